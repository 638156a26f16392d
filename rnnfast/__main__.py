"""The command ``rnnfast``, also as ``python -m rnnfast``: ``rnnfast tune`` and ``rnnfast check``."""

from __future__ import annotations

import sys

__all__ = ["main"]

USAGE = """usage: rnnfast COMMAND [OPTIONS]

  tune     measure what is fastest for your layers on this GPU, and remember it
  check    the kernels on this machine against float64, beside torch.nn's error

rnnfast COMMAND --help lists the options."""


def main(argv: list[str] | None = None) -> int:
    command, *options = (sys.argv[1:] if argv is None else argv) or [""]
    if command == "tune":
        from rnnfast.commands.tune import main as run
    elif command == "check":
        from rnnfast.check import main as run
    else:
        asked = command in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
