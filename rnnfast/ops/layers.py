"""`layer` and `trace`: what `rnnfast.reference` has under these names, on the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnfast import reference
from rnnfast.ops import gradients, operators, recurrence
from rnnfast.ops.operators import Forward, Results
from rnnfast.ops.schema import DIFFERENTIABLE
from rnnfast.reference import CELLS, RESETS, STARTS
from rnnfast.torch_private import innermost_transform

__all__ = ["layer", "trace"]


def layer(*args, **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`rnnfast.reference.layer` on the Triton kernels. It saves for backward only if there can be one.

    It takes one option more: with ``recompute=True`` backward recomputes the gates, which then are not saved.
    """
    results = _run(*args, **options, details=False)
    return results.y, (results.h_n, results.c_n)[: CELLS[args[0]].states]


def trace(*args, **options) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """`rnnfast.reference.trace` on the Triton kernels, which keep the states and gates of all steps as they do for backward."""
    spec, results = CELLS[args[0]], _run(*args, **options, details=True)
    T, B, _ = results.y.shape
    if spec.saved:
        gates = results.saved.view(T, B, spec.saved, -1)[:, :, : spec.gates]
    else:
        gates = results.y.detach()[:, :, None]
    cells = (results.c.to(results.y.dtype),)[: spec.states - 1]
    return results.y, (results.h_n, results.c_n)[: spec.states], cells, gates


def _run(
    cell: str,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    details: bool,
    recompute: bool = False,
    reverse: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_to: tuple[Tensor, ...] | None = None,
) -> Results:
    h0, c0 = (*states, None)[:2] if states else (None, None)
    reset_h, reset_c = (*reset_to, None)[:2] if reset_to else (None, None)
    marks = None
    if lengths is not None or resets is not None:
        marks = reference.marks(x, lengths, resets, reverse)
    inside = not torch.compiler.is_compiling() and innermost_transform() is not None  # no transform that is compiled comes here
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, reset_h, reset_c, w_hr)
    needed = inside or any([tensor is not None and tensor.requires_grad for tensor in tensors])
    call = Forward(
        cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse,
        save=details or (needed and torch.is_grad_enabled()),
        marks=marks, lengths=lengths, reset_h=reset_h, reset_c=reset_c,
        recompute=recompute and not details,
    )  # fmt: skip
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # as cuDNN's layer: everything in the lower precision
        low = torch.get_autocast_dtype(kind)
        given = {name: getattr(call, name) for name in DIFFERENTIABLE}
        call = call._replace(**{name: tensor.to(low) for name, tensor in given.items() if tensor is not None})
        w_hr = None if w_hr is None else w_hr.to(low)
    run: Any = gradients.Layer.apply if inside else operators.forward
    if not inside and recurrence.is_eager(*call):
        run = gradients.RnnfastForward.apply if needed and torch.is_grad_enabled() else recurrence.forward
    return Results(*run(*call)) if w_hr is None else _projected(run, call, w_hr)


def _projected(run, call, w_hr: Tensor) -> Results:
    """An LSTM with projection, computed by one without.

    With m_t = o tanh(c_t), h_t = W_hr m_t gives W_hh h_{t-1} = (W_hh W_hr) m_{t-1}: the kernels run on m with that matrix. An
    initial or reset h that the caller gives is not a W_hr m; it enters at its steps through the input.
    """
    x, (P, H) = call.x, w_hr.shape
    B = x.shape[1]
    inner = call._replace(
        h0=None if call.c0 is None else x.new_zeros(B, H),  # the kernels take both states or none
        reset_h=None,
        w_hh=call.w_hh @ w_hr,
    )
    if call.h0 is not None or call.reset_h is not None:
        codes = reference.marks(x, None, None, call.reverse) if call.marks is None else call.marks
        zeros, codes = x.new_zeros(B, P), codes[..., None]
        start, reset = (zeros if state is None else state for state in (call.h0, call.reset_h))
        given = torch.where(codes == STARTS, start, torch.where(codes == RESETS, reset, zeros))
        inner = inner._replace(x=torch.cat([x, given], dim=2), w_ih=torch.cat([call.w_ih, call.w_hh], dim=1))
    results = Results(*run(*inner))
    h_n = results.h_n @ w_hr.t()
    if call.h0 is not None and call.lengths is not None:
        h_n = torch.where((call.lengths > 0)[:, None], h_n, call.h0)
    return results._replace(y=results.y @ w_hr.t(), h_n=h_n)
