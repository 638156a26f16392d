"""The experimenter's tools: finding a cell, `rnnfast.inspect`, and the check of its gradients."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnnfast
from benchmarks.static import __main__ as static
from rnnfast import cells, check, check_cells, inspect, numerics
from rnnfast.cells import builtin, loading
from rnnfast.derive import cache, registry
from rnnfast.kernels.families import FAMILIES

SOURCE = """
import torch, rnnfast

@rnnfast.cell(gates="f z", states="h c")
def mine(x, h, s, *, w, slope: float = 2.0):
    f = torch.sigmoid(x.f + h.f)
    c = f * s.c + (1 - f) * torch.tanh(x.z + w * h.z)
    return torch.tanh(slope * c), c

@rnnfast.cell(gates="a")
def summed(x, h, s):
    return torch.tanh(x.a + h.a) / s.h.sum()

number = 3
"""
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cells.md").read_text(encoding="utf-8")
CASES = list(itertools.product(check_cells.DTYPES, (False, True)))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cells_of_mine.py"
    path.write_text(SOURCE)
    return path


def small(name: str, position: int) -> check_cells.CellCase:
    """A case of a cell, another of families, dtypes and marks for the next."""
    cell = getattr(cells, name)
    able = check_cells.families(cell, [family for family, own in FAMILIES.items() if not own.waits])
    return check_cells.CellCase(cell, able[position % len(able)], *CASES[position % len(CASES)], T=3, B=2)


@pytest.mark.numerical
@pytest.mark.parametrize("name", sorted(set(cells.__all__) - set(builtin.__all__)))
def test_library(name):
    """Each cell on one family, in one dtype: outputs and all gradients. `make cells` has them all."""
    case = small(name, cells.__all__.index(name))
    assert not check_cells.obstacle(case, "cpu")
    assert not numerics.words(numerics.worst(check_cells.compare(case)))


@pytest.mark.sweep
@pytest.mark.numerical
@pytest.mark.parametrize("name", cells.__all__)
def test_library_everywhere(name, capsys):
    among = [family for family, own in FAMILIES.items() if not own.waits]
    assert check_cells.table([getattr(cells, name)], "cpu", among) == 0, capsys.readouterr().out


def test_finds_a_broken_gradient(file, monkeypatch, capsys):
    """A derived backward that leaves out a factor is found, by the name of what it is the gradient of."""
    intact = cache.load

    def broken(name, source):
        found = source.replace("1.0 - f", "1.01 - f")
        assert found != source
        return intact(f"{name}_broken", found)

    monkeypatch.setattr(cache, "load", broken)
    monkeypatch.setattr(check_cells, "DTYPES", (torch.float32,))
    assert check.main(["--device", "cpu", "--cell", f"{file}:mine"]) == 1
    out = capsys.readouterr().out
    assert "allowed" in out and "beyond the limit" in out and "every error" not in out


def test_unfusable_and_unknown(file, capsys):
    assert check.main(["--device", "cpu", "--cell", f"{file}:summed"]) == 1
    assert "row_mean" in capsys.readouterr().out
    assert check.main(["--device", "cpu", "--cell", "nothing"]) == 2
    found = capsys.readouterr()
    assert found.err.startswith("no cell 'nothing' in rnnfast.cells, which has cfc, ") and found.err.count("\n") == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("{}:other", "'other' in {} does not exist; its cells: mine, summed"),
        ("{}:number", "'number' in {} is int, no cell"),
        ("no_file.py:mine", "no file 'no_file.py'"),
        ("no_package.at_all:mine", "no module 'no_package.at_all'"),
        (":mine", "a cell is my_file.py:my_cell"),
        ("mine", "no cell 'mine' in rnnfast.cells"),
    ],
)
def test_no_such_cell(text, words, file, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # where the command compiles
    text, words = text.format(file), words.format(file)
    with pytest.raises(loading.NoCell) as error:
        loading.load(text)
    assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(SystemExit):
        static.main(["--cell", text])
    assert f"argument --cell: {error.value.args[0]}" in capsys.readouterr().err


def test_loads(file, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (file.parent / "beside_mine.py").touch()
    file.write_text("import beside_mine\n" + SOURCE)
    assert loading.load("rnnfast.cells.gated:mgu") is cells.mgu is loading.load("mgu")
    assert loading.load(f"{file}:mine").gates == ("f", "z")
    assert [cell.name for cell in loading.load_all("library")] == cells.__all__


def test_static_names_the_other_option(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        static.main(["--cells", "mgu"])
    assert "another cell is --cell my_file.py:mgu" in capsys.readouterr().err


@pytest.mark.sweep
def test_static(file):
    """In a process that compiles: a cell of the scan kernels, from a file."""
    file.write_text(SOURCE.replace('states="h c")', 'states="h c", recurrent=False)').replace("x, h, s, *, w", "x, s, *, w"))
    file.write_text(file.read_text().replace(" + h.f", "").replace("w * h.z", "w"))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    sizes = ["--hidden", "32", "--batch", "2", "--jobs", "1"]
    command = [sys.executable, "-m", "benchmarks.static", "--cell", f"{file}:mine", *sizes]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sm_90 (H100, 132 SMs), mine float16" in done.stdout and "3 rows, 3 kernels" in done.stdout
    assert "scan backward" in done.stdout and done.stdout.rstrip().endswith("variants: 0 rows")


@pytest.mark.parametrize("name", cells.__all__)
def test_inspects(name):
    """What it says agrees with what the kernels are told."""
    cell = getattr(cells, name)
    found, kernel = inspect(cell), registry.kernel_cell(registry.fused(cell))
    assert not found.refusal and str(found).count("in Triton") == 2
    assert len([tile for tile in found.saved if not tile.float32]) == kernel.saved
    assert all(tile.needed_for for tile in found.saved)
    assert len(found.apart) == kernel.apart and found.direct == kernel.direct and found.rows == kernel.rows
    able = [family for family, own in FAMILIES.items() if not own.refusal(kernel.recurrent, kernel.rows)]
    assert sorted(found.families) == sorted(able)
    assert found.bytes(torch.float16) == 2 * kernel.saved + 4 * kernel.carried
    families = ", ".join(found.families).replace("_", "-")
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |") and line.endswith(f"| {families} |")]
    assert row.split(" | ")[2:4] == [str(kernel.gates), " ".join(cell.states)]
    assert row.split(" | ")[5] == str(found.bytes(torch.float16)), row


def test_inspection_in_words(file):
    found = inspect(cells.gru)
    assert [(tile.name, tile.by_keep, tile.needed_for) for tile in found.saved][3] == ("h.n", True, ("h.r",))
    assert found.apart == ("n",) and found.bytes(torch.float16) == 8 and found.bytes(torch.float32) == 16
    mine = inspect(loading.load(f"{file}:mine"), slope=0.5)
    text = str(mine)
    for words in ("slope = 0.5", "w (uniform in +-1 / sqrt(H))", "c          4      bytes  a state", "c = f * s.c"):
        assert words in text, text
    refused = inspect(loading.load(f"{file}:summed"))
    assert "row_mean" in refused.refusal and refused.saved == () and "not fused" in str(refused)
    with pytest.raises(TypeError, match=r"got: function"):
        inspect(lambda x, h, s: x.a)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no number 'slop'"):
        inspect(cells.mgu, slop=1)
    assert isinstance(found, rnnfast.Inspection)
