"""What rnnfast's layers cost on CPU tensors above torch.nn's own, which they hand the call to.

    python -m benchmarks.cpu_overhead [--seconds 3] [--json FILE]

Calls of the two alternate, one by one. The ratio of the fastest calls says what the code costs; the median of the ratios of
neighbours says what a user sees, noise of the machine included. Exit code 1 if a cost is above both limits: 2% and 10 us.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

import rnnfast
from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.problem import Problem, of_module
from rnnfast import backends

__all__ = ["compare", "main"]

SIZES = ((1, 1, 8), (1, 1, 128), (16, 4, 32), (32, 8, 128), (64, 16, 256), (128, 32, 512))  # (T, B, H)
MOST_RATIO, MOST_MICROSECONDS = 1.02, 10.0


def compare(case: Case, seconds: float) -> dict:
    """rnnfast's default against torch.nn, both on the same weights and input."""
    problem = Problem(case, "cpu")
    kinds = (getattr(rnnfast, case.cell), getattr(torch.nn, case.cell))
    watches = [measure.stopwatch(problem.call(of_module(problem.module(kind))), "cpu") for kind in kinds]
    for watch in watches:
        measure.warm_up(watch, 0.05)
    ours, theirs = measure.alternate(watches, seconds, least=20, most=10**6)
    return {
        "case": case.as_dict(),
        "calls": len(ours),
        "min_ratio": min(ours) / min(theirs),
        "min_extra_us": min(ours) - min(theirs),
        "median_ratio": statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True)),
        "torch_nn_us": min(theirs),
    }


def own_cost(kind: str, calls: int = 20000, rounds: int = 15) -> float:
    """Microseconds that rnnfast's ``forward`` itself adds to a call: with torch.nn's replaced by one that does nothing."""
    plain, layer = getattr(torch.nn, kind)(8, 8), getattr(rnnfast, kind)(8, 8)
    x = torch.zeros(1, 1, 8)
    layer(x)  # what is to be known of Triton and the device is found by the first call
    theirs = type(plain).forward
    type(plain).forward = lambda self, input, hx=None: None
    try:
        times = measure.alternate(
            [
                measure.stopwatch(measure.Call(lambda _, f=f: [f(x) for _ in range(calls // rounds)]), "cpu")
                for f in (layer, plain)
            ],
            seconds=0,
            least=rounds,
            most=rounds,
        )
    finally:
        type(plain).forward = theirs
    return (min(times[0]) - min(times[1])) / (calls // rounds)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_overhead", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing a case; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; default 1, which is the least noisy")
    parser.add_argument("--cells", nargs="+", default=["LSTM", "GRU", "RNN"], choices=("LSTM", "GRU", "RNN"))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if not backends.tensor_obstacles(torch.empty(0)):
        print("TRITON_INTERPRET is set: CPU tensors would go to the interpreter", file=sys.stderr)
        return 2
    for cell in args.cells:
        print(f"{cell}: rnnfast's forward itself adds {own_cost(cell):.2f} us to a call")
    print(f"\n{'case':45} {'calls':>7} {'torch.nn us':>12} {'extra us':>9} {'ratio':>7} {'median ratio':>13}")
    rows = []
    for cell in args.cells:
        for T, B, H in SIZES:
            for mode in ("inference", "training"):
                row = compare(Case(cell, T, B, H, H, dtype="float32", mode=mode), args.seconds)
                rows.append(row)
                figures = f"{row['min_extra_us']:9.2f} {row['min_ratio']:7.3f} {row['median_ratio']:13.3f}"
                print(f"{Case(**row['case']).id:45} {row['calls']:7} {row['torch_nn_us']:12.1f} {figures}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    slow = [row for row in rows if row["min_ratio"] > MOST_RATIO and row["min_extra_us"] > MOST_MICROSECONDS]
    for row in slow:
        print(f"too slow: {Case(**row['case']).id}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
