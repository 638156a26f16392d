"""The weights of a group's members, as the user has them and as the operators take them.

A module keeps the weights of each layer and direction apart. The operators take one tensor of each kind, with the members in
front. The copy takes a few megabytes, which is little beside what a call reads and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rnnfast.ops.operators import Forward

__all__ = ["Frame"]

GIVEN = ("x", "h0", "c0", "reset_h", "reset_c", "marks", "lengths", "seeds")  # tensors that are as the operators take them
KINDS = ("w_ih", "w_hh", "b_ih", "b_hh")  # the weights of a member


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """With the members in front; None for none of them, and where one is missing."""
    if not tensors or any(tensor is None for tensor in tensors):
        return None
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True, eq=False)
class Frame:
    """What a call of `rnnfast::forward` takes besides the tensors that `names` lists.

    Attributes:
        members: how many.
        directions: those that read the input: all members, or one if they are the layers of a stack.
        biased: whether there are biases.
        cell, flips, save, dropout, recompute: as in `rnnfast::forward`.
    """

    members: int
    directions: int
    biased: bool
    cell: str
    flips: int
    save: bool
    dropout: float = 0.0
    recompute: bool = False

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The argument of `rnnfast::forward` that each tensor is, or is a part of: `GIVEN`, then the weights of each member."""
        kinds = KINDS if self.biased else KINDS[:2]
        above = ("w_up", *kinds[1:])
        return (*GIVEN, *(name for m in range(self.members) for name in (kinds if m < self.directions else above)))

    def assembled(self, tensors: Sequence[Tensor | None]) -> Any:
        """The `Forward`, the arguments of `rnnfast::forward`."""
        count = 4 if self.biased else 2
        given = dict(zip(GIVEN, tensors, strict=False))
        columns = [tensors[len(GIVEN) + n :: count] for n in range(count)]
        b_ih, b_hh = columns[2:] if self.biased else ((), ())
        return Forward(
            self.cell, given["x"], given["h0"], given["c0"], _stacked(columns[0][: self.directions]), _stacked(columns[1]),
            _stacked(b_ih), _stacked(b_hh), _stacked(columns[0][self.directions :]), self.flips, self.save, given["marks"],
            given["lengths"], given["reset_h"], given["reset_c"], given["seeds"], self.dropout, self.recompute,
        )  # fmt: skip

    def apart(self, found: dict[str, Tensor]) -> list[Tensor | None]:
        """The gradients of the tensors that `names` lists, of those of the arguments."""
        parts = {name: iter([grad] if name in GIVEN else grad) for name, grad in found.items()}
        return [next(parts[name]) if name in parts else None for name in self.names]
