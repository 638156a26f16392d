"""The canary: whether each family of kernels computes right results on this GPU, and comes to an end.

    python -m rnnfast.commands.canary INDEX FAMILY...

is the process in which `rnnfast.choice.trust` has it run. It prints JSON lines: ``{"family": name}`` before a family is
touched, ``{"family": name, "fault": words}`` after, with no words if nothing was wrong. A family that has no plan for any of
the layers is passed over.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch

from rnnfast import check, numerics
from rnnfast.check import Case
from rnnfast.choice import kernel_plan
from rnnfast.choice.decide import decide
from rnnfast.choice.kernel_plan import Choice
from rnnfast.choice.pipeline import grouping
from rnnfast.settings import CANARY, KERNELS

__all__ = ["CASES", "examine", "main"]

# A layer that fits one program; one of many programs, with a batch that fills no tile; float32. Then groups, for whose members
# kernels are compiled anew: both directions of a layer, and a stack with so many steps that a pipeline is the fastest.
CASES = (
    Case("LSTM", 40, 8, 64, 64, torch.float16),
    Case("GRU", 24, 20, 96, 256, torch.bfloat16),
    Case("LSTM", 24, 8, 64, 96, torch.float32),
    Case("GRU", 24, 8, 64, 64, torch.float16, bidirectional=True),
    Case("LSTM", 128, 8, 64, 96, torch.float16, layers=2),
)
STREAMS = 3


def examine(family: str, device: str) -> Iterator[str]:
    """What is wrong with each of `CASES` that the family has plans for, in words; empty where nothing is."""
    with KERNELS.within(family):
        for case in CASES:
            if _runs(family, case, device):
                yield _fault(case, device)


def _runs(family: str, case: Case, device: str) -> bool:
    """Whether the family has plans for the case, forward and backward."""
    return all(choice.family == family for choice in _choices(case, device))


def _choices(case: Case, device: str) -> list[Choice]:
    """What runs the case, forward and backward."""
    sizes = case.cell.lower(), case.T, case.B, case.H, case.dtype, kernel_plan.precision()
    group = grouping(case.layers, 2 if case.bidirectional else 1)
    where = True, torch.device(device), False, group.members, group.layers
    return [kernel_plan.pick(*sizes, backward, *where) for backward in (False, True)]


def _fault(case: Case, device: str) -> str:
    """What is wrong with the case alone, or on several streams at once, by the numerics contract; empty if nothing is."""
    from rnnfast import nn

    contract, alone = check.contract_of(case, device)
    problem = check.Problem(case, device)
    layer = problem.module(nn, backend="triton")
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream() for _ in range(STREAMS)]:
        with torch.cuda.stream(stream):
            results.append(problem.run(layer))
    torch.cuda.synchronize()
    for result, where in ((alone, ""), *[(result, f" with {STREAMS} streams at once") for result in results]):
        worst = numerics.worst(contract.judge(result))
        if not worst.ok:
            return f"{case}{where}: {numerics.words(worst)}"
    return ""


def main(argv: list[str] | None = None) -> int:
    index, *families = sys.argv[1:] if argv is None else argv
    torch.cuda.set_device(int(index))
    with CANARY.within("trust"):  # what has no verdict yet gets one here
        obstacles = decide("triton", "cuda", int(index), torch.float16).obstacles
    if obstacles:  # PyTorch's own layer would be checked
        sys.exit("; ".join(obstacles))
    for family in families:
        print(json.dumps({"family": family}), flush=True)
        faults = list(examine(family, f"cuda:{index}"))
        if faults:
            print(json.dumps({"family": family, "fault": next(filter(None, faults), "")}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
