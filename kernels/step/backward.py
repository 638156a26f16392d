"""The backward step kernel. `rnnfast.kernels.step.forward` has the equations and the legend."""

from __future__ import annotations

import triton
import triton.language as tl

from rnnfast.kernels.given import held_tiles, noise_tiles, row_mean
from rnnfast.kernels.groups import place
from rnnfast.kernels.marks import CONTINUES, PADDED, batch_rows, entering, hand_over
from rnnfast.kernels.maths import dot, round_to
from rnnfast.kernels.step.states import before

__all__ = ["backward_step_kernel"]


@triton.jit(do_not_specialize=["begin", "at", "lag", "N", "T", "flips", "has_first", "saved_steps", "B"])
def backward_step_kernel(
    # inputs
    dy_ptr,  # (T, B, D_H) gradient of the outputs, as h; of layers (M, N, B, H), of the chunk's steps, in time
    saved_ptr,  # (M, saved_steps, B, SAVED * H) activations that forward saved
    h_ptr,  # (T, B, D_H) h_t, the members side by side; of layers (M, T, B, H)
    h0_ptr,  # (M, B, H) h before each member's first step of forward
    c_ptr,  # (M, T, B, CARRIED * H) float32, c_t
    c0_ptr,  # (M, B, CARRIED * H) float32, likewise
    w_ptr,  # (M, G * H, H) W_hh
    dcs_ptr,  # (M, T, B, CARRIED * H) float32, gradient of c_t from outside, besides the last one's
    mark_ptrs,  # `Marks`
    given_ptrs,  # `Given`
    # outputs
    d_gates_ptr,  # (M, T * B, D * H) gate gradients: those of the step processed before are read, those of t written
    d_h_ptr,  # (M, B, H) float32, carried: gradient of h_t that comes neither from dy nor through W_hh
    d_c_ptr,  # (M, B, CARRIED * H) float32, carried: gradient of c_t
    d_start_ptrs,  # `StartGrads`
    d_held_ptr,  # (M, B, HELD * H) float32, added to: gradient of the held tiles
    product_ptr,  # (M, B, H) float32, W^T d_gates of the step processed before, between the stages; None without stages
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
    CARRIED: tl.constexpr,
    HELD: tl.constexpr,
    NOISE: tl.constexpr,
    DIRECT: tl.constexpr,
    STAGE: tl.constexpr,
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
    held_ptr, seed_ptr = given_ptrs.held, given_ptrs.seeds
    d_starts_h_ptr, d_starts_c_ptr = d_start_ptrs.h, d_start_ptrs.c
    if GROUPED:
        if steps <= 0:
            return
        states_size = member.to(tl.int64) * B * H  # from the first member to this one, of (M, B, H)
        if HAS_DY:
            dy_ptr += member * H if DIRECTIONS > 1 else states_size * N
        if SAVED:
            saved_ptr += states_size * saved_steps * SAVED
        h_ptr += member * H if DIRECTIONS > 1 else states_size * T
        h0_ptr += states_size
        w_ptr += member.to(tl.int64) * (G * H) * H
        d_gates_ptr += states_size * T * D
        d_h_ptr += states_size
        if CARRIED:
            c_ptr += states_size * CARRIED * T
            c0_ptr += states_size * CARRIED
            d_c_ptr += states_size * CARRIED
            if HAS_DCS:
                dcs_ptr += states_size * CARRIED * T
        if HELD:
            held_ptr += states_size * HELD
            d_held_ptr += states_size * HELD
        if NOISE:
            seed_ptr += member
        if STAGE != "whole":
            product_ptr += states_size
        if HAS_MARKS:
            codes_ptr += member.to(tl.int64) * T * B
            starts_h_ptr += 2 * states_size
            if CARRIED:
                starts_c_ptr += 2 * states_size * CARRIED
        if NEEDS_STARTS:
            d_starts_h_ptr += 2 * states_size
            if CARRIED:
                d_starts_c_ptr += 2 * states_size * CARRIED
    offs_b = batch_rows(tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), mark_ptrs.order, B)
    mask_b = offs_b < B
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    row = t.to(tl.int64) * B + offs_b
    row_next = (t - dt).to(tl.int64) * B + offs_b
    h_rows = before(h_ptr, DIRECTIONS * H, h0_ptr, H, t + dt, is_first, offs_b, B, HAS_MARKS, ALIGNED)
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

    if STAGE == "cell":
        at_h = offs_b.to(tl.int64)[:, None] * H + offs_h[None, :]
        d_h = tl.load(product_ptr + at_h, mask=(multiplied & (offs_b < B * has_next))[:, None] & mask_h[None, :], other=0.0)
    else:
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
    at_h = offs_b.to(tl.int64)[:, None] * H + offs_h[None, :]
    if STAGE == "product":
        tl.store(product_ptr + at_h, d_h, mask=multiplied[:, None] & mask_h[None, :])
        return

    d_h_carried = tl.load(d_h_ptr + at_h, mask=((multiplied | ends) if DIRECT else ends)[:, None] & mask_h[None, :], other=0.0)
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
    here = row[:, None] * (CARRIED * H) + offs_h[None, :]
    at_c = offs_b.to(tl.int64)[:, None] * (CARRIED * H) + offs_h[None, :]
    if CARRIED:
        c_rows = before(c_ptr, CARRIED * H, c0_ptr, CARRIED * H, t + dt, is_first, offs_b, B, HAS_MARKS, ALIGNED)
        if HAS_MARKS:
            c_rows = entering(c_rows, starts_c_ptr, mark, offs_b, B, CARRIED * H, ALIGNED)
        states = states + held_tiles(c_rows, offs_h, mask_prev, H, CARRIED)
        for n in tl.static_range(CARRIED):
            new_states = new_states + (tl.load(c_ptr + here + n * H, mask=mask, other=0.0),)
            d_c = tl.load(d_c_ptr + at_c + n * H, mask=mask_carries, other=0.0)
            if HAS_DCS:
                d_c += tl.load(dcs_ptr + here + n * H, mask=mask, other=0.0)
            d_states = d_states + (d_c,)
    given = ()
    if HELD:
        given = held_tiles(held_ptr + offs_b.to(tl.int64) * (HELD * H), offs_h, mask, H, HELD)
    if NOISE:
        given = given + noise_tiles(seed_ptr, row[:, None], offs_h[None, :], NOISE)

    if STAGE == "whole":
        d_gates, d_before, d_held = CELL(saved, states, new_states, given, d_states)
    else:
        d_gates, d_before, d_held = CELL(saved, states, new_states, given, d_states, (mask_h[None, :], H), row_mean)

    d_gates_out = d_gates_ptr + row[:, None] * (D * H) + offs_h[None, :]
    for g in tl.static_range(D):
        tl.store(d_gates_out + g * H, round_to(d_gates[g], d_gates_ptr.dtype.element_ty, EMULATE_BF16), mask=mask)
    if DIRECT:
        tl.store(d_h_ptr + at_h, d_before[0], mask=mask)
    for n in tl.static_range(CARRIED):
        tl.store(d_c_ptr + at_c + n * H, d_before[1 + n], mask=mask)
        if NEEDS_STARTS:
            hand_over(d_starts_c_ptr + n * H, d_before[1 + n], mark, offs_b, offs_h, mask_h, B, CARRIED * H)
    for n in tl.static_range(HELD):
        at_held = d_held_ptr + offs_b.to(tl.int64)[:, None] * (HELD * H) + n * H + offs_h[None, :]
        tl.store(at_held, tl.load(at_held, mask=mask, other=0.0) + d_held[n], mask=mask)
