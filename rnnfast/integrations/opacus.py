"""Training with differential privacy: rnnfast's layers for Opacus, with per-sample gradients on the kernels.

Importing this module registers the layers with Opacus. ``opacus.validators.ModuleValidator.fix(model)`` then replaces each
`rnnfast.LSTM`, `GRU` and `RNN` by the class of that name in this module, and ``ModuleValidator.validate`` refuses a model in
which they were not replaced.

Opacus computes the per-sample gradients of a layer in hooks around ``forward``. The hooks see the positional tensors that go
in, and the gradient of the first tensor that comes out. Of torch.nn's ``output, (h_n, c_n)`` they would lose h_n and c_n. So
the layers here exchange single tensors, with the batch first, between ``__call__`` and ``forward``, where the hooks stand.

The per-sample gradient of a weight is ``vmap`` of ``grad``, over the rows of the batch. The kernels run it as one forward and
one backward of the whole batch. One batched matrix product for each weight follows: dW_ih of a row is the sum over t of
d_gates_t x_t^T, where d_gates_t (G*H,) is the gradient of the gates before their activation.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnfast import nn as ours
from rnnfast.integrations import load
from rnnfast.nn.base import cell_of
from rnnfast.nn.checks import states_of
from rnnfast.nn.sequence import Sequence

__all__ = ["GRU", "LSTM", "RNN", "grad_samples"]

_errors = load("opacus.validators.errors", "opacus")
_validators = load("opacus.validators.utils", "opacus")
_samplers = load("opacus.grad_sample", "opacus")


class _BatchFirst(Sequence):
    """What the three layers share. A mixin: it stands before rnnfast's class among the bases."""

    def __call__(self, input: Tensor | PackedSequence, hx: Any = None, *, lengths: Any = None, resets: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            if lengths is not None or resets is not None:
                raise ValueError("lengths and resets go with a padded input, not with a PackedSequence")
            padded, lengths = pad_packed_sequence(input, self.batch_first)
            output, last = self(padded, hx, lengths=lengths)
            return pack_padded_sequence(output, lengths, self.batch_first, input.sorted_indices is None), last
        if input.dim() != 3:
            raise ValueError(f"per-sample gradients need an input with a batch, of 3 dimensions, got {input.dim()}")
        rows = [_turned(self, input), *[state.transpose(0, 1) for state in states_of(cell_of(self), hx)]]
        rows += [] if lengths is None else [torch.as_tensor(lengths, device=input.device)]
        rows += [] if resets is None else [_turned(self, resets)]
        shapes = _shapes(self, rows[0])
        parts = super().__call__(*rows).split([prod(shape[1:]) for shape in shapes], 1)
        output, *last = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        last = [state.transpose(0, 1) for state in last]
        return _turned(self, output), tuple(last) if len(last) > 1 else last[0]

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:  # type: ignore[override]
        """The call as Opacus' hooks see it.

        Args:
            x: (B, T, I), whatever ``batch_first`` says.
            given: the states of hx, each (B, layers * directions, H), floating; lengths (B,), integers; resets (B, T), bool.

        Returns:
            output, h_n and an LSTM's c_n, each (B, -1), side by side.
        """
        states = [each.transpose(0, 1) for each in given if each.is_floating_point()]
        options = {}
        for each in given:
            if each.dtype == torch.bool:
                options["resets"] = _turned(self, each)
            elif not each.is_floating_point():
                options["lengths"] = each
        hx = None if not states else tuple(states) if len(states) > 1 else states[0]
        output, last = super().forward(_turned(self, x), hx, **options)
        states = [state.transpose(0, 1) for state in states_of(cell_of(self), last)]
        return torch.cat([part.flatten(1) for part in (_turned(self, output), *states)], 1)


def _turned(layer: torch.nn.RNNBase, tensor: Tensor) -> Tensor:
    """From the layout of the layer's input to the batch first, or back."""
    return tensor if layer.batch_first else tensor.transpose(0, 1)


def _shapes(layer: torch.nn.RNNBase, x: Tensor) -> list[tuple[int, int, int]]:
    """Of output, h_n and an LSTM's c_n, with the batch first. `x` is (B, T, I)."""
    directions = 2 if layer.bidirectional else 1
    B, T, width, places = *x.shape[:2], layer.proj_size or layer.hidden_size, layer.num_layers * directions
    cells = [(B, places, layer.hidden_size)] if layer.mode == "LSTM" else []
    return [(B, T, width * directions), (B, places, width), *cells]


class LSTM(_BatchFirst, ours.LSTM):
    """`rnnfast.LSTM` with per-sample gradients for Opacus: same parameters, checkpoints and results.

    A call takes ``input``, ``hx``, ``lengths`` and ``resets``, as `rnnfast.LSTM` does. The input needs a batch.

    Hooks of a user's own see ``forward`` as Opacus' do: see there.
    """


class GRU(_BatchFirst, ours.GRU):
    """`rnnfast.GRU` with per-sample gradients for Opacus; see `LSTM`."""


class RNN(_BatchFirst, ours.RNN):
    """`rnnfast.RNN` with per-sample gradients for Opacus; see `LSTM`."""


_FIXED = {ours.LSTM: LSTM, ours.GRU: GRU, ours.RNN: RNN}


class _Unhooked(torch.nn.Module):
    """``layer.forward`` without the hooks of `layer`."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *rows: Tensor) -> Tensor:
        return self.layer.forward(*rows)


@_samplers.register_grad_sampler(list(_FIXED.values()))
def grad_samples(layer: torch.nn.RNNBase, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """The gradients of each row of the batch: Opacus' grad sampler of the layers in this module.

    Args:
        layer: one of these layers.
        activations: what went into ``forward``, with B rows each.
        backprops: the gradient of what came out.

    Returns:
        (B, *shape) for each parameter that requires a gradient.

    Raises:
        ValueError: if Opacus was told that the batch is not first.
    """
    x = activations[0]
    if backprops.shape != (x.shape[0], sum(prod(shape[1:]) for shape in _shapes(layer, x))):
        raise ValueError(f"{type(layer).__name__} of rnnfast needs batch_first=True for Opacus, whatever its own is")
    weights: dict[str, Tensor] = {f"layer.{name}": weight for name, weight in layer.named_parameters() if weight.requires_grad}
    if not len(x):
        return {weight: weight.new_zeros(0, *weight.shape) for weight in weights.values()}
    unhooked, dtype = _Unhooked(layer), next(iter(weights.values())).dtype
    rows = [each.to(dtype) if each.is_floating_point() else each for each in activations]  # autocast has ended

    def loss(weights: dict[str, Tensor], rows: list[Tensor], upstream: Tensor) -> Tensor:
        return (functional_call(unhooked, weights, tuple(row[None] for row in rows))[0] * upstream).sum()

    found = vmap(grad(loss), (None, 0, 0))(weights, rows, backprops.to(dtype))
    return {weight: found[name].detach() for name, weight in weights.items()}


@_validators.register_module_fixer(list(_FIXED))
def _fix(layer: torch.nn.Module, **_: Any) -> torch.nn.Module:
    """Opacus gives a layer of its copy of the model, and puts what is returned in its place."""
    layer.__class__ = _FIXED[type(layer)]
    return layer


@_validators.register_module_validator(list(_FIXED))
def _validate_unfixed(layer: torch.nn.Module) -> list[Exception]:
    name = type(layer).__name__
    told = f"Opacus' hooks see the output of rnnfast.{name} and not its last states: ModuleValidator.fix(model) replaces it by"
    return [_errors.ShouldReplaceModuleError(f"{told} rnnfast.integrations.opacus.{name}")]


@_validators.register_module_validator(list(_FIXED.values()))
def _validate(layer: torch.nn.RNNBase) -> list[Exception]:
    if not layer.dropout or layer.num_layers == 1:
        return []
    told = f"{layer}: per-sample gradients would draw the dropout between its layers anew"
    return [_errors.IllegalModuleConfigurationError(f"{told}; use layers of num_layers=1 with torch.nn.Dropout between them")]
