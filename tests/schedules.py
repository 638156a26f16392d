"""The persistent kernels under many random schedules, on a CPU: the same bits every time, within the numerics contract.

    make schedules
    python tests/schedules.py [--schedules 200] [--cells LSTM GRU RNN] [--dtypes float32 float16 bfloat16] [--parts 1 2]
                              [--kinds layer directions]

Each schedule runs a whole layer forward and, in each design of backward, backward, in one direction or both: a grid of 16 or 32
programs that wait for each other every time (see side_by_side.py).
Exit code 1 if a schedule gave other bits or an error is larger than `rnnfast.numerics` allows. A hang ends in an exception.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported

import torch
from support import quick_interpreter
from support.side_by_side import together
from triton.runtime import interpreter

import rnnfast
from rnnfast import check, numerics
from rnnfast.choice import kernel_plan
from rnnfast.kernels.persistent.plan import GPUS, PersistentPlan

CELLS = ("LSTM", "GRU", "RNN")
DTYPES = ("float32", "float16", "bfloat16")
PARTS = (1, 2)  # the two designs of backward
KINDS = ("layer", "directions")  # in one direction, and in both as a group
T, B, I, H = 3, 11, 5, 64  # two batch tiles, the second with masked rows


def small_plan(gates: int, backward: bool, parts: int) -> PersistentPlan:
    """8 units a program, so that a small layer makes 8 programs a batch tile. Backward sums in two parts of a program, or
    `parts` programs; in chunks as few as can be."""
    split = 2 if backward and parts == 1 else 1
    columns = (gates if backward else 1) * H // (split * parts if backward else 1)
    return PersistentPlan(8, 8, min(64, columns & -columns), split, H, 4, 64, 1 << 20, PARTS=parts if backward else 1)


@dataclass(frozen=True)
class Outcome:
    """Of some schedules of one cell and dtype."""

    case: str
    digests: frozenset[str]  # of all outputs and gradients: one, if all schedules gave the same bits
    grids: tuple[tuple[int, int, int], ...]  # of the persistent kernels that a schedule launches
    schedules: int
    switches: int
    late_words: int
    worst: check.Result

    @property
    def ok(self) -> bool:
        return len(self.digests) == 1 and self.worst.ok

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.case,
            self.digests | other.digests,
            self.grids,
            self.schedules + other.schedules,
            self.switches + other.switches,
            self.late_words + other.late_words,
            max(self.worst, other.worst, key=lambda result: result.share),
        )

    def __str__(self) -> str:
        grids = ", ".join(f"{x} x {y}" + f" x {z}" * (z > 1) for x, y, z in self.grids)
        bits = "the same bits" if len(self.digests) == 1 else f"{len(self.digests)} DIFFERENT RESULTS"
        worst = f"{self.worst.tensor} {self.worst.ours:.1e} of {self.worst.allowed:.1e}{'' if self.worst.ok else ' TOO LARGE'}"
        return (
            f"{self.case:24} grids {grids}  {self.schedules:4} schedules: {bits}; {self.switches:7} switches, "
            f"{self.late_words:8} words seen late; largest error {worst}"
        )


def forward(layer: torch.nn.Module, x: torch.Tensor, states: tuple) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The inputs, parameters among them, and the outputs."""
    inputs = {"input": x.clone().requires_grad_()}
    inputs |= {name: state.clone().requires_grad_() for name, state in zip(("h_0", "c_0"), states, strict=False)}
    x, *states = inputs.values()
    y, last = layer(x, tuple(states) if len(states) > 1 else states[0])
    outputs = {"output": y, **dict(zip(("h_n", "c_n"), last if isinstance(last, tuple) else (last,), strict=False))}
    return inputs | dict(layer.named_parameters()), outputs


def backward(inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], upstream: list) -> dict[str, torch.Tensor]:
    """The gradients of everything; may be asked for again."""
    upstream = [gradient.to(outputs["output"].dtype) for gradient in upstream]
    found = torch.autograd.grad(list(outputs.values()), list(inputs.values()), upstream, retain_graph=True)
    return {f"grad of {name}": gradient for name, gradient in zip(inputs, found, strict=True)}


def run(cell: str, dtype: str, parts: Sequence[int], seeds: range, kind: str = "layer") -> Outcome:
    """A layer under the schedules `seeds`, backward with each number of `parts` that a sum has, against the reference."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = check.Case(cell, T, B, I, H, getattr(torch, dtype))
    exact = getattr(rnnfast, cell)(I, H, backend="reference", bidirectional=kind == "directions").to(case.dtype).double()
    ours = getattr(rnnfast, cell)(I, H, backend="triton", dtype=case.dtype, bidirectional=kind == "directions")
    theirs = getattr(torch.nn, cell)(I, H, dtype=case.dtype, bidirectional=kind == "directions")
    for layer in (ours, theirs):
        layer.load_state_dict(exact.state_dict())
    x = torch.randn(T, B, I).to(case.dtype)
    directions = KINDS.index(kind) + 1
    states = tuple(torch.randn(directions, B, H).to(case.dtype) for _ in range(2 if cell == "LSTM" else 1))
    upstream = [torch.randn(shape).to(case.dtype) for shape in [(T, B, directions * H), *(state.shape for state in states)]]

    def both(layer, *given):
        inputs, outputs = forward(layer, *given)
        return outputs | backward(inputs, outputs, upstream)

    double = x.double(), tuple(state.double() for state in states)
    contract = numerics.Contract(lambda: both(exact, *double), both(theirs, x, states), case.dtype)
    outcome = None
    for seed in seeds:
        with (
            kernel_plan.pretend_gpu(GPUS["H100"]),
            mock.patch.dict(os.environ, RNNFAST_KERNELS="persistent"),
            mock.patch("rnnfast.kernels.persistent.plan.persistent_plan") as plan,
            together(seed) as happened,
        ):
            plan.side_effect = lambda *sizes, **_: small_plan(sizes[0], sizes[5], 1)
            inputs, outputs = forward(ours, x, states)
            found = list(outputs.items())
            for count in parts:
                plan.side_effect = lambda *sizes, count=count, **_: small_plan(sizes[0], sizes[5], count)
                found += backward(inputs, outputs, upstream).items()
        digest = hashlib.sha256(b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for _, tensor in found))
        results = [check.Result.of(case, numerics.worst(contract.figures(name, tensor))) for name, tensor in found]
        one = Outcome(
            f"{cell} {dtype}" + f" {kind}" * (kind != "layer"),
            frozenset([digest.hexdigest()]),
            tuple(grid for name, grid in happened.grids if name.startswith("persistent")),
            1,
            happened.switches,
            happened.late_words,
            max(results, key=lambda result: result.share),
        )
        outcome = one if outcome is None else outcome + one
    assert outcome is not None, "no seeds"
    return outcome


def prepare() -> None:
    """A process of this program, as tests/conftest.py prepares pytest's; integer overflow is looked for there."""
    quick_interpreter.install()
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    torch.backends.cudnn.rnn.fp32_precision = "ieee"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/schedules.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--schedules", type=int, default=200, help="of each cell and dtype")
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--parts", nargs="+", type=int, default=PARTS, choices=(1, 2, 4), help="programs to a sum of backward")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="in one direction, or both")
    args = parser.parse_args(argv)
    cases = list(itertools.product(args.cells, args.dtypes, args.kinds))
    at_once, failed = 25, 0  # schedules a task
    print(f"T={T}, B={B}, I={I}, H={H}, forward and backward, in Triton's interpreter")
    with ProcessPoolExecutor(os.cpu_count(), initializer=prepare) as pool:
        tasks = {
            case: [
                pool.submit(run, *case[:2], args.parts, range(begin, min(begin + at_once, args.schedules)), case[2])
                for begin in range(0, args.schedules, at_once)
            ]
            for case in cases
        }
        for case in cases:
            first, *others = (task.result() for task in tasks[case])
            outcome = sum(others, start=first)
            failed += not outcome.ok
            print(outcome, flush=True)
    print(f"{failed} failed" if failed else "every schedule gave the same bits, within the numerics contract")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
