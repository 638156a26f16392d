"""Measures what rnnfast's layers cost on CPU tensors in addition to torch.nn's layers, which run the call.

    python -m benchmarks.cpu_overhead [--seconds 3] [--json FILE]

1. The cost of rnnfast's ``forward`` itself. torch.nn's ``forward`` is replaced by a function that does nothing. This cost does
   not depend on the sizes.
2. Whole calls, which alternate with torch.nn's: the ratio of the two fastest calls, and the median of the ratios of calls that
   follow one another. The median includes the noise of the machine.

The exit code is 1 if the cost is above 2 % of torch.nn's fastest call or above 10 us.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import torch

import rnnfast
from benchmarks.timing import measure
from benchmarks.timing.cases import Case
from benchmarks.timing.problem import Problem, of_module
from rnnfast.choice.decide import tensor_obstacles

CELLS = ("LSTM", "GRU", "RNN")
SIZES = ((1, 1, 8), (1, 1, 128), (16, 4, 32), (32, 8, 128), (64, 16, 256), (128, 32, 512))  # (T, B, H)
MOST_PART, MOST_MICROSECONDS = 0.02, 10.0
TOLERANCES = {"call_ratio": 0.3}  # how much `figures` may differ between runs and machines


def compare(case: Case, seconds: float) -> dict:
    """A row of the table: rnnfast with its default backend beside torch.nn, on the same weights and input."""
    problem = Problem(case, "cpu")
    modules = [problem.module(getattr(library, case.cell)) for library in (rnnfast, torch.nn)]
    watches = [measure.stopwatch(problem.call(of_module(module)), "cpu") for module in modules]
    for watch in watches:
        measure.warm_up(watch, 0.05)
    ours, theirs = measure.alternate(watches, seconds, least=20, most=10**6)
    row = {"case": case.as_dict(), "calls": len(ours), "torch_nn_us": min(theirs)}
    row |= {"min_ratio": min(ours) / min(theirs), "min_extra_us": min(ours) - min(theirs)}
    return row | {"median_ratio": measure.ratio_of(ours, theirs)["p50"]}


def own_cost(cell: str, calls: int = 1000, rounds: int = 20) -> tuple[float, float]:
    """Microseconds of a call of rnnfast's layer and of torch.nn's, the fastest of `rounds`, while torch.nn's ``forward`` does
    nothing. The difference is the time that rnnfast's ``forward`` adds to every call."""
    theirs, layer = getattr(torch.nn, cell)(8, 8), getattr(rnnfast, cell)(8, 8)
    x = torch.zeros(1, 1, 8)
    layer(x)  # the first call looks for Triton and a device

    def repeated(module: torch.nn.Module) -> measure.Call:
        return measure.Call(lambda _: [module(x) for _ in range(calls)])

    with mock.patch.object(type(theirs), "forward", lambda self, input, hx=None: None):
        watches = [measure.stopwatch(repeated(module), "cpu") for module in (layer, theirs)]
        times = measure.alternate(watches, 0, least=rounds, most=rounds)
    own, base = (min(one) / calls for one in times)
    return own, base


def figures() -> dict[str, dict[str, float]]:
    """For the regression gate: the quotient of the two times of `own_cost`, for each cell."""
    return {cell: {"call_ratio": ours / theirs} for cell in CELLS for ours, theirs in [own_cost(cell)]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_overhead", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of timing for a case; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch; default 1, which is the least noisy")
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if not tensor_obstacles(torch.empty(0)):
        print("TRITON_INTERPRET is set: CPU tensors would go to the interpreter", file=sys.stderr)
        return 2
    added = {}
    for cell in args.cells:
        ours, theirs = own_cost(cell)
        added[cell] = ours - theirs
        print(f"{cell}: rnnfast's forward itself adds {added[cell]:.2f} us to a call")
    print(f"\n{'case':45} {'calls':>7} {'torch.nn us':>12} {'extra us':>9} {'ratio':>7} {'median ratio':>13}")
    rows = []
    for cell, (T, B, H), mode in itertools.product(args.cells, SIZES, ("inference", "training")):
        row = compare(Case(cell, T, B, H, H, dtype="float32", mode=mode), args.seconds)
        rows.append(row)
        figures = f"{row['min_extra_us']:9.2f} {row['min_ratio']:7.3f} {row['median_ratio']:13.3f}"
        print(f"{Case(**row['case']).id:45} {row['calls']:7} {row['torch_nn_us']:12.1f} {figures}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"added_us": added, "rows": rows}, indent=1) + "\n")
    slow = 0
    for cell in args.cells:
        fastest = min(row["torch_nn_us"] for row in rows if row["case"]["cell"] == cell)
        print(f"{cell}: {added[cell]:.2f} us are {added[cell] / fastest:.1%} of torch.nn's fastest call")
        slow += added[cell] > min(MOST_PART * fastest, MOST_MICROSECONDS)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
