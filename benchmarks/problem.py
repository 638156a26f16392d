"""A `Case` made of tensors: weights, input and upstream gradients; the right answers to it, and what a provider is to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.measure import Call
from rnnfast.numerics import Contract, samples_for, worst

__all__ = ["Problem", "Ready", "of_module", "tf32"]

Sequence = Tensor | PackedSequence
REFERENCE_STEPS = 4096  # time steps of all layers and directions that the reference is unrolled over
REFERENCE_ELEMENTS = 2**26  # of all its outputs; it keeps a dozen float64 tensors of this size


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may use TF32: those of cuDNN's and our layers, and PyTorch's matmuls."""
    places: list[Any] = [torch.backends.cudnn.rnn, torch.backends.cuda.matmul]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def data(sequence: Sequence) -> Tensor:
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def in_double(sequence: Sequence) -> Sequence:
    return sequence.to(torch.float64) if isinstance(sequence, PackedSequence) else sequence.double()


@dataclass
class Ready:
    """What a provider made of a `Problem`.

    Attributes:
        forward: from the input (T, B, I) or packed to the output and the tuple of last states, shaped as torch.nn's.
        parameters: all that it wants gradients of besides the input.
        gradients: from the gradients of `parameters` to those of torch.nn's parameters, by their names.
        note: what is to be said of it.
    """

    forward: Callable[[Sequence], tuple[Sequence, tuple[Tensor, ...]]]
    parameters: list[Tensor] = field(default_factory=list)
    gradients: Callable[[list[Tensor]], dict[str, Tensor]] = lambda gradients: {}
    note: str = ""


def module_of(kind: type, case: Case, device: str, dtype: torch.dtype, **options) -> torch.nn.Module:
    layers = {"num_layers": case.layers, "bidirectional": case.directions == 2}
    return kind(case.I, case.H, **layers, **options, device=device, dtype=dtype)


def of_module(module: torch.nn.Module) -> Ready:
    """`Ready` of a module that takes and gives what torch.nn's do, and has its parameters."""

    def forward(x: Sequence):
        y, last = module(x)
        return y, last if isinstance(last, tuple) else (last,)

    names = [name for name, _ in module.named_parameters()]
    return Ready(forward, list(module.parameters()), lambda gradients: dict(zip(names, gradients, strict=True)))


class Problem:
    """A case on a device, with random weights as torch.nn initialises them, normal input and upstream gradients.

    The contract is computed once: the float64 reference on the very same numbers, and torch.nn's own errors.
    """

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case, self.device = case, device
        torch.manual_seed(seed)
        plain = module_of(getattr(torch.nn, case.cell), case, device, torch.float32)
        self.weights = {name: weight.detach().to(case.torch_dtype) for name, weight in plain.named_parameters()}
        self.x = self._sequence(torch.randn(case.T, case.B, case.I, device=device, dtype=case.torch_dtype))
        states = (case.layers * case.directions, case.B, case.H)
        steps = (*data(self.x).shape[:-1], case.directions * case.H)
        shapes = [steps] + [states] * (2 if case.cell == "LSTM" else 1)
        self.upstream = [torch.randn(shape, device=device, dtype=case.torch_dtype) for shape in shapes]
        self._answers: tuple[Contract, str] | None = None

    def _sequence(self, x: Tensor) -> Sequence:
        return pack_padded_sequence(x, torch.tensor(self.case.lengths)) if self.case.packed else x

    def module(self, kind: type, dtype: torch.dtype | None = None, **options) -> torch.nn.Module:
        """A module with the weights of this problem."""
        module = module_of(kind, self.case, self.device, dtype or self.case.torch_dtype, **options)
        module.load_state_dict(self.weights)
        return module

    def differentiable(self, x: Sequence) -> tuple[Sequence, Tensor]:
        """A copy of the input for which a gradient can be asked, and the tensor that gets it."""
        leaf = data(x).clone().requires_grad_()
        return (x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf), leaf

    def call(self, ready: Ready) -> Call:
        """What is timed of `ready` in the mode of this case."""
        x, leaf = self.differentiable(self.x)
        inputs = [leaf, *ready.parameters]

        def inference(_):
            with torch.no_grad():
                return ready.forward(self.x)

        def forward(_=None):
            y, last = ready.forward(x)
            return data(y), *last

        def backward(outputs):
            return torch.autograd.grad(outputs, inputs, self.upstream)

        return {
            "inference": Call(inference),
            "forward": Call(forward),
            "backward": Call(backward, before=forward),
            "training": Call(lambda _: backward(forward())),
        }[self.case.mode]

    def kept(self, ready: Ready) -> dict[str, int]:
        """`benchmarks.measure.kept` of a forward call, whatever the mode of this case."""
        x, leaf = self.differentiable(self.x)

        def forward() -> tuple[Tensor, ...]:
            y, last = ready.forward(x)
            return data(y), *last

        return measure.kept(forward, [leaf], ready.parameters)

    def results(self, ready: Ready, in_float64: bool = False) -> dict[str, Tensor]:
        """All outputs of `ready` and, unless the mode is inference, all gradients under the upstream ones."""
        names = ("output", "h_n", "c_n")
        x = in_double(self.x) if in_float64 else self.x
        if self.case.mode == "inference":
            with torch.no_grad():
                y, last = ready.forward(x)
            return dict(zip(names, (data(y), *last), strict=False))
        x, leaf = self.differentiable(x)
        y, last = ready.forward(x)
        outputs = dict(zip(names, (data(y), *last), strict=False))
        upstream = [gradient.to(data(y).dtype) for gradient in self.upstream]
        of_x, *of_parameters = torch.autograd.grad(list(outputs.values()), [leaf, *ready.parameters], upstream)
        gradients = {"input": of_x, **ready.gradients(of_parameters)}
        return {name: value.detach() for name, value in outputs.items()} | {
            f"grad of {name}": gradient for name, gradient in gradients.items()
        }

    def answers(self) -> tuple[Contract, str]:
        """What results may be, and what gave the right ones."""
        if self._answers is None:
            case = self.case
            steps = case.T * case.layers * case.directions
            unrolled = not case.packed and steps <= REFERENCE_STEPS and steps * case.B * case.H <= REFERENCE_ELEMENTS
            if unrolled:
                exact = self.module(getattr(rnnfast, case.cell), torch.float64, backend="reference")
            else:
                exact = self.module(getattr(torch.nn, case.cell), torch.float64)
            theirs = self.results(of_module(self.module(getattr(torch.nn, case.cell))))
            exactly = lambda: self.results(of_module(exact), in_float64=True)  # noqa: E731
            contract = Contract(exactly, theirs, case.torch_dtype, case.tf32, samples_for(steps))
            self._answers = contract, "" if unrolled else "checked against torch.nn in float64"
        return self._answers

    def check(self, ready: Ready) -> dict:
        """The tensor nearest to its limit, or furthest beyond it: its error as a multiple of what `rnnfast.numerics` allows."""
        contract, found = self.answers()[0], self.results(ready)
        if missing := contract.expected.keys() - found.keys():
            raise RuntimeError(f"it gave no {', '.join(sorted(missing))}")
        for name, expected in contract.expected.items():
            if found[name].shape != expected.exact.shape:
                raise RuntimeError(
                    f"{name} has shape {tuple(found[name].shape)}, and should have {tuple(expected.exact.shape)}"
                )
        verdict = worst(contract.judge({name: found[name] for name in contract.expected}))
        return {"worst": min(verdict.share, 1e30), "tensor": verdict.tensor}
