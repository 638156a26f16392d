"""Launches of the one-program kernels: `forward` and `backward`, one launch for many time steps of all members of a group."""

from __future__ import annotations

import functools

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.given import Given
from rnnfast.kernels.groups import Group
from rnnfast.kernels.marks import Marks, StartGrads
from rnnfast.kernels.one_program.backward import one_program_backward_kernel
from rnnfast.kernels.one_program.forward import one_program_forward_kernel
from rnnfast.kernels.one_program.plan import OneProgramPlan
from rnnfast.kernels.persistent.launch import packed
from rnnfast.kernels.runtime import MOST_LAUNCHERS, Launcher, Repeated, as_a_gpu, emulates_bf16

__all__ = ["backward", "forward"]


def _launcher(
    kernel, cell: Cell, plan: OneProgramPlan, grouped: bool, directions: int, H: int, dtype, precision: str, **own
) -> Launcher:
    """`own`: constants that only one of the kernels has."""
    constants = {
        "H": H,
        "G": cell.gates,
        "CARRIED": cell.carried,
        "HELD": cell.held,
        "NOISE": cell.noise,
        "ROWS": cell.rows,
        "PRECISION": precision,
        "EMULATE_BF16": emulates_bf16(dtype),
        "W": plan.units // 16,
        "R": plan.BLOCK_B,
        "PARTS": plan.PARTS,
        "GROUPED": grouped,
        "DIRECTIONS": directions,
    }
    return Launcher(
        kernel,
        constants | own,
        num_warps=plan.num_warps,
        num_stages=1,
        # all that a thread may have: the assembler would save registers for a second program on the SM, and spill
        maxnreg=min(255, 65536 // (32 * plan.num_warps)),
    )


@functools.lru_cache(MOST_LAUNCHERS)
def _forward_launcher(cell: Cell, plan: OneProgramPlan, saves: bool, training: bool, *sizes) -> Launcher:
    own = {"CELL": cell.forward, "SAVED": cell.saved if saves else 0, "APART": cell.apart, "KEEP_C": training}
    return _launcher(one_program_forward_kernel, cell, plan, *sizes, **own)


@functools.lru_cache(MOST_LAUNCHERS)
def _backward_launcher(cell: Cell, plan: OneProgramPlan, *sizes) -> Launcher:
    own = {"CELL": cell.backward, "D": cell.grads, "SAVED": cell.saved, "DIRECT": cell.direct}
    return _launcher(one_program_backward_kernel, cell, plan, *sizes, **own)


@as_a_gpu
def forward(
    cell: Cell, rounds, w, bias_x, bias_h, h0, c0, h, c, saved, *, group: Group, precision: str, plan: OneProgramPlan,
    marks: Marks = Marks(), given: Given = Given(),
) -> None:  # fmt: skip
    """Run the recurrence over all time steps, a launch for each of `rounds`. Arguments as in `rnnfast.kernels.step.forward`."""
    T, B, H = h.size(-3), h.size(-2), w.size(-1)
    training = saved is not None
    saves = training and saved.numel() > 0
    launcher = _forward_launcher(cell, plan, saves, training, group.members > 1, group.directions, H, h.dtype, precision)
    grid = plan.grid(B, group.members)
    has_first, h0 = (0, h) if h0 is None else (1, h0)
    start_c = c if c0 is None else c0
    repeated = Repeated(launcher, grid, w, bias_x, bias_h, h0, start_c, packed(marks, plan), given, h, c, saved)
    for begin, N, x, first in rounds():
        sizes = first, begin, -group.lag, N, T, group.flips, has_first, B
        repeated.of(x, sizes=sizes)(*sizes)


@as_a_gpu
def backward(
    cell: Cell, rounds, h, h0, c, c0, w, d_gates, d_h, d_c, *, group: Group, precision: str, plan: OneProgramPlan, dcs=None,
    marks: Marks = Marks(), d_starts: StartGrads = StartGrads(), given: Given = Given(), d_held=None,
) -> None:  # fmt: skip
    """Run the recurrence backward, a launch for each of `rounds`. Arguments as in `rnnfast.kernels.step.backward`."""
    T, B, H = h.size(-3), h.size(-2), w.size(-1)
    launcher = _backward_launcher(cell, plan, group.members > 1, group.directions, H, h.dtype, precision)
    grid = plan.grid(B, group.members)
    has_first, h0 = (0, h) if h0 is None else (1, h0)
    start_c = c if c0 is None else c0
    read = h, h0, c, start_c, w, dcs, packed(marks, plan), given
    repeated = Repeated(launcher, grid, *read, d_gates, d_h, d_c, d_starts, d_held)
    for begin, N, dy, saved in rounds():
        sizes = begin, group.lag, N, T, group.flips, has_first, saved.size(1) if cell.saved else T, B
        repeated.of(dy, saved, sizes=sizes)(*sizes)
