"""Marks: what state enters each step of each batch row, in the terms of the direction that runs.

    0 CONTINUES   that of the step before
    1 STARTS      the initial state
    2 RESETS      the reset state
    3 PADDED      none: the step is padding, of which nothing is read or written and no gradient leaves

So sequences of several lengths and states that begin anew inside a sequence are one thing to a kernel: each row picks its
pointers by its mark, and all that follows is the same code. Padding is a row's last steps in time, the first ones that a
reverse direction comes to; the first step that is none never CONTINUES. Backward hands the gradient of a state that began
anew to the initial or the reset state, and cuts it off from the step before. `rnnfast.reference.marks` makes marks.
"""

import triton
import triton.language as tl

CONTINUES, STARTS, RESETS, PADDED = (tl.constexpr(code) for code in range(4))


@triton.jit
def batch_rows(order_ptr, B, HAS_ORDER: tl.constexpr, BLOCK_B: tl.constexpr):
    """The batch rows of this program, and which of them exist; in the order given, so that a tile's rows end together."""
    slots = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = slots < B
    if HAS_ORDER:
        slots = tl.load(order_ptr + slots, mask=mask_b, other=0)
    return slots, mask_b


@triton.jit
def entering(prev_rows, starts_ptr, mark, offs_b, B, H, ALIGNED: tl.constexpr):
    """Pointers to each batch row of the state that enters a step: in prev_rows, or in starts (2, B, H), initial and reset.
    ALIGNED: whether each is a multiple of 16 bytes, which Triton 3.9 forgets at a select, and then loads single elements."""
    start_rows = starts_ptr + ((mark.to(tl.int64) - STARTS) * B + offs_b) * H
    rows = tl.where(mark == CONTINUES, prev_rows, start_rows)
    if ALIGNED:
        rows = tl.multiple_of(rows, 16)
    return rows


@triton.jit
def hand_over(d_starts_ptr, tile, mark, offs_b, offs_h, mask_h, B, H):
    """Add the gradients of states that began anew to d_starts (2, B, H). Once a launch for each buffer: the next access may
    belong to another thread."""
    mask = ((mark == STARTS) | (mark == RESETS))[:, None] & mask_h[None, :]
    at = ((mark.to(tl.int64) - STARTS) * B + offs_b)[:, None] * H + offs_h[None, :]
    tl.store(d_starts_ptr + at, tl.load(d_starts_ptr + at, mask=mask, other=0.0) + tile, mask=mask)
