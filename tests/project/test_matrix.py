"""`make matrix`: each stack in an environment of its own, and a table of what came out."""

import subprocess
from pathlib import Path

import matrix
import pytest

pytestmark = pytest.mark.same_everywhere


@pytest.fixture
def commands(monkeypatch):
    """The commands, one line each, that would have run. pytest fails on the oldest stack and passes on the others."""
    found = []

    def run(command, **options):
        line = " ".join(map(str, command))
        found.append(line)
        if " -m venv " in line:
            Path(command[-1]).mkdir(parents=True)
        passed = "oldest" not in line
        printed = f"stack: torch 2.9, triton 3.6.0; AVX2\n== {1 - passed} failed, {7 + passed} passed in 2s ==\n"
        return subprocess.CompletedProcess(command, int("-m pytest" in line and not passed), printed, "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(matrix, "find_python", lambda version: f"/opt/{version}" if version in ("3.10", "3.12") else None)
    return found


def test_table(commands, tmp_path, capsys):
    """Every stack has a row; one that failed makes the command fail."""
    assert matrix.main(["--venvs", str(tmp_path), "-k", "gru"]) == 1
    oldest, gpu, default, newest = capsys.readouterr().out.strip().splitlines()[-4:]
    assert oldest.startswith("oldest ") and oldest.endswith("torch 2.9, triton 3.6.0  1 failed, 7 passed in 2s")
    assert gpu.endswith("0 failed, 8 passed in 2s")
    (usual,) = (stack for stack in matrix.STACKS if stack.name == "default")
    assert ", ".join(usual.torch) in default and newest.endswith("there is no such Python on this machine")
    assert [line for line in commands if line.endswith("-m pytest -n 2 --dist worksteal -k gru")]


def test_environment(commands, tmp_path):
    """Triton comes last, over the one that PyTorch brings; an environment that is there is taken as it is."""
    for _ in range(2):
        assert matrix.main(["--stacks", "gpu", "--venvs", str(tmp_path)]) == 0
    installed = [line.partition("--disable-pip-version-check ")[2] for line in commands if "pip install" in line]
    assert installed == [
        "torch==2.11.0 numpy<2.4", "--editable .[test] torch==2.11.0 numpy<2.4", "--no-deps triton==3.6.0",
    ]  # fmt: skip
    assert [" -m venv " in line for line in commands].count(True) == 1
    assert sum("-m pytest" in line for line in commands) == 2


def test_not_installed(monkeypatch, commands, tmp_path, capsys):
    """A stack that does not install has a row that says so, and the others go on."""

    def build(stack, folder):
        if stack.name == "oldest":
            raise subprocess.CalledProcessError(1, "pip")
        return folder

    monkeypatch.setattr(matrix, "build", build)
    assert matrix.main(["--stacks", "oldest", "gpu", "--venvs", str(tmp_path)]) == 1
    oldest, gpu = capsys.readouterr().out.strip().splitlines()[-2:]
    assert "not installed: " in oldest and gpu.endswith("8 passed in 2s")
