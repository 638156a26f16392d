"""Writes the kernels of the cells of torch.nn, from their equations in `rnnfast.cells.builtin`.

python -m rnnfast.derive --write kernels/cells
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rnnfast.cells import builtin
from rnnfast.derive.registry import derived

__all__ = ["files"]


def files() -> dict[str, str]:
    """The names and texts of the files."""
    return {f"{name}.py": derived(getattr(builtin, name)).source for name in builtin.__all__}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rnnfast.derive", description="Writes the kernels of torch.nn's cells.")
    parser.add_argument("--write", type=Path, metavar="FOLDER", required=True, help="the folder, kernels/cells in a checkout")
    folder = parser.parse_args(given).write
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
