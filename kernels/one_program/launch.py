"""Launches of the one-program kernels: `forward` and `backward`, one launch for many time steps."""

from __future__ import annotations

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.marks import Marks, StartGrads
from rnnfast.kernels.one_program.backward import one_program_backward_kernel
from rnnfast.kernels.one_program.forward import one_program_forward_kernel
from rnnfast.kernels.one_program.plan import OneProgramPlan
from rnnfast.kernels.persistent.launch import packed
from rnnfast.kernels.runtime import INTERPRETED, as_a_gpu
from rnnfast.kernels.step.launch import after, before

__all__ = ["backward", "forward"]


def _options(plan: OneProgramPlan) -> dict:
    return {
        "W": plan.units // 16,
        "R": plan.BLOCK_B,
        "PARTS": plan.PARTS,
        "num_warps": plan.num_warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
        # all that a thread may have: the assembler would save registers for a second program on the SM, and spill
        "maxnreg": min(255, 65536 // (32 * plan.num_warps)),
    }


@as_a_gpu
def forward(
    cell: Cell, x, begin: int, w, bias_x, bias_h, h0, c0, h, c, saved, *, reverse: bool, precision: str, plan: OneProgramPlan,
    marks=None, order=None, starts_h=None, starts_c=None,
) -> None:  # fmt: skip
    """Run the recurrence over the time steps of a chunk in one launch. Arguments as in `rnnfast.kernels.step.forward`."""
    T, B, H = h.shape
    n = x.shape[0]
    training = saved is not None
    dt, t_x = (-1, n - 1) if reverse else (1, 0)
    t = begin + t_x
    t_prev, h_prev, c_prev, has_prev = before(t, T, reverse, h, h0, c, c0, marks)
    if not 0 <= t_prev < T:  # with marks: they say what enters the first step
        t_prev, has_prev = 0, 0
    words = None if marks is None else packed(marks[begin : begin + n], order, plan)
    one_program_forward_kernel[(-(-B // plan.BLOCK_B),)](
        x, w, bias_x, bias_h, h_prev, c_prev, Marks(words, order, starts_h, starts_c), h, c, saved,
        t, t_x, dt, n, t_prev, has_prev, t_prev if training else 0, B, H=H,
        CELL=cell.forward, G=cell.gates, SAVED=cell.saved if training and saved.numel() else 0, CARRIES_C=cell.carries_c,
        APART=cell.grads > cell.gates, KEEP_C=training, PRECISION=precision,
        EMULATE_BF16=INTERPRETED and "bfloat16" in str(h.dtype), **_options(plan),
    )  # fmt: skip


@as_a_gpu
def backward(
    cell: Cell, dy, saved, h, h0, c, c0, w, d_gates, d_h, d_c, *, reverse: bool, precision: str, plan: OneProgramPlan,
    begin=0, steps=None, dcs=None, marks=None, order=None, starts_h=None, starts_c=None, d_starts_h=None, d_starts_c=None,
) -> None:  # fmt: skip
    """Run the recurrence backward, `plan.steps` a launch. Arguments as in `rnnfast.kernels.step.backward`."""
    T, B, H = h.shape
    has_first, h0 = (0, h) if h0 is None else (1, h0)
    c0 = c if c0 is None else c0
    t_first = T - 1 if reverse else 0
    end = begin + (T if steps is None else steps)
    t_next, has_next = after(begin, end, T, reverse)
    dt = 1 if reverse else -1
    mark_tensors = Marks(packed(marks, order, plan), order, starts_h, starts_c)
    for done in range(0, end - begin, plan.steps):
        n = min(plan.steps, end - begin - done)
        t = begin + done if reverse else end - done - 1
        one_program_backward_kernel[(-(-B // plan.BLOCK_B),)](
            dy, saved, h, h0, c, c0, w, dcs, mark_tensors, d_gates, d_h, d_c, StartGrads(d_starts_h, d_starts_c),
            t, dt, n, t_first, has_first, t_next, has_next, begin, B, H=H,
            CELL=cell.backward, G=cell.gates, D=cell.grads, SAVED=cell.saved, CARRIES_C=cell.carries_c, DIRECT=cell.direct,
            PRECISION=precision, EMULATE_BF16=INTERPRETED and "bfloat16" in str(h.dtype), **_options(plan),
        )  # fmt: skip
        t_next, has_next = t + dt * (n - 1), 1
