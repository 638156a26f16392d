"""Step kernels: one launch a time step, for any size. The recurrent product of all gates and the cell's maths, fused.

Forward, for each step t (W the rows of W_hh, one block of H rows a gate):
    h_gates = W h_{t-1} + b_hh              states_t, saved_t = cell.forward(x_gates_t, h_gates, states_{t-1})
Backward, for each step from the last to the first (W_hh^T by columns of W):
    d_h_t = d_y_t + W^T d_gates_{t+1}       d_gates_t = cell.backward(saved_t, ..., d_h_t, d_c_t)

Legend: M members, T steps, B batch, H hidden units, G gates, K the summed axis, D_H = DIRECTIONS * H. A step's row is
t * B + b. A launch runs one step of each member of a group (`rnnfast.kernels.groups`): number `at` of the N steps of a chunk.
The steps beside it are in the order of processing: for a member that runs from the last step to the first, the one before is
t + 1. Where there is none the flag has_prev or has_next is 0, the product is skipped and the state is zero. Without GROUPED
there is one member, M = 1.

With marks (`rnnfast.kernels.marks`), has_prev and has_next are a matter of each batch row instead; without, HAS_MARKS is off
and the arguments that go with them are None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnnfast.kernels.groups import place
from rnnfast.kernels.marks import CONTINUES, PADDED, batch_rows, entering, hand_over
from rnnfast.kernels.maths import dot, round_to

__all__ = ["backward_step_kernel", "forward_step_kernel"]


@triton.jit
def _before(states_ptr, row_size, start_ptr, t_before, is_first, offs_b, B, H, HAS_MARKS: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to each batch row of the state before a step: step t_before of states (T, B, row_size), or start (B, H) before
    the first. With marks that choice is `entering`'s. ALIGNED: as there."""
    if HAS_MARKS:
        return states_ptr + (t_before.to(tl.int64) * B + offs_b) * row_size
    else:
        size = tl.where(is_first, H, row_size)
        before = tl.where(is_first, 0, t_before).to(tl.int64) * B * size
        rows = tl.where(is_first, start_ptr, states_ptr) + before + offs_b.to(tl.int64) * size
        if ALIGNED:
            rows = tl.multiple_of(rows, 16)
        return rows


@triton.jit(do_not_specialize=["x_first", "begin", "at", "lag", "N", "T", "flips", "has_first", "c_steps", "B"])
def forward_step_kernel(
    # inputs
    x_ptr,  # (rows, B, G * H) float32, W_ih x_t of the N positions of each member, in time
    w_ptr,  # (M, G * H, H) W_hh
    bias_x_ptr,  # (M, G * H) b_ih
    bias_h_ptr,  # (M, G * H) b_hh
    h0_ptr,  # (M, B, H) the state before each member's first step
    c0_ptr,  # (M, B, H) float32, likewise
    mark_ptrs,  # `Marks`
    # outputs
    h_ptr,  # (T, B, D_H) h_t, the directions side by side; of layers (M, T, B, H)
    c_ptr,  # (M, c_steps, B, H) float32, c_t at index t, or the last one
    saved_ptr,  # (M, T, B, SAVED * H) activations for backward
    # sizes
    x_first,  # the row of x where member 0 begins; the others come first, one after another
    begin,
    at,
    lag,
    N,
    T,
    flips,
    has_first,  # 0 if every member begins from zeros
    c_steps,  # T, or 1 to keep the last one
    B,
    H,
    # flags
    CELL: tl.constexpr,
    G: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIES_C: tl.constexpr,
    GROUPED: tl.constexpr,
    DIRECTIONS: tl.constexpr,
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
    member = tl.program_id(2) if GROUPED else 0
    p, t, dt, steps, _ = place(begin + at, lag, 1, T, flips, member, False)
    t_x = tl.where(dt > 0, at, N - 1 - at)
    is_first = p == 0
    has_prev = 1 if HAS_MARKS else tl.where(is_first, has_first, 1)
    codes_ptr, starts_h_ptr, starts_c_ptr = mark_ptrs.codes, mark_ptrs.starts_h, mark_ptrs.starts_c
    if GROUPED:
        if steps <= 0:
            return
        states_size = member.to(tl.int64) * B * H  # from the first member to this one, of (M, B, H)
        t_x += tl.where(member == 0, x_first, (member - 1) * N)
        w_ptr += member.to(tl.int64) * (G * H) * H
        if HAS_BIAS:
            bias_x_ptr += member * (G * H)
            bias_h_ptr += member * (G * H)
        h_ptr += member * H if DIRECTIONS == 2 else states_size * T
        h0_ptr += states_size
        if SAVED:
            saved_ptr += states_size * T * SAVED
        if CARRIES_C:
            c_ptr += states_size * c_steps
            c0_ptr += states_size
        if HAS_MARKS:
            codes_ptr += member.to(tl.int64) * T * B
            starts_h_ptr += 2 * states_size
            if CARRIES_C:
                starts_c_ptr += 2 * states_size
    offs_b = batch_rows(tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), mark_ptrs.order, B)
    mask_b = offs_b < B
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    row = t.to(tl.int64) * B + offs_b
    row_x = t_x.to(tl.int64) * B + offs_b
    h_rows = _before(h_ptr, DIRECTIONS * H, h0_ptr, t - dt, is_first, offs_b, B, H, HAS_MARKS, ALIGNED)
    entered = offs_b < B * has_prev
    if HAS_MARKS:
        mark = tl.load(codes_ptr + row, mask=mask_b, other=PADDED)
        mask_b = mark != PADDED
        if tl.max(mask_b.to(tl.int32), 0) == 0:
            return
        h_rows = entering(h_rows, starts_h_ptr, mark, offs_b, B, H, ALIGNED)
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
        c_before = tl.where(c_steps == T, t - dt, 0)
        c_rows = _before(c_ptr, H, c0_ptr, c_before, is_first, offs_b, B, H, HAS_MARKS, ALIGNED)
        if HAS_MARKS:
            c_rows = entering(c_rows, starts_c_ptr, mark, offs_b, B, H, ALIGNED)
        states = states + (tl.load(c_rows[:, None] + offs_h[None, :], mask=mask_prev, other=0.0),)

    new_states, saved = CELL(x_gates, biased, states, ())

    new_h = round_to(new_states[0], h_ptr.dtype.element_ty, EMULATE_BF16)
    tl.store(h_ptr + row[:, None] * (DIRECTIONS * H) + offs_h[None, :], new_h, mask=mask)
    if CARRIES_C:
        row_c = tl.where(c_steps == T, t, 0).to(tl.int64) * B + offs_b
        tl.store(c_ptr + row_c[:, None] * H + offs_h[None, :], new_states[1], mask=mask)
    for s in tl.static_range(SAVED):
        tile = round_to(saved[s], saved_ptr.dtype.element_ty, EMULATE_BF16)
        tl.store(saved_ptr + row[:, None] * (SAVED * H) + s * H + offs_h[None, :], tile, mask=mask)


@triton.jit(do_not_specialize=["begin", "at", "lag", "N", "T", "flips", "has_first", "saved_steps", "B"])
def backward_step_kernel(
    # inputs
    dy_ptr,  # (T, B, D_H) gradient of the outputs, as h; of layers (M, N, B, H), of the chunk's steps, in time
    saved_ptr,  # (M, saved_steps, B, SAVED * H) activations that forward saved
    h_ptr,  # (T, B, D_H) h_t, the directions side by side; of layers (M, T, B, H)
    h0_ptr,  # (M, B, H) the state before each member's first step of forward
    c_ptr,  # (M, T, B, H) float32, c_t
    c0_ptr,  # (M, B, H) float32, likewise
    w_ptr,  # (M, G * H, H) W_hh
    dcs_ptr,  # (M, T, B, H) float32, gradient of c_t from outside, besides the last one's
    mark_ptrs,  # `Marks`
    # outputs
    d_gates_ptr,  # (M, T * B, D * H) gate gradients: those of the step processed before are read, those of t written
    d_h_ptr,  # (M, B, H) float32, carried: gradient of h_t that comes neither from dy nor through W_hh
    d_c_ptr,  # (M, B, H) float32, carried: gradient of c_t
    d_start_ptrs,  # `StartGrads`
    # sizes
    begin,
    at,
    lag,
    N,
    T,
    flips,
    has_first,  # 0 if every member of forward began from zeros
    saved_steps,  # T, or N: of the chunk's steps, in time
    B,
    H,
    # flags
    CELL: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIES_C: tl.constexpr,
    DIRECT: tl.constexpr,
    GROUPED: tl.constexpr,
    DIRECTIONS: tl.constexpr,
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
    member = tl.program_id(2) if GROUPED else 0
    p, t, dt, steps, _ = place(begin + at, lag, 1, T, flips, member, True)
    t_chunk = tl.where(dt > 0, at, N - 1 - at)
    t_saved = tl.where(saved_steps == T, t, t_chunk)
    t_dy = t_chunk if GROUPED and DIRECTIONS == 1 else t
    is_first = p == T - 1  # of forward
    has_prev = 1 if HAS_MARKS else tl.where(is_first, has_first, 1)
    has_next = (p > 0).to(tl.int32)
    codes_ptr, starts_h_ptr, starts_c_ptr = mark_ptrs.codes, mark_ptrs.starts_h, mark_ptrs.starts_c
    d_starts_h_ptr, d_starts_c_ptr = d_start_ptrs.h, d_start_ptrs.c
    if GROUPED:
        if steps <= 0:
            return
        states_size = member.to(tl.int64) * B * H  # from the first member to this one, of (M, B, H)
        if HAS_DY:
            dy_ptr += member * H if DIRECTIONS == 2 else states_size * N
        if SAVED:
            saved_ptr += states_size * saved_steps * SAVED
        h_ptr += member * H if DIRECTIONS == 2 else states_size * T
        h0_ptr += states_size
        w_ptr += member.to(tl.int64) * (G * H) * H
        d_gates_ptr += states_size * T * D
        d_h_ptr += states_size
        if CARRIES_C:
            c_ptr += states_size * T
            c0_ptr += states_size
            d_c_ptr += states_size
            if HAS_DCS:
                dcs_ptr += states_size * T
        if HAS_MARKS:
            codes_ptr += member.to(tl.int64) * T * B
            starts_h_ptr += 2 * states_size
            if CARRIES_C:
                starts_c_ptr += 2 * states_size
        if NEEDS_STARTS:
            d_starts_h_ptr += 2 * states_size
            if CARRIES_C:
                d_starts_c_ptr += 2 * states_size
    offs_b = batch_rows(tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), mark_ptrs.order, B)
    mask_b = offs_b < B
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    row = t.to(tl.int64) * B + offs_b
    row_next = (t - dt).to(tl.int64) * B + offs_b
    h_rows = _before(h_ptr, DIRECTIONS * H, h0_ptr, t + dt, is_first, offs_b, B, H, HAS_MARKS, ALIGNED)
    entered = offs_b < B * has_prev
    # rows that need the product with the next step's gate gradients; that take a carried gradient; whose last step this is
    has_product, multiplied, carries, ends = has_next, mask_b, mask_b, offs_b < B * (1 - has_next)
    if HAS_MARKS:
        mark = tl.load(codes_ptr + row, mask=mask_b, other=PADDED)
        next_mark = tl.load(codes_ptr + row_next, mask=mask_b & (offs_b < B * has_next), other=PADDED)
        mask_b = mark != PADDED
        ends = mask_b & (next_mark == PADDED)
        carries = ends | (next_mark == CONTINUES)
        multiplied = (next_mark != PADDED) if NEEDS_STARTS else (next_mark == CONTINUES)
        has_product = tl.max(multiplied.to(tl.int32), 0)
        if tl.max((mask_b | multiplied).to(tl.int32), 0) == 0:
            return
        h_rows = entering(h_rows, starts_h_ptr, mark, offs_b, B, H, ALIGNED)
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

    here = row[:, None] * H + offs_h[None, :]
    carried = offs_b.to(tl.int64)[:, None] * H + offs_h[None, :]
    d_h_carried = tl.load(
        d_h_ptr + carried, mask=((multiplied | ends) if DIRECT else ends)[:, None] & mask_h[None, :], other=0.0
    )
    if NEEDS_STARTS:
        hand_over(d_starts_h_ptr, d_h + d_h_carried, next_mark, offs_b, offs_h, mask_h, B, H)
    if HAS_MARKS:
        d_h = tl.where((next_mark == CONTINUES)[:, None], d_h, 0.0)
        d_h_carried = tl.where(carries[:, None], d_h_carried, 0.0)
    if HAS_DY:
        row_dy = t_dy.to(tl.int64) * B + offs_b
        dy = tl.load(dy_ptr + row_dy[:, None] * (DIRECTIONS * H) + offs_h[None, :], mask=mask, other=0.0)
        d_h += dy.to(tl.float32)
    d_h += d_h_carried

    saved = ()
    row_saved = t_saved.to(tl.int64) * B + offs_b
    for s in tl.static_range(SAVED):
        tile = tl.load(saved_ptr + row_saved[:, None] * (SAVED * H) + s * H + offs_h[None, :], mask=mask, other=0.0)
        saved = saved + (tile.to(tl.float32),)
    states = (tl.load(h_rows[:, None] + offs_h[None, :], mask=mask_prev, other=0.0).to(tl.float32),)
    h = tl.load(h_ptr + row[:, None] * (DIRECTIONS * H) + offs_h[None, :], mask=mask, other=0.0)
    new_states = (h.to(tl.float32),)
    d_states = (d_h,)
    if CARRIES_C:
        c_rows = _before(c_ptr, H, c0_ptr, t + dt, is_first, offs_b, B, H, HAS_MARKS, ALIGNED)
        if HAS_MARKS:
            c_rows = entering(c_rows, starts_c_ptr, mark, offs_b, B, H, ALIGNED)
        states = states + (tl.load(c_rows[:, None] + offs_h[None, :], mask=mask_prev, other=0.0),)
        new_states = new_states + (tl.load(c_ptr + here, mask=mask, other=0.0),)
        d_c = tl.load(d_c_ptr + carried, mask=mask_carries, other=0.0)
        if HAS_DCS:
            d_c += tl.load(dcs_ptr + here, mask=mask, other=0.0)
        d_states = d_states + (d_c,)

    d_gates, d_before, _ = CELL(saved, states, new_states, (), d_states)

    d_gates_out = d_gates_ptr + row[:, None] * (D * H) + offs_h[None, :]
    for g in tl.static_range(D):
        tl.store(d_gates_out + g * H, round_to(d_gates[g], d_gates_ptr.dtype.element_ty, EMULATE_BF16), mask=mask)
    if DIRECT:
        tl.store(d_h_ptr + carried, d_before[0], mask=mask)
    if CARRIES_C:
        tl.store(d_c_ptr + carried, d_before[1], mask=mask)
        if NEEDS_STARTS:
            hand_over(d_starts_c_ptr, d_before[1], mark, offs_b, offs_h, mask_h, B, H)
