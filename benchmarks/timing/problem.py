"""Makes a `Case` into tensors (weights, input, upstream gradients), computes the right results, and checks a provider's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast
from benchmarks.timing import measure
from benchmarks.timing.cases import Case
from benchmarks.timing.measure import Call
from rnnfast.numerics import Contract, samples_for, worst

Sequence = Tensor | PackedSequence
CLASSES = 10  # outputs of the linear layer of a model
REFERENCE_STEPS = 4096  # the most time steps, of all layers and directions, over which the reference is unrolled
REFERENCE_ELEMENTS = 2**26  # the most elements of all outputs. The reference keeps a dozen float64 tensors of this size


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in float32 products, within the block: in cuDNN's layers, in ours and in PyTorch's matmuls."""
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


@dataclass
class Ready:
    """A `Problem` that a provider is ready to run."""

    # takes the input, (T, B, I) or packed; returns the output and the last state or states, as torch.nn's modules do. A model
    # returns what its case says and an empty tuple
    forward: Callable[[Sequence], tuple[Sequence, Tensor | tuple[Tensor, ...]]]
    parameters: list[Tensor] = field(default_factory=list)  # the tensors besides the input that get gradients
    gradients: Callable[[list[Tensor]], list[Tensor]] | None = None  # from theirs to those of torch.nn's parameters, if others
    note: str = ""  # a remark for the row

    def outputs(self, x: Sequence) -> tuple[Tensor, ...]:
        y, last = self.forward(x)
        return data(y), *(last if isinstance(last, tuple) else (last,))


class ModelAround(torch.nn.Module):
    """A layer, torch.nn's or ours, with what the case puts around it: states, lengths, and what of its results is returned.

    torch.nn's layer gets the lengths by packing, and its output is padded again: this is how its users get correct results.
    """

    def __init__(self, layer: torch.nn.RNNBase, case: Case, states: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.layer, self.case, self.states = layer, case, states
        if case.around.returns == "last":
            weight = layer.weight_hh_l0
            self.last = torch.nn.Linear(case.H * case.directions, CLASSES, device=weight.device, dtype=weight.dtype)
        self.packs = case.around.lengths and type(layer).__module__.startswith("torch.")
        self.lengths = torch.tensor(case.lengths, device="cpu" if self.packs else layer.weight_hh_l0.device)

    def arguments(self, x: Tensor) -> tuple[tuple, dict]:
        """Those of the call of our layer."""
        states = tuple(state.to(x.dtype) for state in self.states)
        given = (states if len(states) == 2 else states[0],) if states else ()
        return (x, *given), {"lengths": self.lengths} if self.case.around.lengths else {}

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.packs:
            y, last = self.layer(pack_padded_sequence(x, self.lengths))
            return pad_packed_sequence(y, total_length=self.case.T)[0], last
        args, options = self.arguments(x)
        y, last = self.layer(*args, **options)
        last = last if isinstance(last, tuple) else (last,)
        returns = self.case.around.returns
        if returns == "all":
            return y, last
        if returns == "last":
            return self.last(y[:, -1] if self.case.around.batch_first else y[-1]), ()
        return {"output": y, "h_n": last[0], "c_n": last[-1]}[returns], ()


def module_of(kind: type, case: Case, device: str, dtype: torch.dtype, **options) -> torch.nn.Module:
    layers = {"num_layers": case.layers, "bidirectional": case.directions == 2, "batch_first": case.around.batch_first}
    return kind(case.I, case.H, **layers, **options, device=device, dtype=dtype)


def of_module(module: torch.nn.Module) -> Ready:
    """`Ready` of a module with the interface and the parameters of torch.nn's."""
    return Ready(module, list(module.parameters()))


class Problem:
    """A case on a device. Weights are random as torch.nn initialises them; input, states and upstream gradients are normal.

    The contract is computed once: from the float64 reference on the same numbers, and from torch.nn's own errors.
    """

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case, self.device = case, device
        torch.manual_seed(seed)
        kinds = 2 if case.cell == "LSTM" else 1
        normal = partial(torch.randn, device=device, dtype=case.torch_dtype)
        last = [(case.layers * case.directions, case.B, case.H)] * kinds
        self.states = tuple(normal(shape) for shape in last) if case.around.states else ()
        theirs = self._module(getattr(torch.nn, case.cell), torch.float32)
        self.weights = {name: weight.detach().to(case.torch_dtype) for name, weight in theirs.named_parameters()}
        x = normal(case.B, case.T, case.I) if case.around.batch_first else normal(case.T, case.B, case.I)
        self.x: Sequence = pack_padded_sequence(x, torch.tensor(case.lengths)) if case.packed else x
        steps = (*data(self.x).shape[:-1], case.directions * case.H)
        shapes = {"all": [steps, *last], "output": [steps], "last": [(case.B, CLASSES)]}.get(case.around.returns, last[:1])
        self.upstream = [normal(shape) for shape in shapes]
        self._answers: tuple[Contract, str] | None = None

    def _module(self, kind: type, dtype: torch.dtype, **options) -> torch.nn.Module:
        layer = module_of(kind, self.case, self.device, dtype, **options)
        return ModelAround(layer, self.case, self.states) if self.case.model else layer

    def module(self, kind: type, dtype: torch.dtype | None = None, **options) -> torch.nn.Module:
        """A layer of `kind` with the weights of this problem, or the model around one."""
        module = self._module(kind, dtype or self.case.torch_dtype, **options)
        module.load_state_dict(self.weights)
        return module

    def differentiable(self, x: Sequence) -> tuple[Sequence, Tensor]:
        """A copy of the input that requires a gradient, and the tensor that gets the gradient."""
        leaf = data(x).clone().requires_grad_()
        return (x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf), leaf

    def call(self, ready: Ready) -> Call:
        """The call of `ready` that the mode of this case times."""
        x, leaf = self.differentiable(self.x)
        inputs = [leaf, *ready.parameters]

        def inference(_):
            with torch.no_grad():
                return ready.forward(self.x)

        def backward(outputs):
            return torch.autograd.grad(outputs, inputs, self.upstream)

        return {
            "inference": Call(inference),
            "forward": Call(lambda _: ready.outputs(x)),
            "backward": Call(backward, before=lambda: ready.outputs(x)),
            "training": Call(lambda _: backward(ready.outputs(x))),
        }[self.case.mode]

    def kept(self, ready: Ready) -> dict[str, int]:
        """`benchmarks.timing.measure.kept` of a forward call, whatever the mode of this case."""
        x, leaf = self.differentiable(self.x)
        return measure.kept(lambda: ready.outputs(x), [leaf], ready.parameters)

    def results(self, ready: Ready, in_float64: bool = False) -> dict[str, Tensor]:
        """All outputs of `ready`. Unless the mode is inference, also all gradients under the upstream ones."""
        names, x = ("output", "h_n", "c_n"), self.x.double() if in_float64 else self.x
        if self.case.mode == "inference":
            with torch.no_grad():
                return dict(zip(names, ready.outputs(x), strict=False))
        x, leaf = self.differentiable(x)
        outputs = ready.outputs(x)
        upstream = [gradient.to(outputs[0].dtype) for gradient in self.upstream]
        of_x, *of_parameters = torch.autograd.grad(outputs, [leaf, *ready.parameters], upstream)
        of_weights = ready.gradients(of_parameters) if ready.gradients else of_parameters
        gradients = {"input": of_x, **dict(zip(self.weights, of_weights, strict=False))}
        found = dict(zip(names, (output.detach() for output in outputs), strict=False))
        return found | {f"grad of {name}": gradient for name, gradient in gradients.items()}

    def answers(self) -> tuple[Contract, str]:
        """The contract that the results have to meet, and a note that says where the right results come from."""
        if self._answers is None:
            case = self.case
            steps = case.T * case.layers * case.directions
            unrolled = not case.packed and steps <= REFERENCE_STEPS and steps * case.B * case.H <= REFERENCE_ELEMENTS
            library, options = (rnnfast, {"backend": "reference"}) if unrolled else (torch.nn, {})
            exact = self.module(getattr(library, case.cell), torch.float64, **options)
            exactly = partial(self.results, of_module(exact), in_float64=True)
            theirs = self.results(of_module(self.module(getattr(torch.nn, case.cell))))
            contract = Contract(exactly, theirs, case.torch_dtype, case.tf32, samples_for(steps))
            self._answers = contract, "" if unrolled else "checked against torch.nn in float64"
        return self._answers

    def check(self, ready: Ready) -> dict:
        """The tensor nearest to its limit, or furthest beyond it: its error as a multiple of what `rnnfast.numerics` allows."""
        expected, found = self.answers()[0].expected, self.results(ready)
        if missing := expected.keys() - found.keys():
            raise RuntimeError(f"it gave no {', '.join(sorted(missing))}")
        for name, right in expected.items():
            if found[name].shape != right.exact.shape:
                raise RuntimeError(f"{name} has shape {tuple(found[name].shape)}, and should have {tuple(right.exact.shape)}")
        verdict = worst(self.answers()[0].judge({name: found[name] for name in expected}))
        return {"worst": min(verdict.share, 1e30), "tensor": verdict.tensor}
