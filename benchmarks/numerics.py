"""Computes the figures of docs/numerics.md, in Triton's interpreter.

    python -m benchmarks.numerics [--round-input-side]
    python -m benchmarks.numerics --power [--draws 10000]

Without arguments it prints the ratio of our error to torch.nn's, as a geometric mean over 10 seeds. --round-input-side rounds
W_ih x to the dtype of the tensors, to show what keeping it in float32 gains. --power runs the study in tests/power.py.
"""

import argparse
import itertools
import math
import os
import sys

import torch

from rnnfast import check
from rnnfast.ops.rounds import Sides

SHOWN = ("output", "grad of input", "grad of weight_hh_l0")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def ratios() -> None:
    print("| | " + " | ".join(SHOWN) + " | largest of all |")
    for cell, dtype in itertools.product(("LSTM", "GRU", "RNN"), DTYPES):
        logs: dict[str, list[float]] = {}
        for seed in range(10):
            contract, mine = check.contract_of(check.Case(cell, 4, 3, 5, 18, dtype, seed=seed), "cpu")
            for name, tensor in mine.items():
                error, *_ = contract.figures(name, tensor)  # the root mean square
                logs.setdefault(name, []).append(math.log(error.ours / error.theirs))
        means = {name: math.exp(sum(values) / len(values)) for name, values in logs.items()}
        shown = " | ".join(f"{means[name]:.2f}" for name in SHOWN)
        print(f"| {cell} {str(dtype).removeprefix('torch.')} | {shown} | {max(means.values()):.2f} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--round-input-side", action="store_true", help="round W_ih x to the dtype of the tensors")
    parser.add_argument("--power", action="store_true", help="false alarms of the contract, and the faults that it finds")
    parser.add_argument("--draws", type=int, default=10_000, help="draws of the study, over all sets of instructions")
    args = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    if args.power:
        from tests.power import power

        return power(args.draws)
    if args.round_input_side:
        chunk = Sides.chunk

        def rounded(sides: Sides, starts: list[int], N: int) -> tuple[torch.Tensor, int]:
            x, first = chunk(sides, starts, N)
            return x.to(sides.x.dtype).float(), first

        Sides.chunk = rounded
    ratios()
    return 0


if __name__ == "__main__":
    sys.exit(main())
