"""What the tests of the persistent kernels share: small plans, and a layer of raw buffers that either family runs."""

from __future__ import annotations

import torch

from rnnfast import reference
from rnnfast.kernels.cells import CELLS, Cell
from rnnfast.kernels.marks import Marks, StartGrads
from rnnfast.kernels.persistent.plan import PersistentPlan
from rnnfast.kernels.step import plan

# a rounding or two of the type: the products add in another order than the step kernels'
UNWRITTEN = 77.0
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tiles(H: int, block_h: int = 8, block_k: int = 32, split: int = 1, steps: int = 1 << 16):
    """A small plan, so that a small layer makes many programs."""
    return PersistentPlan(8, block_h, block_k // split, split, -(-H // 32) * 32, 4, steps, 1 << 20)


class Layer:
    """Inputs of one layer, and a run of either family on them.

    `lengths`, `resets`: of the marks, if any; then the initial and the reset states are given, or both zero without `h0`, the
    rows are taken in the opposite order, and `starts` says whether those states' gradients are wanted. `dcs`: whether there is
    a gradient of all cell states.
    """

    def __init__(
        self, cell: str | Cell, dtype: torch.dtype, T: int, B: int, H: int, *, h0=True, bias=True, dy=True, reverse=False,
        lengths=None, resets=None, starts=True, dcs=False,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(T * 1000 + B * 100 + H)

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        self.cell, self.reverse = CELLS[cell] if isinstance(cell, str) else cell, reverse
        self.x = normal(T, B, self.cell.gates * H).float()
        self.w = normal(self.cell.gates * H, H, scale=H**-0.5)
        self.bias_x, self.bias_h = (normal(self.cell.gates * H) if bias else None for _ in range(2))
        self.h0 = normal(B, H) if h0 else None
        self.c0 = normal(B, H).float() if h0 and self.cell.carries_c else None
        self.dy = normal(T, B, H) if dy else None
        self.d_h = normal(B, H).float()
        self.d_c = normal(B, H).float() if self.cell.carries_c else None
        self.shape = T, B, H
        self.dcs = normal(T, B, H).float() if dcs and self.cell.carries_c else None
        self.marks, self.starts = Marks(), starts
        if lengths is not None or resets is not None:
            given = {"lengths": None if lengths is None else torch.tensor(lengths), "resets": resets, "reverse": reverse}
            starts_h = normal(2, B, H) * h0
            self.marks = Marks(
                codes=reference.marks(self.x, **given),
                order=torch.arange(B - 1, -1, -1, dtype=torch.int32),
                starts_h=starts_h,
                starts_c=normal(2, B, H).float() * h0 if self.cell.carries_c else None,
            )
            self.h0 = self.c0 = None
            padded = self.marks.codes == reference.PADDED
            for tensor in (self.x, self.dy, self.dcs):
                if tensor is not None:
                    tensor[padded] = float("nan")  # never read, or never to be seen

    def forward(self, family, tiles, training=True, chunk=None):
        """h, c and what is saved, the input side given in chunks of steps; whatever is not written stays UNWRITTEN."""
        T, B, H = self.shape
        h = torch.full((T, B, H), UNWRITTEN, dtype=self.w.dtype)
        c = torch.full((T if training else 1, B, H), UNWRITTEN) if self.cell.carries_c else None
        saved = torch.full((T, B, self.cell.saved * H), UNWRITTEN, dtype=self.w.dtype) if training else None
        n = chunk or T
        for begin in reversed(range(0, T, n)) if self.reverse else range(0, T, n):
            family.forward(
                self.cell, self.x[begin : begin + n], begin, self.w, self.bias_x, self.bias_h, self.h0, self.c0, h, c, saved,
                reverse=self.reverse, precision="ieee", plan=tiles, marks=self.marks,
            )  # fmt: skip
        return h, c, saved

    def backward(self, family, tiles, h, c, saved):
        """The gate gradients, and the gradients of the initial states as far as they do not pass through W_hh; with marks those
        of `starts_h` and `starts_c` too, and the carried ones where they mean something."""
        T, B, H = self.shape
        d_gates = torch.full((T, B, self.cell.grads * H), UNWRITTEN, dtype=self.w.dtype)
        d_h = self.d_h.clone()
        d_c = None if self.d_c is None else self.d_c.clone()
        marks = self.marks.codes
        wanted = (self.marks.starts_h, self.marks.starts_c) if self.starts else (None, None)
        d_starts = StartGrads(*(None if states is None else torch.full(states.shape, 0.5) for states in wanted))
        family.backward(
            self.cell, self.dy, saved, h, self.h0, c, self.c0, self.w, d_gates, d_h, d_c,
            reverse=self.reverse, precision="ieee", plan=tiles, dcs=self.dcs, marks=self.marks, d_starts=d_starts,
        )  # fmt: skip
        if marks is None:
            return d_gates, d_h if self.cell.direct else None, d_c
        empty = (marks == reference.PADDED).all(0)[:, None]
        begins = (marks[-1 if self.reverse else 0] != reference.PADDED)[:, None]
        d_h = d_h * (empty | begins) if self.cell.direct else d_h * empty
        return d_gates, d_h, None if d_c is None else d_c * empty, *d_starts

    def both(self, family, tiles, chunk=None):
        forward = self.forward(family, tiles, chunk=chunk)
        return [tensor for tensor in (*forward, *self.backward(family, tiles, *forward)) if tensor is not None]


def steps_of(H: int, dtype: torch.dtype):
    return plan.step_plan(H, dtype.itemsize, "ieee")


def assert_close(ours, theirs, dtype):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], check_dtype=True)
