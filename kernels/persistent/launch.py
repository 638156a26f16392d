"""Launches of the persistent kernels: `forward` and `backward`, one launch for many time steps."""

from __future__ import annotations

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.marks import Marks, StartGrads, pack_kernel
from rnnfast.kernels.persistent.backward import persistent_backward_kernel
from rnnfast.kernels.persistent.exchange import clear_kernel
from rnnfast.kernels.persistent.forward import persistent_forward_kernel
from rnnfast.kernels.persistent.give_up import for_launch, name_of
from rnnfast.kernels.persistent.plan import ROWS, PersistentPlan
from rnnfast.kernels.runtime import INTERPRETED, as_a_gpu
from rnnfast.kernels.step.launch import after, before

__all__ = ["backward", "forward", "packed"]

CLEAR_BLOCK = 4096
PACK_STEPS = 32


def _power_of_two(gates: int) -> int:
    return 1 << (gates - 1).bit_length()


def _exchange(out, H: int, plan: PersistentPlan, blocks: int, marked: bool):
    """A cleared exchange buffer of `blocks` * H_PAD a row: `out` itself where nothing is padded or marked, else a new one."""
    return _cleared(out if plan.H_PAD == H and not marked else out.new_empty(*out.shape[:2], blocks * plan.H_PAD))


def _cleared(buffer):
    words = buffer.numel() * buffer.element_size() // 4
    clear_kernel[(-(-words // CLEAR_BLOCK),)](buffer, words, BLOCK=CLEAR_BLOCK, enable_fp_fusion=True)
    return buffer


def packed(marks: Marks, plan: PersistentPlan, begin: int, end: int) -> Marks:
    """`marks` with the codes of the steps begin, ..., end - 1 alone, those of each of the plan's batch tiles in a word."""
    if marks.codes is None:
        return marks
    codes = marks.codes[begin:end]
    T, B = codes.shape
    tiles = -(-B // plan.BLOCK_B)
    words = codes.new_empty(T, tiles * 8)  # bytes
    grid = -(-T // PACK_STEPS), tiles
    pack_kernel[grid](codes, marks.order, words, T, B, BLOCK_B=plan.BLOCK_B, BLOCK_T=PACK_STEPS, enable_fp_fusion=True)
    return marks._replace(codes=words)


def _options(plan: PersistentPlan) -> dict:
    return {
        "PLAN": plan.tiles,
        "num_warps": plan.num_warps,
        "num_stages": 1,  # the pipeliner ignores volatile: it would load ahead of the poll
        "enable_fp_fusion": True,
        # a second CTA on the SM is no use: the assembler would save registers for one, and spill
        "maxnreg": 255,
        "launch_cooperative_grid": True,  # programs wait for each other: all resident, or an error
    }


@as_a_gpu
def forward(
    cell: Cell, x, begin: int, w, bias_x, bias_h, h0, c0, h, c, saved, *, reverse: bool, precision: str, plan: PersistentPlan,
    marks: Marks = Marks(),
) -> None:  # fmt: skip
    """Run the recurrence over the time steps of a chunk in one launch, or a few where the batch takes several.

    Arguments as in `rnnfast.kernels.step.forward`. The rows of the chunk in `h` are its exchange, unless there are marks.
    """
    T, B, H = h.shape
    give_up, name = for_launch(x), name_of("forward", cell, H, h.dtype)
    n = x.shape[0]
    training = saved is not None
    exchange = _exchange(h[begin : begin + n], H, plan, 1, marks.codes is not None)
    chunk_marks = packed(marks, plan, begin, begin + n)
    dt, t_x = (-1, n - 1) if reverse else (1, 0)
    t = begin + t_x
    t_prev, h_prev, c_prev, has_prev = before(t, T, reverse, h, h0, c, c0, marks.codes)
    flags = {
        "CELL": cell.forward,
        "G": cell.gates,
        "GATES": _power_of_two(cell.gates),
        "SAVED": cell.saved if training and saved.numel() else 0,
        "CARRIES_C": cell.carries_c,
        "KEEP_C": training,
        "PER_WORD": 4 // h.element_size(),
        "PRECISION": precision,
        "EMULATE_BF16": INTERPRETED and "bfloat16" in str(h.dtype),
    }
    t_c_prev = t_prev if training else 0
    for grid, b_begin in plan.launches(B):
        persistent_forward_kernel[grid](
            x, w, bias_x, bias_h, h_prev, c_prev, chunk_marks, give_up, exchange, h, c, saved,
            t, t_x, dt, n, t_prev, has_prev, t_c_prev, b_begin, B, name, H=H, **flags, **_options(plan),
        )  # fmt: skip


@as_a_gpu
def backward(
    cell: Cell, dy, saved, h, h0, c, c0, w, d_gates, d_h, d_c, *, reverse: bool, precision: str, plan: PersistentPlan,
    begin=0, steps=None, dcs=None, marks: Marks = Marks(), d_starts: StartGrads = StartGrads(),
) -> None:  # fmt: skip
    """Run the recurrence backward, `plan.steps` a launch. Arguments as in `rnnfast.kernels.step.backward`.

    The rows of a launch in `d_gates` are its exchange; with marks it has a buffer of its own, which bounds the steps.
    """
    T, B, H = h.shape
    give_up, name = for_launch(d_h), name_of("backward", cell, H, h.dtype)
    flags = {
        "CELL": cell.backward,
        "G": cell.gates,
        "GATES": _power_of_two(cell.gates),
        "D": cell.grads,
        "SAVED": cell.saved,
        "CARRIES_C": cell.carries_c,
        "DIRECT": cell.direct,
        "PER_WORD": 4 // h.element_size(),
        "PRECISION": precision,
        "EMULATE_BF16": INTERPRETED and "bfloat16" in str(h.dtype),
    }
    has_first, h0 = (0, h) if h0 is None else (1, h0)
    c0 = c if c0 is None else c0
    t_first = T - 1 if reverse else 0
    end = begin + (T if steps is None else steps)
    t_next, has_next = after(begin, end, T, reverse)
    dt = 1 if reverse else -1
    marked = marks.codes is not None
    all_marks = packed(marks, plan, 0, T)
    most = plan.steps if not marked else min(plan.steps, max(1, ROWS // B))
    for done in range(0, end - begin, most):
        n = min(most, end - begin - done)
        first = begin + done if reverse else end - done - n
        t_x = 0 if reverse else n - 1
        exchange = _exchange(d_gates[first : first + n], H, plan, cell.gates, marked)
        sums = d_h if plan.PARTS == 1 else _cleared(d_h.new_empty(n, B, plan.PARTS * plan.H_PAD))
        for grid, b_begin in plan.launches(B):
            persistent_backward_kernel[grid](
                dy, saved, h, h0, c, c0, w, dcs, all_marks, give_up,
                exchange, sums, d_gates, d_h, d_c, d_starts,
                first + t_x, t_x, dt, n, t_first, has_first, t_next, has_next, b_begin, begin, B, name,
                H=H, **flags, **_options(plan),
            )  # fmt: skip
        t_next, has_next = first + t_x + dt * (n - 1), 1
