"""What runs where: the automatic choice for some calls on GPUs that are not here, and the predictions that it rests on.

    python -m benchmarks.where [--gpu H100 ...]

Every time is predicted, in microseconds a time step, all layers and directions together (`rnnfast.choice.forecast`). The GPUs
count as never measured, and every family of kernels as found right by the canary.
"""

import argparse
import itertools
import sys

import torch

from rnnfast.choice import kernel_plan, tuned
from rnnfast.choice.gpu import pretend_gpu
from rnnfast.choice.trust import families
from rnnfast.choice.tuning_file import Shape
from rnnfast.kernels.persistent.plan import GPUS
from rnnfast.settings import CANARY

ASSUMED = ("A100", "H100", "RTX 4090")
CALLS = (  # cell, dtype, precision, T, B, I, H, layers, directions
    ("lstm", "float16", "half", 1024, 16, 768, 768, 1, 1),
    ("lstm", "bfloat16", "half", 1024, 16, 768, 768, 1, 1),
    ("gru", "float16", "half", 1024, 16, 768, 768, 1, 1),
    ("lstm", "float16", "half", 1024, 8, 64, 64, 1, 1),
    ("lstm", "float16", "half", 1024, 16, 128, 128, 1, 1),
    ("lstm", "float32", "tf32", 2058, 62, 168, 168, 1, 1),
    ("lstm", "float32", "tf32", 512, 10, 128, 256, 6, 1),
    ("gru", "float32", "tf32", 512, 10, 128, 256, 6, 2),
    ("lstm", "bfloat16", "half", 512, 64, 512, 512, 2, 1),
    ("lstm", "float16", "half", 512, 32, 1024, 1024, 1, 1),
    ("lstm", "bfloat16", "half", 512, 64, 2048, 2048, 1, 1),
    ("lstm", "float16", "half", 8, 4, 256, 256, 1, 1),
)


def cell(shape: Shape, name: str) -> str:
    """What runs a call on the GPU `name`, and what our fastest kernels and cuDNN would take."""
    device, gpu = torch.device("cpu"), GPUS[name]
    with pretend_gpu(gpu), tuned.override_tuning(gpu, []), CANARY.within("trust"):
        predicted = kernel_plan.predict(shape, device, gpu, families())
        runs = "cuDNN" if kernel_plan.torch_wins(shape, device) else " and ".join(dict.fromkeys(predicted.families))
    return f"{runs}: {predicted.kernels:.2f}, {predicted.torch:.2f} {predicted.algorithm}"


def table(names: list[str]) -> str:
    """The whole table, as Markdown: a line a call, a column a GPU."""
    lines = [f"| call | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for call, training in itertools.product(CALLS, (False, True)):
        shape = Shape(*call, training)
        lines.append(f"| {shape} | {' | '.join(cell(shape, name) for name in names)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.where", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpu", nargs="+", default=list(ASSUMED), choices=list(GPUS), help="GPUs to assume")
    print(table(parser.parse_args(argv).gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
