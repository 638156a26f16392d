"""Persistent kernels: one launch runs many time steps; the recurrent weights stay on chip.

`forward` and `backward` take what `rnnfast.kernels.step` takes, write the same buffers, and differ in the plan. Either
family's backward runs on what either's forward saved.
"""

from __future__ import annotations

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.persistent.backward import persistent_backward_kernel
from rnnfast.kernels.persistent.exchange import clear_kernel
from rnnfast.kernels.persistent.forward import persistent_forward_kernel
from rnnfast.kernels.plan import PersistentPlan
from rnnfast.kernels.step import upcast

__all__ = ["backward", "clear_kernel", "forward", "persistent_backward_kernel", "persistent_forward_kernel"]


def _power_of_two(gates: int) -> int:
    return 1 << (gates - 1).bit_length()


def _exchange(like, out, H: int, plan: PersistentPlan, blocks: int):
    """A cleared exchange buffer of `blocks` * H_PAD a row: `out` itself where nothing is padded, else a new one."""
    T, B, _ = like.shape
    buffer = out if plan.H_PAD == H else like.new_empty(T, B, blocks * plan.H_PAD)
    words = buffer.numel() * buffer.element_size() // 4
    block = 4096
    clear_kernel[(-(-words // block),)](buffer, words, BLOCK=block)
    return buffer


def _options(plan: PersistentPlan) -> dict:
    return {
        "BLOCK_B": plan.BLOCK_B,
        "BLOCK_H": plan.BLOCK_H,
        "BLOCK_K": plan.BLOCK_K,
        "SPLIT": plan.SPLIT,
        "H_PAD": plan.H_PAD,
        "num_warps": plan.num_warps,
        "num_stages": 1,  # the pipeliner ignores volatile: it would load ahead of the poll
        "enable_fp_fusion": True,
        # a second CTA on the SM is no use: the assembler would save registers for one, and spill
        "maxnreg": 255,
        "launch_cooperative_grid": True,  # programs wait for each other: all resident, or an error
    }


def forward(
    cell: Cell, gates, w, bias, h0, c0, h, c, *, save: bool, reverse: bool, precision: str, plan: PersistentPlan
) -> None:
    """Run the recurrence over all time steps, `plan.steps` a launch. Arguments as in `rnnfast.kernels.step.forward`."""
    T, B, H = h.shape
    exchange = _exchange(h, h, H, plan, 1)
    dt = -1 if reverse else 1
    flags = {
        "CELL": cell.forward,
        "G": cell.gates,
        "GATES": _power_of_two(cell.gates),
        "WIDTH": cell.width(save),
        "CARRIES_C": cell.carries_c,
        "HAS_BIAS": bias is not None,
        "SAVE": save and cell.saved > 0,
        "KEEP_C": save,
        "PER_WORD": 4 // h.element_size(),
        "PRECISION": precision,
        "UPCAST": upcast(h),
    }
    bias = w if bias is None else bias
    c = h if c is None else c
    for grid, b_begin in plan.launches(B):
        t_prev, h_prev, c_prev, has_prev = 0, h if h0 is None else h0, c if c0 is None else c0, int(h0 is not None)
        for begin in range(0, T, plan.steps):
            t, steps = (T - 1 - begin if reverse else begin), min(plan.steps, T - begin)
            t_c_prev = t_prev if save else 0
            persistent_forward_kernel[grid](
                gates, w, bias, h_prev, c_prev, exchange, h, c, t, dt, steps, t_prev, has_prev, t_c_prev, b_begin, B,
                H=H, **flags, **_options(plan),
            )  # fmt: skip
            t_prev, h_prev, c_prev, has_prev = t + dt * (steps - 1), h, c, 1


def backward(
    cell: Cell, dy, saved, h, h0, c, c0, w, d_gates, d_h, d_c, *, reverse: bool, precision: str, plan: PersistentPlan
) -> None:
    """Run the recurrence backward, `plan.steps` a launch. Arguments as in `rnnfast.kernels.step.backward`."""
    T, B, H = h.shape
    exchange = _exchange(h, d_gates, H, plan, cell.gates)
    dt = 1 if reverse else -1
    flags = {
        "CELL": cell.backward,
        "G": cell.gates,
        "GATES": _power_of_two(cell.gates),
        "D": cell.grads,
        "SAVED": cell.saved,
        "WIDTH": cell.width(True),
        "CARRIES_C": cell.carries_c,
        "DIRECT": cell.direct,
        "HAS_DY": dy is not None,
        "PER_WORD": 4 // h.element_size(),
        "PRECISION": precision,
        "UPCAST": upcast(h),
    }
    dy = h if dy is None else dy
    saved = h if saved is None else saved
    has_first, h0 = (0, h) if h0 is None else (1, h0)
    c = h if c is None else c
    c0 = c if c0 is None else c0
    d_c = d_h if d_c is None else d_c
    t_first = T - 1 if reverse else 0
    for grid, b_begin in plan.launches(B):
        t_next, has_next = 0, 0
        for begin in range(0, T, plan.steps):
            t, steps = (begin if reverse else T - 1 - begin), min(plan.steps, T - begin)
            persistent_backward_kernel[grid](
                dy, saved, h, h0, c, c0, w, exchange, d_gates, d_h, d_c,
                t, dt, steps, t_first, has_first, t_next, has_next, b_begin, B,
                H=H, **flags, **_options(plan),
            )  # fmt: skip
            t_next, has_next = t + dt * (steps - 1), 1
