"""The small examples on the kernels, without falling back, at tiny sizes: on a GPU, or in the interpreter."""

import re

import pytest
from support.programs import load, run


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    monkeypatch.setenv("RNNFAST_BACKEND", "triton")
    monkeypatch.setenv("RNNFAST_STRICT", "1")


def test_pronounce(device, monkeypatch, capsys, tmp_path):
    words = {f"{a}{b}c"[: 2 + (a < b)]: [(a.upper(), b.upper())] for a in "abcdefgh" for b in "abcde"}
    with load("pronounce") as module:
        monkeypatch.setattr(module, "read_dictionary", lambda: words)
        args = ["--device", device, "--steps", 1, "--size", 7, "--beam", 2, "--out", tmp_path]
        output = run(module, capsys, *args, "abc", "a")
    assert "backend: triton" in output
    assert output.count("phoneme error rate") == 3


def test_unfolded(device, monkeypatch, capsys, tmp_path):
    with load("unfolded") as module:
        for name, value in (("HELD_OUT", 100), ("BATCH", 3), ("LENGTH", 7)):
            monkeypatch.setattr(module, name, value)
        args = ["--device", device, "--steps", 2, "--size", 7, "--sentence", 'Say "(yes)".', "--out", tmp_path]
        output = run(module, capsys, *args)
    assert "backend: triton" in output
    rows = re.findall(r"largest difference (\S+), largest value (\S+)$", output, re.MULTILINE)
    assert len(rows) == 6 and all(float(difference) <= 1e-5 * float(size) for difference, size in rows), output


def test_recall(device, monkeypatch, capsys, tmp_path):
    """Resets by hand, a step a call, and `resets=` over the chunk are the same on the kernels too."""
    with load("recall") as module:
        monkeypatch.setattr(module, "CHUNK", 5)
        output = run(module, capsys, "--device", device, "--steps", 1, "--size", 8, "--corridors", 3, "--out", tmp_path)
    assert "backend: triton" in output
    differences = re.findall(r"chunks in one call: (\S+)", output)
    assert len(differences) == 3 and all(float(difference) < 1e-5 for difference in differences)


def test_new_cell(device, monkeypatch, capsys, tmp_path):
    with load("new_cell") as module:
        for name, value in (("HEARD", 3), ("SILENT", 2), ("BATCH", 2)):
            monkeypatch.setattr(module, name, value)
        output = run(module, capsys, "--device", device, "--steps", 1, "--size", 7, "--out", tmp_path)
    assert output.count("backend: triton") == 2 and output.count("it was not trained on: 0.") == 2
