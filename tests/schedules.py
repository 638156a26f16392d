"""The persistent kernels under many random schedules, on a CPU: the same bits every time, within the numerics contract.

    make schedules
    python tests/schedules.py [--schedules 200] [--cells LSTM GRU RNN] [--dtypes float32 float16 bfloat16]

Each schedule runs a whole layer forward and backward, two grids of 16 programs that wait for each other (see side_by_side.py).
Exit code 1 if a schedule gave other bits or an error is larger than `rnnfast.check.allowed`; a hang ends it with an exception.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported

import quick_interpreter
import torch
from side_by_side import together
from triton.runtime import interpreter

import rnnfast
from rnnfast import check, families
from rnnfast.kernels.persistent.plan import GPUS, PersistentPlan

CELLS = ("LSTM", "GRU", "RNN")
DTYPES = ("float32", "float16", "bfloat16")
T, B, I, H = 3, 11, 5, 64  # two batch tiles, the second with masked rows


def small_plan(gates, B, H, itemsize, precision, backward, limits, marked=False) -> PersistentPlan:
    """Instead of a GPU's: 8 units a program, so that a small layer makes 8 programs a batch tile."""
    return PersistentPlan(8, 8, 32 if backward else 64, 2 if backward else 1, H, 4, 1 << 16, 1 << 20)


@dataclass(frozen=True)
class Outcome:
    """Of some schedules of one cell and dtype."""

    case: str
    digests: frozenset[str]  # of all outputs and gradients: one, if all schedules gave the same bits
    grids: frozenset[tuple[int, int, int]]  # of the persistent kernels
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
            self.grids | other.grids,
            self.schedules + other.schedules,
            self.switches + other.switches,
            self.late_words + other.late_words,
            max(self.worst, other.worst, key=share),
        )

    def __str__(self) -> str:
        grids = ", ".join(f"{x} x {y}" for x, y, _ in sorted(self.grids))
        bits = "the same bits" if len(self.digests) == 1 else f"{len(self.digests)} DIFFERENT RESULTS"
        worst = f"{self.worst.tensor} {self.worst.ours:.1e} of {self.worst.allowed:.1e}{'' if self.worst.ok else ' TOO LARGE'}"
        return (
            f"{self.case:14} grids {grids}  {self.schedules:4} schedules: {bits}; {self.switches:7} switches, "
            f"{self.late_words:8} words seen late; largest error {worst}"
        )


def share(result: check.Result) -> float:
    return result.ours / result.allowed


def tensors(layer: torch.nn.Module, x: torch.Tensor, states: tuple, upstream: list) -> dict[str, torch.Tensor]:
    """The outputs and the gradients of everything."""
    inputs = {"input": x.clone().requires_grad_()}
    inputs |= {name: state.clone().requires_grad_() for name, state in zip(("h_0", "c_0"), states, strict=False)}
    x, *states = inputs.values()
    y, last = layer(x, tuple(states) if len(states) > 1 else states[0])
    outputs = {"output": y, **dict(zip(("h_n", "c_n"), last if isinstance(last, tuple) else (last,), strict=False))}
    inputs |= dict(layer.named_parameters())
    gradients = torch.autograd.grad(list(outputs.values()), list(inputs.values()), [g.to(y.dtype) for g in upstream])
    return outputs | {f"grad of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}


def run(cell: str, dtype: str, seeds: range) -> Outcome:
    """A layer under the schedules `seeds`, and the error of the first against the float64 reference."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = check.Case(cell, T, B, I, H, getattr(torch, dtype))
    exact = getattr(rnnfast, cell)(I, H, backend="reference").to(case.dtype).double()
    ours = getattr(rnnfast, cell)(I, H, backend="triton", dtype=case.dtype)
    theirs = getattr(torch.nn, cell)(I, H, dtype=case.dtype)
    for layer in (ours, theirs):
        layer.load_state_dict(exact.state_dict())
    x = torch.randn(T, B, I).to(case.dtype)
    states = tuple(torch.randn(1, B, H).to(case.dtype) for _ in range(2 if cell == "LSTM" else 1))
    upstream = [torch.randn(shape).to(case.dtype) for shape in [(T, B, H), *(state.shape for state in states)]]
    right = tensors(exact, x.double(), tuple(state.double() for state in states), upstream)
    torchs = tensors(theirs, x, states, upstream)
    outcome = None
    for seed in seeds:
        with (
            families.assume(GPUS["H100"]),
            mock.patch.dict(os.environ, RNNFAST_KERNELS="persistent"),
            mock.patch("rnnfast.kernels.persistent.plan.persistent_plan", small_plan),
            together(seed) as happened,
        ):
            mine = tensors(ours, x, states, upstream)
        digest = hashlib.sha256(b"".join(bytes(t.contiguous().view(torch.uint8).untyped_storage()) for t in mine.values()))
        errors = {name: (check.error(mine[name], value), check.error(torchs[name], value)) for name, value in right.items()}
        results = [
            check.Result(case, name, our, their, check.allowed(their, right[name], case.dtype))
            for name, (our, their) in errors.items()
        ]
        one = Outcome(
            f"{cell} {dtype}",
            frozenset([digest.hexdigest()]),
            frozenset(grid for name, grid in happened.grids if name.startswith("persistent")),
            1,
            happened.switches,
            happened.late_words,
            max(results, key=share),
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
    args = parser.parse_args(argv)
    cases = list(itertools.product(args.cells, args.dtypes))
    at_once, failed = 10, 0  # schedules a task
    print(f"a layer of T={T}, B={B}, I={I}, H={H}, forward and backward, in Triton's interpreter")
    with ProcessPoolExecutor(os.cpu_count(), initializer=prepare) as pool:
        tasks = {
            case: [
                pool.submit(run, *case, range(begin, min(begin + at_once, args.schedules)))
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
