"""The PyTorch operators ``rnnfast::forward`` and ``rnnfast::backward``: `rnnfast.ops.recurrence`, registered with fake kernels.

Code that PyTorch calls with the arguments of an operator makes a `Forward` or a `Backward` of them and reads them by name.
PyTorch leaves out trailing arguments that are their default; the records fill them in.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnfast.ops import recurrence
from rnnfast.ops.schema import NAMESPACE, RETURNED, TENSORS, record
from rnnfast.reference import spec_of

__all__ = ["FLOP_FORMULAS", "INPUTS", "Backward", "Forward", "Grads", "Results", "backward", "forward"]

forward = torch.library.custom_op(f"{NAMESPACE}::forward", recurrence.forward, mutates_args=())
backward = torch.library.custom_op(f"{NAMESPACE}::backward", recurrence.backward, mutates_args=())

Forward = record("Forward", recurrence.forward)  # the arguments of `forward`
Backward = record("Backward", recurrence.backward)  # the arguments of `backward`
Grads: Any = namedtuple("Grads", ("d_gates", *(f"d_{name}" for name in RETURNED)))  # what `backward` returns
INPUTS = tuple(name for name in Forward._fields if name in TENSORS)  # those of `forward` that are tensors


class Results(NamedTuple):
    """What `forward` returns."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor
    h: Tensor
    saved: Tensor
    c: Tensor


@forward.register_fake
def _(*arguments, **named) -> Results:
    call = Forward(*arguments, **named)
    spec, x = spec_of(call.cell), call.x
    (T, B, _), (M, _, H), D = x.shape, call.w_hh.shape, call.w_ih.shape[0]
    C, saves = spec.carried, call.save and spec.saved and not call.recompute
    return Results(
        y=x.new_empty(T, B, D * H),
        h_n=x.new_empty(M, B, H),
        c_n=x.new_empty((M, B, C * H) if C else (0,)),
        h=x.new_empty((M, T, B, H) if call.save and call.w_up is not None else (0,)),
        saved=x.new_empty((M, T, B, spec.saved * H) if saves else (0,)),
        c=x.new_empty((M, T, B, C * H) if call.save and C else (0,), dtype=torch.float32),
    )


@backward.register_fake
def _(*arguments, **named) -> tuple[Tensor, ...]:
    call = Backward(*arguments, **named)
    spec, h = spec_of(call.cell), call.h
    (M, _, H), (T, B) = call.w_hh.shape, h.shape[-3:-1]
    C, marked = spec.carried, call.marks is not None

    def state(given: bool, blocks: int = 1) -> Tensor:
        return h.new_empty((M, B, blocks * H) if given and blocks else (0,))

    return Grads(
        d_gates=h.new_empty(M, T, B, spec.grads * H),
        d_h0=state(call.need_starts),
        d_c0=state(call.need_starts or not marked, C),
        d_reset_h=state(call.need_starts and marked),
        d_reset_c=state(call.need_starts and marked, C),
        d_held=state(True, spec.held),
    )


def _input_columns(w_ih, w_up) -> int:
    """Columns of the input weights of all members together, from the shapes of these."""
    return w_ih[0] * w_ih[2] + (0 if w_up is None else w_up[0] * w_up[2])


def _forward_flops(*shapes, out_shape=None, **named) -> int:
    """W_ih x of all steps; W_hh h of all steps, but for a first one that begins from zeros; of every member. A multiplication
    and an addition count as two."""
    call = Forward(*shapes, **named)
    (T, B, _), (M, rows, H) = call.x, call.w_hh
    hidden = rows * M * (T - (call.h0 is None)) * H
    return 2 * B * (call.w_ih[1] * T * _input_columns(call.w_ih, call.w_up) + hidden)


def _backward_flops(*shapes, out_shape=None, **named) -> int:
    """The gradient of each h_{t-1}, that of an initial one if it is wanted; the gradients of the outputs of all layers but the
    last of a stack; and both sides of gates that are recomputed."""
    call = Backward(*shapes, **named)
    (T, B), (M, rows, H) = call.h[-3:-1], call.w_hh
    between = 0 if call.w_up is None else call.w_up[0] * call.w_up[1] * H * T
    again = call.x is not None and spec_of(call.cell).saved
    recomputed = T * (call.w_ih[1] * _input_columns(call.w_ih, call.w_up) + rows * M * H) if again else 0
    return 2 * B * (rows * M * H * (T - 1 + call.need_starts) + between + recomputed)


# for FlopCounterMode(custom_mapping=...). PyTorch's own table of formulas is in a module that imports Triton.
_ops = getattr(torch.ops, NAMESPACE)
FLOP_FORMULAS = {_ops.forward: _forward_flops, _ops.backward: _backward_flops}
