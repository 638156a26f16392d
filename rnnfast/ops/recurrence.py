"""One layer in one direction on the Triton kernels, forward and backward.

    forward    chunk after chunk of steps: W_ih x of the chunk, one GEMM through PyTorch into a float32 buffer that does not
               grow with T; then the recurrence over the chunk, on the kernels that `rnnfast.choice.kernel_plan` chose.
    backward   the recurrence in reverse, which writes the gate gradients of all steps. `rnnfast.ops.gradients` makes the
               gradients of weights, biases and inputs from them, by large products.

Everything in here is time-major and contiguous. Saved for backward, in bytes per unit and step, with elements of e bytes: LSTM
4 e + 4 (gates, and the cell state in float32), GRU 4 e, RNN nothing. The input and the output are saved too. Other layers
mostly keep those anyway, but two directions are joined in a copy, and dropout makes a copy. With ``recompute`` backward
computes the gates again, a chunk at a time, with two GEMMs: then LSTM 4, GRU nothing.

Lengths and resets come as marks (`rnnfast.reference.marks`); see `rnnfast.ops.marks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rnnfast.choice import kernel_plan
from rnnfast.choice.kernel_plan import precision
from rnnfast.ops.marks import empty_start_grads, entered, for_kernels, last_states, start_grads
from rnnfast.torch_private import forward_level

__all__ = ["CHUNK_ROWS", "backward", "forward", "no_autocast", "on_device", "project"]

# Time steps x batch rows whose input side is computed by one GEMM, into one float32 buffer: enough to fill a GPU with the GEMM,
# few enough that for H up to 1024 the buffer (4 H floats a row) stays in the L2 of an H100 and never grows with T.
CHUNK_ROWS = 2048


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each contiguous and on a 16-byte boundary, which the kernels are compiled for; None for None."""
    found = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    return [tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone() for tensor in found]


def no_autocast(kind: str) -> contextlib.AbstractContextManager:
    """Switch autocast off for a kind of device. Where it is off already, entering it again would cost microseconds. (PyTorch
    raises where there is no autocast, as for meta tensors.)"""
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else contextlib.nullcontext()


@contextlib.contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Make the tensor's device current, because Triton launches on the current device, and switch autocast off."""
    kind = tensor.device.type
    autocast = no_autocast(kind) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
    with autocast, torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        yield


def project(x: Tensor, w_ih: Tensor) -> Tensor:
    """W_ih x of some steps, in float32. That saves one rounding, which is worth little: see docs/numerics.md."""
    rows = x.reshape(-1, x.shape[2])
    if x.dtype == torch.float32 or not x.is_cuda:
        product = rows.float() @ w_ih.float().t()
    else:
        product = torch.mm(rows, w_ih.t(), out_dtype=torch.float32)
    return product.view(*x.shape[:2], -1)


def _refuse_forward_mode() -> None:
    """PyTorch takes the forward-mode derivative of an operator without a rule for zero. rnnfast's layers do not come here in
    forward mode, but programs that were compiled or exported before may."""
    raise NotImplementedError(
        "rnnfast's operators have no forward-mode derivative, and this program calls them itself, for it was compiled or "
        "exported outside of forward mode: run the layer as it is, or compile within rnnfast.use_backend('reference')"
    )


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
    marks: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer, one direction.

    Args:
        cell: a name in `rnnfast.reference.CELLS`.
        x: (T, B, I), T, B, I >= 1; float16, bfloat16 or float32, as every other tensor.
        h0, c0: (B, H), or None for zeros. c0 is None for a cell without a cell state.
        w_ih, w_hh: (G*H, I), (G*H, H).
        b_ih, b_hh: (G*H,), or both None.
        reverse: from the last step to the first.
        save: whether to save what `backward` needs.
        marks: (T, B) of `rnnfast.reference.marks` for this direction, or None.
        lengths: (B,) in 0..T, those that `marks` was made of. None if it has no padding.
        reset_h, reset_c: (B, H), the states after a reset. None for zeros.
        recompute: save only the float32 cell states. `backward` recomputes the gates from x and y.

    Returns:
        y (T, B, H), zero in padding; h_n (B, H); c_n (B, H); the saved activations (T, B, `Cell.saved` * H); all cell states
        (T, B, H) in float32. The saved ones are zero in padding. Each is empty where there is none or it is not saved.
    """
    from rnnfast.kernels import cells

    if forward_level() >= 0:
        _refuse_forward_mode()
    spec = cells.CELLS[cell]
    T, B, _ = x.shape
    H = w_hh.shape[1]
    with on_device(x):
        new = x.new_empty if lengths is None else x.new_zeros  # the kernels write nothing in padding
        y = new(T, B, H)
        c = new(T if save else 1, B, H, dtype=torch.float32) if spec.carries_c else None
        saved = new((T, B, spec.saved * H) if save and spec.saved and not recompute else (0,))
        w, start_h, start_c, bias_x, bias_h = _dense(w_hh, h0, None if c0 is None else c0.float(), b_ih, b_hh)
        products = precision()
        choice = kernel_plan.pick(cell, T, B, H, x.dtype, products, False, save, x.device, marks is not None)
        options = {}
        if marks is not None:
            starts_c = (start_c, reset_c) if spec.carries_c else None
            options["marks"] = for_kernels(marks, lengths, (start_h, reset_h), starts_c, y, choice.plan.BLOCK_B)
        n = choice.plan.steps or max(1, CHUNK_ROWS // B)
        wide = x.is_cuda and x.dtype != torch.float32  # a product of half precision that gives float32
        w_x = w_ih.t() if wide else w_ih.float().t()
        for begin in reversed(range(0, T, n)) if reverse else range(0, T, n):
            rows = x[begin : begin + n].reshape(-1, x.shape[2])
            sides = torch.mm(rows, w_x, out_dtype=torch.float32) if wide else rows.float() @ w_x
            choice = kernel_plan.run(
                "forward",
                choice,
                x.device,
                spec,
                sides.view(-1, B, sides.shape[1]),
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
                precision=products,
                **options,
            )
        h_n = last_states(y, h0, lengths, reverse)
        c_n = x.new_empty(0) if c is None else last_states(c, c0, lengths, reverse).to(x.dtype)
        cs = c if save and c is not None else x.new_empty(0, dtype=torch.float32)
    return y, h_n, c_n, saved, cs


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
    need_starts: bool,
    dcs: Tensor | None = None,
    marks: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    x: Tensor | None = None,
    w_ih: Tensor | None = None,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The recurrence of `forward` in reverse.

    Args:
        dy, dh_n, dc_n: gradients of y, h_n and c_n, None for zeros.
        y, saved, c: what `forward` returned.
        need_starts: whether h0's gradient is wanted (one more product); with marks, that of any initial or reset state.
        dcs: gradient of all cell states (T, B, H) in float32, or None.
        marks, lengths, reset_h, reset_c: as in `forward`.
        x, w_ih, b_ih, b_hh: as in `forward`, if that was called with ``recompute``.

    Returns:
        The gate gradients (T, B, `Cell.grads` * H), zero in padding, and the gradients of h0, c0, reset_h and reset_c, each
        (B, H), or empty where there is none or it is not wanted.
    """
    from rnnfast.kernels import cells
    from rnnfast.kernels.recompute import compute

    if forward_level() >= 0:
        _refuse_forward_mode()
    spec = cells.CELLS[cell]
    T, B, H = y.shape
    with on_device(y):
        d_gates = (y.new_empty if lengths is None else y.new_zeros)(T, B, spec.grads * H)
        d_h, d_c = (
            torch.zeros(B, H, dtype=torch.float32, device=y.device)
            if grad is None
            else grad.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            for grad in (dh_n, dc_n)
        )
        start_c = None if c0 is None else c0.float()
        w, start_h, start_c, bias_x, bias_h, dy, dcs = _dense(w_hh, h0, start_c, b_ih, b_hh, dy, dcs)
        assert w is not None
        products = precision()
        choice = kernel_plan.pick(cell, T, B, H, y.dtype, products, True, True, y.device, marks is not None)
        options: dict[str, Any] = {}
        if marks is not None:
            starts_c = (start_c, reset_c) if spec.carries_c else None
            options["marks"] = for_kernels(marks, lengths, (start_h, reset_h), starts_c, y, choice.plan.BLOCK_B)
            if need_starts:
                options["d_starts"] = empty_start_grads(options["marks"])
        recompute = x is not None and spec.saved > 0
        n = max(1, CHUNK_ROWS // B) if recompute else T
        before = entered(y, h0, reset_h, marks, reverse) if recompute and marks is not None else None
        for begin in range(0, T, n) if reverse else reversed(range(0, T, n)):
            steps = min(n, T - begin)
            if recompute:
                assert x is not None and w_ih is not None
                h_before = _entering(begin, steps, y, h0, reverse) if before is None else before[begin : begin + steps]
                saved = y.new_empty(steps, B, spec.saved * H)
                sides = project(x[begin : begin + steps], w_ih), project(h_before, w)
                compute(spec, *sides, bias_x, bias_h, saved)
            choice = kernel_plan.run(
                "backward",
                choice,
                y.device,
                spec,
                dy,
                saved,
                y,
                start_h,
                c if spec.carries_c else None,
                start_c,
                w,
                d_gates,
                d_h,
                d_c if spec.carries_c else None,
                reverse=reverse,
                precision=products,
                begin=begin,
                steps=steps,
                dcs=dcs,
                **options,
            )
        first = d_gates[-1 if reverse else 0, :, (spec.grads - spec.gates) * H :] if need_starts else None
        direct = d_h if spec.direct else None
        if marks is not None:
            grads = start_grads(first, w, direct, d_h, d_c, marks[-1 if reverse else 0], lengths, options.get("d_starts"))
        else:
            grads = [None if first is None else first @ w, d_c if spec.carries_c else None, None, None]
            if grads[0] is not None and direct is not None:
                grads[0] = grads[0] + direct
    d_h0, d_c0, d_reset_h, d_reset_c = (y.new_empty(0) if grad is None else grad.to(y.dtype, copy=True) for grad in grads)
    return d_gates, d_h0, d_c0, d_reset_h, d_reset_c


def _entering(begin: int, steps: int, y: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """The h that entered the steps begin, ..., begin + steps - 1, (steps, B, H), of a call without marks."""
    start = torch.zeros_like(y[:1]) if h0 is None else h0[None]
    if reverse:
        at_edge = begin + steps == y.shape[0]
        return torch.cat([y[begin + 1 : begin + steps], start]) if at_edge else y[begin + 1 : begin + steps + 1]
    return torch.cat([start, y[: steps - 1]]) if begin == 0 else y[begin - 1 : begin + steps - 1]
