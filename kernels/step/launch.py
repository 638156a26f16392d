"""Launches of the step kernels: `forward` and `backward`, one launch a time step of all members of a group.

A cell that needs whole rows takes two, one for each stage of a step (`rnnfast.kernels.step.forward`). The first one is left out
where it has no product: at a first step from zeros, and at backward's first step.
"""

from __future__ import annotations

import functools

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.given import Given
from rnnfast.kernels.groups import Group
from rnnfast.kernels.marks import Marks, StartGrads
from rnnfast.kernels.runtime import MOST_LAUNCHERS, Launcher, Repeated, as_a_gpu, emulates_bf16
from rnnfast.kernels.step.backward import backward_step_kernel
from rnnfast.kernels.step.forward import forward_step_kernel
from rnnfast.kernels.step.plan import StepPlan

__all__ = ["backward", "forward"]


def _launcher(kernel, plan: StepPlan, grouped: bool, directions: int, aligned: bool, precision: str, dtype, **cell) -> Launcher:
    constants = {"GROUPED": grouped, "DIRECTIONS": directions, "ALIGNED": aligned, "PRECISION": precision, "PLAN": plan}
    constants |= cell | {"EMULATE_BF16": emulates_bf16(dtype)}
    return Launcher(kernel, constants, num_warps=plan.num_warps, num_stages=plan.num_stages)


def _of_cell(cell: Cell, stage: str) -> dict:
    return {"G": cell.gates, "CARRIED": cell.carried, "HELD": cell.held, "NOISE": cell.noise, "STAGE": stage}


@functools.lru_cache(MOST_LAUNCHERS)
def _forward_launcher(cell: Cell, saves: bool, stage: str, *kind) -> Launcher:
    constants = _of_cell(cell, stage) | {"CELL": cell.forward, "SAVED": cell.saved if saves else 0}
    return _launcher(forward_step_kernel, *kind, **constants)


@functools.lru_cache(MOST_LAUNCHERS)
def _backward_launcher(cell: Cell, stage: str, *kind) -> Launcher:
    constants = _of_cell(cell, stage) | {"CELL": cell.backward, "D": cell.grads, "SAVED": cell.saved, "DIRECT": cell.direct}
    return _launcher(backward_step_kernel, *kind, **constants)


def _of_rows(plan: StepPlan, H: int) -> list[tuple[str, StepPlan]]:
    """The two launches of a step of a cell that needs whole rows, each with its plan. The last one runs the cell."""
    return [("product", plan), ("cell", plan.of_rows(H))]


def _kind(h, H: int, group: Group, precision: str) -> tuple:
    """What a launcher is for, besides the cell and the plan."""
    return group.members > 1, group.directions, H * h.element_size() % 16 == 0, precision, h.dtype


@as_a_gpu
def forward(
    cell: Cell, rounds, w, bias_x, bias_h, h0, c0, h, c, saved, *, group: Group, precision: str, plan: StepPlan,
    marks: Marks = Marks(), given: Given = Given(),
) -> None:  # fmt: skip
    """Run the recurrence of each of M members over all time steps, one launch a step. All tensors contiguous and on one device.

    The K carried states of a cell (`Cell.carried`) lie side by side: state n, from 1, is columns (n - 1) * H to n * H.

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
        c0: (M, B, K * H) float32 initial carried states, or None for zeros; None for a cell without any.
        h: (T, B, D * H), written: the hidden states, D members side by side; for layers (M, T, B, H).
        c: (M, T, B, K * H) float32 if `saved` is given, else (M, 1, B, K * H), written: all carried states, else the last; None
            for a cell without any.
        saved: (M, T, B, cell.saved * H), written: what backward needs; empty if it is to be computed again
            (`rnnfast.kernels.recompute`) or the cell saves nothing; None in inference.
        group: the members.
        precision: of a float32 product, "ieee" or "tf32".
        plan: the tiles.
        marks: see `rnnfast.kernels.marks`. Its `starts_h` and `starts_c` replace h0 and c0. Nothing is written of padded steps;
            `c` for one step keeps the last of each row.
        given: held tiles and seeds, see `rnnfast.kernels.given`.
    """
    *_, T, B, _ = h.shape
    H = w.size(-1)
    saves = saved is not None and saved.numel() > 0
    kind = _kind(h, H, group, precision)
    product = h.new_empty(0).float().new_empty(group.members, B, cell.gates * H) if cell.rows else None
    h_first, c_first, has_first = h if h0 is None else h0, c if c0 is None else c0, int(h0 is not None)
    fixed = w, bias_x, bias_h, h_first, c_first, marks, given, h, c, saved, product
    stages = [
        Repeated(_forward_launcher(cell, saves, stage, tiles, *kind), tiles.grid(B, H, group.members), *fixed)
        for stage, tiles in (_of_rows(plan, H) if cell.rows else [("whole", plan)])
    ]
    sizes = T, group.flips, has_first, 1 if c is None else c.size(1), B, H
    enters = has_first or marks.codes is not None  # whether a state enters the first step
    for begin, N, x, first in rounds():
        launches = [stage.of(x, sizes=(T, T, T, -group.lag, N, *sizes)) for stage in stages]
        for at in range(group.steps(begin, N, T, False)):
            for launch in launches if enters or begin + at > 0 else launches[-1:]:
                launch(first, begin, at, -group.lag, N, *sizes)


@as_a_gpu
def backward(
    cell: Cell, rounds, h, h0, c, c0, w, d_gates, d_h, d_c, *, group: Group, precision: str, plan: StepPlan, dcs=None,
    marks: Marks = Marks(), d_starts: StartGrads = StartGrads(), given: Given = Given(), d_held=None,
) -> None:  # fmt: skip
    """Run the recurrence of each of M members backward, one launch a time step. All tensors contiguous and on one device.

    Args:
        cell: the cell.
        rounds: ``rounds()`` gives (begin, N, dy, saved), in the order of `Group.begins` in backward: what a launch of N
            positions of each member reads. N may change as in `forward`. dy, the gradient of the hidden states, is None or all
            of it, laid out as `h`; for layers (M, N, B, H), of these positions, in time. saved (M, T, B, cell.saved * H) is as
            forward left it, or (M, N, B, cell.saved * H) of these positions, in time; empty for a cell that saves nothing.
            Where a member has no position, both may hold anything.
        h, h0, c, c0, w: as in `forward`, with all carried states.
        d_gates: (M, T, B, cell.grads * H), written: the gate gradients, in the order that `Cell.grads` explains.
        d_h: (M, B, H) float32; on entry the gradient of the last hidden state, on return, if `cell.direct`, the part of h0's
            gradient that does not pass through W_hh.
        d_c: (M, B, K * H) float32; on entry the gradient of the last carried states, on return that of c0; None without any.
        group, precision, plan: as in `forward`.
        dcs: (M, T, B, K * H) float32, gradient of all carried states, besides d_c; or None.
        marks: as in `forward`. Nothing is read or written of padded steps.
        d_starts: with marks, added to: gradients of `marks.starts_c`, and of `marks.starts_h` but for the step processed first,
            for which `d_h` is as without marks. Each None if not needed. `d_c` is then scratch, but for empty rows.
        given: as in `forward`.
        d_held: (M, B, cell.held * H) float32, added to: the gradient of `given.held`. None without held tiles.
    """
    *_, T, B, _ = h.shape
    H = w.size(-1)
    kind = _kind(h, H, group, precision)
    product = d_h.new_empty(group.members, B, H) if cell.rows else None
    h_first, c_first, has_first = h if h0 is None else h0, c if c0 is None else c0, int(h0 is not None)
    fixed = h, h_first, c, c_first, w, dcs, marks, given, d_gates, d_h, d_c, d_starts, d_held, product
    stages = [
        Repeated(_backward_launcher(cell, stage, tiles, *kind), tiles.grid(B, H, group.members), *fixed)
        for stage, tiles in (_of_rows(plan, H) if cell.rows else [("whole", plan)])
    ]
    first_begin = -group.lag * (group.members - 1)
    for begin, N, dy, saved in rounds():
        sizes = T, group.flips, has_first, saved.size(1) if cell.saved else T, B, H
        launches = [stage.of(dy, saved, sizes=(T, T, group.lag, N, *sizes)) for stage in stages]
        for at in range(group.steps(begin, N, T, True)):
            for launch in launches if begin + at > first_begin else launches[-1:]:
                launch(begin, at, group.lag, N, *sizes)
