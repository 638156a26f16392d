"""Launches of the step kernels: `forward` and `backward`, one launch a time step.

The steps beside a step are in the order of processing: for a reverse direction the one before t is t + 1.
"""

from __future__ import annotations

import functools

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.marks import Marks, StartGrads
from rnnfast.kernels.runtime import INTERPRETED, MOST_LAUNCHERS, Launcher, addresses, as_a_gpu, emulates_bf16
from rnnfast.kernels.step.kernels import backward_step_kernel, forward_step_kernel
from rnnfast.kernels.step.plan import StepPlan

__all__ = ["after", "backward", "before", "forward"]


def _launcher(kernel, plan: StepPlan, **constants) -> Launcher:
    return Launcher(kernel, constants | {"PLAN": plan}, num_warps=plan.num_warps, num_stages=plan.num_stages)


@functools.lru_cache(MOST_LAUNCHERS)
def _forward_launcher(cell: Cell, plan: StepPlan, saves: bool, aligned: bool, precision: str, dtype) -> Launcher:
    return _launcher(
        forward_step_kernel, plan, CELL=cell.forward, G=cell.gates, SAVED=cell.saved if saves else 0, CARRIES_C=cell.carries_c,
        ALIGNED=aligned, PRECISION=precision, EMULATE_BF16=emulates_bf16(dtype),
    )  # fmt: skip


@functools.lru_cache(MOST_LAUNCHERS)
def _backward_launcher(cell: Cell, plan: StepPlan, aligned: bool, precision: str, dtype) -> Launcher:
    return _launcher(
        backward_step_kernel, plan, CELL=cell.backward, G=cell.gates, D=cell.grads, SAVED=cell.saved, CARRIES_C=cell.carries_c,
        DIRECT=cell.direct, ALIGNED=aligned, PRECISION=precision, EMULATE_BF16=emulates_bf16(dtype),
    )  # fmt: skip


def before(t: int, T: int, reverse: bool, h, h0, c, c0, codes=None):
    """The step processed before t: its index, the tensors that hold its h and c, and whether there is any state. With marks
    there always is: those of the first step point to where it is."""
    if codes is not None or t != (T - 1 if reverse else 0):
        return t + 1 if reverse else t - 1, h, c, 1
    return 0, h if h0 is None else h0, c if c0 is None else c0, int(h0 is not None)


def after(begin: int, end: int, T: int, reverse: bool) -> tuple[int, int]:
    """The step that backward comes from to the steps begin, ..., end - 1: its index, and whether there is one."""
    t = begin - 1 if reverse else end
    return (t, 1) if 0 <= t < T else (0, 0)


@as_a_gpu
def forward(
    cell: Cell, chunks, w, bias_x, bias_h, h0, c0, h, c, saved, *, reverse: bool, precision: str, plan: StepPlan,
    marks: Marks = Marks(),
) -> None:  # fmt: skip
    """Run the recurrence over all time steps, one launch each. All tensors contiguous and on one device.

    Args:
        cell: the cell, from `rnnfast.kernels.cells.CELLS`.
        chunks: ``chunks()`` gives pairs (begin, x), in the order of processing: for `reverse`, the last steps first. x (n, B,
            G * H) in float32 is the input side W_ih x of the steps begin, ..., begin + n - 1. It may be overwritten when the
            next pair is asked for.
        w: (G * H, H), W_hh.
        bias_x, bias_h: (G * H,), b_ih and b_hh, or both None.
        h0: (B, H) initial hidden state, or None for zeros.
        c0: (B, H) float32 initial cell state, or None for zeros; None for a cell without one.
        h: (T, B, H), written: the hidden states.
        c: (T, B, H) float32 if `saved` is given, else (1, B, H), written: all cell states, else the last; None without any.
        saved: (T, B, cell.saved * H), written: what backward needs; empty if it is to be computed again
            (`rnnfast.kernels.recompute`) or the cell saves nothing; None in inference.
        reverse: from the last step to the first.
        precision: of a float32 product, "ieee" or "tf32".
        plan: the tiles.
        marks: see `rnnfast.kernels.marks`. Its `starts_h` and `starts_c` replace h0 and c0. Nothing is written of padded steps;
            `c` for one step keeps the last of each row.
    """
    T, B, H = h.shape
    training = saved is not None
    aligned = H * h.element_size() % 16 == 0
    saves = training and saved.numel() > 0
    launcher = _forward_launcher(cell, plan, saves, aligned, precision, h.dtype)
    grid = -(-B // plan.BLOCK_B), -(-H // plan.BLOCK_H), 1
    first = (T - 1 if reverse else 0) if marks.codes is None else -1  # with marks the first step is as any other
    dt = 1 if reverse else -1  # to the step before
    x_aligned = launch = None
    for begin, x in chunks():
        pointer = x.data_ptr()
        if x_aligned is not (x_aligned := pointer % 16 == 0):  # Triton compiles other code for it
            launch = None
        x_at, n = x if INTERPRETED else pointer, x.size(0)
        for at in range(n - 1, -1, -1) if reverse else range(n):
            t = begin + at
            t_c = t if training else 0
            if t == first:
                h_first, c_first = h if h0 is None else h0, c if c0 is None else c0
                launcher(
                    grid, x, w, bias_x, bias_h, h_first, c_first, marks, h, c, saved,
                    t, at, 0, int(h0 is not None), t_c, 0, B, H,
                )  # fmt: skip
                continue
            if launch is None:
                launch = launcher.bind(grid, x, w, bias_x, bias_h, h, c, marks, h, c, saved, T, T, T, 1, T, T, B, H)
                w_at, bias_x_at, bias_h_at, h_at, c_at, marks_at, saved_at = addresses(w, bias_x, bias_h, h, c, marks, saved)
            launch(
                x_at, w_at, bias_x_at, bias_h_at, h_at, c_at, marks_at, h_at, c_at, saved_at,
                t, at, t + dt, 1, t_c, t_c + dt if training else 0, B, H,
            )  # fmt: skip


@as_a_gpu
def backward(
    cell: Cell, dy, saved, h, h0, c, c0, w, d_gates, d_h, d_c, *, reverse: bool, precision: str, plan: StepPlan,
    begin=0, steps=None, dcs=None, marks: Marks = Marks(), d_starts: StartGrads = StartGrads(),
) -> None:  # fmt: skip
    """Run the recurrence backward, one launch a time step. All tensors contiguous and on one device.

    Args:
        cell: the cell.
        dy: (T, B, H) gradient of the hidden states, or None.
        saved: (n, B, cell.saved * H), as forward left it for the steps of this call; empty for a cell that saves nothing.
        h, h0, c, c0, w: as in `forward`, with all cell states.
        d_gates: (T, B, cell.grads * H), written: the gate gradients.
        d_h: (B, H) float32; on entry the gradient of the last hidden state, on return, if `cell.direct`, the part of h0's
            gradient that does not pass through W_hh.
        d_c: (B, H) float32; on entry the gradient of the last cell state, on return that of c0; None without one.
        reverse, precision, plan: as in `forward`.
        begin, steps: the first in time and the number of the steps of this call; without, all. Chunks are run against the order
            of forward, each going on from what the one before left in `d_gates`, `d_h` and `d_c`.
        dcs: (T, B, H) float32, gradient of all cell states, besides d_c; or None.
        marks: as in `forward`. Nothing is read or written of padded steps.
        d_starts: with marks, added to: gradients of `marks.starts_c`, and of `marks.starts_h` but for the step processed first,
            for which `d_h` is as without marks. Each None if not needed. `d_c` is then scratch, but for empty rows.
    """
    T, B, H = h.shape
    aligned = H * h.element_size() % 16 == 0
    launcher = _backward_launcher(cell, plan, aligned, precision, h.dtype)
    grid = -(-B // plan.BLOCK_B), -(-H // plan.BLOCK_H), 1
    ends = (T - 1 if reverse else 0) if marks.codes is None else -1  # the step that forward began with
    dt = 1 if reverse else -1
    end = begin + (T if steps is None else steps)
    t_next, has_next = after(begin, end, T, reverse)
    launch = None
    for t in range(begin, end) if reverse else range(end - 1, begin - 1, -1):
        if t == ends:
            h_first, c_first = h if h0 is None else h0, c if c0 is None else c0
            launcher(
                grid, dy, saved, h, h_first, c, c_first, w, dcs, marks, d_gates, d_h, d_c, d_starts,
                t, t - begin, 0, t_next, int(h0 is not None), has_next, B, H,
            )  # fmt: skip
        else:
            if launch is None:
                launch = launcher.bind(
                    grid, dy, saved, h, h, c, c, w, dcs, marks, d_gates, d_h, d_c, d_starts, T, T, T, T, 1, 1, B, H
                )
                dy_at, saved_at, h_at, c_at, w_at, dcs_at, marks_at = addresses(dy, saved, h, c, w, dcs, marks)
                d_gates_at, d_h_at, d_c_at, d_starts_at = addresses(d_gates, d_h, d_c, d_starts)
            launch(
                dy_at, saved_at, h_at, h_at, c_at, c_at, w_at, dcs_at, marks_at, d_gates_at, d_h_at, d_c_at, d_starts_at,
                t, t - begin, t + dt, t_next, 1, has_next, B, H,
            )  # fmt: skip
        t_next, has_next = t, 1
