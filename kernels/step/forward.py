"""Step kernels: one launch a time step, for any size. The recurrent product of all gates and the cell's maths, fused.

Forward, for each step t (W the rows of W_hh, one block of H rows a gate):
    h_gates = W h_{t-1} + b_hh              states_t, saved_t = cell.forward(x_gates_t, h_gates, states_{t-1}, given_t)
Backward, for each step from the last to the first (W_hh^T by columns of W):
    d_h_t = d_y_t + W^T d_gates_{t+1}       d_gates_t, d_states_{t-1}, d_held_t = cell.backward(saved_t, ..., d_states_t)

A cell that needs whole rows (`Cell.rows`) takes two launches a step. The first one, of STAGE "product", writes W h_{t-1} or
W^T d_gates_{t+1} for the second, of STAGE "cell", whose programs have whole rows. Else STAGE is "whole".

Legend: M members, T steps, B batch, H hidden units, G gates, K the summed axis, D_H = DIRECTIONS * H. A step's row is
t * B + b. A launch runs one step of each member of a group (`rnnfast.kernels.groups`): number `at` of the N steps of a chunk.
The steps beside it are in the order of processing: for a member that runs from the last step to the first, the one before is
t + 1. Where there is none the flag has_prev or has_next is 0, the product is skipped and the state is zero. Without GROUPED
there is one member, M = 1.

With marks (`rnnfast.kernels.marks`), has_prev and has_next are a matter of each batch row instead; without, HAS_MARKS is off
and the arguments that go with them are None. Likewise what the cell is given (`rnnfast.kernels.given`) where it has none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnnfast.kernels.given import held_tiles, noise_tiles, row_mean
from rnnfast.kernels.groups import place
from rnnfast.kernels.marks import PADDED, batch_rows, entering
from rnnfast.kernels.maths import dot, round_to
from rnnfast.kernels.step.states import before

__all__ = ["forward_step_kernel"]


@triton.jit(do_not_specialize=["x_first", "begin", "at", "lag", "N", "T", "flips", "has_first", "c_steps", "B"])
def forward_step_kernel(
    # inputs
    x_ptr,  # (rows, B, G * H) float32, W_ih x_t of the N positions of each member, in time
    w_ptr,  # (M, G * H, H) W_hh
    bias_x_ptr,  # (M, G * H) b_ih
    bias_h_ptr,  # (M, G * H) b_hh
    h0_ptr,  # (M, B, H) h before each member's first step
    c0_ptr,  # (M, B, CARRIED * H) float32, likewise
    mark_ptrs,  # `Marks`
    given_ptrs,  # `Given`
    # outputs
    h_ptr,  # (T, B, D_H) h_t, the members side by side; of layers (M, T, B, H)
    c_ptr,  # (M, c_steps, B, CARRIED * H) float32, c_t at index t, or the last one
    saved_ptr,  # (M, T, B, SAVED * H) activations for backward
    product_ptr,  # (M, B, G * H) float32, W h_{t-1} between the stages; None without stages
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
    CARRIED: tl.constexpr,
    HELD: tl.constexpr,
    NOISE: tl.constexpr,
    STAGE: tl.constexpr,
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
    held_ptr, seed_ptr = given_ptrs.held, given_ptrs.seeds
    if GROUPED:
        if steps <= 0:
            return
        states_size = member.to(tl.int64) * B * H  # from the first member to this one, of (M, B, H)
        t_x += tl.where(member == 0, x_first, (member - 1) * N)
        w_ptr += member.to(tl.int64) * (G * H) * H
        if HAS_BIAS:
            bias_x_ptr += member * (G * H)
            bias_h_ptr += member * (G * H)
        h_ptr += member * H if DIRECTIONS > 1 else states_size * T
        h0_ptr += states_size
        if SAVED:
            saved_ptr += states_size * T * SAVED
        if CARRIED:
            c_ptr += states_size * CARRIED * c_steps
            c0_ptr += states_size * CARRIED
        if HELD:
            held_ptr += states_size * HELD
        if NOISE:
            seed_ptr += member
        if STAGE != "whole":
            product_ptr += states_size * G
        if HAS_MARKS:
            codes_ptr += member.to(tl.int64) * T * B
            starts_h_ptr += 2 * states_size
            if CARRIED:
                starts_c_ptr += 2 * states_size * CARRIED
    offs_b = batch_rows(tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), mark_ptrs.order, B)
    mask_b = offs_b < B
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    row = t.to(tl.int64) * B + offs_b
    row_x = t_x.to(tl.int64) * B + offs_b
    h_rows = before(h_ptr, DIRECTIONS * H, h0_ptr, H, t - dt, is_first, offs_b, B, HAS_MARKS, ALIGNED)
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

    product_rows = offs_b.to(tl.int64)[:, None] * (G * H) + offs_h[None, :]
    h_gates = ()
    for g in tl.static_range(G):
        if STAGE == "cell":
            h_gate = tl.load(product_ptr + product_rows + g * H, mask=mask_prev, other=0.0)
        else:
            h_gate = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        h_gates = h_gates + (h_gate,)
    if STAGE != "cell":
        for k in range(0, H * has_prev, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < H
            h_chunk = tl.load(h_rows[:, None] + offs_k[None, :], mask=mask_b[:, None] & mask_k[None, :], other=0.0)
            sums = ()
            for g in tl.static_range(G):
                w_rows = (g * H + offs_h).to(tl.int64)
                w_chunk = tl.load(
                    w_ptr + w_rows[None, :] * H + offs_k[:, None], mask=mask_k[:, None] & mask_h[None, :], other=0.0
                )
                sums = sums + (dot(h_chunk, w_chunk, h_gates[g], PRECISION, EMULATE_BF16),)
            h_gates = sums
    if STAGE == "product":
        for g in tl.static_range(G):
            tl.store(product_ptr + product_rows + g * H, h_gates[g], mask=mask)
        return

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
    if CARRIED:
        c_before = tl.where(c_steps == T, t - dt, 0)
        c_rows = before(c_ptr, CARRIED * H, c0_ptr, CARRIED * H, c_before, is_first, offs_b, B, HAS_MARKS, ALIGNED)
        if HAS_MARKS:
            c_rows = entering(c_rows, starts_c_ptr, mark, offs_b, B, CARRIED * H, ALIGNED)
        states = states + held_tiles(c_rows, offs_h, mask_prev, H, CARRIED)
    given = ()
    if HELD:
        given = held_tiles(held_ptr + offs_b.to(tl.int64) * (HELD * H), offs_h, mask, H, HELD)
    if NOISE:
        given = given + noise_tiles(seed_ptr, row[:, None], offs_h[None, :], NOISE)

    if STAGE == "whole":
        new_states, saved = CELL(x_gates, biased, states, given)
    else:
        new_states, saved = CELL(x_gates, biased, states, given, (mask_h[None, :], H), row_mean)

    new_h = round_to(new_states[0], h_ptr.dtype.element_ty, EMULATE_BF16)
    tl.store(h_ptr + row[:, None] * (DIRECTIONS * H) + offs_h[None, :], new_h, mask=mask)
    if CARRIED:
        row_c = tl.where(c_steps == T, t, 0).to(tl.int64) * B + offs_b
        for n in tl.static_range(CARRIED):
            tl.store(c_ptr + row_c[:, None] * (CARRIED * H) + n * H + offs_h[None, :], new_states[1 + n], mask=mask)
    for s in tl.static_range(SAVED):
        tile = round_to(saved[s], saved_ptr.dtype.element_ty, EMULATE_BF16)
        tl.store(saved_ptr + row[:, None] * (SAVED * H) + s * H + offs_h[None, :], tile, mask=mask)
