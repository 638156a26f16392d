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

GIVEN = (
    "x",
    "h0",
    "c0",
    "reset_h",
    "reset_c",
    "marks",
    "lengths",
    "seeds",
    "held",
    "noise",
)  # tensors that are as the operators take them
KINDS = ("w_ih", "w_hh", "b_ih", "b_hh")  # the weights of a member


def _stacked(kinds: Sequence[Any]) -> list[Tensor | None]:
    """The weights of each kind with the members in front; None for a kind without any, or of which one is None."""
    found: list[Tensor | None] = []
    for weights in kinds:
        if not weights or any([weight is None for weight in weights]):
            found.append(None)
        else:
            found.append(weights[0].unsqueeze(0) if len(weights) == 1 else torch.stack(weights))
    return found


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
        """The `Forward`, the arguments of `rnnfast::forward`. Weights of a kind of which one is None are None."""
        x, h0, c0, reset_h, reset_c, marks, lengths, seeds, held, noise, *own = tensors
        count = 4 if self.biased else 2
        kinds = [own[n::count] for n in range(count)]
        kinds[:1] = [kinds[0][: self.directions], kinds[0][self.directions :]]
        w_ih, w_up, w_hh, b_ih, b_hh, *_ = _stacked((*kinds, (), ()))
        return Forward(
            self.cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_up, self.flips, self.save, marks, lengths, reset_h, reset_c, seeds,
            self.dropout, self.recompute, held, noise,
        )  # fmt: skip

    def apart(self, found: dict[str, Tensor]) -> list[Tensor | None]:
        """The gradients of the tensors that `names` lists, of those of the arguments."""
        parts = {name: iter([grad] if name in GIVEN else grad) for name, grad in found.items()}
        return [next(parts[name]) if name in parts else None for name in self.names]
