"""What lengths and resets add to the operators, around the kernels.

Everything here is tensors: no size, no branch and no launch depends on a length or a reset. Nothing waits for the GPU, and a
CUDA graph that was captured replays with other lengths and resets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rnnfast.ops.products import product
from rnnfast.reference import CONTINUES, RESETS, STARTS

if TYPE_CHECKING:
    from rnnfast.kernels.marks import Marks, StartGrads

__all__ = [
    "by_direction",
    "by_member",
    "empty_start_grads",
    "entering",
    "first_steps",
    "for_kernels",
    "last_states",
    "of_members",
    "own_marks",
    "start_grads",
]


def _or_zeros(state: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if state is None else state.to(like.dtype)


def of_members(part: slice, *tensors: Tensor | None) -> list[Tensor | None]:
    """What belongs to some members, which are in front of each tensor; None for None, empty for empty."""
    count = part.stop - part.start
    return [tensor if tensor is None or not tensor.numel() or len(tensor) == count else tensor[part] for tensor in tensors]


def by_member(h: Tensor, directions: int) -> Tensor:
    """The outputs of each member (M, T, B, H), a view: those of directions lie side by side, (T, B, D * H)."""
    if h.dim() == 4:
        return h
    return h[None] if directions == 1 else h.unflatten(2, (directions, -1)).permute(2, 0, 1, 3)


def by_direction(flips: int, members: int) -> list[tuple[slice, bool]]:
    """Neighbouring members that run in one direction of time, and whether it is from the last step to the first."""
    if not flips:
        return [(slice(0, members), False)]
    return [(slice(m, m + 1), bool(flips >> m & 1)) for m in range(members)]


def first_steps(tensor: Tensor, flips: int) -> Tensor:
    """What a tensor (M, T, ...) holds for the step that each member runs first, (M, ...)."""
    found = [tensor[members, -1 if reverse else 0] for members, reverse in by_direction(flips, len(tensor))]
    return found[0] if len(found) == 1 else torch.cat(found)


def _starts(states: tuple[Tensor | None, ...], shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """States (M, B, width), zeros for None, as (M, states, B, width)."""
    zeros = like.new_zeros(shape, dtype=dtype)
    return torch.stack([zeros if state is None else state.to(dtype) for state in states], 1)


def for_kernels(
    marks: Tensor,
    lengths: Tensor | None,
    starts_h: tuple[Tensor | None, Tensor | None],
    starts_c: tuple[Tensor | None, Tensor | None] | None,
    shape: tuple[int, int, int],
    like: Tensor,
    carried: int,
    tile: int,
) -> Marks:
    """What the kernels take where there are marks.

    Args:
        marks, lengths: as in `rnnfast.ops.recurrence.forward`.
        starts_h: the initial and the reset h, None for zeros.
        starts_c: the initial and the reset carried states; None for a cell without.
        shape: M, B, H.
        like: a tensor of the dtype and device of h.
        carried: the number of carried states.
        tile: batch rows of a program. With more rows than that, programs take the longest rows first: a tile costs nothing
            after the end of its longest row.
    """
    from rnnfast.kernels.marks import Marks

    M, B, H = shape
    order = None if lengths is None or tile >= B else lengths.argsort(descending=True).to(torch.int32)
    return Marks(
        codes=marks.expand(M, -1, -1).contiguous(),
        order=order,
        starts_h=_starts(starts_h, (M, B, H), like, like.dtype),
        starts_c=None if starts_c is None else _starts(starts_c, (M, B, carried * H), like, torch.float32),
    )


def own_marks(marks: Marks | None, part: slice) -> Marks | None:
    """The marks of some members."""
    if marks is None:
        return None
    codes, starts_h, starts_c = of_members(part, marks.codes, marks.starts_h, marks.starts_c)
    return marks._replace(codes=codes, starts_h=starts_h, starts_c=starts_c)


def empty_start_grads(marks: Marks) -> StartGrads:
    """Zeros, to which backward adds the gradients of the states that begin anew."""
    from rnnfast.kernels.marks import StartGrads

    starts = (marks.starts_h, marks.starts_c)
    return StartGrads(*(None if states is None else torch.zeros_like(states, dtype=torch.float32) for states in starts))


def last_states(states: Tensor, start: Tensor | None, lengths: Tensor | None, flips: int) -> Tensor:
    """The state of each row after its last step, (M, B, H); `start` (M, B, H) for a row without steps.

    `states` is (M, T, B, H), or (M, 1, B, H) if it holds the last state of each row alone.
    """
    found = []
    for members, reverse in by_direction(flips, len(states)):
        own = states[members]
        if lengths is None or reverse or own.shape[1] == 1:
            found.append(own[:, 0 if reverse else -1].clone(memory_format=torch.contiguous_format))
        else:
            at = (lengths.clamp(min=1) - 1)[None, None, :, None].expand(len(own), 1, *own.shape[2:])
            found.append(own.gather(1, at)[:, 0])
    last = found[0] if len(found) == 1 else torch.cat(found)
    return last if lengths is None else torch.where((lengths > 0)[:, None], last, _or_zeros(start, last))


def start_grads(
    first: Tensor | None,
    w: Tensor,
    direct: Tensor | None,
    d_h: Tensor,
    d_c: Tensor,
    mark: Tensor,
    lengths: Tensor | None,
    d_starts: StartGrads | None,
) -> list[Tensor | None]:
    """The gradients of h0, c0, reset_h and reset_c, (M, B, H); None for each that is not wanted.

    They are a sum of three parts: what the kernels left in `d_starts`; what comes from the step that was processed first, with
    the gate gradients `first` and the marks `mark` (M, B); and, for a row without steps, the gradients of its last states.
    """
    if first is None or d_starts is None:
        return [None] * 4
    through = product(first, w).float() if direct is None else product(first, w) + direct
    mark, nothing = mark[..., None], torch.zeros_like(through)
    d_starts.h[:, 0] += torch.where(mark == STARTS, through, nothing)
    d_starts.h[:, 1] += torch.where(mark == RESETS, through, nothing)
    if lengths is not None:
        empty = (lengths == 0)[:, None]
        d_starts.h[:, 0] += torch.where(empty, d_h, nothing)
        if d_starts.c is not None:
            d_starts.c[:, 0] += torch.where(empty, d_c, torch.zeros_like(d_c))
    c = (None, None) if d_starts.c is None else d_starts.c.unbind(1)
    return [d_starts.h[:, 0], c[0], d_starts.h[:, 1], c[1]]


def entering(
    h: Tensor, start: Tensor | None, reset: Tensor | None, codes: Tensor | None, reverse: bool, first: int, last: int
) -> Tensor:
    """The h that entered the steps first, ..., last - 1 of one member, (last - first, B, H), zero in padding.

    Args:
        h: (T, B, H), its outputs.
        start, reset: (B, H), the initial and the reset state; None for zeros.
        codes: (T, B), its marks, or None.
        reverse: whether it runs from the last step to the first.
    """
    at_edge = last == h.shape[0] if reverse else first == 0  # len would be a constant of a compiled program
    before = h[first + 1 : last + 1] if reverse else h[max(0, first - 1) : last - 1]
    if at_edge:
        edge = torch.zeros_like(h[0]) if start is None else start.to(h.dtype)
        before = torch.cat([before, edge[None]] if reverse else [edge[None], before])
    if codes is None:
        return before
    own = codes[first:last, :, None]
    anew = torch.where(own == STARTS, _or_zeros(start, h[0]), torch.where(own == RESETS, _or_zeros(reset, h[0]), 0))
    return torch.where(own == CONTINUES, before, anew)
