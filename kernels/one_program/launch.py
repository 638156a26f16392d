"""Launches of the one-program kernels: `forward` and `backward`, one launch for many time steps."""

from __future__ import annotations

import functools

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.groups import Group
from rnnfast.kernels.marks import Marks, StartGrads
from rnnfast.kernels.one_program.backward import one_program_backward_kernel
from rnnfast.kernels.one_program.forward import one_program_forward_kernel
from rnnfast.kernels.one_program.plan import OneProgramPlan
from rnnfast.kernels.persistent.launch import packed
from rnnfast.kernels.runtime import MOST_LAUNCHERS, Launcher, addresses, as_a_gpu, emulates_bf16

__all__ = ["backward", "forward"]


def _launcher(
    kernel, cell: Cell, plan: OneProgramPlan, grouped: bool, directions: int, H: int, dtype, precision: str, **own
) -> Launcher:
    """`own`: constants that only one of the kernels has."""
    constants = {
        "H": H,
        "G": cell.gates,
        "CARRIES_C": cell.carries_c,
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
    own = {"CELL": cell.forward, "SAVED": cell.saved if saves else 0, "APART": cell.grads > cell.gates, "KEEP_C": training}
    return _launcher(one_program_forward_kernel, cell, plan, *sizes, **own)


@functools.lru_cache(MOST_LAUNCHERS)
def _backward_launcher(cell: Cell, plan: OneProgramPlan, *sizes) -> Launcher:
    own = {"CELL": cell.backward, "D": cell.grads, "SAVED": cell.saved, "DIRECT": cell.direct}
    return _launcher(one_program_backward_kernel, cell, plan, *sizes, **own)


def _packed(marks: Marks, plan: OneProgramPlan) -> Marks:
    """`marks` with the codes of each of the plan's batch tiles in a word, (M * T, tiles): all that a call needs."""
    if marks.codes is None:
        return marks
    codes = marks.codes.view(-1, marks.codes.size(-1))
    return packed(marks._replace(codes=codes), plan, 0, codes.size(0))


@as_a_gpu
def forward(
    cell: Cell, rounds, w, bias_x, bias_h, h0, c0, h, c, saved, *, group: Group, precision: str, plan: OneProgramPlan,
    marks: Marks = Marks(),
) -> None:  # fmt: skip
    """Run the recurrence over all time steps, a launch for each of `rounds`. Arguments as in `rnnfast.kernels.step.forward`."""
    T, B, H = h.size(-3), h.size(-2), w.size(-1)
    training = saved is not None
    saves = training and saved.numel() > 0
    launcher = _forward_launcher(cell, plan, saves, training, group.members > 1, group.directions, H, h.dtype, precision)
    grid = plan.grid(B, group.members)
    has_first, h0 = (0, h) if h0 is None else (1, h0)
    fixed = w, bias_x, bias_h, h0, c if c0 is None else c0, _packed(marks, plan), h, c, saved
    aligned = launch = None
    for begin, x in rounds():
        (pointer,), N = addresses(x), x.size(1)
        if aligned is not (aligned := x.data_ptr() % 16 == 0):  # Triton compiles other code for it
            launch = launcher.bind(grid, x, *fixed, begin, group.lag, N, T, group.flips, has_first, B)
            at = addresses(*fixed)
        launch(pointer, *at, begin, -group.lag, N, T, group.flips, has_first, B)


@as_a_gpu
def backward(
    cell: Cell, rounds, h, h0, c, c0, w, d_gates, d_h, d_c, *, group: Group, precision: str, plan: OneProgramPlan, dcs=None,
    marks: Marks = Marks(), d_starts: StartGrads = StartGrads(),
) -> None:  # fmt: skip
    """Run the recurrence backward, a launch for each of `rounds`. Arguments as in `rnnfast.kernels.step.backward`."""
    T, B, H = h.size(-3), h.size(-2), w.size(-1)
    launcher = _backward_launcher(cell, plan, group.members > 1, group.directions, H, h.dtype, precision)
    grid = plan.grid(B, group.members)
    has_first, h0 = (0, h) if h0 is None else (1, h0)
    fixed = h, h0, c, c if c0 is None else c0, w, dcs, _packed(marks, plan), d_gates, d_h, d_c, d_starts
    aligned = launch = None
    for begin, N, dy, saved in rounds():
        pointers, saved_steps = addresses(dy, saved), saved.size(1)
        if aligned != (aligned := [tensor is None or tensor.data_ptr() % 16 == 0 for tensor in (dy, saved)]):
            launch = launcher.bind(
                grid, dy, saved, *fixed, begin, group.lag, N, T, group.flips, has_first, saved_steps, B
            )
            at = addresses(*fixed)
        launch(*pointers, *at, begin, group.lag, N, T, group.flips, has_first, saved_steps, B)
