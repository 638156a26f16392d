"""Runs all tests with each Python, PyTorch and Triton that we support, and prints a table: `make matrix`.

Each stack gets a virtual environment of its own below `build/matrix`, which stays there for the next time. A stack whose
Python is not on this machine is skipped, and the table says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stack:
    """`triton`: what to install over the Triton that `torch` brings, if anything; pip calls the pair incompatible."""

    name: str
    python: str
    torch: tuple[str, ...]
    triton: tuple[str, ...] = ()


STACKS = (
    # The oldest of everything. PyTorch 2.9 brings Triton 3.5, which is too old for the kernels.
    Stack("oldest", "3.10", ("torch==2.9.1", "numpy<2.4"), ("triton==3.6.0",)),
    # What a GPU machine had when this was written. The interpreter of Triton 3.6 needs numpy<2.4.
    Stack("gpu", "3.12", ("torch==2.11.0", "numpy<2.4"), ("triton==3.6.0",)),
    Stack("default", "3.11", ("torch==2.13.0", "numpy"), ("triton==3.9.0",)),
    Stack("newest", "3.13", ("torch", "numpy")),
)


def find_python(version: str) -> str | None:
    """The interpreter of that version: on PATH, or where pyenv keeps it."""
    found = shutil.which(f"python{version}")
    # A shim of pyenv is there for every version and runs only the chosen one.
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
        return found
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    return next((str(path) for path in sorted(versions.glob(f"{version}.*/bin/python"))), None)


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], cwd=ROOT, **options)


def build(stack: Stack, folder: Path) -> Path:
    """The Python of an environment with the stack in it. A `.done` file says that the installation came to its end."""
    python, done = folder / "bin" / "python", folder / ".done"
    wanted = "\n".join((stack.python, *stack.torch, *stack.triton))
    if done.is_file() and done.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(find_python(stack.python), "-m", "venv", folder, check=True)
    # With torch and numpy named again, pip changes neither for what the tests need.
    run(*pip, *stack.torch, check=True)
    run(*pip, "--editable", ".[test]", *stack.torch, check=True)
    if stack.triton:
        run(*pip, "--no-deps", *stack.triton, check=True)
    done.write_text(wanted)
    return python


def test(python: Path, arguments: list[str]) -> tuple[str, str, bool]:
    """The versions that the tests ran with, pytest's closing line, and whether all passed."""
    done = run(python, "-m", "pytest", "-n", "2", "--dist", "worksteal", *arguments, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    found = re.search(r"^stack: (.*?);", done.stdout, re.MULTILINE)
    closing = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    return found[1] if found else "", closing, done.returncode == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/matrix.py", description=__doc__.partition("\n")[0])
    names = [stack.name for stack in STACKS]
    parser.add_argument("--stacks", nargs="+", choices=names, default=names)
    parser.add_argument("--venvs", type=Path, default=ROOT / "build" / "matrix", help="where the environments are kept")
    options, for_pytest = parser.parse_known_args(arguments)
    rows, failed = [], False
    for stack in STACKS:
        if stack.name not in options.stacks:
            continue
        if find_python(stack.python) is None:
            rows.append((stack.name, stack.python, ", ".join(stack.torch), "there is no such Python on this machine"))
            continue
        print(f"{stack.name}: Python {stack.python}, {', '.join((*stack.torch, *stack.triton))}", flush=True)
        try:
            python = build(stack, options.venvs / stack.name)
        except subprocess.CalledProcessError as error:
            rows.append((stack.name, stack.python, ", ".join(stack.torch), f"not installed: {error}"))
            failed = True
            continue
        versions, closing, passed = test(python, for_pytest)
        failed |= not passed
        rows.append((stack.name, stack.python, versions, closing))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return failed


if __name__ == "__main__":
    sys.exit(main())
