"""The schema of a recurrent call: every tensor that goes into or comes out of an operator, by name.

`TENSORS` describes each tensor once. Fake kernels, gradients, vmap rules and FLOP formulas read the arguments of an operator
by name: `record` turns the operator's signature into a NamedTuple. To add an argument, add it to `TENSORS`, to the signature of
the operator, and to the code that uses it.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rnnfast.version import PACKAGE

__all__ = [
    "DIFFERENTIABLE", "NAMESPACE", "RETURNED", "STATE_TENSORS", "TENSORS", "UPSTREAM", "Described", "batch_axis", "record"
]  # fmt: skip

NAMESPACE = PACKAGE.replace(".", "_")  # of the operators in torch.ops: each copy of this package in a process has its own


@dataclass(frozen=True)
class Described:
    """One tensor of a recurrent call.

    Attributes:
        shape: T steps, B batch, I input, H hidden; M members: D directions or heads of one layer, or U + 1 layers of one
            direction; G, S, K, C and E are `Cell.gates`, `Cell.saved`, `Cell.grads`, `Cell.carried` and `Cell.held`.
        differentiable: whether `rnnfast::forward` has a gradient with respect to it.
        state: whether it is a state that enters the recurrence.
        returned: whether `rnnfast::backward` itself returns the gradient, as of every state.
    """

    shape: str
    differentiable: bool = False
    state: bool = False
    returned: bool = False

    @property
    def batch(self) -> int | None:
        """The axis of the batch, counted from the last one. None for a weight, which all rows share."""
        sizes = self.shape.split()
        return sizes.index("B") - len(sizes) if "B" in sizes else None


TENSORS = {
    # what `rnnfast::forward` takes
    "x": Described("T B I", differentiable=True),
    "h0": Described("M B H", differentiable=True, state=True),
    "c0": Described("M B C*H", differentiable=True, state=True),
    "w_ih": Described("D G*H I", differentiable=True),
    "w_hh": Described("M G*H H", differentiable=True),
    "b_ih": Described("M G*H", differentiable=True),
    "b_hh": Described("M G*H", differentiable=True),
    "w_up": Described("U G*H H", differentiable=True),
    "marks": Described("D T B"),
    "lengths": Described("B"),
    "reset_h": Described("M B H", differentiable=True, state=True),
    "reset_c": Described("M B C*H", differentiable=True, state=True),
    "seeds": Described("U"),
    "held": Described("M B E*H", differentiable=True, returned=True),
    "noise": Described("M"),
    # what it returns
    "y": Described("T B D*H"),
    "h_n": Described("M B H"),
    "c_n": Described("M B C*H"),
    "h": Described("M T B H"),
    "saved": Described("M T B S*H"),
    "c": Described("M T B C*H"),
    # gradients of what it returns, which `rnnfast::backward` takes
    "dy": Described("T B D*H"),
    "dh_n": Described("M B H"),
    "dc_n": Described("M B C*H"),
    "dcs": Described("M T B C*H"),
    # what `rnnfast::backward` returns, besides the gradients of the tensors that `RETURNED` names
    "d_gates": Described("M T B K*H"),
}
STATE_TENSORS = tuple(name for name, tensor in TENSORS.items() if tensor.state)
RETURNED = tuple(name for name, tensor in TENSORS.items() if tensor.state or tensor.returned)
TENSORS |= {f"d_{name}": Described(TENSORS[name].shape) for name in RETURNED}
DIFFERENTIABLE = tuple(name for name, tensor in TENSORS.items() if tensor.differentiable)
UPSTREAM = {"dy": "y", "dh_n": "h_n", "dc_n": "c_n", "dcs": "c"}  # a gradient that comes from outside -> whose it is


def batch_axis(name: str) -> int | None:
    """The axis of the batch of an argument or a result, counted from the last one, because ``h`` of `rnnfast::backward` may be
    ``y``, which has an axis less. None for a weight and for what is no tensor."""
    return TENSORS[name].batch if name in TENSORS else None


def record(name: str, signature: Callable) -> Any:
    """A NamedTuple with the parameters of a function as fields, and with their defaults."""
    parameters = inspect.signature(signature).parameters.values()
    defaults = [parameter.default for parameter in parameters if parameter.default is not parameter.empty]
    return namedtuple(name, [parameter.name for parameter in parameters], defaults=defaults)
