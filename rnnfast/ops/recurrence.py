"""A group of recurrences on the Triton kernels, forward and backward: the directions of a layer, its heads, or a stack.

    forward    chunk after chunk of steps: the input sides of the chunk (`rnnfast.ops.rounds`), by products through PyTorch into
               a float32 buffer that does not grow with T; then the recurrences of all members over the chunk, on the kernels
               that `rnnfast.choice.kernel_plan` chose.
    backward   the recurrences in reverse, which write the gate gradients of all steps. `rnnfast.ops.gradients` makes the
               gradients of weights, biases and inputs from them, by large products.

A stack of one direction is a pipeline: while a layer runs a chunk, the layer below runs the next one
(`rnnfast.kernels.groups`). What a layer takes from the one below was written by an earlier launch. Where a group does not fit
on the GPU at once, it runs in parts, one after another.

Everything in here is time-major and contiguous. Saved for backward, in bytes per unit and step, with elements of e bytes: LSTM
4 e + 4 (gates, and the cell state in float32), GRU 4 e, RNN nothing. A cell of one's own takes `Cell.saved` * e and 4 for
each carried state. The input and the output are saved too, which other layers
mostly keep anyway, and the outputs of all layers of a pipeline. With ``recompute`` backward computes the gates again, a chunk
at a time, with two products: then LSTM 4, GRU nothing.

Lengths and resets come as marks (`rnnfast.reference.marks`); see `rnnfast.ops.marks`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnnfast import torch_private
from rnnfast.choice import kernel_plan
from rnnfast.choice.kernel_plan import precision
from rnnfast.choice.pipeline import CHUNK_ROWS
from rnnfast.ops.marks import (
    by_member,
    empty_start_grads,
    first_steps,
    for_kernels,
    last_states,
    of_members,
    own_marks,
    start_grads,
)
from rnnfast.ops.products import product
from rnnfast.ops.rounds import Recomputed, Sides, input_sides, output_gradients, sides_of_layers, upstream_of_layers
from rnnfast.reference import spec_of
from rnnfast.torch_private import forward_level

if TYPE_CHECKING:
    from rnnfast.kernels.cells import Cell
    from rnnfast.kernels.given import Given
    from rnnfast.kernels.groups import Group

__all__ = ["CHUNK_ROWS", "backward", "forward", "is_eager", "no_autocast", "on_device"]

_PLAIN = (Tensor, torch.nn.Parameter)
MOST_FLIPS = 31  # members of a launch that have a bit of `Group.flips`, which is a number of 32 bits


def kernel_cell(name: str) -> Cell:
    """What the kernels know of the cell of this name, which is none of PyTorch's; from then on `CELLS` has it."""
    from rnnfast.derive import registry
    from rnnfast.kernels.cells import CELLS

    spec_of(name)
    CELLS[name] = registry.kernel_cell(name)
    return CELLS[name]


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each contiguous and on a 16-byte boundary, which the kernels are compiled for; None for None."""
    found = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    return [tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone() for tensor in found]


def no_autocast(kind: str) -> contextlib.AbstractContextManager:
    """Switch autocast off for a kind of device. Where it is off already, entering it again would cost microseconds. (PyTorch
    raises where there is no autocast, as for meta tensors.)"""
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else contextlib.nullcontext()


def _given(cell: Cell, held: Tensor | None, noise: Tensor | None) -> Given:
    """What the kernels give to a cell besides its gates and states."""
    from rnnfast.kernels.given import Given

    held, noise = _dense(None if held is None else held.float(), noise)
    return Given(held if cell.held else None, noise if cell.noise else None)


@contextlib.contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Make the tensor's device current, because Triton launches on the current device, and switch autocast off."""
    kind = tensor.device.type
    autocast = no_autocast(kind) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
    with autocast, torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        yield


def is_eager(*values: Any) -> bool:
    """Whether nobody but autograd would see an operator that is called with these arguments: no compiler, no transform, no mode
    of dispatch, no profiler, no subclass of Tensor. What the operator does can then be called as it is. PyTorch's way through
    an operator that is written in Python takes 20 us of the host's time forward, and 40 us with gradients."""
    return not (
        torch.compiler.is_compiling()
        or torch_private.thread.__dict__.get("tracing_context") is not None
        or torch_private.innermost_transform() is not None
        or torch_private.forward_level() >= 0
        or torch_private.dispatch_modes()
        or torch_private.function_modes()
        or torch_private.profiles()
        or any([isinstance(value, Tensor) and (type(value) not in _PLAIN or value.is_meta) for value in values])
    )


def _refuse_forward_mode() -> None:
    """PyTorch takes the forward-mode derivative of an operator without a rule for zero. rnnfast's layers do not come here in
    forward mode, but programs that were compiled or exported before may."""
    raise NotImplementedError(
        "rnnfast's operators have no forward-mode derivative, and this program calls them itself, for it was compiled or "
        "exported outside of forward mode: run the layer as it is, or compile within rnnfast.use_backend('reference')"
    )


@functools.lru_cache(1024)
def _groups(M: int, D: int, flips: int, at_once: int, chunk: int) -> list[tuple[slice, Group]]:
    """The parts in which all members run, one part after another: which members, and their group. Directions or heads that run
    without the others have outputs of their own."""
    from rnnfast.kernels.groups import Group

    found = []
    at_once = min(at_once, MOST_FLIPS) if flips else at_once
    for first in range(0, M, at_once):
        count = min(at_once, M - first)
        own, lag = flips >> first & ((1 << count) - 1), chunk if count > 1 else 0
        found.append((slice(first, first + count), Group(count, min(D, count), own, lag)))
    return found


def forward(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_up: Tensor | None,
    flips: int,
    save: bool,
    marks: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    seeds: Tensor | None = None,
    dropout: float = 0.0,
    recompute: bool = False,
    held: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A group of M members: the D directions or heads of a layer, M = D, or a stack of M layers in one direction, D = 1.

    C is the number of states that the cell carries besides h. In memory they lie side by side.

    Args:
        cell: a name in `rnnfast.reference.CELLS`.
        x: (T, B, I), T, B, I >= 1; float16, bfloat16 or float32, as every other tensor.
        h0, c0: (M, B, H) and (M, B, C*H), or None for zeros. c0 is None for a cell without a carried state.
        w_ih: (D, G*H, I), of the members that read `x`.
        w_hh: (M, G*H, H); (M, 0, H) for a cell without W_hh.
        b_ih, b_hh: (M, G*H), or both None. b_hh is None for a cell without W_hh.
        w_up: (M - 1, G*H, H), the input weights of the layers above the first. None for directions.
        flips: bit m is 1 if member m runs from the last step to the first.
        save: whether to save what `backward` needs.
        marks: (D, T, B) of `rnnfast.reference.marks` for each direction, or None.
        lengths: (B,) in 0..T, those that `marks` was made of. None if it has no padding.
        reset_h, reset_c: (M, B, H) and (M, B, C*H), the states after a reset. None for zeros.
        seeds: (M - 1,) int64, of the dropout between the layers (`rnnfast.kernels.dropout`). None without.
        dropout: the probability that an element is dropped.
        recompute: save only the float32 states. `backward` recomputes what it needs from x and the states.
        held: (M, B, `Cell.held` * H), what no step changes; None for a cell without.
        noise: (M,) int64, the seeds of the random numbers; None for a cell without.

    Returns:
        y (T, B, D*H), zero in padding; h_n (M, B, H); c_n (M, B, C*H); the outputs of all layers (M, T, B, H), if there are
        several; the saved activations (M, T, B, `Cell.saved` * H); all carried states (M, T, B, C*H) in float32. The saved ones
        are zero in padding. Each is empty where there is none or it is not saved.
    """
    from rnnfast.kernels.cells import CELLS

    if forward_level() >= 0:
        _refuse_forward_mode()
    spec = CELLS[cell] if cell in CELLS else kernel_cell(cell)
    (T, B, _), (M, _, H), D = x.shape, w_hh.shape, w_ih.shape[0]
    if flips and M > D:
        raise RuntimeError("the layers of a stack run from the first step to the last, and flips must be 0")
    with on_device(x):
        new = x.new_empty if lengths is None else x.new_zeros  # the kernels write nothing in padding
        h = new(M, T, B, H) if M > D else new(T, B, D * H)
        c = new(M, T if save else 1, B, spec.carried * H, dtype=torch.float32) if spec.carried else None
        saved = new((M, T, B, spec.saved * H) if spec.saved and not recompute else (0,)) if save else None
        w, start_h, start_c, bias_x, bias_h = _dense(w_hh, h0, None if c0 is None else c0.float(), b_ih, b_hh)
        products = precision()
        choice = kernel_plan.pick(cell, T, B, H, x.dtype, products, False, save, x.device, marks is not None, M, M > D)
        marked = None
        if marks is not None:
            starts_c = (start_c, reset_c) if spec.carried else None
            marked = for_kernels(marks, lengths, (start_h, reset_h), starts_c, (M, B, H), x, spec.carried, choice.plan.BLOCK_B)
        own_tiles = None if held is None and noise is None else _given(spec, held, noise)
        members, stack = (w, bias_x, bias_h, start_h, start_c, c, saved), (h, w_up, seeds, dropout, CHUNK_ROWS) if M > D else ()
        for part, group in _groups(M, D, flips, choice.members, min(T, choice.chunk)):
            N = group.lag or min(T, choice.plan.steps or max(1, CHUNK_ROWS // (B * group.members)))
            own = members if group.members == M else of_members(part, *members)
            if M > D:
                out = h[part] if group.layers else h[part.start]
            else:
                out = h if group.members == M else new(T, B, group.members * H)
            choice = kernel_plan.run(
                "forward",
                choice,
                x.device,
                spec,
                partial(input_sides, group, T, N, part, x, w_ih, *stack),
                *own[:5],
                out,
                *own[5:],
                group=group,
                precision=products,
                **({} if marked is None else {"marks": own_marks(marked, part)}),
                **({} if own_tiles is None else {"given": type(own_tiles)(*of_members(part, *own_tiles))}),
            )
            if out is not h and M == D:
                h[..., part.start * H : part.stop * H] = out
        h_n = last_states(by_member(h, D), h0, lengths, flips)
        c_n = x.new_empty(0) if c is None else last_states(c, c0, lengths, flips).to(x.dtype)
        cs = c if save and c is not None else x.new_empty(0, dtype=torch.float32)
        y, layers = (h, x.new_empty(0)) if M == D else (h[-1].clone(), h if save else x.new_empty(0))
    return y, h_n, c_n, layers, x.new_empty(0) if saved is None else saved, cs


def backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    h: Tensor,
    saved: Tensor,
    c: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_hh: Tensor,
    w_up: Tensor | None,
    flips: int,
    need_starts: bool,
    dcs: Tensor | None = None,
    marks: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    seeds: Tensor | None = None,
    dropout: float = 0.0,
    x: Tensor | None = None,
    w_ih: Tensor | None = None,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    held: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The recurrences of `forward` in reverse.

    Args:
        dy, dh_n, dc_n: gradients of y, h_n and c_n, None for zeros.
        h: the outputs of all members: y (T, B, D*H) of directions, else what `forward` returned (M, T, B, H).
        saved, c: what `forward` returned.
        need_starts: whether h0's gradient is wanted (one more product); with marks, that of any initial or reset state.
        dcs: gradient of all carried states (M, T, B, C*H) in float32, or None.
        marks, lengths, reset_h, reset_c, w_up, flips, seeds, dropout, held, noise: as in `forward`.
        x, w_ih, b_ih, b_hh: as in `forward`, if that was called with ``recompute``.

    Returns:
        The gate gradients (M, T, B, `Cell.grads` * H), zero in padding, and the gradients of h0, c0, reset_h, reset_c and held,
        in their shapes, or empty where there is none or it is not wanted.
    """
    from rnnfast.kernels.cells import CELLS

    if forward_level() >= 0:
        _refuse_forward_mode()
    spec = CELLS[cell] if cell in CELLS else kernel_cell(cell)
    M, _, H = w_hh.shape
    D = h.shape[-1] // H
    T, B = h.shape[-3:-1]
    with on_device(h):
        d_gates = (h.new_empty if lengths is None else h.new_zeros)(M, T, B, spec.grads * H)
        d_h, d_c = (
            torch.zeros(M, B, blocks * H, dtype=torch.float32, device=h.device)
            if grad is None
            else grad.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            for grad, blocks in ((dh_n, 1), (dc_n, spec.carried))
        )
        start_c = None if c0 is None else c0.float()
        w, start_h, start_c, bias_x, bias_h, dy, dcs = _dense(w_hh, h0, start_c, b_ih, b_hh, dy, dcs)
        assert w is not None
        products = precision()
        choice = kernel_plan.pick(cell, T, B, H, h.dtype, products, True, True, h.device, marks is not None, M, M > D)
        marked, d_starts = None, None
        if marks is not None:
            starts_c = (start_c, reset_c) if spec.carried else None
            marked = for_kernels(marks, lengths, (start_h, reset_h), starts_c, (M, B, H), h, spec.carried, choice.plan.BLOCK_B)
            d_starts = empty_start_grads(marked) if need_starts else None
        own_tiles = None if held is None and noise is None else _given(spec, held, noise)
        d_held = torch.zeros(M, B, spec.held * H, dtype=torch.float32, device=h.device) if spec.held else None
        recompute = x is not None and spec.saved > 0
        for part, group in reversed(_groups(M, D, flips, choice.members, min(T, choice.chunk))):
            N = group.lag or min(T, choice.plan.steps or T)
            if recompute and not group.layers:
                N = min(N, max(1, CHUNK_ROWS // (B * group.members)))
            own_h, own_dy, upstream = h, dy, None
            if M > D:
                own_h = h[part] if group.layers else h[part.start]
                upstream = upstream_of_layers(part, dy, d_gates, w_up, spec, seeds, dropout)
            elif group.members < M:  # directions or heads without the others
                columns = slice(part.start * H, part.stop * H)
                own_h = h[..., columns].contiguous()
                own_dy = None if dy is None else dy[..., columns].contiguous()
            own_w, own_h0, own_c0, own_bias_x, own_bias_h = of_members(part, w, start_h, start_c, bias_x, bias_h)
            own_codes = own_marks(marked, part)
            own_c, own_d_gates, own_d_h, own_d_c, own_dcs, own_d_held = of_members(
                part, c if spec.carried else None, d_gates, d_h, d_c if spec.carried else None, dcs, d_held
            )
            own_given = None if own_tiles is None else type(own_tiles)(*of_members(part, *own_tiles))
            again = None
            if recompute:
                assert x is not None and w_ih is not None and own_w is not None
                sides = Sides(x, w_ih[part]) if M == D else sides_of_layers(part, x, w_ih, h, w_up, seeds, dropout)
                outputs = by_member(own_h, group.directions)
                entered = outputs, own_h0, own_c, own_c0
                weights = own_w, own_bias_x, own_bias_h
                again = Recomputed(spec, sides, *entered, *weights, group.flips, own_codes, own_given)

            options: dict[str, Any] = {} if own_codes is None else {"marks": own_codes}
            if own_given is not None:
                options |= {"given": own_given, "d_held": own_d_held}
            if d_starts is not None:
                options["d_starts"] = type(d_starts)(*of_members(part, *d_starts))
            choice = kernel_plan.run(
                "backward",
                choice,
                h.device,
                spec,
                partial(output_gradients, group, T, N, own_dy, upstream, of_members(part, saved)[0], again),
                own_h,
                own_h0,
                own_c,
                own_c0,
                own_w,
                own_d_gates,
                own_d_h,
                own_d_c,
                group=group,
                precision=products,
                dcs=own_dcs,
                **options,
            )
        first = first_steps(d_gates, flips)[..., spec.apart * H :] if need_starts else None
        direct = d_h if spec.direct else None
        if not spec.recurrent and first is not None:  # h0 meets no weights
            first, w = d_h.new_zeros(M, B, 0), d_h.new_zeros(M, 0, H)
        if marks is not None:
            at_first = first_steps(marks, flips)
            grads = start_grads(first, w, direct, d_h, d_c, at_first, lengths, d_starts)
        else:
            grads = [None if first is None else product(first, w), d_c if spec.carried else None, None, None]
            if grads[0] is not None and direct is not None:
                grads[0] = grads[0] + direct
    found = [h.new_empty(0) if grad is None else grad.to(h.dtype, copy=True) for grad in (*grads, d_held)]
    d_h0, d_c0, d_reset_h, d_reset_c, d_held = found
    return d_gates, d_h0, d_c0, d_reset_h, d_reset_c, d_held
