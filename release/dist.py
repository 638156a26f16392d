"""Builds and checks what a package index would get: ``make dist``, or ``python -m release.dist``.

1. ``python -m build`` makes the sdist in dist/, and the wheel from it.
2. ``twine check --strict`` reads their metadata and long descriptions.
3. The wheel holds every module of rnnfast/ and kernels/ as a plain file, and py.typed.
4. pyright checks a program of a user's, in a new environment with the wheel, and in one with an editable install.

Needs the extra ``release``, and an index to fetch the build backend from.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from release import hub

__all__ = ["PROGRAM", "main"]

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """\
import rnnfast
import torch

layer = rnnfast.LSTM(8, 16)
output, (h_n, c_n) = layer(torch.zeros(5, 2, 8))
reveal_type(layer)
reveal_type(layer.hidden_size)
reveal_type(rnnfast.functional.lstm)
"""
TYPES = {
    "layer": "LSTM",
    "layer.hidden_size": "int",
    "rnnfast.functional.lstm": "(x: Tensor, hx: ",
}


def run(*command: object, cwd: Path = ROOT, must: bool = True) -> str:
    """What a command prints. It sees no checkout by PYTHONPATH.

    Raises:
        SystemExit: it failed, and `must` is true.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    if must and done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}failed: {' '.join(map(str, command))}")
    return done.stdout


def distributions(out: Path) -> tuple[Path, Path]:
    """Build the sdist and the wheel, and have twine check both."""
    for old in out.glob("rnnfast-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    print(run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", sdist, wheel), end="")
    return sdist, wheel


def check_files(wheel: Path) -> int:
    """The number of files of the package in the wheel, which are those of the sources.

    Raises:
        SystemExit: they are not.
    """
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if name.startswith("rnnfast/")}
    wanted = {f"rnnfast/{path}": content for path, content in hub.sources(ROOT).items()}
    if held != wanted:
        raise SystemExit(f"{wheel.name} differs from the sources in {sorted(held.items() ^ wanted.items())[0][0]}")
    return len(held)


def types(install: list[object]) -> list[str]:
    """What pyright says of `PROGRAM` in a new environment, after ``pip install`` of this.

    Raises:
        SystemExit: an error, or another type than one of `TYPES`.
    """
    with tempfile.TemporaryDirectory() as folder:
        home, user = Path(folder, "environment"), Path(folder, "user.py")
        venv.create(home, symlinks=True)
        python = home / "bin" / "python"
        site = next(home.glob("lib/python*/site-packages"))
        torch = importlib.util.find_spec("torch")
        assert torch is not None and torch.origin is not None
        (site / "torch.pth").write_text(f"{Path(torch.origin).parents[1]}\n")  # but no packages that are installed as a path
        user.write_text(PROGRAM)
        if install:
            run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", *install)
        pyright = (sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", python, user)
        told = json.loads(run(*pyright, cwd=home, must=False))
    said = [each["message"] for each in told["generalDiagnostics"]]
    if not install:
        return said
    for name, kind in TYPES.items():
        if not any(words.startswith(f'Type of "{name}" is "{kind}') for words in said):
            raise SystemExit(f"pyright does not see that {name} is {kind}: {said}")
    if told["summary"]["errorCount"]:
        raise SystemExit(f"pyright: {said}")
    return said


def main() -> int:
    sdist, wheel = distributions(ROOT / "dist")
    print(f"{wheel.name}: {check_files(wheel)} files, the same as in the sources")
    if not any('"rnnfast" could not be resolved' in words for words in types([])):
        raise SystemExit("pyright finds rnnfast in an environment without it, so its check says nothing")
    for name, install in (("the wheel", [wheel]), ("an editable install", ["--editable", ROOT])):
        print(f"pyright after {name}: no errors")
        print(*(f"  {words if len(words) < 80 else f'{words[:80]}...'}" for words in types(install)), sep="\n")
    print(f"dist/{sdist.name} and dist/{wheel.name} are built and checked")
    return 0


if __name__ == "__main__":
    sys.exit(main())
