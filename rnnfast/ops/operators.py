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
from rnnfast.ops.schema import STATE_TENSORS, TENSORS, record
from rnnfast.reference import CELLS

__all__ = ["FLOP_FORMULAS", "INPUTS", "Backward", "Forward", "Grads", "Results", "backward", "forward"]

forward = torch.library.custom_op("rnnfast::forward", recurrence.forward, mutates_args=())
backward = torch.library.custom_op("rnnfast::backward", recurrence.backward, mutates_args=())

Forward = record("Forward", recurrence.forward)  # the arguments of `forward`
Backward = record("Backward", recurrence.backward)  # the arguments of `backward`
Grads: Any = namedtuple("Grads", ("d_gates", *(f"d_{name}" for name in STATE_TENSORS)))  # what `backward` returns
INPUTS = tuple(name for name in Forward._fields if name in TENSORS)  # those of `forward` that are tensors


class Results(NamedTuple):
    """What `forward` returns."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor
    saved: Tensor
    c: Tensor


@forward.register_fake
def _(*arguments, **named) -> Results:
    call = Forward(*arguments, **named)
    spec, x = CELLS[call.cell], call.x
    (T, B, _), H = x.shape, call.w_hh.shape[1]
    has_c, saves = spec.states > 1, call.save and spec.saved and not call.recompute
    return Results(
        y=x.new_empty(T, B, H),
        h_n=x.new_empty(B, H),
        c_n=x.new_empty((B, H) if has_c else (0,)),
        saved=x.new_empty((T, B, spec.saved * H) if saves else (0,)),
        c=x.new_empty((T, B, H) if call.save and has_c else (0,), dtype=torch.float32),
    )


@backward.register_fake
def _(*arguments, **named) -> tuple[Tensor, ...]:
    call = Backward(*arguments, **named)
    spec, y = CELLS[call.cell], call.y
    T, B, H = y.shape
    has_c, marked = spec.states > 1, call.marks is not None

    def state(given: bool) -> Tensor:
        return y.new_empty((B, H) if given else (0,))

    return Grads(
        d_gates=y.new_empty(T, B, spec.grads * H),
        d_h0=state(call.need_starts),
        d_c0=state(has_c and (call.need_starts or not marked)),
        d_reset_h=state(call.need_starts and marked),
        d_reset_c=state(call.need_starts and marked and has_c),
    )


def _forward_flops(*shapes, out_shape=None, **named) -> int:
    """W_ih x of all steps; W_hh h of all steps, but for a first one that begins from zeros. A multiplication and an addition
    count as two."""
    call = Forward(*shapes, **named)
    (T, B, I), (rows, H) = call.x, call.w_hh
    return 2 * B * rows * (T * I + (T - (call.h0 is None)) * H)


def _backward_flops(*shapes, out_shape=None, **named) -> int:
    """The gradient of each h_{t-1}, that of an initial one if it is wanted, and both sides of gates that are recomputed."""
    call = Backward(*shapes, **named)
    (T, B, _), (rows, H) = call.y, call.w_hh
    recomputed = T * (call.x[2] + H) if call.x is not None and CELLS[call.cell].saved else 0
    return 2 * B * rows * (H * (T - 1 + call.need_starts) + recomputed)


# for FlopCounterMode(custom_mapping=...). PyTorch's own table of formulas is in a module that imports Triton.
FLOP_FORMULAS = {torch.ops.rnnfast.forward: _forward_flops, torch.ops.rnnfast.backward: _backward_flops}
