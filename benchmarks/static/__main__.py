"""Makes a table of every kernel without a GPU: compiles it for absent GPUs, counts its machine code, and predicts its time.

    python -m benchmarks.static [--arch 80 90 100] [--json FILE] [--summary FILE] [--jobs N] [--fresh]
                                [--family step] [--cells lstm gru] [--dtypes float16 tf32] [--hidden 128 768] [--batch 1 16]
                                [--marked] [--members 6] [--both-directions]
    python -m benchmarks.static --cell my_file.py:my_cell [--arch 90] [--hidden 768] [--batch 16] [...]
    python -m benchmarks.static --show-terms LSTM 768 16

For each shape the table has the persistent kernels. If they have no plan, it says why and has the step kernels. Without
--cells, --dtypes, --hidden and --batch it is the standard table. --marked compiles the kernels for lengths and resets.
--members compiles them for the layers of a stack as one group, --both-directions for both directions of a layer. A predicted
step is then one of all members.

--cell compiles the kernels of a cell that is not one of torch.nn's, on every family that runs it: my_file.py:my_cell,
my_package.my_module:my_cell, the name of one in rnnfast.cells, or library for all of those. It is the LSTM's size in float16
with H = 768 and B = 16 for an H100 unless other options say otherwise.
With --arch gfx942, gfx950 or gfx1100 it compiles the step, one-program and scan kernels for these AMD GPUs and counts them.
Nothing is predicted there.
docs/static.md says what the columns and the keys of the JSON mean.

No GPU has measured any of it.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import triton

from benchmarks.static import amd, text
from benchmarks.static.offline import GPU_OF_ARCH
from benchmarks.static.table import BATCH, CELLS, HIDDEN, SCHEMA, STANDARD, build, jobs_of, of_cells
from benchmarks.timing.cases import DTYPES
from rnnfast.cells.loading import NoCell
from rnnfast.choice import kernel_plan
from rnnfast.derive.registry import CannotFuse
from rnnfast.kernels.persistent.limits import AMD_GPUS


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description="Compiles, counts and predicts.")
    parser.add_argument(
        "--arch", type=lambda text: int(text) if text.isdecimal() else text, nargs="+", choices=[*GPU_OF_ARCH, *AMD_GPUS],
        help="default: 80 90 100, with --cell 90",
    )  # fmt: skip
    parser.add_argument("--family", choices=kernel_plan.FAMILIES, help="step: the step kernels everywhere")
    cells = parser.add_mutually_exclusive_group()
    cells.add_argument("--cells", nargs="+", metavar="CELL", help=f"of torch.nn: {', '.join(CELLS)}")
    cells.add_argument(
        "--cell", nargs="+", metavar="CELL", help="others: my_file.py:my_cell, a name in rnnfast.cells, or library"
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES))
    parser.add_argument("--hidden", type=_positive, nargs="+")
    parser.add_argument("--batch", type=_positive, nargs="+")
    parser.add_argument("--marked", action="store_true", help="the kernels for lengths and resets")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--members", type=_positive, default=1, help="layers of a stack in one launch")
    group.add_argument("--both-directions", action="store_true", help="both directions of a layer in one launch")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--summary", metavar="FILE", help="also put the table in short into this page, docs/static.md")
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--fresh", action="store_true", help="compile everything anew, to time it: Triton's cache is not used")
    parser.add_argument(
        "--show-terms", nargs=3, metavar=("CELL", "H", "B"), help="only the predicted step of one shape, by term"
    )
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    for name in args.cells or ():
        if name not in CELLS:
            parser.error(f"argument --cells: no {name!r} among {', '.join(CELLS)}; another cell is --cell my_file.py:{name}")
    archs = args.arch or ([90] if args.cell else [80, 90, 100])
    on_amd = any(isinstance(arch, str) for arch in archs)
    if on_amd and not all(isinstance(arch, str) for arch in archs):
        parser.error("argument --arch: GPUs of AMD or of NVIDIA, whose tables have other columns")
    if on_amd and "tf32" in (args.dtypes or ()):
        parser.error("argument --dtypes: on AMD GPUs the kernels do not use TF32")
    if on_amd and args.show_terms:
        parser.error("argument --show-terms: nothing is predicted for AMD GPUs")
    chosen = args.cells, args.dtypes, args.hidden, args.batch
    if args.show_terms:
        cell, *sizes = args.show_terms
        try:
            chosen = (cell.lower(),), args.dtypes, *((_positive(size),) for size in sizes)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --show-terms: {error}")
        if cell.lower() not in CELLS:
            parser.error(f"argument --show-terms: no cell {cell!r}: choose from {', '.join(CELLS)}")
    heading = f"### {'AMD GPUs, ' if on_amd else ''}Triton {triton.__version__}"
    for file in filter(None, (args.json, args.summary)):  # now, and not after minutes of compiling
        try:
            if file == args.json:
                open(file, "a").close()
            else:
                text.put(Path(file).read_text(), heading, [])
        except (OSError, ValueError) as error:
            parser.error(f"{file}: {error}")
    table = amd.STANDARD if on_amd else STANDARD
    if args.family or any(chosen):
        defaults = ("lstm",), ("float16",), HIDDEN, BATCH
        table = [
            (
                args.family or ("step" if on_amd else "persistent"),
                *(axis or default for axis, default in zip(chosen, defaults, strict=True)),
            )
        ]
    if args.cell:
        try:
            table = of_cells(args.cell, args.family, args.dtypes, args.hidden, args.batch)
        except (NoCell, CannotFuse) as error:
            parser.error(f"argument --cell: {error}")
    print(f"triton {triton.__version__}, torch {torch.__version__}. Counted and predicted: no GPU has measured any of this.\n")
    members, directions = (2, 2) if args.both_directions else (args.members, 1)
    rows = build(jobs_of(table, archs, args.marked, members, directions), args.jobs, args.fresh)
    print("\n".join(text.show_terms(rows) if args.show_terms else text.show(rows)))
    if args.json:
        report = {"schema": SCHEMA, "triton": triton.__version__, "torch": torch.__version__, "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1))
    if args.summary:
        page = Path(args.summary)
        command = " ".join(["python -m benchmarks.static", *(sys.argv[1:] if argv is None else argv)])
        page.write_text(text.put(page.read_text(), heading, (text.amd_summary if on_amd else text.summary)(rows, command)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
