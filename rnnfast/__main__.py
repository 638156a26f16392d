"""The command ``rnnfast``, also as ``python -m rnnfast``: docs/command-line.md."""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path

__all__ = ["main"]

COMMANDS = ("doctor", "check", "tune", "bench")
USAGE = """usage: rnnfast COMMAND [OPTIONS]

  doctor   what of rnnfast works on this machine, as a block to paste into a bug report
  check    the kernels on this machine against float64, beside torch.nn's error
  tune     measure what is fastest for your layers on this GPU, and remember it
  bench    time rnnfast beside torch.nn and others; from a checkout of the sources

rnnfast COMMAND --help lists the options. rnnfast --version prints the version."""
NO_BENCHMARKS = (
    "the benchmarks come with the sources and not with the installed package: clone the repository of rnnfast, and run "
    "`python -m benchmarks` in it"
)


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns its exit status: 2 for one that does not exist."""
    command, *options = (sys.argv[1:] if argv is None else argv) or [""]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        from rnnfast.version import __version__

        print(f"rnnfast {__version__}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        meant = f": did you mean `rnnfast {near[0]}`?" if near else ""
        print(f"rnnfast has no command {command!r}{meant}\n\n{USAGE}" if command else USAGE, file=sys.stderr)
        return 2
    if command == "doctor":  # which tells of wrong values itself
        from rnnfast.commands import doctor

        return doctor.main(options)
    from rnnfast.settings import check_environment

    try:
        check_environment()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if command == "tune":
        from rnnfast.commands.tune import main as run
    elif command == "check":
        from rnnfast.check import main as run
    else:
        run = _bench
    return run(options)


def _bench(options: list[str]) -> int:
    """Become ``python -m benchmarks`` of the checkout that this rnnfast is in. Another package may have the name benchmarks."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "timing" / "cases.py").is_file():
        print(NO_BENCHMARKS, file=sys.stderr)
        return 2
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks", *options]
    os.execve(sys.executable, command, os.environ | {"PYTHONPATH": path})


if __name__ == "__main__":
    sys.exit(main())
