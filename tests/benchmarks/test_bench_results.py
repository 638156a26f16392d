"""The cases that are measured and the file of results."""

import json
import os
import re
from pathlib import Path

import pytest

from benchmarks.timing import cases, results
from benchmarks.timing.cases import Case, Unknown, chosen, named_set

pytestmark = pytest.mark.same_everywhere

CASE = Case("LSTM", 5, 3, 4, 6, dtype="float32")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", cases.SETS)
def test_sets(name, device):
    found = named_set(name, device)
    assert found and len({case.id for case in found}) == len(set(found)) == len(found)
    for case in found:
        assert Case(**json.loads(json.dumps(case.as_dict()))) == case


def test_sets_hold_what_they_say():
    best = named_set("cudnn-best", "cuda")
    assert {case.H for case in best} == set(range(256, 1025, 128)) and {case.B for case in best} <= set(range(8, 129, 8))
    assert {(case.cell, case.dtype, case.layers, case.directions, case.packed) for case in best} == {
        ("LSTM", "float16", 1, 1, False)
    }
    standard = named_set("cudnn-standard", "cuda")
    for reason in (
        lambda case: case.cell == "GRU" and case.H > 192,
        lambda case: case.dtype == "bfloat16",
        lambda case: case.tf32,
        lambda case: case.layers > 1,
        lambda case: case.directions == 2,
        lambda case: case.packed,
        lambda case: case.H % 2,
    ):
        assert any(map(reason, standard))
    assert all(case.H <= 128 for case in named_set("small", "cuda"))
    assert all(1536 <= case.H <= 4096 for case in named_set("large", "cuda"))
    assert {case.T for case in named_set("long", "cuda")} == {10**4, 10**5, 10**6}
    real = Path(cases.__file__).with_name("sets.txt").read_text().partition("[real]")[2].partition("\n\n")[0]
    assert all(re.search("  # .+: .+", line) for line in real.strip().splitlines()), "each says where it comes from"


def test_chosen():
    """Each case once, under the first set that has it; patterns choose by id."""
    everything = chosen(["quick", "quick"], "cpu")
    assert [case for _, case in everything] == named_set("quick", "cpu") and {name for name, _ in everything} == {"quick"}
    found = chosen(["quick"], "cpu", ["LSTM-T1-*", "*-packed"])
    assert [case.id for _, case in found] == [
        "LSTM-T1-B1-I8-H8-float32-inference",
        "LSTM-T1-B1-I8-H8-float32-training",
        "LSTM-T32-B8-I64-H64-float32-training-packed",
    ]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: chosen(["quik"], "cpu"), "unknown set 'quik'; there are: cudnn-best, cudnn-standard, small"),
        (lambda: chosen(["quick"], "cpu", ["LSTM-T2"]), "unknown case 'LSTM-T2'; there are: LSTM-T1-B1-I8-H8-float32-inf"),
        (lambda: Case("lstm", 1, 1, 1, 1), "unknown cell 'lstm'; there are: LSTM, GRU, RNN"),
        (lambda: Case("LSTM", 1, 1, 1, 1, mode="train"), "unknown mode 'train'; there are: inference, forward, backw"),
    ],
)
def test_unknown_names(call, words):
    with pytest.raises(Unknown) as caught:
        call()
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("wrong", [{"T": 0}, {"B": 1.5}, {"layers": -1}, {"dtype": "half"}])
def test_impossible_cases(wrong):
    with pytest.raises(ValueError, match=r"positive integer|unknown dtype 'half'; there are: float16, bfloat16, float32, tf32"):
        Case(**CASE.as_dict() | wrong)


def test_lengths():
    case = Case("LSTM", 64, 8, 1, 1, packed=True)
    assert case.lengths == sorted(case.lengths, reverse=True) and case.lengths[0] == 64 and case.lengths[-1] == 16
    assert Case("LSTM", 1, 2, 1, 1, packed=True).lengths == [1, 1] and CASE.lengths == [5, 5, 5]


def document(**changes) -> dict:
    row = results.new_row(CASE, "quick", "torch.nn", "error", note="it broke")
    return {"schema": 2, "environment": {}, "settings": {}, "ceilings": None, "rows": [row]} | changes


def test_round_trip(tmp_path):
    path = tmp_path / "folder" / "out.json"
    results.save(document(), path)
    assert results.load(path) == document()
    assert results.key(results.load(path)["rows"][0]) == (CASE, "torch.nn")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ('{"schema": 2, "rows": [', "is damaged: Expecting value at line 1"),
        ("[1, 2]", "holds no benchmark results: it has no schema version"),
        ('{"schema": 1}', "has schema version 1, and this program reads version 2"),
        ('{"schema": 2}', "is damaged: 'environment' is missing"),
        (json.dumps(document(rows={})), "is damaged: rows should be a list"),
        (json.dumps(document(rows=[{"case": {}}])), "is damaged: "),
        (json.dumps(document(rows=[document()["rows"][0] | {"status": "fine"}])), "is damaged: a row has status 'fine'"),
        (json.dumps(document(rows=[document()["rows"][0] | {"timings": [{}]}])), "is damaged: 'how' is missing"),
        (json.dumps(document(rows=[document()["rows"][0] | {"kernels": ["gemm"]}])), "is damaged: string indices"),
        (b"\xff\xfe\x00", "holds no results: it is not text"),
    ],
)
def test_bad_files(text, words, tmp_path):
    """One line that names the file and what is wrong with it."""
    path = tmp_path / "out.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(results.BadResults) as caught:
        results.load(path)
    assert str(caught.value).startswith(f"{path} {words}") and "\n" not in str(caught.value)


def test_a_failed_save_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    results.save(document(), path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        results.save(document(settings={"more": 1}), path)
    assert results.load(path) == document() and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(ValueError):
        results.save(document(settings={"more": float("nan")}), path)
    assert results.load(path) == document()
