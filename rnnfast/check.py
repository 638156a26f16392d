"""Checks the Triton kernels on this machine against the float64 reference, beside torch.nn's own error.

    python -m rnnfast.check [--device cpu|cuda] [--cell CELL ...]

On a GPU it runs the compiled kernels. On a CPU it runs small cases in Triton's interpreter. The exit code is 0 if every tensor
meets the contract of `rnnfast.numerics`, 1 if one does not, and 2 if the kernels cannot run here.

With --cell it checks cells in place of torch.nn's layers: my_file.py:my_cell, my_package.my_module:my_cell, the name of one in
`rnnfast.cells`, or library for all of those. `rnnfast.check_cells` says what is checked.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rnnfast import numerics
from rnnfast.choice.decide import tensor_obstacles, use_backend
from rnnfast.settings import CANARY

__all__ = ["Case", "Result", "compare", "fault", "forget", "main", "products_in_tf32"]


@dataclass(frozen=True)
class Case:
    """A layer and its input. `states`: hx is given. `scale`: standard deviation of the input."""

    cell: str  # "LSTM", "GRU" or "RNN"
    T: int
    B: int
    I: int
    H: int
    dtype: torch.dtype
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    bias: bool = True
    nonlinearity: str = "tanh"
    states: bool = True
    scale: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        cell = self.cell if self.nonlinearity == "tanh" else f"{self.cell} {self.nonlinearity}"
        extras = [
            f"{self.layers} layers" if self.layers > 1 else "",
            "2 directions" if self.bidirectional else "",
            "batch first" if self.batch_first else "",
            "" if self.bias else "no bias",
            "" if self.states else "no hx",
            f"scale {self.scale:g}" if self.scale != 1 else "",
        ]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{cell} T={self.T} B={self.B} I={self.I} H={self.H} {dtype} {' '.join(filter(None, extras))}".rstrip()


@dataclass(frozen=True)
class Result:
    """The errors of one tensor of a case, ours and torch.nn's, and the limit, in the `figure` that is nearest to its limit."""

    case: Case
    tensor: str
    ours: float
    theirs: float
    allowed: float
    figure: str = "rms"

    @classmethod
    def of(cls, case: Case, verdict: numerics.Verdict) -> Result:
        return cls(case, verdict.tensor, verdict.ours, verdict.theirs, verdict.allowed, verdict.figure)

    @property
    def verdict(self) -> numerics.Verdict:
        return numerics.Verdict(self.tensor, self.figure, self.ours, self.theirs, self.allowed)

    @property
    def share(self) -> float:
        return self.verdict.share

    @property
    def ok(self) -> bool:
        return self.verdict.ok


def compare(case: Case, device: str, backend: str | None = "triton", tf32: bool = False, training: bool = True) -> list[Result]:
    """Run a case on `backend` and on torch.nn, both against the reference in float64, and compare every tensor.

    `tf32`: whether both may use TF32 for the products of float32 (which the CPU does not have). `training`: gradients too; else
    the outputs of inference alone.
    """
    with products_in_tf32(tf32):
        return _compare(case, device, backend, tf32 and case.dtype == torch.float32, training)


@contextmanager
def products_in_tf32(tf32: bool) -> Iterator[None]:
    """Let recurrent layers use TF32 for the products of float32, or not, within the ``with`` block.

    The setting is the whole process's. It is left alone where it is right already.
    """
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision  # type: ignore[attr-defined]
    if (before == "tf32") == tf32:
        yield
        return
    rnn.fp32_precision = "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        rnn.fp32_precision = before  # type: ignore[attr-defined]


def _compare(case: Case, device: str, backend: str | None, tf32: bool, training: bool) -> list[Result]:
    contract, mine = contract_of(case, device, backend, tf32, training)
    return [Result.of(case, verdict) for verdict in contract.judge(mine)]


def contract_of(
    case: Case, device: str, backend: str | None = "triton", tf32: bool = False, training: bool = True
) -> tuple[numerics.Contract, dict[str, Tensor]]:
    """The contract of a case, and what `backend` computes."""
    from rnnfast import nn

    problem, contract = _prepared(case, device, tf32, training)
    return contract, problem.run(problem.module(nn, backend=backend), training=training)


def forget() -> None:
    """Free the tensors of the last case, which are kept for the case that it comes again."""
    _prepared.cache_clear()


@lru_cache(maxsize=4)  # the tuner asks for one case again and again, and the canary for a few with each family
def _prepared(case: Case, device: str, tf32: bool, training: bool) -> tuple[Problem, numerics.Contract]:
    problem = Problem(case, device)
    theirs = problem.run(problem.module(torch.nn), training=training)
    steps = case.T * case.layers * (2 if case.bidirectional else 1)
    samples = numerics.samples_for(steps)
    return problem, numerics.Contract(lambda: problem.exactly(training), theirs, case.dtype, tf32, samples)


class Problem:
    """A case made of numbers: weights as torch.nn draws them, input, states and upstream gradients, all exact in its dtype.

    They come from a generator of its own. PyTorch's generators stay as they are.
    """

    def __init__(self, case: Case, device: str) -> None:
        from rnnfast import nn

        draws = torch.Generator(device).manual_seed(case.seed)
        self.case, self.device, self._weights = case, device, None
        self._exact = self.module(nn, torch.float64, backend="reference")
        for weight in self._exact.parameters():
            torch.nn.init.uniform_(weight, -(case.H**-0.5), case.H**-0.5, generator=draws)
        self._exact.to(case.dtype).double()
        self._weights = self._exact.state_dict()
        D = 2 if case.bidirectional else 1
        count = 2 if case.cell == "LSTM" else 1
        lead = (case.B, case.T) if case.batch_first else (case.T, case.B)
        shape = (D * case.layers, case.B, case.H)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=draws)

        self.x = (normal(*lead, case.I) * case.scale).to(case.dtype)
        self.hx = tuple(normal(*shape).to(case.dtype) for _ in range(count if case.states else 0))
        self.upstream = [normal(*lead, D * case.H).to(case.dtype)]
        self.upstream += [normal(*shape).to(case.dtype) for _ in range(count)]

    def module(self, space, dtype: torch.dtype | None = None, **options) -> torch.nn.Module:
        """The layer of `space`, torch.nn or rnnfast.nn, with the weights of this problem."""
        case = self.case
        options |= {"num_layers": case.layers, "bidirectional": case.bidirectional, "batch_first": case.batch_first}
        options |= {"bias": case.bias} | ({"nonlinearity": case.nonlinearity} if case.cell == "RNN" else {})
        layer = getattr(space, case.cell)(case.I, case.H, **options, device="meta", dtype=dtype or case.dtype)
        layer.to_empty(device=self.device)
        if self._weights is not None:
            layer.load_state_dict(self._weights)
        return layer

    def exactly(self, training: bool = True) -> dict[str, Tensor]:
        """The reference in float64."""
        with use_backend("reference"):  # whatever backend the caller has around this
            return self.run(self._exact, torch.float64, training)

    def run(self, layer: torch.nn.Module, dtype: torch.dtype | None = None, training: bool = True) -> dict[str, Tensor]:
        """All outputs and, in training, the gradients of everything, under the given upstream gradients.

        ``forward`` is called as it is, so that hooks that the user has on all modules do not run.
        """
        dtype = dtype or self.case.dtype
        x = self.x.to(dtype, copy=True).requires_grad_(training)
        hx = tuple(state.to(dtype, copy=True).requires_grad_(training) for state in self.hx)
        with torch.set_grad_enabled(training):
            y, last = layer.forward(x, None if not hx else hx if len(hx) == 2 else hx[0])
        last = last if isinstance(last, tuple) else (last,)
        outputs: dict[str, Tensor] = dict(zip(("output", "h_n", "c_n"), (y, *last), strict=False))
        if not training:
            return outputs
        inputs = {"input": x, **dict(zip(("h_0", "c_0"), hx, strict=False)), **dict(layer.named_parameters())}
        grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), [g.to(dtype) for g in self.upstream])
        return outputs | {f"grad of {name}": grad for name, grad in zip(inputs, grads, strict=True)}


def fault(results: list[Result]) -> str:
    """What is wrong with the tensor furthest beyond its limit, in words; empty if nothing is."""
    return numerics.words(numerics.worst([result.verdict for result in results])) if results else ""


def small_cases() -> list[Case]:
    """A few seconds in the interpreter: each cell in each dtype, with two directions and odd sizes."""
    return [
        Case(cell, 4, 3, 5, 18, dtype, layers=2 if dtype == torch.float32 else 1, bidirectional=True)
        for cell in ("LSTM", "GRU", "RNN")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]


def gpu_cases() -> list[Case]:
    """Sizes of real layers, odd sizes and stacks."""
    sizes = ((64, 16, 128, 256, 1), (33, 5, 29, 50, 2), (128, 64, 512, 768, 1), (7, 200, 33, 129, 1))
    return [
        Case(cell, T, B, I, H, dtype, layers=layers, bidirectional=layers > 1)
        for cell in ("LSTM", "GRU", "RNN")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for T, B, I, H, layers in sizes
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rnnfast check", description=(__doc__ or "").split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"))
    parser.add_argument("--cell", nargs="+", metavar="CELL", help="my_file.py:my_cell, a name in rnnfast.cells, or library")
    args = parser.parse_args(argv)
    device = args.device
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible to PyTorch: use --device cpu", file=sys.stderr)
        return 2
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported
    tensor = torch.empty(1, device=device)
    with CANARY.within("trust"):  # what has no verdict yet is given one below
        obstacles = tensor_obstacles(tensor)
    if device == "cuda" and not obstacles:
        from rnnfast.choice import trust

        found = trust.examine(tensor.device, again=True)
        print(f"each family of kernels, in a process of its own: {found}")
        obstacles = tensor_obstacles(tensor)
    if obstacles:
        print(f"the Triton kernels cannot be checked here: {'; '.join(obstacles)}", file=sys.stderr)
        return 2
    if args.cell:
        from rnnfast import check_cells

        with products_in_tf32(False):
            return check_cells.main(args.cell, device)
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU, interpreted"
    print(f"Triton kernels on {where}. Each line has the tensor nearest to its limit, and that figure (docs/numerics.md)")
    print(f"{'case':58} {'tensor':28} {'figure':>8} {'rnnfast':>9} {'torch.nn':>9} {'allowed':>9}")
    failed = 0
    for case in gpu_cases() if device == "cuda" else small_cases():
        results = compare(case, device)
        failed += sum(not result.ok for result in results)
        worst = max(results, key=lambda result: result.share)
        errors = f"{worst.figure:>8} {worst.ours:9.1e} {worst.theirs:9.1e} {worst.allowed:9.1e}"
        print(f"{case!s:58} {worst.tensor:28} {errors}  {'ok' if worst.ok else 'TOO LARGE'}", flush=True)
    print(f"{failed} too large" if failed else "every error is within the contract: twice torch.nn's, and what chance may add")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
