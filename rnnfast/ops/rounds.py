"""What the launches of a group are given, chunk after chunk of time steps (see `rnnfast.kernels.groups`).

    Sides        the input side W_ih x: a product through PyTorch for each member that reads the input of the call, and one
                 batched product for all layers above. For the first layer of a pipeline a product makes several chunks
    Upstream     backward, the gradients of the outputs of a pipeline's layers: one batched product for all but the last
    Recomputed   backward, the activations that forward did not save

A layer's chunk is N steps further on in one tensor than that of the layer above. So the chunks of all layers are one strided
view, and nothing is gathered. A view of a chunk that an end of the sequence cuts short goes on into a neighbouring layer's
rows. It never leaves the tensor, and nobody reads what comes of those rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnnfast.ops.marks import entering
from rnnfast.ops.products import product, wide_product

if TYPE_CHECKING:
    from rnnfast.kernels.cells import Cell
    from rnnfast.kernels.given import Given
    from rnnfast.kernels.groups import Group
    from rnnfast.kernels.marks import Marks

__all__ = [
    "Recomputed",
    "Sides",
    "Upstream",
    "drop_out",
    "input_sides",
    "output_gradients",
    "sides_of_layers",
    "upstream_of_layers",
]


def _rounds(group: Group, T: int, N: int, backward: bool) -> Iterator[tuple[int, int, list[int]]]:
    """For each launch: `begin`; the number of positions, which is N, but outside of a pipeline no more than are left; and for
    each member the first step, in time, of those that the launch covers. In a pipeline some may lie outside of 0..T."""
    lag = group.lag if backward else -group.lag
    for begin in group.begins(T, N, backward):
        n = N if lag else min(N, T - begin)
        positions = [begin + m * lag for m in range(group.members)]
        yield begin, n, [T - p - n if bool(group.flips >> m & 1) != backward else p for m, p in enumerate(positions)]


def input_sides(
    group: Group, T: int, N: int, part: slice, x: Tensor, w_ih: Tensor, *stack: Any
) -> Iterator[tuple[int, int, Tensor, int]]:
    """What the launches of forward are given.

    Args:
        part: the members that `group` has of the whole call.
        x, w_ih: those of the whole call.
        stack: the other arguments of `sides_of_layers`, if the call is of a stack.
    """
    sides = sides_of_layers(part, x, w_ih, *stack) if stack else Sides(x, w_ih[part])
    for begin, steps, starts in _rounds(group, T, N, False):
        yield begin, steps, *sides.chunk(starts, steps)


def output_gradients(
    group: Group, T: int, N: int, dy: Tensor | None, upstream: Upstream | None, saved: Any, again: Recomputed | None
) -> Iterator[tuple[int, int, Tensor | None, Tensor]]:
    """What the launches of backward are given."""
    for begin, steps, starts in _rounds(group, T, N, True):
        yield (
            begin,
            steps,
            dy if upstream is None else upstream.chunk(starts, steps),
            saved if again is None else again.chunk(starts, steps),
        )


def _active(starts: list[int], N: int, T: int, members: range) -> range:
    """Those of the neighbouring `members` that have steps in a launch."""
    found = [m for m in members if -N < starts[m] < T]
    return range(found[0], found[-1] + 1) if found else range(0)


def _chunk_rows(tensor: Tensor, members: range, start: int, N: int, width: int | None = None) -> Tensor:
    """The chunks of neighbouring layers (members, N * B, width) of ``tensor`` (layers, T, B, row), a view.

    It is a copy if it would begin before the tensor, with anything in the rows before the first layer's first step.

    Args:
        start: the first step of the first of the members. Each next one is N steps before it.
        width: the first columns of a row; all if not given.
    """
    _, T, B, row = tensor.shape
    first = members.start * T + start
    if first < 0:
        return torch.cat([tensor.new_empty(-first * B, row), tensor[0, : start + N].flatten(0, 1)])[None, :, :width]
    size = len(members), N * B, width or row
    return tensor.as_strided(size, ((T - N) * B * row, row, 1), tensor.storage_offset() + first * B * row)


def drop_out(x: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Dropout of whole sequences, `x` (K, T, B, H), with a seed each."""
    from rnnfast.kernels import dropout

    K, T, B, H = x.shape
    rows = x.contiguous().view(K, T * B, H)
    out = torch.empty_like(rows)
    dropout.apply(rows, out, seeds, p, T * B)
    return out.view(K, T, B, H)


class Sides:
    """The input side of a group's members.

    Args:
        x: (T, B, I), what the directions of a layer read, or the first layer of a pipeline.
        w_ih: (D, G * H, I), for each member that reads `x`.
        h: (M, T, B, H), the outputs of the layers of a pipeline; None for directions.
        w_up: (M - 1, G * H, H), the input weights of the layers above the first.
        seeds, p: of the dropout between the layers; no seeds without.
        rows_ahead: time steps x batch rows of the first layer of a pipeline that one product may make.
    """

    def __init__(
        self,
        x: Tensor,
        w_ih: Tensor,
        h: Tensor | None = None,
        w_up: Tensor | None = None,
        seeds: Tensor | None = None,
        p: float = 0.0,
        rows_ahead: int = 0,
    ):
        wide = x.is_cuda and x.dtype != torch.float32
        self.x, self.h, self.seeds, self.p, self.rows_ahead = x, h, seeds, p, rows_ahead
        self.w_ih = w_ih if wide else w_ih.float()
        self.w_up = w_up if w_up is None or wide else w_up.float()
        self.buffer: Tensor | None = None
        self.dropped: Tensor | None = None
        self.N, self.from_step = 0, None  # steps of a chunk; the first one whose input side of member 0 is in the buffer

    def chunk(self, starts: list[int], N: int) -> tuple[Tensor, int]:
        """The input side of the steps starts[m], ..., starts[m] + N - 1 of each member m, and the row where member 0 begins:
        as the kernels take them (`rnnfast.kernels.step.forward`), in a buffer that the next call overwrites."""
        x, (D, width, _), B = self.x, self.w_ih.shape, self.x.shape[1]
        if len(starts) == 1:
            return wide_product(x[starts[0] : starts[0] + N].reshape(N * B, -1), self.w_ih[0].t()).view(N, B, width), 0
        others = (len(starts) - 1) * N
        ahead = max(1, self.rows_ahead // (N * B)) * N if self.w_up is not None else N
        if self.buffer is None or self.N != N:
            self.N, self.from_step = N, None
            self.buffer = x.new_empty(others + ahead, B, width, dtype=torch.float32)
        if self.from_step is None or not self.from_step <= starts[0] < self.from_step + ahead or D > 1:
            self._read(0, starts[0], self.buffer[others:])
            self.from_step = starts[0]
        for m in range(1, D):
            self._read(m, starts[m], self.buffer[(m - 1) * N : m * N])
        above = _active(starts, N, len(x), range(D, len(starts)))
        if above:
            assert self.w_up is not None
            below = range(above.start - 1, above.stop - 1)
            rows = self._below(below, starts[above.start], N)
            out = self.buffer[below.start * N : below.stop * N].view(len(below), N * B, width)
            wide_product(rows, self.w_up[below.start : below.stop].mT, out)
        return self.buffer, others + starts[0] - self.from_step

    def _read(self, m: int, start: int, out: Tensor) -> None:
        """Make the input side of a member that reads x, from the step `start` on, in time, as far as there are steps."""
        first, last = max(0, start), min(len(self.x), start + len(out))
        if first < last:
            rows, out = self.x[first:last].flatten(0, 1), out[first - start : last - start].flatten(0, 1)
            wide_product(rows, self.w_ih[m].t(), out)

    def _below(self, layers: range, start: int, N: int) -> Tensor:
        """The chunks of `layers`, whose first one starts at the step `start`, with dropout: (layers, N * B, H)."""
        assert self.h is not None
        rows = _chunk_rows(self.h, layers, start, N)
        assert len(rows) == len(layers)
        if self.seeds is None:
            return rows
        from rnnfast.kernels import dropout

        if self.dropped is None:
            self.dropped = rows.new_empty(self.h.shape[0] - 1, *rows.shape[1:])
        T, B = self.x.shape[:2]
        out = self.dropped[: len(layers)]
        dropout.apply(rows, out, self.seeds[layers.start : layers.stop], self.p, T * B, begin=start * B, lag=-N * B)
        return out


def sides_of_layers(
    part: slice, x: Tensor, w_ih: Tensor, h: Tensor, w_up: Any, seeds: Tensor | None, p: float, rows_ahead: int = 0
) -> Sides:
    """The input sides of some layers of a stack. The arguments are those of the whole stack. The first of the layers reads `x`,
    or all that the layer below wrote before."""
    first, inner = part.start, slice(part.start, part.stop - 1)
    if first:
        x, w_ih = h[first - 1], w_up[first - 1 : first]
        x = x if seeds is None else drop_out(x[None], seeds[first - 1 : first], p)[0]
    return Sides(x, w_ih, h[part], w_up[inner], None if seeds is None else seeds[inner], p, rows_ahead)


class Upstream:
    """The gradients of the outputs of a pipeline's layers, dy of the last one and W_ih^T d_gates of the layer above.

    Args:
        dy: (T, B, H), of the last layer's output; None for zeros.
        d_gates: (M, T, B, K * H), which the launches fill. The input side is the first G * H columns.
        w_up: (M - 1, G * H, H), with its rows in the order of these columns.
        seeds, p: of the dropout between the layers; no seeds without.
    """

    def __init__(self, dy: Tensor | None, d_gates: Tensor, w_up: Tensor, seeds: Tensor | None, p: float):
        self.dy, self.d_gates, self.w_up, self.seeds, self.p = dy, d_gates, w_up, seeds, p
        self.buffer: Tensor | None = None

    def chunk(self, starts: list[int], N: int) -> Tensor | None:
        """(M, N, B, H) of the steps starts[m], ..., starts[m] + N - 1, in a buffer that the next call overwrites. A single
        layer gets `dy` as it is."""
        if len(starts) == 1:
            return self.dy
        (M, T, B, _), (_, width, H) = self.d_gates.shape, self.w_up.shape
        if self.buffer is None:
            self.buffer = self.d_gates.new_zeros(M, N, B, H)
        first, last = max(0, starts[-1]), min(T, starts[-1] + N)
        if self.dy is not None and first < last:
            self.buffer[-1, first - starts[-1] : last - starts[-1]] = self.dy[first:last]
        below = _active(starts, N, T, range(M - 1))
        if below:
            rows = _chunk_rows(self.d_gates, range(below.start + 1, below.stop + 1), starts[below.start], N, width)
            out = self.buffer[below.start : below.stop].flatten(1, 2)
            product(rows, self.w_up[below.start : below.stop], out)
            if self.seeds is not None:
                from rnnfast.kernels import dropout

                seeds = self.seeds[below.start : below.stop]
                dropout.apply(out, out, seeds, self.p, T * B, begin=starts[below.start] * B, lag=-N * B)
        return self.buffer


def upstream_of_layers(
    part: slice, dy: Tensor | None, d_gates: Tensor, w_up: Any, cell: Cell, seeds: Tensor | None, p: float
) -> Upstream:
    """The gradients of the outputs of some layers of a stack. The arguments are those of the whole stack. The layer above the
    last one has run."""
    H, last, inner = w_up.shape[2], part.stop - 1, slice(part.start, part.stop - 1)
    w_up = w_up.roll(cell.apart * H, 1) if cell.apart else w_up  # the input sides of the last gates come first: see Cell.grads
    if part.stop < d_gates.shape[0]:
        above = d_gates[part.stop].flatten(0, 1)[:, : w_up.shape[1]]
        dy = product(above, w_up[last]).view(*d_gates.shape[1:3], H)
        dy = dy if seeds is None else drop_out(dy[None], seeds[last : last + 1], p)[0]
    return Upstream(dy, d_gates[part], w_up[inner], None if seeds is None else seeds[inner], p)


class Recomputed:
    """The activations that backward needs, from the input and the outputs.

    Args:
        cell: the cell.
        sides: the input sides.
        h: (M, T, B, H), the outputs of each member.
        h0: (M, B, H) or None.
        c, c0: the carried states (M, T, B, C * H) and those before the first step (M, B, C * H), or None.
        w, bias_x, bias_h: W_hh, b_ih and b_hh of each member.
        flips: as in `rnnfast.kernels.groups.Group`.
        marks, given: as the kernels take them, or None.
    """

    def __init__(
        self,
        cell: Cell,
        sides: Sides,
        h: Tensor,
        h0: Tensor | None,
        c: Tensor | None,
        c0: Tensor | None,
        w: Tensor,
        bias_x: Tensor | None,
        bias_h: Tensor | None,
        flips: int,
        marks: Marks | None,
        given: Given | None,
    ):
        self.cell, self.sides, self.w, self.flips, self.marks, self.given = cell, sides, w, flips, marks, given
        self.h, self.c, self.starts = h, c, (h0, c0)
        self.biases = bias_x, bias_h

    def chunk(self, starts: list[int], N: int) -> Tensor:
        """(M, N, B, S * H), of the steps starts[m], ..., starts[m] + N - 1."""
        from rnnfast.kernels.given import Given
        from rnnfast.kernels.recompute import compute

        M, _, B, H = self.h.shape
        before_h = self._entering(self.h, 0, starts, N)
        before_c = None if self.c is None else self._entering(self.c, 1, starts, N)
        saved = self.h.new_empty(M, N, B, self.cell.saved * H)
        h_side = None
        if self.cell.recurrent:
            h_side = wide_product(before_h.view(M, N * B, H), self.w.mT).view(M, N, B, -1)
        x, first = self.sides.chunk(starts, N)
        x = torch.cat([x[first : first + N], x[: (M - 1) * N]]).view(M, N, B, -1) if M > 1 else x[None]
        compute(self.cell, x, h_side, *self.biases, saved, before_h, before_c, self.given or Given(), starts)
        return saved

    def _entering(self, states: Tensor, kind: int, starts: list[int], N: int) -> Tensor:
        """The states that entered the steps starts[m], ..., starts[m] + N - 1, (M, N, B, width). kind: 0 for h, 1 for those
        carried."""
        M, T, B, width = states.shape
        before = states.new_zeros(M, N, B, width)
        for m, own in enumerate(states):
            first, last = max(0, starts[m]), min(T, starts[m] + N)
            if first >= last:
                continue
            start, reset, codes = self.starts[kind], None, None
            start = None if start is None else start[m]
            if self.marks is not None:
                start, reset = (self.marks.starts_c if kind else self.marks.starts_h)[m]
                codes = self.marks.codes[m]
            found = entering(own, start, reset, codes, bool(self.flips >> m & 1), first, last)
            before[m, first - starts[m] : last - starts[m]] = found
        return before
