"""Launches of the one-program kernels: `forward` and `backward`, one launch for many time steps."""

from __future__ import annotations

import functools

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.marks import Marks, StartGrads
from rnnfast.kernels.one_program.backward import one_program_backward_kernel
from rnnfast.kernels.one_program.forward import one_program_forward_kernel
from rnnfast.kernels.one_program.plan import OneProgramPlan
from rnnfast.kernels.persistent.launch import packed
from rnnfast.kernels.runtime import MOST_LAUNCHERS, Launcher, as_a_gpu, emulates_bf16, in_chunks
from rnnfast.kernels.step.launch import after, before

__all__ = ["backward", "forward"]


def _launcher(kernel, cell: Cell, plan: OneProgramPlan, H: int, dtype, precision: str, **own) -> Launcher:
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


@in_chunks
@as_a_gpu
def forward(
    cell: Cell, x, begin: int, w, bias_x, bias_h, h0, c0, h, c, saved, *, reverse: bool, precision: str, plan: OneProgramPlan,
    marks: Marks = Marks(),
) -> None:  # fmt: skip
    """Run the recurrence over the time steps of a chunk in one launch. Arguments as in `rnnfast.kernels.step.forward`."""
    T, B, H = h.shape
    n = x.shape[0]
    training = saved is not None
    saves = training and saved.numel() > 0
    dt, t_x = (-1, n - 1) if reverse else (1, 0)
    t = begin + t_x
    t_prev, h_prev, c_prev, has_prev = before(t, T, reverse, h, h0, c, c0, marks.codes)
    if not 0 <= t_prev < T:  # with marks: they say what enters the first step
        t_prev, has_prev = 0, 0
    _forward_launcher(cell, plan, saves, training, H, h.dtype, precision)(
        plan.grid(B), x, w, bias_x, bias_h, h_prev, c_prev, packed(marks, plan, begin, begin + n), h, c, saved,
        t, t_x, dt, n, t_prev, has_prev, t_prev if training else 0, B,
    )  # fmt: skip


@as_a_gpu
def backward(
    cell: Cell, dy, saved, h, h0, c, c0, w, d_gates, d_h, d_c, *, reverse: bool, precision: str, plan: OneProgramPlan,
    begin=0, steps=None, dcs=None, marks: Marks = Marks(), d_starts: StartGrads = StartGrads(),
) -> None:  # fmt: skip
    """Run the recurrence backward, `plan.steps` a launch. Arguments as in `rnnfast.kernels.step.backward`."""
    T, B, H = h.shape
    has_first, h0 = (0, h) if h0 is None else (1, h0)
    c0 = c if c0 is None else c0
    t_first = T - 1 if reverse else 0
    end = begin + (T if steps is None else steps)
    t_next, has_next = after(begin, end, T, reverse)
    dt = 1 if reverse else -1
    all_marks = packed(marks, plan, 0, T)
    launcher = _backward_launcher(cell, plan, H, h.dtype, precision)
    for done in range(0, end - begin, plan.steps):
        n = min(plan.steps, end - begin - done)
        t = begin + done if reverse else end - done - 1
        launcher(
            plan.grid(B), dy, saved, h, h0, c, c0, w, dcs, all_marks, d_gates, d_h, d_c, d_starts,
            t, dt, n, t_first, has_first, t_next, has_next, begin, B,
        )  # fmt: skip
        t_next, has_next = t + dt * (n - 1), 1
