"""Launches of the step kernels: `forward` and `backward`, one launch a time step.

The steps beside a step are in the order of processing: for a reverse direction the one before t is t + 1.
"""

from __future__ import annotations

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.marks import Marks, StartGrads
from rnnfast.kernels.runtime import INTERPRETED, as_a_gpu
from rnnfast.kernels.step.kernels import backward_step_kernel, forward_step_kernel
from rnnfast.kernels.step.plan import StepPlan

__all__ = ["Launcher", "after", "backward", "before", "forward"]


class Launcher:
    """Launches one kernel many times with the same argument types.

    Triton binds and specialises every argument at each call, which costs several times a launch. The first two calls go that
    way: the initial state may be aligned otherwise than the output that follows it. The rest reuse what the second call built.
    """

    def __init__(self, kernel, plan: StepPlan, B: int, H: int, constants: dict):
        self.kernel, self.constants = kernel, constants | {"PLAN": plan}
        self.grid = -(-B // plan.BLOCK_B), -(-H // plan.BLOCK_H), 1
        # fused multiply-adds by name: the default of Triton 3.10 is to be without
        self.options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages, "enable_fp_fusion": True}
        self.calls, self.compiled = 0, None

    def __call__(self, *args):
        if self.compiled is not None:
            self.compiled(*args, *(self.constants[name] for name in self.kernel.arg_names[len(args) :]))
            return
        built = self.kernel[self.grid](*args, **self.constants, **self.options)
        self.calls += 1
        if self.calls == 2 and built is not None:  # the interpreter gives None
            self.compiled = built[self.grid]


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
    cell: Cell, x, begin: int, w, bias_x, bias_h, h0, c0, h, c, saved, *, reverse: bool, precision: str, plan: StepPlan,
    marks: Marks = Marks(),
) -> None:  # fmt: skip
    """Run the recurrence over the time steps of a chunk, one launch each. All tensors contiguous and on one device.

    Args:
        cell: the cell, from `rnnfast.kernels.cells.CELLS`.
        x: (n, B, G * H) float32, the input side W_ih x of the steps begin, ..., begin + n - 1.
        begin: the first of them in time. Chunks are run in the order of processing: for `reverse`, the last one first.
        w: (G * H, H), W_hh.
        bias_x, bias_h: (G * H,), b_ih and b_hh, or both None.
        h0: (B, H) initial hidden state, or None for zeros.
        c0: (B, H) float32 initial cell state, or None for zeros; None for a cell without one.
        h: (T, B, H), written: the hidden states; the chunk continues from the step beside it.
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
    n = x.shape[0]
    training = saved is not None
    constants = {
        "CELL": cell.forward,
        "G": cell.gates,
        "SAVED": cell.saved if training and saved.numel() else 0,
        "CARRIES_C": cell.carries_c,
        "ALIGNED": H * h.element_size() % 16 == 0,
        "PRECISION": precision,
        "EMULATE_BF16": INTERPRETED and "bfloat16" in str(h.dtype),
    }
    launch = Launcher(forward_step_kernel, plan, B, H, constants)
    for at in reversed(range(n)) if reverse else range(n):
        t = begin + at
        t_prev, h_prev, c_prev, has_prev = before(t, T, reverse, h, h0, c, c0, marks.codes)
        t_c, t_c_prev = (t, t_prev) if training else (0, 0)
        launch(
            x, w, bias_x, bias_h, h_prev, c_prev, marks, h, c, saved,
            t, at, t_prev, has_prev, t_c, t_c_prev, B, H,
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
    constants = {
        "CELL": cell.backward,
        "G": cell.gates,
        "D": cell.grads,
        "SAVED": cell.saved,
        "CARRIES_C": cell.carries_c,
        "DIRECT": cell.direct,
        "ALIGNED": H * h.element_size() % 16 == 0,
        "PRECISION": precision,
        "EMULATE_BF16": INTERPRETED and "bfloat16" in str(h.dtype),
    }
    launch = Launcher(backward_step_kernel, plan, B, H, constants)
    end = begin + (T if steps is None else steps)
    t_next, has_next = after(begin, end, T, reverse)
    for t in range(begin, end) if reverse else reversed(range(begin, end)):
        t_prev, h_prev, c_prev, has_prev = before(t, T, reverse, h, h0, c, c0, marks.codes)
        launch(
            dy, saved, h, h_prev, c, c_prev, w, dcs, marks,
            d_gates, d_h, d_c, d_starts, t, t - begin, t_prev, t_next, has_prev, has_next, B, H,
        )  # fmt: skip
        t_next, has_next = t, 1
