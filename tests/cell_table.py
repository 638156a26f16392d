"""Every cell of the library on every family of kernels, on a CPU: a table of the largest part of its limit that an error takes.

    make cells
    python tests/cell_table.py [--cells slstm mgu my_file.py:my_cell] [--families step persistent]

It is `python -m rnnfast.check --cell library` with the persistent kernels too: their programs, small ones, run side by side in
a random order (support/side_by_side.py). Exit code 1 if an error is larger than `rnnfast.numerics` allows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported

import torch
from support import quick_interpreter
from support.recurrence import tiles
from support.side_by_side import together

from rnnfast import check_cells
from rnnfast.cells.loading import NoCell, load_all
from rnnfast.choice import kernel_plan
from rnnfast.kernels.families import FAMILIES
from rnnfast.kernels.persistent.limits import GPUS

HELPERS = ("clear_kernel", "pack_kernel")


@contextmanager
def side_by_side(case: check_cells.CellCase) -> Iterator[None]:
    """A case on the persistent kernels has many small programs, whose order a seed gives; any other case runs as it is."""
    if not FAMILIES[case.family].waits:
        yield
        return
    own = FAMILIES[case.family]
    small = replace(own, plan=lambda gates, B, H, *sizes: tiles(H))
    with kernel_plan.pretend_gpu(GPUS["H100"]), mock.patch.dict(FAMILIES, {case.family: small}), together(7) as happened:
        yield
    assert all(case.family in kernel or kernel in HELPERS for kernel, _ in happened.grids), happened.grids


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/cell_table.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", nargs="+", default=["library"], metavar="CELL")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    args = parser.parse_args(argv)
    try:
        cells = [cell for text in args.cells for cell in load_all(text)]
    except NoCell as error:
        parser.error(error.args[0])
    quick_interpreter.install()
    torch.set_num_threads(1)
    failed = check_cells.table(cells, "cpu", args.families, side_by_side)
    print(f"{failed} beyond the limit or not fused" if failed else "every error is within the contract")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
