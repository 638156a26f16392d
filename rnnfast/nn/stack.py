"""Runs the layers and directions of a module, on the kernels or by the equations, and rows of several lengths by packing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnfast import ops, reference, torch_private
from rnnfast.nn.base import checkpointed
from rnnfast.nn.checks import states_of
from rnnfast.nn.options import CallOptions, packed_like, padded
from rnnfast.ops.dropout import dropout
from rnnfast.reference import STATES

__all__ = ["LAYERS", "TRACES", "by_packing", "run"]

# By runner, as `rnnfast.choice.decide.Decision` names them
LAYERS: dict[str, Callable] = {"kernels": ops.layer, "equations": reference.layer}
TRACES: dict[str, Callable] = {"kernels": ops.trace, "equations": reference.trace}  # with the states and gates of every step


def _joined(directions: Any) -> Tensor:
    return directions[0] if len(directions) == 1 else torch.cat(directions, dim=-1)


def _permuted(states: tuple[Tensor, ...], order: Tensor | None) -> tuple[Tensor, ...]:
    return states if order is None else tuple(state.index_select(1, order) for state in states)


def _in_form(cell: str, hidden: tuple[Tensor, ...]) -> Any:
    """The last states as torch.nn returns them."""
    return hidden if STATES[cell] > 1 else hidden[0]


def run(
    runner: str,
    layer: torch.nn.RNNBase,
    cell: str,
    weights: list[Any],
    input: Any,
    states: tuple[Any, ...],
    options: CallOptions | None = None,
    recompute: bool = False,
) -> Any:
    """A call that `rnnfast.nn.checks.layer_fits`, on "kernels" or by "equations".

    Args:
        weights: all, layer after layer and direction after direction.
        states: those of hx; empty for zeros.
        recompute: whether the kernels keep no gates, and whether the equations run under PyTorch's checkpoint.
    """
    directions, count = 2 if layer.bidirectional else 1, 2 + (2 if layer.bias else 0) + (1 if layer.proj_size else 0)
    packed, batched = None, True
    if isinstance(input, PackedSequence):
        packed = input
        x, options = padded(packed, options)
        states = _permuted(states, packed.sorted_indices)
    else:
        batched = input.dim() == 3
        x = input.unsqueeze(1) if not batched else input.transpose(0, 1) if layer.batch_first else input
    if not batched:
        states = tuple(state.unsqueeze(1) for state in states)
    if runner == "equations" and torch.jit.is_tracing():
        x = torch.stack(x.unbind(0))  # the trace holds the steps it saw: this fails on any other number of them
    wants_details = options is not None and options.details
    one = (TRACES if wants_details else LAYERS)[runner]
    if recompute:
        one = partial(one, recompute=True) if runner == "kernels" else partial(checkpointed, one)

    last_states, all_states, all_gates = [], [], []
    for index in range(layer.num_layers):
        outputs, seen = [], []
        for direction in range(directions):
            n = index * directions + direction
            w_ih, w_hh, *rest = weights[n * count : (n + 1) * count]
            b_ih, b_hh = rest[:2] if layer.bias else (None, None)
            w_hr = rest[-1] if layer.proj_size else None
            start = tuple(state[n] for state in states) or None
            given = {} if options is None else options.of_layer(n)
            y, last, *details = one(cell, x, start, w_ih, w_hh, b_ih, b_hh, w_hr, reverse=direction == 1, **given)
            outputs.append(y)
            last_states.append(last)
            seen.append(details)
        drops = layer.dropout and layer.training and index < layer.num_layers - 1
        fused = drops and runner == "kernels" and not torch_private.inside()
        if wants_details or not fused:
            x = _joined(outputs)
        if wants_details:
            cells, gates = zip(*seen, strict=True)
            all_states.append((x, *(_joined(c) for c in zip(*cells, strict=True))))
            all_gates.append(torch.stack(gates, dim=2))
        if fused:
            x = dropout(outputs, layer.dropout)
        elif drops:
            x = torch.dropout(x, layer.dropout, train=True)  # whose errors are torch.nn.LSTM's

    hidden = tuple(torch.stack(state) for state in zip(*last_states, strict=True))

    def laid_out(tensor: Tensor) -> Any:
        """(T, B, ...) as the caller has the input."""
        if packed is not None:
            return packed_like(packed, tensor)
        return tensor.squeeze(1) if not batched else tensor.transpose(0, 1) if layer.batch_first else tensor

    if packed is not None:
        hidden = _permuted(hidden, packed.unsorted_indices)
    if not batched:
        hidden = tuple(state.squeeze(1) for state in hidden)
    results = (laid_out(x), _in_form(cell, hidden))
    if options is None:
        return results
    seen = (tuple(tuple(laid_out(state) for state in states) for states in all_states), tuple(map(laid_out, all_gates)))
    return results + options.returned(*seen)


def by_packing(by_torch: Callable, layer: torch.nn.RNNBase, cell: str, lengths: Any, input: Tensor, hx: Any) -> Any:
    """PyTorch's own layer, called by ``by_torch(input, hx)``, on rows of several lengths.

    It takes no empty row: one is run for a step of zeros, and then given the states and the zeros that it should have.
    """
    empty = lengths == 0
    row = empty[:, None, None] if layer.batch_first else empty[None, :, None]
    rows = input.masked_fill(row, 0)
    packed = pack_padded_sequence(rows, lengths.clamp(min=1).cpu(), batch_first=layer.batch_first, enforce_sorted=False)
    output, hidden = by_torch(packed, hx)
    T = input.shape[1 if layer.batch_first else 0]
    output, _ = pad_packed_sequence(output, batch_first=layer.batch_first, total_length=T)
    states = states_of(cell, hx)
    hidden = tuple(
        torch.where(empty[None, :, None], states[n] if states else 0, last) for n, last in enumerate(states_of(cell, hidden))
    )
    return output.masked_fill(row, 0), _in_form(cell, hidden)
