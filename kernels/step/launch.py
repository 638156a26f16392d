"""Launches of the step kernels: `forward` and `backward`, one launch a time step of all members of a group."""

from __future__ import annotations

import functools

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.groups import Group
from rnnfast.kernels.marks import Marks, StartGrads
from rnnfast.kernels.runtime import MOST_LAUNCHERS, Launcher, Repeated, as_a_gpu, emulates_bf16
from rnnfast.kernels.step.kernels import backward_step_kernel, forward_step_kernel
from rnnfast.kernels.step.plan import StepPlan

__all__ = ["backward", "forward"]


def _launcher(kernel, plan: StepPlan, grouped: bool, directions: int, aligned: bool, precision: str, dtype, **cell) -> Launcher:
    constants = {"GROUPED": grouped, "DIRECTIONS": directions, "ALIGNED": aligned, "PRECISION": precision, "PLAN": plan}
    constants |= cell | {"EMULATE_BF16": emulates_bf16(dtype)}
    return Launcher(kernel, constants, num_warps=plan.num_warps, num_stages=plan.num_stages)


@functools.lru_cache(MOST_LAUNCHERS)
def _forward_launcher(cell: Cell, saves: bool, *kind) -> Launcher:
    return _launcher(
        forward_step_kernel,
        *kind,
        CELL=cell.forward,
        G=cell.gates,
        SAVED=cell.saved if saves else 0,
        CARRIES_C=cell.carried > 0,
    )


@functools.lru_cache(MOST_LAUNCHERS)
def _backward_launcher(cell: Cell, *kind) -> Launcher:
    return _launcher(
        backward_step_kernel, *kind, CELL=cell.backward, G=cell.gates, D=cell.grads, SAVED=cell.saved,
        CARRIES_C=cell.carried > 0, DIRECT=cell.direct,
    )  # fmt: skip


def _kind(h, H: int, group: Group, precision: str, plan: StepPlan) -> tuple:
    """What a launcher is for, besides the cell."""
    return plan, group.members > 1, group.directions, H * h.element_size() % 16 == 0, precision, h.dtype


@as_a_gpu
def forward(
    cell: Cell, rounds, w, bias_x, bias_h, h0, c0, h, c, saved, *, group: Group, precision: str, plan: StepPlan,
    marks: Marks = Marks(),
) -> None:  # fmt: skip
    """Run the recurrence of each of M members over all time steps, one launch a step. All tensors contiguous and on one device.

    Args:
        cell: the cell, from `rnnfast.kernels.cells.CELLS`.
        rounds: ``rounds()`` gives (begin, N, x, first), in the order of `Group.begins`. x (rows, B, G * H) in float32 holds the
            input side W_ih x of the N positions of each member that a launch from `begin` runs, in time: of member 0 from row
            `first` on, of the others in the first (M - 1) * N rows, one member after another. N may change from round to round,
            but for layers is `group.lag`. x may be overwritten when the next round is asked for. Where a member has no
            position, x may hold anything.
        w: (M, G * H, H), W_hh.
        bias_x, bias_h: (M, G * H), b_ih and b_hh, or both None.
        h0: (M, B, H) initial hidden states, or None for zeros.
        c0: (M, B, H) float32 initial cell states, or None for zeros; None for a cell without one.
        h: (T, B, D * H), written: the hidden states, D directions side by side; for layers (M, T, B, H).
        c: (M, T, B, H) float32 if `saved` is given, else (M, 1, B, H), written: all cell states, else the last; None without
            any.
        saved: (M, T, B, cell.saved * H), written: what backward needs; empty if it is to be computed again
            (`rnnfast.kernels.recompute`) or the cell saves nothing; None in inference.
        group: the members.
        precision: of a float32 product, "ieee" or "tf32".
        plan: the tiles.
        marks: see `rnnfast.kernels.marks`. Its `starts_h` and `starts_c` replace h0 and c0. Nothing is written of padded steps;
            `c` for one step keeps the last of each row.
    """
    *_, T, B, _ = h.shape
    H = w.size(-1)
    saves = saved is not None and saved.numel() > 0
    launcher = _forward_launcher(cell, saves, *_kind(h, H, group, precision, plan))
    grid = plan.grid(B, H, group.members)
    h_first, c_first, has_first = h if h0 is None else h0, c if c0 is None else c0, int(h0 is not None)
    repeated = Repeated(launcher, grid, w, bias_x, bias_h, h_first, c_first, marks, h, c, saved)
    sizes = T, group.flips, has_first, 1 if c is None else c.size(1), B, H
    for begin, N, x, first in rounds():
        launch = repeated.of(x, sizes=(T, T, T, -group.lag, N, *sizes))
        for at in range(group.steps(begin, N, T, False)):
            launch(first, begin, at, -group.lag, N, *sizes)


@as_a_gpu
def backward(
    cell: Cell, rounds, h, h0, c, c0, w, d_gates, d_h, d_c, *, group: Group, precision: str, plan: StepPlan, dcs=None,
    marks: Marks = Marks(), d_starts: StartGrads = StartGrads(),
) -> None:  # fmt: skip
    """Run the recurrence of each of M members backward, one launch a time step. All tensors contiguous and on one device.

    Args:
        cell: the cell.
        rounds: ``rounds()`` gives (begin, N, dy, saved), in the order of `Group.begins` in backward: what a launch of N
            positions of each member reads. N may change as in `forward`. dy, the gradient of the hidden states, is None or all
            of it, laid out as `h`; for layers (M, N, B, H), of these positions, in time. saved (M, T, B, cell.saved * H) is as
            forward left it, or (M, N, B, cell.saved * H) of these positions, in time; empty for a cell that saves nothing.
            Where a member has no position, both may hold anything.
        h, h0, c, c0, w: as in `forward`, with all cell states.
        d_gates: (M, T, B, cell.grads * H), written: the gate gradients.
        d_h: (M, B, H) float32; on entry the gradient of the last hidden state, on return, if `cell.direct`, the part of h0's
            gradient that does not pass through W_hh.
        d_c: (M, B, H) float32; on entry the gradient of the last cell state, on return that of c0; None without one.
        group, precision, plan: as in `forward`.
        dcs: (M, T, B, H) float32, gradient of all cell states, besides d_c; or None.
        marks: as in `forward`. Nothing is read or written of padded steps.
        d_starts: with marks, added to: gradients of `marks.starts_c`, and of `marks.starts_h` but for the step processed first,
            for which `d_h` is as without marks. Each None if not needed. `d_c` is then scratch, but for empty rows.
    """
    *_, T, B, _ = h.shape
    H = w.size(-1)
    launcher = _backward_launcher(cell, *_kind(h, H, group, precision, plan))
    grid = plan.grid(B, H, group.members)
    h_first, c_first, has_first = h if h0 is None else h0, c if c0 is None else c0, int(h0 is not None)
    repeated = Repeated(launcher, grid, h, h_first, c, c_first, w, dcs, marks, d_gates, d_h, d_c, d_starts)
    for begin, N, dy, saved in rounds():
        sizes = T, group.flips, has_first, saved.size(1) if cell.saved else T, B, H
        launch = repeated.of(dy, saved, sizes=(T, T, group.lag, N, *sizes))
        for at in range(group.steps(begin, N, T, True)):
            launch(begin, at, group.lag, N, *sizes)
