"""Checks the kernels derived from a cell against the equations that it is written in, for ``python -m rnnfast.check --cell``.

For each family of kernels and each dtype it compares outputs, last states and the gradients of everything with the same
computation in float64, without and with lengths and resets, in a layer with two directions; and the second derivatives once.
The limits are those of `rnnfast.numerics`, with the equations in plain PyTorch, in the dtype, in the place of torch.nn.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rnnfast import numerics
from rnnfast.cells.loading import NoCell, load_all
from rnnfast.choice import kernel_plan
from rnnfast.derive.definition import Cell
from rnnfast.derive.registry import CannotFuse, fused
from rnnfast.nn.layer import Layer
from rnnfast.reference import spec_of
from rnnfast.settings import KERNELS

__all__ = ["DTYPES", "CellCase", "compare", "families", "main", "obstacle", "table"]

DTYPES = torch.float32, torch.float16, torch.bfloat16
Around = Callable[["CellCase"], AbstractContextManager]


@dataclass(frozen=True)
class CellCase:
    """A layer of a cell with two directions, on one family of kernels.

    Attributes:
        cell: the cell, with its own numbers.
        family: a name in `rnnfast.kernels.families.FAMILIES`.
        dtype: of the input and the weights.
        marked: with lengths, of which one is 0, and resets.
        second: the second derivatives, in place of outputs and gradients.
        T, B, I, H: steps, batch rows, input features, hidden units.
    """

    cell: Cell
    family: str
    dtype: torch.dtype
    marked: bool = False
    second: bool = False
    T: int = 5
    B: int = 6
    I: int = 4
    H: int = 18


class _Problem:
    """A case in numbers that its dtype has, from a generator of its own. The states at the beginning and after a reset are some
    that the cell comes to."""

    def __init__(self, case: CellCase, device: str) -> None:
        self.case, self.device = case, device
        draw = torch.Generator(device).manual_seed(0)

        def uniform(*shape: int, bound: float = 1.0) -> Tensor:
            return torch.rand(*shape, device=device, generator=draw).mul_(2).sub_(1).mul_(bound)

        T, B, I, H = case.T, case.B, case.I, case.H
        layer = self._layer(torch.float32, "reference")
        found = {"x": torch.randn(T, B, I, device=device, generator=draw)}
        for name, parameter in layer.named_parameters():
            found[name] = parameter.detach() * 0 + uniform(*parameter.shape, bound=2 * H**-0.5)
            learned = case.cell.learned.get(name.rpartition("_l")[0])
            if learned is not None and learned.init is not None:
                found[name] += learned.init
        found |= {name: 1 + uniform(B, H, bound=0.5) for name in case.cell.rows}
        self.rounded = {name: tensor.to(case.dtype) for name, tensor in found.items()}
        for which in ("start", "reset to") if case.marked else ("start",):
            early = self.rounded | {"x": torch.randn(3, B, I, device=device, generator=draw)}
            _, last = self._call(layer.float(), {name: tensor.float() for name, tensor in early.items()}, {})
            for name, state in zip(case.cell.states, last, strict=True):
                self.rounded[f"{which} {name}"] = state.detach().to(case.dtype)
        self.options = {}
        if case.marked:
            lengths = torch.arange(B, device=device) * 7 % (T + 1)
            resets = torch.rand(T, B, device=device, generator=draw) < 0.2
            self.options = {"lengths": lengths, "resets": resets}

    def _layer(self, dtype: torch.dtype, backend: str) -> Layer:
        case = self.case
        return Layer(case.cell, case.I, case.H, bidirectional=True, device=self.device, dtype=dtype, backend=backend)

    def _call(self, layer: Layer, tensors: dict[str, Tensor], options: dict) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output and the last states. The noise is the same each time."""
        case = self.case

        def states(which: str):
            found = tuple(tensors[f"{which} {name}"] for name in case.cell.states if f"{which} {name}" in tensors)
            return found if len(found) > 1 else found[0] if found else None

        given = options | {name: tensors[name] for name in case.cell.rows}
        if (reset_to := states("reset to")) is not None:
            given["reset_to"] = reset_to
        weights = {name: tensors[name] for name, _ in layer.named_parameters()}
        devices = [self.device] if self.device != "cpu" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(3)
            y, last = torch.func.functional_call(layer, weights, (tensors["x"], states("start")), given)
        return y, last if isinstance(last, tuple) else (last,)

    def run(self, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        """Outputs and gradients under upstream gradients that are the same each time, or the second derivatives."""
        tensors = {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in self.rounded.items()}
        y, last = self._call(self._layer(dtype, backend), tensors, self.options)
        outputs = dict(zip(("output", *(f"last {name}" for name in self.case.cell.states)), (y, *last), strict=True))
        draw = torch.Generator(self.device).manual_seed(1)

        def weigh(tensor: Tensor) -> Tensor:
            return torch.randn(tensor.shape, device=self.device, generator=draw).to(self.case.dtype).to(dtype)

        leaves = list(tensors.values())
        if self.case.second:
            loss = torch.stack([(out.square() * weigh(out)).sum() for out in outputs.values()]).sum()
            first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True, allow_unused=True)
            loss = torch.stack([(grad * weigh(grad)).sum() for grad in first]).sum()
            grads = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
            return {f"second derivative by {name}": grad for name, grad in zip(tensors, grads, strict=True)}
        pairs = [(out, weigh(out)) for out in outputs.values()]
        with_gradient, upstream = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)  # a cell may detach
        grads = torch.autograd.grad(with_gradient, leaves, upstream, materialize_grads=True, allow_unused=True)
        return outputs | {f"gradient of {name}": grad for name, grad in zip(tensors, grads, strict=True)}


@functools.lru_cache(maxsize=16)
def _prepared(case: CellCase, device: str) -> tuple[_Problem, numerics.Contract]:
    """Of a case whatever its family."""
    problem = _Problem(case, device)
    theirs = problem.run(case.dtype, "reference")
    steps = numerics.samples_for(2 * case.T)
    return problem, numerics.Contract(lambda: problem.run(torch.float64, "reference"), theirs, case.dtype, False, steps)


def obstacle(case: CellCase, device: str) -> str:
    """Why the family has no plan for the case, in words; empty if it runs it."""
    name, where = fused(case.cell), torch.empty(0, device=device).device
    with KERNELS.within(case.family):
        for backward in (False, True):
            choice = kernel_plan.pick(
                name, case.T, case.B, case.H, case.dtype, "ieee", backward, True, where, case.marked, members=2,
            )  # fmt: skip
            if choice.family != case.family:
                return choice.reason or f"the {choice.family} kernels run it"
    return ""


def compare(case: CellCase, device: str = "cpu") -> list[numerics.Verdict]:
    """Of each tensor the figure that is nearest to its limit. Products of float32 are not to be in TF32.

    Raises:
        CannotFuse: the kernels cannot run the cell.
    """
    with KERNELS.within(case.family):
        problem, contract = _prepared(replace(case, family=""), device)
        return contract.judge(problem.run(case.dtype, "triton"))


def families(cell: Cell, among: Iterable[str]) -> list[str]:
    """The families of kernels that run the cell, of those `among` which it is asked.

    Raises:
        CannotFuse: no family does.
    """
    from rnnfast.kernels.families import FAMILIES

    spec = spec_of(fused(cell))
    return [name for name in among if not FAMILIES[name].refusal(spec.recurrent, spec.rows)]


def table(cells: Iterable[Cell], device: str, among: Sequence[str], around: Around = lambda case: nullcontext()) -> int:
    """Check the cells and print a line for each family as it is done.

    Args:
        cells: to check.
        device: "cpu" or "cuda".
        among: families to check it on.
        around: a context in which a case runs.

    Returns:
        How many figures are beyond their limit, and cells that cannot be fused.
    """
    title = f"{'cell':18} {'family':12}" + "".join(f" {str(dtype).removeprefix('torch.'):>9} marked" for dtype in DTYPES)
    print(f"{title} second  nearest to its limit", flush=True)
    failed = 0
    for cell in cells:
        try:
            names = families(cell, among)
        except CannotFuse as error:
            print(f"{cell.name:18} {error}", flush=True)
            failed += 1
            continue
        for position, family in enumerate(names):
            line, wrong = _line(cell, family, device, around, second=not position)
            failed += wrong
            print(line, flush=True)
    return failed


def _line(cell: Cell, family: str, device: str, around: Around, second: bool) -> tuple[str, int]:
    cases = [CellCase(cell, family, dtype, marked) for dtype in DTYPES for marked in (False, True)]
    text, worst, failed = f"{cell.name:18} {family:12}", None, 0
    for case in [*cases, *([CellCase(cell, family, torch.float32, True, True)] if second else [])]:
        with around(case):
            if words := obstacle(case, device):
                return f"{text} no plan: {words}", failed
            try:
                found = numerics.worst(compare(case, device))
            except NotImplementedError:
                if not case.second:
                    raise
                text += "   none"  # PyTorch has no second derivative of an operator
                continue
        failed += not found.ok
        text += f" {found.share:{9 if not case.marked else 6}.2f}"
        worst = found if worst is None or found.share > worst.share else worst
    assert worst is not None
    return f"{text}{'' if second else '       '}  {numerics.words(worst) or f'{worst.tensor} ({worst.figure})'}", failed


def main(texts: list[str], device: str) -> int:
    """Check the cells that these texts stand for (`rnnfast.cells.loading`). The exit code."""
    try:
        cells = [cell for text in texts for cell in load_all(text)]
    except NoCell as error:
        print(error.args[0], file=sys.stderr)
        return 2
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU, interpreted"
    print(f"Cells on {where}. A number is the largest part of its limit that an error takes (docs/numerics.md)")
    from rnnfast.kernels.families import FAMILIES

    # Triton's interpreter runs the programs of a grid one after another
    failed = table(cells, device, [name for name, family in FAMILIES.items() if device != "cpu" or not family.waits])
    if device == "cpu":
        print("not here: the persistent kernels, whose programs wait for one another (in a checkout: make cells)")
    print(f"{failed} beyond the limit or not fused" if failed else "every error is within the contract")
    return 1 if failed else 0
