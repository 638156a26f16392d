"""Step kernels: one launch a time step, for any size. The recurrent product of all gates and the cell's maths, fused.

Forward, for each step t (W the rows of W_hh, one block of H rows a gate):
    h_gates = W h_{t-1} + b_hh              states_t, saved_t = cell.forward(x_gates_t, h_gates, states_{t-1})
Backward, for each step from the last to the first (W_hh^T by columns of W):
    d_h_t = d_y_t + W^T d_gates_{t+1}       d_gates_t = cell.backward(saved_t, ..., d_h_t, d_c_t)

Legend: T steps, B batch, H hidden units, G gates, K the summed axis. A step's row is t * B + b. The step before is t_prev
and the one after t_next, in the order of processing: for a reverse direction t_prev = t + 1. Where there is none the flag
has_prev or has_next is 0, the product is skipped and the state is zero.

With marks (`rnnfast.kernels.marks`), has_prev and has_next are a matter of each batch row instead; without, HAS_MARKS is off
and the arguments that go with them are None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnnfast.kernels.marks import CONTINUES, PADDED, batch_rows, entering, hand_over
from rnnfast.kernels.maths import dot, round_to

__all__ = ["backward_step_kernel", "forward_step_kernel"]


@triton.jit(do_not_specialize=["t", "t_x", "t_prev", "has_prev", "t_c", "t_c_prev", "B"])
def forward_step_kernel(
    # inputs
    x_ptr,  # (*, B, G * H) float32, W_ih x_t at index t_x
    w_ptr,  # (G * H, H) W_hh
    bias_x_ptr,  # (G * H,) b_ih
    bias_h_ptr,  # (G * H,) b_hh
    h_prev_ptr,  # (*, B, H) h_{t-1} at index t_prev
    c_prev_ptr,  # (*, B, H) float32, c_{t-1} at index t_c_prev
    mark_ptrs,  # `Marks`
    # outputs
    h_ptr,  # (T, B, H) h_t at index t
    c_ptr,  # (*, B, H) float32, c_t at index t_c
    saved_ptr,  # (T, B, SAVED * H) activations for backward, at index t
    # sizes
    t,
    t_x,
    t_prev,
    has_prev,
    t_c,
    t_c_prev,
    B,
    H,
    # flags
    CELL: tl.constexpr,
    G: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIES_C: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    PLAN: tl.constexpr,  # `StepPlan`
):
    HAS_BIAS: tl.constexpr = bias_x_ptr is not None
    HAS_MARKS: tl.constexpr = mark_ptrs.codes is not None
    BLOCK_B: tl.constexpr = PLAN.BLOCK_B
    BLOCK_H: tl.constexpr = PLAN.BLOCK_H
    BLOCK_K: tl.constexpr = PLAN.BLOCK_K
    offs_b = batch_rows(tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), mark_ptrs.order, B)
    mask_b = offs_b < B
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    row = t.to(tl.int64) * B + offs_b
    row_x = t_x.to(tl.int64) * B + offs_b
    h_rows = h_prev_ptr + (t_prev.to(tl.int64) * B + offs_b) * H
    entered = offs_b < B * has_prev
    if HAS_MARKS:
        mark = tl.load(mark_ptrs.codes + row, mask=mask_b, other=PADDED)
        mask_b = mark != PADDED
        if tl.max(mask_b.to(tl.int32), 0) == 0:
            return
        h_rows = entering(h_rows, mark_ptrs.starts_h, mark, offs_b, B, H, ALIGNED)
        entered = mask_b
    mask = mask_b[:, None] & mask_h[None, :]
    mask_prev = entered[:, None] & mask_h[None, :]

    h_gates = ()
    for _ in tl.static_range(G):
        h_gates = h_gates + (tl.zeros((BLOCK_B, BLOCK_H), tl.float32),)
    for k in range(0, H * has_prev, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < H
        h_chunk = tl.load(h_rows[:, None] + offs_k[None, :], mask=mask_b[:, None] & mask_k[None, :], other=0.0)
        sums = ()
        for g in tl.static_range(G):
            w_rows = (g * H + offs_h).to(tl.int64)
            w_chunk = tl.load(w_ptr + w_rows[None, :] * H + offs_k[:, None], mask=mask_k[:, None] & mask_h[None, :], other=0.0)
            sums = sums + (dot(h_chunk, w_chunk, h_gates[g], PRECISION, EMULATE_BF16),)
        h_gates = sums

    x_gates = ()
    biased = ()
    for g in tl.static_range(G):
        x_gate = tl.load(x_ptr + row_x[:, None] * (G * H) + g * H + offs_h[None, :], mask=mask, other=0.0)
        h_gate = h_gates[g]
        if HAS_BIAS:
            x_gate += tl.load(bias_x_ptr + g * H + offs_h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
            h_gate += tl.load(bias_h_ptr + g * H + offs_h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
        x_gates = x_gates + (x_gate,)
        biased = biased + (h_gate,)

    states = (tl.load(h_rows[:, None] + offs_h[None, :], mask=mask_prev, other=0.0).to(tl.float32),)
    if CARRIES_C:
        c_rows = c_prev_ptr + (t_c_prev.to(tl.int64) * B + offs_b) * H
        if HAS_MARKS:
            c_rows = entering(c_rows, mark_ptrs.starts_c, mark, offs_b, B, H, ALIGNED)
        states = states + (tl.load(c_rows[:, None] + offs_h[None, :], mask=mask_prev, other=0.0),)

    new_states, saved = CELL(x_gates, biased, states)

    tl.store(
        h_ptr + row[:, None] * H + offs_h[None, :], round_to(new_states[0], h_ptr.dtype.element_ty, EMULATE_BF16), mask=mask
    )
    if CARRIES_C:
        row_c = t_c.to(tl.int64) * B + offs_b
        tl.store(c_ptr + row_c[:, None] * H + offs_h[None, :], new_states[1], mask=mask)
    for s in tl.static_range(SAVED):
        tile = round_to(saved[s], saved_ptr.dtype.element_ty, EMULATE_BF16)
        tl.store(saved_ptr + row[:, None] * (SAVED * H) + s * H + offs_h[None, :], tile, mask=mask)


@triton.jit(do_not_specialize=["t", "t_saved", "t_prev", "t_next", "has_prev", "has_next", "B"])
def backward_step_kernel(
    # inputs
    dy_ptr,  # (T, B, H) gradient of the outputs
    saved_ptr,  # (*, B, SAVED * H) activations that forward saved, at index t_saved
    h_ptr,  # (T, B, H) h_t
    h_prev_ptr,  # (*, B, H) h_{t-1} at index t_prev
    c_ptr,  # (T, B, H) float32, c_t
    c_prev_ptr,  # (*, B, H) float32, c_{t-1} at index t_prev
    w_ptr,  # (G * H, H) W_hh
    dcs_ptr,  # (T, B, H) float32, gradient of c_t from outside, besides the last one's
    mark_ptrs,  # `Marks`
    # outputs
    d_gates_ptr,  # (T * B, D * H) gate gradients; row t_next * B + b is read, row t * B + b written
    d_h_ptr,  # (B, H) float32, carried: gradient of h_t that comes neither from dy nor through W_hh
    d_c_ptr,  # (B, H) float32, carried: gradient of c_t
    d_start_ptrs,  # `StartGrads`
    # sizes
    t,
    t_saved,
    t_prev,
    t_next,
    has_prev,
    has_next,
    B,
    H,
    # flags
    CELL: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIES_C: tl.constexpr,
    DIRECT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    PLAN: tl.constexpr,  # `StepPlan`
):
    HAS_DY: tl.constexpr = dy_ptr is not None
    HAS_DCS: tl.constexpr = dcs_ptr is not None
    HAS_MARKS: tl.constexpr = mark_ptrs.codes is not None
    NEEDS_STARTS: tl.constexpr = d_start_ptrs.h is not None
    BLOCK_B: tl.constexpr = PLAN.BLOCK_B
    BLOCK_H: tl.constexpr = PLAN.BLOCK_H
    BLOCK_K: tl.constexpr = PLAN.BLOCK_K
    offs_b = batch_rows(tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), mark_ptrs.order, B)
    mask_b = offs_b < B
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    row = t.to(tl.int64) * B + offs_b
    row_prev = t_prev.to(tl.int64) * B + offs_b
    row_next = t_next.to(tl.int64) * B + offs_b
    h_rows = h_prev_ptr + row_prev * H
    entered = offs_b < B * has_prev
    # rows that need the product with the next step's gate gradients; that take a carried gradient; whose last step this is
    has_product, multiplied, carries, ends = has_next, mask_b, mask_b, offs_b < B * (1 - has_next)
    if HAS_MARKS:
        mark = tl.load(mark_ptrs.codes + row, mask=mask_b, other=PADDED)
        next_mark = tl.load(mark_ptrs.codes + row_next, mask=mask_b & (offs_b < B * has_next), other=PADDED)
        mask_b = mark != PADDED
        ends = mask_b & (next_mark == PADDED)
        carries = ends | (next_mark == CONTINUES)
        multiplied = (next_mark != PADDED) if NEEDS_STARTS else (next_mark == CONTINUES)
        has_product = tl.max(multiplied.to(tl.int32), 0)
        if tl.max((mask_b | multiplied).to(tl.int32), 0) == 0:
            return
        h_rows = entering(h_rows, mark_ptrs.starts_h, mark, offs_b, B, H, ALIGNED)
        entered = mask_b
    mask = mask_b[:, None] & mask_h[None, :]
    mask_prev = entered[:, None] & mask_h[None, :]
    mask_carries = carries[:, None] & mask_h[None, :]

    d_h = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    d_next = d_gates_ptr + row_next[:, None] * (D * H) + (D - G) * H  # the hidden side is the last G blocks
    for k in range(0, G * H * has_product, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < G * H
        d_chunk = tl.load(d_next + offs_k[None, :], mask=multiplied[:, None] & mask_k[None, :], other=0.0)
        w_chunk = tl.load(
            w_ptr + offs_k.to(tl.int64)[:, None] * H + offs_h[None, :], mask=mask_k[:, None] & mask_h[None, :], other=0.0
        )
        d_h = dot(d_chunk, w_chunk, d_h, PRECISION, EMULATE_BF16)

    at = row[:, None] * H + offs_h[None, :]
    carried = offs_b.to(tl.int64)[:, None] * H + offs_h[None, :]
    d_h_carried = tl.load(
        d_h_ptr + carried, mask=((multiplied | ends) if DIRECT else ends)[:, None] & mask_h[None, :], other=0.0
    )
    if NEEDS_STARTS:
        hand_over(d_start_ptrs.h, d_h + d_h_carried, next_mark, offs_b, offs_h, mask_h, B, H)
    if HAS_MARKS:
        d_h = tl.where((next_mark == CONTINUES)[:, None], d_h, 0.0)
        d_h_carried = tl.where(carries[:, None], d_h_carried, 0.0)
    if HAS_DY:
        d_h += tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    d_h += d_h_carried

    saved = ()
    row_saved = t_saved.to(tl.int64) * B + offs_b
    for s in tl.static_range(SAVED):
        tile = tl.load(saved_ptr + row_saved[:, None] * (SAVED * H) + s * H + offs_h[None, :], mask=mask, other=0.0)
        saved = saved + (tile.to(tl.float32),)
    states = (tl.load(h_rows[:, None] + offs_h[None, :], mask=mask_prev, other=0.0).to(tl.float32),)
    new_states = (tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32),)
    d_states = (d_h,)
    if CARRIES_C:
        c_rows = c_prev_ptr + row_prev * H
        if HAS_MARKS:
            c_rows = entering(c_rows, mark_ptrs.starts_c, mark, offs_b, B, H, ALIGNED)
        states = states + (tl.load(c_rows[:, None] + offs_h[None, :], mask=mask_prev, other=0.0),)
        new_states = new_states + (tl.load(c_ptr + at, mask=mask, other=0.0),)
        d_c = tl.load(d_c_ptr + carried, mask=mask_carries, other=0.0)
        if HAS_DCS:
            d_c += tl.load(dcs_ptr + at, mask=mask, other=0.0)
        d_states = d_states + (d_c,)

    d_gates, d_h_direct, d_c = CELL(saved, states, new_states, d_states)

    d_gates_out = d_gates_ptr + row[:, None] * (D * H) + offs_h[None, :]
    for g in tl.static_range(D):
        tl.store(d_gates_out + g * H, round_to(d_gates[g], d_gates_ptr.dtype.element_ty, EMULATE_BF16), mask=mask)
    if DIRECT:
        tl.store(d_h_ptr + carried, d_h_direct, mask=mask)
    if CARRIES_C:
        tl.store(d_c_ptr + carried, d_c, mask=mask)
        if NEEDS_STARTS:
            hand_over(d_start_ptrs.c, d_c, mark, offs_b, offs_h, mask_h, B, H)
