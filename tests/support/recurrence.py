"""What the tests of kernels share: small plans, and layers of raw buffers that any family runs, alone or as a group."""

from __future__ import annotations

import math

import torch

from rnnfast import reference
from rnnfast.kernels.cells import Cell
from rnnfast.kernels.given import Given
from rnnfast.kernels.groups import Group
from rnnfast.kernels.marks import Marks, StartGrads
from rnnfast.kernels.persistent.plan import PersistentPlan
from rnnfast.kernels.step import plan

from .cells import CELLS  # relative: tests import this as support.recurrence, tests.ptx as tests.support.recurrence

UNWRITTEN = 77.0
ADDED_TO = 0.5
GUARD = 64  # elements before and after each buffer that must stay as they were
# a rounding or two of the type: the products add in another order than the step kernels'
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tiles(H: int, block_h: int = 8, block_k: int = 32, split: int = 1, steps: int = 1 << 16):
    """A small plan, so that a small layer makes many programs."""
    return PersistentPlan(8, block_h, block_k // split, split, -(-H // 32) * 32, 4, steps, 1 << 20)


class Layer:
    """Inputs of one layer, and a run of any family on them. `cell`: a name in `support.cells.CELLS`, or a cell. `seed`: another
    one gives another layer of the same sizes. `support.equations` says what is right.

    `lengths`, `resets`: of the marks, if any; then the initial and the reset states are given, or both zero without `h0`, the
    rows are taken in the opposite order, and `starts` says whether those states' gradients are wanted. `dcs`: whether there is
    a gradient of all cell states.
    """

    def __init__(
        self, cell: str | Cell, dtype: torch.dtype, T: int, B: int, H: int, *, h0=True, bias=True, dy=True, reverse=False,
        lengths=None, resets=None, starts=True, dcs=False, seed=0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(T * 1000 + B * 100 + H + seed * 1_000_000)

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        self.name, self.reverse = cell if isinstance(cell, str) else None, reverse
        self.cell = CELLS[cell] if isinstance(cell, str) else cell
        carried = self.cell.carried
        self.x = normal(T, B, self.cell.gates * H).float()
        self.w = normal(self.cell.gates * H * self.cell.recurrent, H, scale=H**-0.5)
        self.bias_x, self.bias_h = (normal(self.cell.gates * H) if bias else None for _ in range(2))
        self.bias_h = self.bias_h if self.cell.recurrent else None
        self.h0 = normal(B, H) if h0 else None
        self.c0 = normal(B, carried * H).float() if h0 and carried else None
        self.dy = normal(T, B, H) if dy else None
        self.d_h = normal(B, H).float()
        self.d_c = normal(B, carried * H).float() if carried else None
        self.shape = T, B, H
        self.dcs = normal(T, B, carried * H).float() if dcs and carried else None
        self.marks, self.starts = Marks(), starts
        if lengths is not None or resets is not None:
            given = {"lengths": None if lengths is None else torch.tensor(lengths), "resets": resets, "reverse": reverse}
            starts_h = normal(2, B, H) * h0
            self.marks = Marks(
                codes=reference.marks(self.x, **given),
                order=torch.arange(B - 1, -1, -1, dtype=torch.int32),
                starts_h=starts_h,
                starts_c=normal(2, B, carried * H).float() * h0 if carried else None,
            )
            self.h0 = self.c0 = None
            padded = self.marks.codes == reference.PADDED
            for tensor in (self.x, self.dy, self.dcs):
                if tensor is not None:
                    tensor[padded] = float("nan")  # never read, or never to be seen
        self.held = normal(B, self.cell.held * H).float() if self.cell.held else None
        self.seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator) if self.cell.noise else None

    def forward(self, family, tiles, training=True, chunk=None):
        """h, c and what is saved, the input side given in chunks of steps; whatever is not written stays UNWRITTEN."""
        return Members([self], chunk).forward(family, tiles, training)[0]

    def backward(self, family, tiles, h, c, saved, chunk=None):
        """The gate gradients, and the gradients of the initial states as far as they do not pass through W_hh; with marks those
        of `starts_h` and `starts_c` too, and the carried ones where they mean something. Last those of the held tiles, if any.
        All that is added to was `ADDED_TO` before."""
        return Members([self], chunk).backward(family, tiles, [(h, c, saved)])[0]

    def both(self, family, tiles, chunk=None):
        forward = self.forward(family, tiles, chunk=chunk)
        return [tensor for tensor in (*forward, *self.backward(family, tiles, *forward)) if tensor is not None]


class Members:
    """Layers of the same sizes as the members of one group (`rnnfast.kernels.groups`), with an input side each.

    Args:
        layers: one; or any number of one direction, which run as a pipeline; or, if the second one is of the other direction,
            two directions.
        chunk: steps of a chunk; without, all.
        gradient_chunk: likewise in backward, if another.
        by_chunk: whether backward is given what is saved a chunk at a time, as `rnnfast.kernels.recompute` makes it.
        side_by_side: whether the outputs of layers of any directions lie side by side, as those of heads.

    Whatever holds no step of a member is NaN. Each buffer that is written stands between guards, which each run checks.
    """

    def __init__(
        self, layers: list[Layer], chunk: int | None = None, gradient_chunk: int | None = None, *, by_chunk: bool = False,
        side_by_side: bool = False,
    ):  # fmt: skip
        self.layers, self.cell, (self.T, B, H) = layers, layers[0].cell, layers[0].shape
        self.N, self.gradient_N, self.by_chunk = chunk or self.T, gradient_chunk or chunk or self.T, by_chunk
        self.guarded: list[torch.Tensor] = []
        flips = sum(int(layer.reverse) << m for m, layer in enumerate(layers))
        self.group = Group(len(layers), len(layers) if side_by_side or flips == 2 else 1, flips)
        self.sizes = B, H

    def _group(self, N: int) -> Group:
        return self.group._replace(lag=N if self.group.layers else 0)

    def _buffer(self, *shape: int, dtype: torch.dtype = torch.float32):
        """An unwritten buffer between two guards."""
        whole = torch.full((math.prod(shape) + 2 * GUARD,), UNWRITTEN, dtype=dtype)
        self.guarded.append(whole)
        return whole[GUARD : len(whole) - GUARD].view(shape)

    def _check_guards(self):
        whole = all(bool((each[:GUARD] == UNWRITTEN).all() and (each[-GUARD:] == UNWRITTEN).all()) for each in self.guarded)
        self.guarded.clear()
        assert whole, "a kernel wrote outside of its output"

    def _stacked(self, *tensors):
        """With the members in front; None of None."""
        return None if tensors[0] is None else torch.stack(tensors)

    def _of_chunk(self, tensors, begin: int, N: int, lag: int, backward: bool):
        """(members, N, ...): of each member's tensor (T, ...) the steps that a launch of N positions from `begin` runs, in
        time. NaN where there are none."""
        rows = torch.full((len(tensors), N, *tensors[0].shape[1:]), float("nan"), dtype=tensors[0].dtype)
        for m, tensor in enumerate(tensors):
            flipped = (self.group.flips >> m & 1) != backward
            first = self.T - N - begin - m * lag if flipped else begin + m * lag
            low, high = max(0, first), max(0, min(self.T, first + N))
            if low < high:
                rows[m, low - first : high - first] = tensor[low:high]
        return rows

    def _together(self, tensors):
        """(T, B, H) of each member as the kernels have h: side by side, or one after another."""
        if tensors[0] is None:
            return None
        return torch.cat(tensors, -1) if self.group.directions > 1 else torch.stack(tensors)

    def _apart(self, tensor):
        M = len(self.layers)
        return [*tensor.chunk(M, -1)] if self.group.directions > 1 else [*tensor.view(M, *tensor.shape[-3:])]

    def _marks(self):
        marks = [layer.marks for layer in self.layers]
        if marks[0].codes is None:
            return Marks()
        parts = [self._stacked(*(getattr(each, name) for each in marks)) for name in ("codes", "starts_h", "starts_c")]
        return Marks(parts[0], marks[0].order, *parts[1:])

    def _shared(self):
        """The arguments that forward and backward share: w, h0 and c0, and the one that is by name, if the cell needs it."""
        w, h0, c0, held, seeds = (
            self._stacked(*(getattr(layer, name) for layer in self.layers)) for name in ("w", "h0", "c0", "held", "seed")
        )
        return (w, h0, c0), {"given": Given(held, seeds)} if self.cell.held or self.cell.noise else {}

    def forward(self, family, tiles, training=True):
        """h, c and what is saved of each member; whatever is not written stays UNWRITTEN."""
        (B, H), T, M, N, dtype = self.sizes, self.T, len(self.layers), self.N, self.layers[0].w.dtype
        h = self._buffer(*self._together([torch.empty(T, B, H)] * M).shape, dtype=dtype)
        c = self._buffer(M, T if training else 1, B, self.cell.carried * H) if self.cell.carried else None
        saved = self._buffer(M, T, B, self.cell.saved * H, dtype=dtype) if training else None
        bias_x, bias_h = (self._stacked(*(getattr(layer, name) for layer in self.layers)) for name in ("bias_x", "bias_h"))
        (w, h0, c0), given = self._shared()
        group = self._group(N)

        def rounds():
            for begin in group.begins(T, N, False):
                n = N if group.layers else min(N, T - begin)
                x = self._of_chunk([layer.x for layer in self.layers], begin, n, -group.lag, False)
                gap = torch.full_like(x[0, :1], float("nan"))  # member 0 may begin anywhere behind the others
                yield begin, n, torch.cat([x[1:].flatten(0, 1), gap, x[0]])[M == 1 :], (M - 1) * n + (M > 1)

        family.forward(
            self.cell, rounds, w, bias_x, bias_h, h0, c0, h, c, saved, group=group, precision="ieee", plan=tiles,
            marks=self._marks(), **given,
        )  # fmt: skip
        self._check_guards()
        cs = [None] * M if c is None else c
        return [(h, cs[m], None if saved is None else saved[m]) for m, h in enumerate(self._apart(h))]

    def backward(self, family, tiles, forwards):
        """The results of `Layer.backward` for each member; `forwards` are those of `forward`."""
        (B, H), T, M, N, dtype = self.sizes, self.T, len(self.layers), self.gradient_N, self.layers[0].w.dtype
        hs, cs, saved = zip(*forwards, strict=True)
        h, c, saved = self._together(hs).contiguous(), self._stacked(*cs), torch.stack(saved)
        d_gates = self._buffer(M, T, B, self.cell.grads * H, dtype=dtype)
        d_h, d_c, dcs = (self._stacked(*(getattr(layer, name) for layer in self.layers)) for name in ("d_h", "d_c", "dcs"))
        d_h, d_c = (None if carried is None else self._buffer(*carried.shape).copy_(carried) for carried in (d_h, d_c))
        (w, h0, c0), given = self._shared()
        d_held = None
        if self.cell.held:
            given["d_held"] = d_held = self._buffer(M, B, self.cell.held * H).fill_(ADDED_TO)
        marks = self._marks()
        wanted = (marks.starts_h, marks.starts_c) if self.layers[0].starts else (None, None)
        d_starts = StartGrads(*(None if states is None else self._buffer(*states.shape).fill_(ADDED_TO) for states in wanted))
        group = self._group(N)
        dys = [layer.dy for layer in self.layers]
        dy = None if dys[0] is None else self._together(dys).contiguous()

        def rounds():
            for begin in group.begins(T, N, True):
                n = N if group.layers else min(N, T - begin)
                part = begin, n, group.lag, True
                yield (
                    begin,
                    n,
                    self._of_chunk(dys, *part) if group.layers and dy is not None else dy,
                    self._of_chunk(saved, *part) if self.by_chunk else saved,
                )

        family.backward(
            self.cell, rounds, h, h0, c, c0, w, d_gates, d_h, d_c, group=group, precision="ieee", plan=tiles, dcs=dcs,
            marks=marks, d_starts=d_starts, **given,
        )  # fmt: skip
        self._check_guards()
        results = [self._results(m, d_gates[m], d_h[m], None if d_c is None else d_c[m], d_starts) for m in range(M)]
        return results if d_held is None else [(*each, d_held[m]) for m, each in enumerate(results)]

    def _results(self, m: int, d_gates, d_h, d_c, d_starts):
        layer, codes = self.layers[m], self.layers[m].marks.codes
        if codes is None:
            return d_gates, d_h if self.cell.direct else None, d_c
        empty = (codes == reference.PADDED).all(0)[:, None]
        begins = (codes[-1 if layer.reverse else 0] != reference.PADDED)[:, None]
        d_h = d_h * (empty | begins) if self.cell.direct else d_h * empty
        starts = (None if states is None else states[m] for states in d_starts)
        return d_gates, d_h, None if d_c is None else d_c * empty, *starts


def steps_of(H: int, dtype: torch.dtype):
    return plan.step_plan(H, dtype.itemsize, "ieee")


def assert_close(ours, theirs, dtype):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], check_dtype=True)


def assert_as_alone(family, plan, layers: list[Layer], *chunks: int, **options) -> None:
    """Forward, backward and inference of a group give each member the bits that it has alone, and nothing is NaN. `chunks` and
    `options`: those of `Members`."""

    def results(run, is_alone: bool) -> list:
        forward = run.forward(family, plan)
        backward = run.backward(family, plan, *(forward if is_alone else (forward,)))
        return [forward, backward, run.forward(family, plan, training=False)]

    together = results(Members(layers, *chunks, **options), False)
    for m, layer in enumerate(layers):
        for found, right in zip(together, results(layer, True), strict=True):
            for a, b in zip(found[m], right, strict=True):
                assert (a is None) == (b is None)
                assert a is None or (torch.equal(a, b) and not a.isnan().any())
