"""What lengths and resets add to the operators, around the kernels.

Everything here is tensors: no size, no branch and no launch depends on a length or a reset. Nothing waits for the GPU, and a
CUDA graph that was captured replays with other lengths and resets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rnnfast.reference import CONTINUES, RESETS, STARTS

if TYPE_CHECKING:
    from rnnfast.kernels.marks import Marks, StartGrads

__all__ = ["empty_start_grads", "entered", "for_kernels", "last_states", "start_grads"]


def _or_zeros(state: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if state is None else state.to(like.dtype)


def for_kernels(
    marks: Tensor,
    lengths: Tensor | None,
    starts_h: tuple[Tensor | None, Tensor | None],
    starts_c: tuple[Tensor | None, Tensor | None] | None,
    y: Tensor,
    tile: int,
) -> Marks:
    """What the kernels take where there are marks.

    Args:
        marks, lengths: as in `rnnfast.ops.recurrence.forward`.
        starts_h: the initial and the reset h, None for zeros.
        starts_c: the initial and the reset c; None for a cell without a cell state.
        y: (T, B, H), for its shape and dtype.
        tile: batch rows of a program. With more rows than that, programs take the longest rows first: a tile costs nothing
            after the end of its longest row.
    """
    from rnnfast.kernels.marks import Marks

    h, c = y[0], y[0].float()
    order = None if lengths is None or y.shape[1] <= tile else lengths.argsort(descending=True).to(torch.int32)
    return Marks(
        codes=marks.contiguous(),
        order=order,
        starts_h=torch.stack([_or_zeros(state, h) for state in starts_h]),
        starts_c=None if starts_c is None else torch.stack([_or_zeros(state, c) for state in starts_c]),
    )


def empty_start_grads(marks: Marks) -> StartGrads:
    """Zeros, to which backward adds the gradients of the states that begin anew."""
    from rnnfast.kernels.marks import StartGrads

    starts = (marks.starts_h, marks.starts_c)
    return StartGrads(*(None if states is None else torch.zeros_like(states, dtype=torch.float32) for states in starts))


def last_states(states: Tensor, start: Tensor | None, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The state of each row after its last step, (B, H); `start` for a row without steps.

    `states` is (T, B, H), or (1, B, H) if it holds the last state of each row alone.
    """
    if lengths is None or (reverse or states.shape[0] == 1):
        last = states[0 if reverse else -1].clone()
    else:
        last = states.gather(0, (lengths.clamp(min=1) - 1)[None, :, None].expand(1, *states.shape[1:]))[0]
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
    """The gradients of h0, c0, reset_h and reset_c; None for each that is not wanted.

    They are a sum of three parts: what the kernels left in `d_starts`; what comes from the step that was processed first, with
    the gate gradients `first` and the marks `mark`; and, for a row without steps, the gradients of its last states.
    """
    if first is None or d_starts is None:
        return [None] * 4
    through = (first @ w).float() if direct is None else (first @ w) + direct
    mark, nothing = mark[:, None], torch.zeros_like(through)
    d_starts.h[0] += torch.where(mark == STARTS, through, nothing)
    d_starts.h[1] += torch.where(mark == RESETS, through, nothing)
    if lengths is not None:
        empty = (lengths == 0)[:, None]
        d_starts.h[0] += torch.where(empty, d_h, nothing)
        if d_starts.c is not None:
            d_starts.c[0] += torch.where(empty, d_c, nothing)
    c = [None, None] if d_starts.c is None else [*d_starts.c]
    return [d_starts.h[0], c[0], d_starts.h[1], c[1]]


def entered(y: Tensor, h0: Tensor | None, reset_h: Tensor | None, marks: Tensor, reverse: bool) -> Tensor:
    """The h that entered each step, (T, B, H), zero in padding. It is a copy, so that one product takes all steps."""
    edge = torch.zeros_like(y[:1])
    before = torch.cat([y[1:], edge] if reverse else [edge, y[:-1]])
    start, reset = _or_zeros(h0, y[0]), _or_zeros(reset_h, y[0])
    codes = marks[..., None]
    anew = torch.where(codes == STARTS, start, torch.where(codes == RESETS, reset, 0))
    return torch.where(codes == CONTINUES, before, anew)
