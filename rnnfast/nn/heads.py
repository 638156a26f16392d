"""Heads: W_hh block-diagonal, so that a layer of H units is several of H / heads units that read the same input.

A layer keeps its weights and states whole, gate after gate as torch.nn does. Each head runs as a member of a group of its own
(`rnnfast.reference.group`), with the rows and columns of its units. The outputs of the members, side by side, are those of the
layer. A layer without heads is one head.

    whole                                   of each head, H' = H / heads
    w_ih  (G*H, I)                          (G*H', I)
    w_hh  (G*H, H); (heads, G*H', H')       (G*H', H')
    b_ih, b_hh  (G*H,)                      (G*H',)
    held  (B or 1, E*H)                     (B or 1, E*H')
    a state  (places, B, H)                 (places * heads, B, H'), the heads of a place next to each other

A place is one direction of one layer.
"""

from __future__ import annotations

from torch import Tensor

from rnnfast.reference import Weights

__all__ = ["apart", "joined", "members"]


def members(whole: Weights, heads: int, gates: int, held: int) -> list[Weights]:
    """The weights of each head of one place.

    Args:
        gates, held: how many blocks of H units lie one after another in the weights and in the held tiles.
    """
    if heads == 1:
        return [whole]

    def rows(tensor: Tensor | None) -> list[Tensor | None]:
        if tensor is None:
            return [None] * heads
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (gates, heads, -1)).unbind(1)]

    def columns(tensor: Tensor | None) -> list[Tensor | None]:
        if tensor is None:
            return [None] * heads
        return [part.flatten(1) for part in tensor.unflatten(1, (held, heads, -1)).unbind(2)]

    parts = zip(
        rows(whole.w_ih), whole.w_hh.unbind(0), rows(whole.b_ih), rows(whole.b_hh), columns(whole.held), strict=True
    )  # fmt: skip
    return [Weights(w_ih, w_hh, b_ih, b_hh, None, tiles) for w_ih, w_hh, b_ih, b_hh, tiles in parts]  # type: ignore[arg-type]


def apart(state: Tensor, heads: int) -> Tensor:
    """A state of all places, as its members have it."""
    return state if heads == 1 else state.unflatten(-1, (heads, -1)).movedim(-2, 1).flatten(0, 1)


def joined(state: Tensor, heads: int) -> Tensor:
    """The inverse of `apart`."""
    return state if heads == 1 else state.unflatten(0, (-1, heads)).movedim(1, -2).flatten(-2)
