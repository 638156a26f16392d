"""Marks: what state enters each step of each batch row, in the terms of the direction that runs.

    0 CONTINUES   that of the step before
    1 STARTS      the initial state
    2 RESETS      the reset state
    3 PADDED      none: the step is padding. Nothing of it is read or written, and no gradient leaves it

So a kernel handles sequences of several lengths and states that begin anew in the same way: each row picks its pointers by
its mark, and all that follows is the same code. Padding is a row's last steps in time, the first ones that a
reverse direction comes to; the first step that is none never CONTINUES. Backward hands the gradient of a state that began
anew to the initial or the reset state, and cuts it off from the step before. `rnnfast.reference.marks` makes marks.

The persistent and the one-program kernels take the marks of a step and a tile of batch rows packed into one word. So every
program of the tile has them by one scalar load, whatever the layout of its tiles, and sees at once whether no row of the tile
runs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

CONTINUES, STARTS, RESETS, PADDED = (tl.constexpr(code) for code in range(4))
MOST_ROWS = tl.constexpr(32)  # the most rows of a tile whose marks fit a word, two bits a row
ALL_PADDED = tl.constexpr(-1)  # packed marks of a step at which no row of the tile runs


class Marks(NamedTuple):
    """The marks of a call and the states that begin anew, for M members (`rnnfast.kernels.groups`); each None where a call has
    none.

    Attributes:
        codes: (M, T, B) int8; the persistent and the one-program kernels are given (M, T, tiles) words of `pack_kernel`.
        order: (B,) int32, the batch rows in the order in which programs take them, the same for all members.
        starts_h: (M, 2, B, H), the initial and the reset h.
        starts_c: (M, 2, B, K * H) float32, the initial and the reset carried states, K side by side.
    """

    codes: Any = None
    order: Any = None
    starts_h: Any = None
    starts_c: Any = None


class StartGrads(NamedTuple):
    """Gradients of `Marks.starts_h` and `Marks.starts_c`, of their shapes, float32 and added to; None where not needed."""

    h: Any = None
    c: Any = None


@triton.jit
def batch_rows(slots, order_ptr, B):
    """The batch rows in these slots, in the order given if there is one, so that a tile's rows end together; from B on none."""
    if order_ptr is not None:
        return tl.load(order_ptr + slots, mask=slots < B, other=B)
    else:
        return slots


@triton.jit(do_not_specialize=["T", "B"])
def pack_kernel(
    marks_ptr,  # (T, B) int8
    order_ptr,  # (B,) int32 or None, as for `batch_rows`
    packed_ptr,  # (T, tiles) words of 64 bits, written: the mark of slot i of a tile of BLOCK_B slots in bits 2 i and 2 i + 1
    T,
    B,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    steps = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    lanes = tl.arange(0, MOST_ROWS)
    slots = tl.where(lanes < BLOCK_B, tl.program_id(1) * BLOCK_B + lanes, B)
    rows = batch_rows(slots, order_ptr, B)
    at = steps.to(tl.int64)[:, None] * B + rows[None, :]
    marks = tl.load(marks_ptr + at, mask=(steps < T)[:, None] & (rows < B)[None, :], other=PADDED)
    words = tl.sum(marks.to(tl.int64) << (2 * lanes)[None, :], 1)
    packed = packed_ptr.to(tl.pointer_type(tl.int64)) + steps.to(tl.int64) * tl.cdiv(B, BLOCK_B) + tl.program_id(1)
    tl.store(packed, words, mask=steps < T)


@triton.jit
def unpacked(word, BLOCK_B: tl.constexpr):
    """The marks in a word of `pack_kernel`, (BLOCK_B,)."""
    return ((word >> (2 * tl.arange(0, BLOCK_B))) & 3).to(tl.int32)


@triton.jit
def anew(mark):
    """Whether the state that enters the step begins anew."""
    return (mark == STARTS) | (mark == RESETS)


@triton.jit
def start_rows(starts_ptr, mark, offs_b, B, H):
    """Pointers to the batch rows of starts (2, B, H), initial and reset, for rows whose state begins anew."""
    return starts_ptr + ((mark.to(tl.int64) - STARTS) * B + offs_b) * H


@triton.jit
def entering(prev_rows, starts_ptr, mark, offs_b, B, H, ALIGNED: tl.constexpr):
    """Pointers to each batch row of the state that enters a step: in prev_rows, or in starts (2, B, H), initial and reset.
    ALIGNED: whether each is a multiple of 16 bytes, which Triton 3.9 forgets at a select, and then loads single elements."""
    rows = tl.where(anew(mark), start_rows(starts_ptr, mark, offs_b, B, H), prev_rows)
    if ALIGNED:
        rows = tl.multiple_of(rows, 16)
    return rows


@triton.jit
def hand_over(d_starts_ptr, tile, mark, offs_b, offs_h, mask_h, B, H):
    """Add the gradients of states that began anew to d_starts (2, B, H). Once a launch for each buffer: the next access may
    belong to another thread."""
    mask = anew(mark)[:, None] & mask_h[None, :]
    at = ((mark.to(tl.int64) - STARTS) * B + offs_b)[:, None] * H + offs_h[None, :]
    tl.store(d_starts_ptr + at, tl.load(d_starts_ptr + at, mask=mask, other=0.0) + tile, mask=mask)
