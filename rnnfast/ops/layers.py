"""`group`, `layer` and `trace`: what `rnnfast.reference` has under these names, on the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnfast import reference
from rnnfast.ops import dropout as between
from rnnfast.ops import gradients, operators, recurrence
from rnnfast.ops.members import Frame
from rnnfast.ops.operators import Results
from rnnfast.reference import CELLS, RESETS, STARTS, Traced, Weights, spec_of
from rnnfast.torch_private import innermost_transform

__all__ = ["group", "layer", "trace"]


def layer(*args, **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`rnnfast.reference.layer` on the Triton kernels. It saves for backward only if there can be one.

    It takes one option more: with ``recompute=True`` backward recomputes the gates, which then are not saved.
    """
    return reference.alone(group, *args, **options)[:2]


def trace(*args, **options) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """`rnnfast.reference.trace` on the Triton kernels, which keep the states and gates of all steps as they do for backward."""
    return reference.alone(group, *args, **options, details=True)


def group(
    cell: str,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    weights: Sequence[Weights],
    *,
    flips: int = 0,
    details: bool = False,
    recompute: bool = False,
    dropout: float = 0.0,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_to: tuple[Tensor, ...] | None = None,
    noise: Tensor | None = None,
    stacked: bool = False,
) -> Traced:
    """`rnnfast.reference.group` on the Triton kernels: directions or heads of a layer, or a stack of layers in one direction.

    Args:
        weights: those of each member.
        stacked: whether the members are the layers of a stack: without `flips`, ``w_hr`` and `details`.
        recompute: as for `layer`.
        dropout: between the layers of a stack, the probability that an element is dropped.
    """
    M, spec = len(weights), CELLS[cell] if cell in CELLS else spec_of(cell)
    D = 1 if stacked else M
    h0, c0 = _side_by_side(states, spec) if states else (None, None)
    reset_h, reset_c = _side_by_side(reset_to, spec) if reset_to else (None, None)
    w_hr = weights[0].w_hr
    marks = None
    if lengths is not None or resets is not None:
        each = [reference.marks(x, lengths, resets, reverse) for reverse in ((False, True) if flips else (False,))]
        marks = torch.stack([each[flips >> m & 1] for m in range(D)]) if flips else each[0][None]
    held = None
    if spec.held:
        held = torch.stack([own.held.expand(x.shape[1], -1) for own in weights])  # type: ignore[union-attr]
    own = [tensor for each in weights for tensor in each[: 2 if each.b_ih is None else 4]]
    projections = [each.w_hr for each in weights if each.w_hr is not None]
    inside = not torch.compiler.is_compiling() and innermost_transform() is not None  # no transform that is compiled comes here
    needed = inside or any([t is not None and t.requires_grad for t in (x, h0, c0, reset_h, reset_c, held, *own, *projections)])
    frame = Frame(
        M, D, weights[0].b_ih is not None, cell, flips,
        save=details or (needed and torch.is_grad_enabled()),
        dropout=float(dropout), recompute=recompute and not details,
    )  # fmt: skip
    seeds = between.seeds(x, dropout, M - 1) if dropout and M > D else None
    tensors = [x, h0, c0, reset_h, reset_c, marks, lengths, seeds, held, noise, *own]
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # as cuDNN's layer: everything in the lower precision
        low = torch.get_autocast_dtype(kind)
        tensors = [t.to(low) if t is not None and t.is_floating_point() else t for t in tensors]
        projections = [projection.to(low) for projection in projections]
    if w_hr is None and not inside and recurrence.is_eager(*tensors):
        if frame.save and needed:
            results = Results(*gradients.RnnfastForward.apply(frame, *tensors))
        else:
            results = Results(*recurrence.forward(*frame.assembled(tensors)))
    else:
        run: Any = gradients.Layer.apply if inside else operators.forward
        call = frame.assembled(tensors)
        results = Results(*run(*call)) if w_hr is None else _projected(run, call, torch.stack(projections))
    last = (results.h_n,) if spec.states == 1 else (results.h_n, *_apart(results.c_n, spec))
    if not details:
        return Traced(results.y, last, (), None)
    T, B, width = results.y.shape
    if spec.saved >= spec.gates:
        gates = results.saved.view(D, T, B, spec.saved, -1)[..., : spec.gates, :].permute(1, 2, 0, 3, 4)
    else:
        gates = results.y.detach().view(T, B, D, 1, width // D) if spec.gates == 1 else None
    cells = tuple([state.to(results.y.dtype).permute(1, 2, 0, 3).flatten(2) for state in _apart(results.c, spec)])
    return Traced(results.y, last, cells, gates)


def _side_by_side(states: tuple[Tensor, ...], spec: reference.Cell) -> tuple[Tensor | None, Tensor | None]:
    """h and all carried states in one tensor, (M, B, H) and (M, B, C * H), as the operators take them."""
    h, *carried = states
    if len(carried) == spec.carried == 1:
        return h, carried[0]
    return h, torch.cat([*carried, *[torch.zeros_like(h)] * spec.kept32], -1) if spec.carried else None


def _apart(carried: Tensor, spec: reference.Cell) -> tuple[Tensor, ...]:
    """The states of a tensor that holds all carried ones side by side, without what is kept for backward alone."""
    if spec.carried < 2:
        return (carried,)[: spec.states - 1]
    return carried.chunk(spec.carried, -1)[: spec.states - 1]


def _projected(run, call: Any, w_hr: Tensor) -> Results:
    """The D directions of an LSTM with projection, computed by one without. `w_hr` is (D, P, H).

    With m_t = o tanh(c_t), h_t = W_hr m_t gives W_hh h_{t-1} = (W_hh W_hr) m_{t-1}: the kernels run on m with that matrix. An
    initial or reset h that the caller gives is not a W_hr m; it enters at its steps through the input.
    """
    x, (D, P, H) = call.x, w_hr.shape
    B = x.shape[1]
    inner = call._replace(
        h0=None if call.c0 is None else x.new_zeros(D, B, H),  # the kernels take both states or none
        reset_h=None,
        w_hh=torch.bmm(call.w_hh, w_hr),
    )
    if call.h0 is not None or call.reset_h is not None:
        codes = call.marks
        if codes is None:
            codes = torch.stack([reference.marks(x, None, None, bool(call.flips >> m & 1)) for m in range(D)])
        zeros, codes = x.new_zeros(D, 1, B, P), codes[..., None]
        start, reset = (zeros if state is None else state[:, None] for state in (call.h0, call.reset_h))
        given = torch.where(codes == STARTS, start, torch.where(codes == RESETS, reset, zeros))
        own = torch.eye(D, dtype=x.dtype, device=x.device)[:, None, :, None] * call.w_hh[:, :, None, :]
        inner = inner._replace(
            x=torch.cat([x, given.permute(1, 2, 0, 3).flatten(2)], dim=2), w_ih=torch.cat([call.w_ih, own.flatten(2)], dim=2)
        )
    results = Results(*run(*inner))
    h_n = torch.bmm(results.h_n, w_hr.mT)
    if call.h0 is not None and call.lengths is not None:
        h_n = torch.where((call.lengths > 0)[:, None], h_n, call.h0)
    y = [m @ w.t() for m, w in zip(results.y.chunk(D, -1), w_hr, strict=True)]
    return results._replace(y=torch.cat(y, -1) if D > 1 else y[0], h_n=h_n)
