"""The kernels as PyTorch operators: ``rnnfast::forward`` and ``rnnfast::backward``, one layer, one direction each.

    forward    for one chunk of steps after another: W_ih x of the chunk, one GEMM through PyTorch into a float32 buffer that
               does not grow with T; then the recurrence over the chunk, on the kernels that
               `rnnfast.families` chose.
    backward   the recurrence in reverse, which writes the gate gradients of all steps; then, in `rnnfast.ops_autograd`, each
               weight, bias and input gradient as one GEMM or sum over T * B, through PyTorch, and only those that are needed.

Inside, everything is time-major and contiguous. Kept for backward, in bytes per unit and step, e being the size of an
element: LSTM 4 e + 4 (gates and the float32 cell state), GRU 4 e, RNN nothing; besides the layer's input and its output, which
mostly live anyway (two directions are joined in a copy, and dropout makes one). With ``recompute`` backward computes the gates
again, a chunk at a time, with two GEMMs: LSTM 4, GRU nothing.

Lengths and resets reach the operators as marks (`rnnfast.reference.marks`); see `rnnfast.ops_marks`.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnfast import families, ops_autograd, ops_marks, reference, torch_private
from rnnfast.families import precision
from rnnfast.reference import GATES, GRADS, RESETS, SAVED, STARTS

__all__ = ["FLOP_FORMULAS", "backward", "forward", "on_device", "precision"]


def _dense(tensor: Tensor) -> Tensor:
    """Contiguous and on a 16-byte boundary, which the kernels are compiled for."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _dense_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _dense(tensor)


def _dense_float_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _dense(tensor.float())


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
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


def _refuse_forward_mode() -> None:
    """rnnfast's layers never come here with it, but compiled and exported programs may, and PyTorch would take the derivative
    of an operator without a rule for zero."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "rnnfast's operators have no forward-mode derivative, and this program calls them itself, for it was compiled or "
            "exported outside of forward mode: run the layer as it is, or compile within rnnfast.use_backend('reference')"
        )


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
    marks: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    recompute: bool = False,
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
        marks: (T, B) of `rnnfast.reference.marks` for this direction, or None.
        lengths: (B,) those that `marks` was made of, in 0..T; None if it has no padding.
        reset_h, reset_c: (B, H), the states that resets begin from, or None for zeros.
        recompute: whether to save the cell states alone, of which and of the outputs `backward` computes the rest again.

    Returns:
        y (T, B, H), zero in padding; h_n (B, H), c_n (B, H) or empty; and for backward the saved activations
        (T, B, `Cell.saved` * H) and all cell states (T, B, H) in float32, each empty where nothing is kept, zero in
        padding too.
    """
    from rnnfast.kernels import cells, plan

    _refuse_forward_mode()
    spec = cells.CELLS[cell]
    T, B, _ = x.shape
    H = w_hh.shape[1]
    with on_device(x):
        new = x.new_empty if lengths is None else x.new_zeros  # the kernels leave padding alone
        y = new(T, B, H)
        c = new(T if save else 1, B, H, dtype=torch.float32) if spec.carries_c else None
        saved = new((T, B, spec.saved * H) if save and spec.saved and not recompute else (0,))
        w, start_h, start_c = _dense(w_hh), _dense_or_none(h0), _dense_float_or_none(c0)
        bias_x, bias_h = _dense_or_none(b_ih), _dense_or_none(b_hh)
        choice = families.pick(cell, T, B, H, x.dtype, precision(), False, save, x.device, marks is not None)
        options = {}
        if marks is not None:
            starts_c = (start_c, reset_c) if spec.carries_c else None
            options = ops_marks.for_kernels(marks, lengths, (start_h, reset_h), starts_c, y, choice.tile)
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
                **options,
            )
        h_n = ops_marks.last_states(y, h0, lengths, reverse)
        c_n = x.new_empty(0) if c is None else ops_marks.last_states(c, c0, lengths, reverse).to(x.dtype)
        cs = c if save and c is not None else x.new_empty(0, dtype=torch.float32)
    return y, h_n, c_n, saved, cs


@forward.register_fake
def _(
    cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, save,
    marks=None, lengths=None, reset_h=None, reset_c=None, recompute=False,
):  # fmt: skip
    T, B, _ = x.shape
    H = w_hh.shape[1]
    kept = SAVED[cell] if save and not recompute else 0
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
    from rnnfast.kernels import cells, gates, plan

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
        w, start_h, start_c = _dense(w_hh), _dense_or_none(h0), _dense_float_or_none(c0)
        choice = families.pick(cell, T, B, H, y.dtype, precision(), True, True, y.device, marks is not None)
        options: dict[str, Tensor | None] = {}
        if marks is not None:
            starts_c = (start_c, reset_c) if spec.carries_c else None
            options = ops_marks.for_kernels(marks, lengths, (start_h, reset_h), starts_c, y, choice.tile)
            for name in ("starts_h", "starts_c") if need_starts else ():
                starts = options[name]
                options[f"d_{name}"] = None if starts is None else torch.zeros_like(starts, dtype=torch.float32)
        if dcs is not None:
            options["dcs"] = _dense(dcs)
        again = x is not None and spec.saved > 0
        n = plan.chunk_steps(T, B) if again else T
        entered = ops_marks.entered(y, h0, reset_h, marks, reverse) if again and marks is not None else None
        for begin in range(0, T, n) if reverse else reversed(range(0, T, n)):
            steps = min(n, T - begin)
            if again:
                assert x is not None and w_ih is not None
                h_before = _entering(begin, steps, y, h0, reverse) if entered is None else entered[begin : begin + steps]
                saved = y.new_empty(steps, B, spec.saved * H)
                sides = _project(x[begin : begin + steps], w_ih), _project(h_before, w)
                gates.compute(spec, *sides, _dense_or_none(b_ih), _dense_or_none(b_hh), saved)
            choice = families.run(
                "backward",
                choice,
                y.device,
                spec,
                _dense_or_none(dy),
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
                precision=precision(),
                begin=begin,
                steps=steps,
                **options,
            )
        first = d_gates[-1 if reverse else 0, :, (spec.grads - spec.gates) * H :] if need_starts else None
        direct = d_h if spec.direct else None
        if marks is not None:
            grads = ops_marks.start_grads(first, w, direct, d_h, d_c, marks[-1 if reverse else 0], lengths, options)
        else:
            grads = [None if first is None else first @ w, d_c if spec.carries_c else None, None, None]
            if grads[0] is not None and direct is not None:
                grads[0] = grads[0] + direct
    dh0, dc0, d_reset_h, d_reset_c = (y.new_empty(0) if grad is None else grad.to(y.dtype, copy=True) for grad in grads)
    return d_gates, dh0, dc0, d_reset_h, d_reset_c


@backward.register_fake
def _(
    cell, dy, dh_n, dc_n, y, saved, c, h0, c0, w_hh, reverse, need_starts,
    dcs=None, marks=None, lengths=None, reset_h=None, reset_c=None, x=None, w_ih=None, b_ih=None, b_hh=None,
):  # fmt: skip
    T, B, H = y.shape
    has_c, marked = cell == "lstm", marks is not None
    return (
        y.new_empty(T, B, GRADS[cell] * H),
        y.new_empty(B, H) if need_starts else y.new_empty(0),
        y.new_empty(B, H) if has_c and (need_starts or not marked) else y.new_empty(0),
        y.new_empty(B, H) if need_starts and marked else y.new_empty(0),
        y.new_empty(B, H) if need_starts and marked and has_c else y.new_empty(0),
    )


def _entering(begin: int, steps: int, y: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """The h that entered the steps begin, ..., begin + steps - 1, (steps, B, H), where nothing is marked."""
    start = torch.zeros_like(y[:1]) if h0 is None else h0[None]
    if reverse:
        at_edge = begin + steps == y.shape[0]
        return torch.cat([y[begin + 1 : begin + steps], start]) if at_edge else y[begin + 1 : begin + steps + 1]
    return torch.cat([start, y[: steps - 1]]) if begin == 0 else y[begin - 1 : begin + steps - 1]


def _setup_context(ctx, inputs, output):
    if not inputs[9]:
        raise RuntimeError("rnnfast::forward was called with save=False on inputs that require gradients")
    ops_autograd.setup_context(ctx, inputs, output)


torch.library.register_autograd("rnnfast::forward", ops_autograd.backward, setup_context=_setup_context)
torch.library.register_autograd("rnnfast::backward", ops_autograd.refuse)
torch.library.register_vmap("rnnfast::forward", ops_autograd.vmap_forward)
torch.library.register_vmap("rnnfast::backward", ops_autograd.vmap_backward)


def _forward_flops(cell, x, h0, c0, w_ih, w_hh, *_, **options) -> int:
    """W_ih x of all steps, W_hh h of all but a first one that begins from zeros. A multiplication and an addition are two."""
    (T, B, I), (rows, H) = x, w_hh
    return 2 * B * rows * (T * I + (T - (h0 is None)) * H)


def _backward_flops(
    cell, dy, dh_n, dc_n, y, saved, c, h0, c0, w_hh, reverse, need_starts,
    dcs=None, marks=None, lengths=None, reset_h=None, reset_c=None, x=None, *_, **options,
) -> int:  # fmt: skip
    """The gradient of each h_{t-1}, that of an initial one if it is wanted, and both sides of gates that were not kept."""
    (T, B, _), (rows, H) = y, w_hh
    again = T * (x[2] + H) if x is not None and SAVED[cell] else 0
    return 2 * B * rows * (H * (T - 1 + need_starts) + again)


# for FlopCounterMode(custom_mapping=...): its own table is in a module that imports Triton
FLOP_FORMULAS = {torch.ops.rnnfast.forward: _forward_flops, torch.ops.rnnfast.backward: _backward_flops}


def layer(*args, **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`rnnfast.reference.layer` on the Triton kernels; saves for backward only if there can be one."""
    y, last, *_ = _unroll(*args, **options, details=False)
    return y, last


def trace(*args, **options) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """`rnnfast.reference.trace` on the Triton kernels, which keep the states and gates of all steps as they do for backward."""
    y, last, saved, cs = _unroll(*args, **options, details=True)
    return y, last, *_details(args[0], y, saved, cs)


def _unroll(
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
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
    h0, c0 = (*states, None)[:2] if states else (None, None)
    reset_h, reset_c = (*reset_to, None)[:2] if reset_to else (None, None)
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, reset_h, reset_c, w_hr)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # as cuDNN's layer: everything in the lower precision
        low = torch.get_autocast_dtype(kind)
        tensors = tuple(None if tensor is None else tensor.to(low) for tensor in tensors)
    marks = None
    if lengths is not None or resets is not None:
        marks = reference.marks(x, lengths, resets, reverse)
    run = forward if not torch_private.inside() else ops_autograd.Layer.apply
    needed = run is not forward or any(tensor is not None and tensor.requires_grad for tensor in tensors)
    save = details or (torch.is_grad_enabled() and needed)
    layout = _plain if w_hr is None else _projected
    y, h_n, c_n, saved, cs = layout(run, cell, tensors, reverse, save, marks, lengths, recompute and not details)
    last = (h_n, c_n) if cell == "lstm" else (h_n,)
    return y, last, saved, cs


def _plain(run, cell, tensors, reverse, save, marks, lengths, recompute):
    *layer, reset_h, reset_c, _ = tensors
    return run(cell, *layer, reverse, save, marks, lengths, reset_h, reset_c, recompute)


def _projected(run, cell, tensors, reverse, save, marks, lengths, recompute):
    """An LSTM with projection as one without: m_t = o tanh(c_t) gives h_t = W_hr m_t and W_hh h_{t-1} = (W_hh W_hr) m_{t-1}, so
    the kernels run on m and that one matrix. An h that is given, not being W_hr m, comes in at its steps by the input."""
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, reset_h, reset_c, w_hr = tensors
    B, (P, H) = x.shape[1], w_hr.shape
    if h0 is not None or reset_h is not None:
        codes = reference.marks(x, None, None, reverse) if marks is None else marks
        zeros, codes = x.new_zeros(B, P), codes[..., None]
        start, anew = zeros if h0 is None else h0, zeros if reset_h is None else reset_h
        given = torch.where(codes == STARTS, start, torch.where(codes == RESETS, anew, zeros))
        x, w_ih = torch.cat([x, given], dim=2), torch.cat([w_ih, w_hh], dim=1)
    m0 = None if c0 is None else x.new_zeros(B, H)  # a kernel takes both states or none
    m, m_n, c_n, saved, cs = run(
        cell, x, m0, c0, w_ih, w_hh @ w_hr, b_ih, b_hh, reverse, save, marks, lengths, None, reset_c, recompute
    )
    h_n = m_n @ w_hr.t()
    if h0 is not None and lengths is not None:
        h_n = torch.where((lengths > 0)[:, None], h_n, h0)
    return m @ w_hr.t(), h_n, c_n, saved, cs


def _details(cell: str, y: Tensor, saved: Tensor, cs: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """The cell states and the gates of all steps, as `rnnfast.reference.trace` gives them."""
    T, B, _ = y.shape
    gates = saved.view(T, B, SAVED[cell], -1)[:, :, : GATES[cell]] if SAVED[cell] else y.detach()[:, :, None]
    cells = (cs,) if cell == "lstm" else ()
    return tuple(c.to(y.dtype) for c in cells), gates
