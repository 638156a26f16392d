"""Derivatives of the operators of `rnnfast.ops`: of any order, and inside PyTorch's function transforms.

    first order       the kernels: `rnnfast::backward`, and then the large products (`gradients`)
    higher orders     the first is made differentiable by `Gradients`, whose own derivative goes through the equations in plain
                      PyTorch (`rnnfast.reference`), one step after another, in float32; only where such a derivative is taken
    torch.func        cannot differentiate an operator, so inside its transforms `Layer` stands before it: same kernels
    vmap              rows of a larger batch for the kernels; where the weights differ, one call of a kernel for each
    forward mode      has no rule here: `rnnfast.choice.decide` has such calls sent to the equations before they come

Inputs are named as in `rnnfast::forward`; `INPUTS` are those that have gradients.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnfast import ops_marks, reference
from rnnfast.reference import GATES, PADDED

__all__ = [
    "Gradients",
    "Layer",
    "backward",
    "batched",
    "gradients",
    "refuse",
    "setup_context",
    "vmap_backward",
    "vmap_each",
    "vmap_forward",
]

INPUTS = (1, 2, 3, 4, 5, 6, 7, 12, 13)  # x, h0, c0, w_ih, w_hh, b_ih, b_hh, reset_h, reset_c among the operator's arguments
_Tensors = tuple[Any, ...]  # None for what is absent


@dataclass(frozen=True)
class _Call:
    """What a derivative needs to know besides tensors. No tuple: torch.func would look for tensors in one."""

    cell: str
    reverse: bool
    needs: tuple[bool, ...]  # whether the gradient of each of `INPUTS` is wanted
    recompute: bool  # as in `rnnfast::forward`


def setup_context(ctx, inputs, output):
    cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, save, marks, lengths, reset_h, reset_c, recompute = inputs
    y, _, _, saved, c = output
    ctx.cell, ctx.reverse, ctx.recompute = cell, reverse, recompute
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    if save:  # else there is no backward
        ctx.save_for_backward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reset_h, reset_c, marks, lengths, y, saved, c)


def backward(ctx, *grad_outputs):
    dy, dh_n, dc_n, _, dcs = grad_outputs
    *tensors, y, saved, c = ctx.saved_tensors
    needs = (*ctx.needs_input_grad, *[False] * 5)[:15]  # PyTorch leaves out trailing inputs that are their default
    call = _Call(ctx.cell, ctx.reverse, tuple(needs[n] for n in INPUTS), ctx.recompute)
    upstream = (dy, dh_n, dc_n if ctx.cell == "lstm" else None, dcs if ctx.cell == "lstm" else None)

    def run(*upstream):
        with _no_autocast(y.device.type):
            if forward_ad._current_level >= 0:
                return _plain_gradients(call, upstream, tuple(tensors))
            kernels: Any = Gradients.apply if torch.is_grad_enabled() else gradients
            return kernels(call, *upstream, *tensors, y.detach(), saved, c.detach())

    found = iter(batched(run, upstream))
    grads: list[Tensor | None] = [None] * 15
    for n, need in zip(INPUTS, call.needs, strict=True):
        grads[n] = next(found) if need else None
    return tuple(grads)


def _no_autocast(kind: str) -> contextlib.AbstractContextManager:
    """Autocast has no say in what dtype is computed in. Not even entered where it is off, which takes microseconds."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def batched(run, upstream: _Tensors) -> tuple[Tensor, ...]:
    """``run(*upstream)``. Where torch.autograd.grad maps over `upstream` (``is_grads_batched=True``), it does so by an old vmap
    to which no rule can be given and which would leave out the derivatives of `Gradients`: torch.func's does it here."""
    is_mapped = torch._C._functorch.is_legacy_batchedtensor  # type: ignore[attr-defined]
    mapped = [n for n, grad in enumerate(upstream) if grad is not None and is_mapped(grad)]
    if not mapped:
        return run(*upstream)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()

    def one(*grads):
        replaced = list(upstream)
        for n, grad in zip(mapped, grads, strict=True):
            replaced[n] = grad
        return run(*replaced)

    whole = (torch._remove_batch_dim(upstream[n], level, 0, 0) for n in mapped)  # of size 0 if it had none, but it has
    return tuple(torch._add_batch_dim(grad, 0, level) for grad in torch.func.vmap(one)(*whole))


def refuse(ctx, *_):
    raise RuntimeError("rnnfast::backward has no derivative of its own: differentiate rnnfast::forward with create_graph=True")


def gradients(
    call: _Call,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcs: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    marks: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    saved: Tensor,
    c: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients that are needed, on the kernels, in the order of `INPUTS`."""
    need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_reset_h, need_reset_c = call.needs
    need_starts = need_h0 if marks is None else need_h0 or need_c0 or need_reset_h or need_reset_c
    marked = (marks, lengths, reset_h, reset_c)
    again = (x, w_ih, b_ih, b_hh) if call.recompute else (None,) * 4
    d_gates, dh0, dc0, d_reset_h, d_reset_c = torch.ops.rnnfast.backward(
        call.cell, dy, dh_n, dc_n, y, saved, c, h0, c0, w_hh, call.reverse, need_starts, dcs, *marked, *again
    )

    T, B, H = y.shape
    sides = GATES[call.cell] * H
    kept_apart = d_gates.shape[2] > sides  # the last gate's two sides: the input side is stored first, see Cell.grads
    rows = d_gates.reshape(T * B, -1)
    d_input, d_hidden = rows[:, :sides], rows[:, -sides:]
    dx = dw_ih = dw_hh = db_ih = db_hh = None
    if need_x:
        dx = (d_input @ (w_ih.roll(H, 0) if kept_apart else w_ih)).view(T, B, -1)
    if need_w_ih:
        if lengths is not None:
            x = x.masked_fill((marks == PADDED)[..., None], 0)  # a NaN in padding times a gradient of 0 would be one
        dw_ih = d_input.t() @ x.reshape(T * B, -1)
        dw_ih = dw_ih.roll(-H, 0) if kept_apart else dw_ih
    if need_w_hh:
        # step t met y[t - 1], or y[t + 1] in reverse; the first step met h0
        first, met, by = (rows[-B:], y[1:], d_hidden[:-B]) if call.reverse else (rows[:B], y[:-1], d_hidden[B:])
        if marks is not None:
            dw_hh = d_hidden.t() @ ops_marks.entered(y, h0, reset_h, marks, call.reverse).reshape(T * B, H)
        else:
            dw_hh = by.t() @ met.reshape((T - 1) * B, H)
            if h0 is not None:
                dw_hh = torch.addmm(dw_hh, first[:, -sides:].t(), h0)
    if need_b_ih:
        db_ih = d_input.sum(0)
        db_ih = db_ih.roll(-H, 0) if kept_apart else db_ih
    if need_b_hh:
        db_hh = d_hidden.sum(0)
    grads: _Tensors = (dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, d_reset_h, d_reset_c)
    return tuple(grad for grad, need in zip(grads, call.needs, strict=True) if need)


def _plain(call: _Call, inputs: _Tensors, marks: Tensor | None) -> tuple[Tensor, ...]:
    """`rnnfast::forward` by the equations: y, h_n and, of an LSTM, c_n and all cell states in float32. Everything is computed
    in float32, as in the kernels."""
    floats: _Tensors = tuple(None if given is None else given.float() for given in inputs)
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, reset_h, reset_c = floats
    zeros = x.new_zeros(x.shape[1], w_hh.shape[1])

    def states(h, c):
        return tuple(zeros if state is None else state for state in (h, c)[: 2 if call.cell == "lstm" else 1])

    starts, anew = states(h0, c0), states(reset_h, reset_c)
    y, last, cells, _ = reference.unroll(
        call.cell, x, starts, w_ih, w_hh, b_ih, b_hh, reverse=call.reverse, codes=marks, reset_to=anew
    )
    return tuple(out.to(inputs[0].dtype) for out in (y, *last)) + cells


def _plain_gradients(call: _Call, upstream: _Tensors, tensors: _Tensors) -> tuple[Tensor, ...]:
    """`gradients` by the equations: differentiable, in any mode, as often as one likes."""
    *inputs, marks, _ = tensors
    wanted = [n for n, need in enumerate(call.needs) if need]
    given = [n for n, grad in enumerate(upstream) if grad is not None]

    def outputs(*values):
        replaced = list(inputs)
        for n, value in zip(wanted, values, strict=True):
            replaced[n] = value
        found = _plain(call, tuple(replaced), marks)
        return tuple(found[n] for n in given)

    pull: Any = torch.func.vjp(outputs, *(inputs[n] for n in wanted))[1]
    return pull(tuple(upstream[n] for n in given))


class Gradients(torch.autograd.Function):
    """`gradients` as a function that has derivatives: those of the same gradients by the equations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call, *tensors):
        return gradients(call, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors[:-3])  # y, saved and c follow from the others

    @staticmethod
    def backward(ctx, *upstream):
        tensors, count = ctx.saved_tensors, 4 + len(INPUTS)
        moved = [n for n in range(count) if tensors[n] is not None]

        def first(*values):
            replaced = list(tensors)
            for n, value in zip(moved, values, strict=True):
                replaced[n] = value
            return _plain_gradients(ctx.call, tuple(replaced[:4]), tuple(replaced[4:]))

        def run(*upstream):
            with _no_autocast(upstream[0].device.type):
                return torch.func.vjp(first, *(tensors[n] for n in moved))[1](upstream)

        found: list[Tensor | None] = [None] * (len(tensors) + 4)
        for n, grad in zip(moved, batched(run, upstream), strict=True):
            found[n + 1] = grad
        return tuple(found)


class Layer(torch.autograd.Function):
    """`rnnfast::forward` inside torch.func's transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return torch.ops.rnnfast.forward(*arguments)

    setup_context = staticmethod(setup_context)
    backward = staticmethod(backward)


# Where the batch is, among the arguments and results of the operators; None for what is no batch
_FORWARD = (None, 1, 0, 0, None, None, None, None, None, None, 1, 0, 0, 0, None), (1, 0, 0, 1, 1)
_BACKWARD = (None, 1, 0, 0, 1, 1, 1, 0, 0, None, None, None, 1, 1, 0, 0, 0, 1, None, None, None), (1, 0, 0, 0, 0)


def vmap_forward(info, in_dims, *arguments):
    return _vmap(torch.ops.rnnfast.forward, _FORWARD, info, in_dims, arguments)


def vmap_backward(info, in_dims, *arguments):
    return _vmap(torch.ops.rnnfast.backward, _BACKWARD, info, in_dims, arguments)


def vmap_each(operator, info, in_dims, *arguments):
    """The rule of an operator that is called once for each."""
    pairs = list(zip(arguments, in_dims, strict=True))
    calls = [
        operator(*(value if dim is None else value.select(dim, n) for value, dim in pairs)) for n in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(results) for results in zip(*calls, strict=True)), (0,) * len(calls[0])


def _vmap(operator, axes, info, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]):
    """What is mapped over joins the batch; where weights are mapped over, one call after another."""
    if any(axis is None and dim is not None for axis, dim in zip(axes[0], in_dims, strict=False)):
        return vmap_each(operator, info, in_dims, *arguments)
    size = info.batch_size
    folded = [
        _folded(value, dim, axis, size) if isinstance(value, Tensor) and axis is not None else value
        for value, dim, axis in zip(arguments, in_dims, axes[0], strict=False)
    ]
    results = operator(*folded)
    dims = tuple(axis if result.numel() else None for result, axis in zip(results, axes[1], strict=True))
    return tuple(
        result if dim is None else result.unflatten(dim, (size, -1)) for result, dim in zip(results, dims, strict=True)
    ), dims


def _folded(tensor: Tensor, dim: int | None, axis: int, size: int) -> Tensor:
    """`tensor`, mapped over along `dim`, with that dimension inside of its batch `axis`."""
    if not tensor.numel():  # nothing is kept
        return tensor if dim is None else tensor.select(dim, 0)
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, axis).flatten(axis, axis + 1)
