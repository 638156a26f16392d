"""The kernels as PyTorch operators: ``rnnfast::forward`` and ``rnnfast::backward``, one layer, one direction each.

    forward    for one chunk of steps after another: W_ih x of the chunk, one GEMM through PyTorch into a float32 buffer that
               does not grow with T; then the recurrence over the chunk, on the kernels that
               `rnnfast.families` chose.
    backward   the recurrence in reverse, which writes the gate gradients of all steps; then, in `_backward`, each weight,
               bias and input gradient as one GEMM or sum over T * B, through PyTorch, and only those that are needed.

Inside, everything is time-major and contiguous. Kept for backward, in bytes per unit and step, e being the size of an
element: LSTM 4 e + 4 (gates and the float32 cell state), GRU 4 e, RNN nothing; besides the layer's input and its output, which
mostly live anyway (two directions are joined in a copy, and dropout makes one).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from rnnfast import families
from rnnfast.families import precision
from rnnfast.reference import GATES, GRADS, SAVED

__all__ = ["backward", "forward", "precision"]


def _dense(tensor: Tensor) -> Tensor:
    """Contiguous and on a 16-byte boundary, which the kernels are compiled for."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _dense_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _dense(tensor)


def _dense_float_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _dense(tensor.float())


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's. And autocast has no say in what dtype is computed in."""
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
    if tensor.is_cuda:
        stack.enter_context(torch.cuda.device(tensor.device))
    return stack


def _project(x: Tensor, w_ih: Tensor) -> Tensor:
    """W_ih x of some steps in float32: one rounding less, which is worth little; see docs/numerics.md."""
    rows = x.reshape(-1, x.shape[2])
    if x.dtype == torch.float32 or not x.is_cuda:
        product = rows.float() @ w_ih.float().t()
    else:
        product = torch.mm(rows, w_ih.t(), out_dtype=torch.float32)
    return product.view(*x.shape[:2], -1)


@torch.library.custom_op("rnnfast::forward", mutates_args=())
def forward(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer, one direction, on the Triton kernels.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        x: (T, B, I), T, B, I >= 1; float16, bfloat16 or float32, as every other tensor.
        h0, c0: (B, H), or None for zeros; c0 None for a cell without a cell state.
        w_ih, w_hh: (G*H, I), (G*H, H).
        b_ih, b_hh: (G*H,), or both None.
        reverse: from the last step to the first.
        save: whether to keep what `backward` needs.

    Returns:
        y (T, B, H), h_n (B, H), c_n (B, H) or empty, and for backward the saved activations
        (T, B, `Cell.saved` * H) and all cell states (T, B, H) in float32, each empty where nothing is kept.
    """
    from rnnfast.kernels import cells, plan

    spec = cells.CELLS[cell]
    T, B, _ = x.shape
    H = w_hh.shape[1]
    with _on_device(x):
        y = x.new_empty(T, B, H)
        c = x.new_empty(T if save else 1, B, H, dtype=torch.float32) if spec.carries_c else None
        saved = x.new_empty((T, B, spec.saved * H) if save and spec.saved else (0,))
        w, start_h, start_c = _dense(w_hh), _dense_or_none(h0), _dense_float_or_none(c0)
        bias_x, bias_h = _dense_or_none(b_ih), _dense_or_none(b_hh)
        choice = families.pick(cell, T, B, H, x.dtype, precision(), False, save, x.device)
        n = plan.chunk_steps(T, B) if choice.persistent is None else choice.persistent.steps
        for begin in reversed(range(0, T, n)) if reverse else range(0, T, n):
            choice = families.run(
                "forward",
                choice,
                x.device,
                spec,
                _project(x[begin : begin + n], w_ih),
                begin,
                w,
                bias_x,
                bias_h,
                start_h,
                start_c,
                y,
                c,
                saved if save else None,
                reverse=reverse,
                precision=precision(),
            )
        last = 0 if reverse else -1
        h_n = y[last].clone()
        c_n = x.new_empty(0) if c is None else c[last].to(x.dtype, copy=True)
        cs = c if save and c is not None else x.new_empty(0, dtype=torch.float32)
    return y, h_n, c_n, saved, cs


@forward.register_fake
def _(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, save):
    T, B, _ = x.shape
    H = w_hh.shape[1]
    kept = SAVED[cell] if save else 0
    has_c = cell == "lstm"
    return (
        x.new_empty(T, B, H),
        x.new_empty(B, H),
        x.new_empty(B, H) if has_c else x.new_empty(0),
        x.new_empty(T, B, kept * H) if kept else x.new_empty(0),
        x.new_empty(T, B, H, dtype=torch.float32) if save and has_c else x.new_empty(0, dtype=torch.float32),
    )


@torch.library.custom_op("rnnfast::backward", mutates_args=())
def backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    y: Tensor,
    saved: Tensor,
    c: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_hh: Tensor,
    reverse: bool,
    need_h0: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of `forward` in reverse.

    Args:
        dy, dh_n, dc_n: gradients of y, h_n and c_n, None for zeros.
        y, saved, c: what `forward` returned.
        need_h0: whether h0's gradient is wanted, which takes one more product.

    Returns:
        The gate gradients (T, B, `Cell.grads` * H), the gradient of h0 (B, H) or empty, and that of c0 (B, H) or empty.
    """
    from rnnfast.kernels import cells

    spec = cells.CELLS[cell]
    T, B, H = y.shape
    with _on_device(y):
        d_gates = y.new_empty(T, B, spec.grads * H)
        d_h, d_c = (
            torch.zeros(B, H, dtype=torch.float32, device=y.device)
            if grad is None
            else grad.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            for grad in (dh_n, dc_n)
        )
        w = _dense(w_hh)
        families.run(
            "backward",
            families.pick(cell, T, B, H, y.dtype, precision(), True, True, y.device),
            y.device,
            spec,
            _dense_or_none(dy),
            saved,
            y,
            _dense_or_none(h0),
            c if spec.carries_c else None,
            _dense_float_or_none(c0),
            w,
            d_gates,
            d_h,
            d_c if spec.carries_c else None,
            reverse=reverse,
            precision=precision(),
        )
        dh0 = y.new_empty(0)
        if need_h0:
            first = d_gates[-1 if reverse else 0, :, (spec.grads - spec.gates) * H :]
            dh0 = first @ w
            if spec.direct:
                dh0 = (dh0 + d_h).to(y.dtype)
        dc0 = d_c.to(y.dtype, copy=True) if spec.carries_c else y.new_empty(0)
    return d_gates, dh0, dc0


@backward.register_fake
def _(cell, dy, dh_n, dc_n, y, saved, c, h0, c0, w_hh, reverse, need_h0):
    T, B, H = y.shape
    return (
        y.new_empty(T, B, GRADS[cell] * H),
        y.new_empty(B, H) if need_h0 else y.new_empty(0),
        y.new_empty(B, H) if cell == "lstm" else y.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    cell, x, h0, c0, w_ih, w_hh, _, _, reverse, save = inputs
    if not save:
        raise RuntimeError("rnnfast::forward was called with save=False on inputs that require gradients")
    y, _, _, saved, c = output
    ctx.cell, ctx.reverse = cell, reverse
    ctx.mark_non_differentiable(saved, c)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h0, c0, w_ih, w_hh, y, saved, c)


def _backward(ctx, dy, dh_n, dc_n, _d_saved, _d_c):
    x, h0, c0, w_ih, w_hh, y, saved, c = ctx.saved_tensors
    _, need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh, _, _ = ctx.needs_input_grad
    d_gates, dh0, dc0 = backward(ctx.cell, dy, dh_n, dc_n, y, saved, c, h0, c0, w_hh, ctx.reverse, need_h0)

    T, B, H = y.shape
    sides = GATES[ctx.cell] * H
    kept_apart = d_gates.shape[2] > sides  # the last gate's two sides: the input side is stored first, see Cell.grads
    rows = d_gates.view(T * B, -1)
    d_input, d_hidden = rows[:, :sides], rows[:, -sides:]
    dx = dw_ih = dw_hh = db_ih = db_hh = None
    if need_x:
        dx = (d_input @ (w_ih.roll(H, 0) if kept_apart else w_ih)).view(T, B, -1)
    if need_w_ih:
        dw_ih = d_input.t() @ x.reshape(T * B, -1)
        dw_ih = dw_ih.roll(-H, 0) if kept_apart else dw_ih
    if need_w_hh:
        # step t met y[t - 1], or y[t + 1] in reverse; the first step met h0
        first, met, by = (rows[-B:], y[1:], d_hidden[:-B]) if ctx.reverse else (rows[:B], y[:-1], d_hidden[B:])
        dw_hh = by.t() @ met.reshape((T - 1) * B, H)
        if h0 is not None:
            dw_hh = torch.addmm(dw_hh, first[:, -sides:].t(), h0)
    if need_b_ih:
        db_ih = d_input.sum(0)
        db_ih = db_ih.roll(-H, 0) if kept_apart else db_ih
    if need_b_hh:
        db_hh = d_hidden.sum(0)
    return None, dx, dh0 if need_h0 else None, dc0 if need_c0 else None, dw_ih, dw_hh, db_ih, db_hh, None, None


def _double_backward(ctx, *_):
    raise RuntimeError(
        "double backward through the Triton kernels is not supported yet: run this layer with backend='reference', "
        "or on a CPU with backend='torch'"
    )


torch.library.register_autograd("rnnfast::backward", _double_backward)
torch.library.register_autograd("rnnfast::forward", _backward, setup_context=_setup_context)


def layer(
    cell: str,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`rnnfast.reference.layer` on the Triton kernels; saves for backward only if there can be one. `states` may be None."""
    h0, c0 = (*states, None)[:2] if states else (None, None)
    inputs = (x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # as cuDNN's layer: everything in the lower precision
        low = torch.get_autocast_dtype(kind)
        inputs = tuple(None if tensor is None else tensor.to(low) for tensor in inputs)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    y, h_n, c_n, _, _ = forward(cell, *inputs, reverse, save)
    return y, (h_n, c_n) if cell == "lstm" else (h_n,)
