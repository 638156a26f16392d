"""Prints which kernels ran as compiled, how far from the reference, and which planted mistakes were noticed by what.

    python -m tests.ptx [--layers quick|sweep|none] [--mistakes] [--barriers] [--seed N] [--json]

Exit code 1 if a layer is outside of the numerics contract or does what it must not, or a mistake goes unnoticed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings

import torch
import triton

from rnnfast.numerics import words, worst
from tests.ptx import mistakes
from tests.ptx.cases import LAYERS
from tests.ptx.gpu import Ran, simulated_gpu
from tests.ptx.group import GroupOfLayers
from tests.ptx.layer import Layer
from tests.ptx.memory import Fault

KERNELS = (  # whose barriers are left out, one at a time
    (mistakes.PERSISTENT, mistakes.FORWARD),
    (mistakes.PERSISTENT, mistakes.BACKWARD),
    (mistakes.STEP, mistakes.STEP_FORWARD),
    (mistakes.STEP, mistakes.STEP_BACKWARD),
    (mistakes.ONE, mistakes.ONE_FORWARD),
    (mistakes.ONE, mistakes.ONE_BACKWARD),
)


def checked(layer: Layer | GroupOfLayers, seed: int) -> tuple[list[Ran], str, str]:
    """The kernels that ran, the result nearest to its limit in words, and what is wrong, or ""."""
    with simulated_gpu(seed) as simulation:
        try:
            nearest = worst(layer.run())
        except Fault as fault:
            return list(simulation.ran.values()), "", f"{type(fault).__name__}: {fault}"
    shown = f"{nearest.tensor}, {nearest.figure}: {nearest.ours:.1e} of {nearest.allowed:.1e}"
    return list(simulation.ran.values()), shown, words(nearest)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", default="quick", choices=LAYERS)
    parser.add_argument("--mistakes", action="store_true", help="plant each mistake")
    parser.add_argument("--barriers", action="store_true", help="leave out each barrier of six kernels")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which warps run")
    parser.add_argument("--json", action="store_true", help="name -> what is wrong, for the tests")
    args = parser.parse_args(argv)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as the launches say; Triton 3.9 warns without
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    faults: dict[str, str] = {}

    def say(*cells: object) -> None:
        if not args.json:
            print("|", *(f"{cell} |" for cell in cells), flush=True)

    if args.layers != "none":
        say(
            f"layer (Triton {triton.__version__})",
            "kernels: CTAs x warps",
            "instructions",
            "CPU seconds",
            "nearest to its limit",
        )
        say("---", "---", "---:", "---:", "---")
    for layer in LAYERS[args.layers]:
        ran, nearest, wrong = checked(layer, args.seed)
        faults[str(layer)] = wrong
        kernels = ", ".join(f"{kernel.name.removesuffix('_kernel')} {kernel.ctas} x {kernel.warps}" for kernel in ran)
        instructions, seconds = sum(kernel.instructions for kernel in ran), sum(kernel.seconds for kernel in ran)
        say(layer, kernels, instructions, f"{seconds:.1f}", wrong or nearest)
    if args.mistakes:
        say(f"mistake (Triton {triton.__version__})", "kernel", "noticed by", "words")
        say("---", "---", "---", "---")
        for mistake in mistakes.MISTAKES:
            noticed, _ = mistakes.noticed(mistake)
            by, _, rest = noticed.partition(": ")
            faults[mistake.name] = "" if by in mistake.by else f"noticed by {by or 'nothing'}, not {mistake.by}: {rest}"
            say(mistake.name, mistake.kernel, by or "NOTHING", re.split("[:;]", rest)[0])
    if args.barriers:
        say(f"kernel (Triton {triton.__version__})", "barriers", "noticed when left out")
        say("---", "---:", "---:")
        for layer, kernel in KERNELS:
            found = mistakes.barriers(layer, kernel)
            say(kernel, len(found), sum(map(bool, found)))
    if args.json:
        print(json.dumps(faults))
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
