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
from rnnfast.reference import Cell, Traced, Weights, spec_of

__all__ = ["GROUPS", "by_packing", "members_of", "run"]

# By runner, as `rnnfast.choice.decide.Decision` names them
GROUPS: dict[str, Callable[..., Traced]] = {"kernels": ops.group, "equations": reference.group}


def _permuted(states: tuple[Tensor, ...], order: Tensor | None) -> tuple[Tensor, ...]:
    return states if order is None else tuple(state.index_select(1, order) for state in states)


def members_of(layer: torch.nn.RNNBase, weights: list[Any]) -> list[Weights]:
    """Those of one of torch.nn's layers, whose weights come layer after layer and direction after direction."""
    count = 2 + (2 if layer.bias else 0) + (1 if layer.proj_size else 0)
    return [
        Weights(own[0], own[1], *(own[2:4] if layer.bias else ()))._replace(w_hr=own[-1] if layer.proj_size else None)
        for own in (weights[n : n + count] for n in range(0, len(weights), count))
    ]


def _in_form(cell: str | Cell, hidden: tuple[Tensor, ...]) -> Any:
    """The last states as torch.nn returns them."""
    return hidden if spec_of(cell).states > 1 else hidden[0]


def run(
    runner: str,
    layer: Any,
    cell: str | Cell,
    members: list[Weights],
    input: Any,
    states: tuple[Any, ...],
    options: CallOptions | None = None,
    recompute: bool = False,
    noise: Tensor | None = None,
    output: int = 0,
) -> Any:
    """A well-formed call, on "kernels" or by "equations".

    Args:
        layer: one of torch.nn's or an `rnnfast.Layer`, for its numbers of layers and directions, ``batch_first`` and dropout.
        cell: as for `rnnfast.reference.group`.
        members: the weights of each, layer after layer, direction after direction and head after head.
        states: those of hx, of all members; empty for zeros.
        recompute: whether the kernels keep no gates, and whether the equations run under PyTorch's checkpoint.
        noise: (members,) int64, the seed of each, for a cell with noise.
        output: which state is the output of a layer.
    """
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
    one = GROUPS[runner]
    if recompute:
        one = partial(one, recompute=True) if runner == "kernels" else partial(checkpointed, one)
    given = {} if options is None else options.of_layer()
    if output:
        given |= {"details": True}
    p = layer.dropout if layer.training else 0.0
    found: list[Traced] = []
    L, details = layer.num_layers, bool(given.get("details"))
    side = len(members) // L  # members of a layer: its directions, or the heads of each
    flips = ((1 << side // 2) - 1) << side // 2 if layer.bidirectional else 0
    whole = runner == "kernels" and L > 1 and side == 1 and not details and spec_of(cell).recurrent
    parts = _parts(x, members, p) if whole else [(n, n + 1) for n in range(L)]
    for first, last in parts:
        own = slice(first * side, last * side)
        start = tuple(state[own] for state in states) or None
        if given.get("reset_to") is not None:
            given = given | {"reset_to": tuple(state[own] for state in options.reset_to)}  # type: ignore[union-attr]
        inner: dict[str, Any] = {"dropout": p, "stacked": True} if last - first > 1 else {}
        if noise is not None:
            inner["noise"] = noise[own]
        found.append(one(cell, x, start, members[own], flips=flips, **given, **inner))
        x = found[-1].cells[output - 1] if output else found[-1].y
        if p and last < layer.num_layers:
            fused = runner == "kernels" and not torch_private.inside()
            x = dropout(x, p) if fused else torch.dropout(x, p, train=True)  # whose errors are torch.nn.LSTM's
    hidden = (
        found[0].last if len(found) == 1 else tuple(torch.cat(state) for state in zip(*(f.last for f in found), strict=True))
    )

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
    seen = [(tuple(map(laid_out, (f.y, *f.cells))), f.gates if f.gates is None else laid_out(f.gates)) for f in found]
    return results + options.returned(*(tuple(each) for each in zip(*seen, strict=True)))


def _parts(x: Tensor, members: list[Weights], p: float) -> list[tuple[int, int]]:
    """The layers of a stack of one direction that each call of the kernels runs, as (first, last + 1). The stack is a pipeline,
    but not with a projection, or with dropout inside a transform. Layers below the first one that needs a gradient run apart
    from it, as they need no backward."""
    L = len(members)
    if members[0].w_hr is not None or (p and torch_private.inside()):
        return [(n, n + 1) for n in range(L)]
    if x.requires_grad or not torch.is_grad_enabled():
        return [(0, L)]
    frozen = next((n for n, own in enumerate(members) if any(w is not None and w.requires_grad for w in own)), 0)
    return [(0, frozen), (frozen, L)] if frozen else [(0, L)]


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
