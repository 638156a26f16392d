"""The table of docs/numerics.md: our error over torch.nn's, geometric mean over 10 seeds, in Triton's interpreter.

    python -m benchmarks.numerics [--round-input-side]

With --round-input-side, W_ih x is rounded to the dtype of the tensors, to see what keeping it in float32 is worth.
"""

import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from rnnfast.check import Case, compare
from rnnfast.ops import recurrence

SHOWN = ("output", "grad of input", "grad of weight_hh_l0")


def main(argv: list[str]) -> int:
    if "--round-input-side" in argv:
        project = recurrence.project
        recurrence.project = lambda x, w_ih: project(x, w_ih).to(x.dtype).float()
    print("| | " + " | ".join(SHOWN) + " | largest of all |")
    for cell in ("LSTM", "GRU", "RNN"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            logs: dict[str, list[float]] = {}
            for seed in range(10):
                for result in compare(Case(cell, 4, 3, 5, 18, dtype, seed=seed), "cpu"):
                    logs.setdefault(result.tensor, []).append(math.log(result.ours / result.theirs))
            means = {name: math.exp(sum(values) / len(values)) for name, values in logs.items()}
            shown = " | ".join(f"{means[name]:.2f}" for name in SHOWN)
            print(f"| {cell} {str(dtype).removeprefix('torch.')} | {shown} | {max(means.values()):.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
