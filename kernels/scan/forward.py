"""Forward of the scan kernels: N steps of BLOCK_B batch rows by BLOCK_H units, whose states stay in registers.

    states_t, saved_t = cell.forward(x_gates_t, (), states_{t-1}, given)

The input side of a step is loaded AHEAD steps before it is used (tiles.py). h goes from step to step as memory has it, in its
own dtype, so that the launches of a sequence may be cut anywhere.

Legend: M members of the group (`rnnfast.kernels.groups`), T steps, B batch, H hidden units, G gates, K carried states,
D_H = DIRECTIONS * H.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnnfast.kernels.given import noise_tiles
from rnnfast.kernels.groups import place
from rnnfast.kernels.marks import PADDED, batch_rows
from rnnfast.kernels.maths import round_to
from rnnfast.kernels.scan.tiles import below, blocks, chosen, entering, offsets, state_tiles, taken, window

__all__ = ["scan_forward_kernel"]


@triton.jit(do_not_specialize=["x_first", "begin", "lag", "N", "T", "flips", "has_first", "B"])
def scan_forward_kernel(
    # inputs
    x_ptr,  # (rows, B, G * H) float32, W_ih x_t of the N positions of each member, in time
    bias_ptr,  # (M, G * H) b_ih
    h0_ptr,  # (M, B, H) the state before each member's first step
    c0_ptr,  # (M, B, K * H) float32, likewise
    mark_ptrs,  # `Marks`
    given_ptrs,  # `Given`
    # outputs
    h_ptr,  # (T, B, D_H) h_t, or (M, T, B, H)
    c_ptr,  # (M, T, B, K * H) float32, c_t, if KEEP_C, else (M, 1, B, K * H), the last
    saved_ptr,  # (M, T, B, SAVED * H) activations for backward
    # sizes
    x_first,  # the row of x where member 0 begins; the others come first, one after another
    begin,  # these: see `rnnfast.kernels.groups`
    lag,
    N,
    T,
    flips,
    has_first,  # 0 if every member begins from zeros
    B,
    H,
    # flags
    CELL: tl.constexpr,
    G: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIED: tl.constexpr,
    HELD: tl.constexpr,
    NOISE: tl.constexpr,
    KEEP_C: tl.constexpr,
    GROUPED: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    PLAN: tl.constexpr,  # `ScanPlan`
):
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    HAS_MARKS: tl.constexpr = mark_ptrs.codes is not None
    STATES: tl.constexpr = 1 + CARRIED
    BLOCK_B: tl.constexpr = PLAN.BLOCK_B
    BLOCK_H: tl.constexpr = PLAN.BLOCK_H
    AHEAD: tl.constexpr = PLAN.AHEAD
    batch = B.to(tl.int64)
    member = tl.program_id(2) if GROUPED else 0
    p, t, dt, steps, t_x = place(begin, lag, N, T, flips, member, False)
    codes_ptr, starts_h_ptr, starts_c_ptr = mark_ptrs.codes, mark_ptrs.starts_h, mark_ptrs.starts_c
    held_ptr, seed_ptr = given_ptrs.held, given_ptrs.seeds
    if GROUPED:
        if steps <= 0:
            return
        t_x += tl.where(member == 0, x_first, (member - 1) * N)
        states_size = member.to(tl.int64) * batch * H  # from the first member to this one, of (M, B, H)
        if HAS_BIAS:
            bias_ptr += member * (G * H)
        h_ptr += member * H if DIRECTIONS > 1 else states_size * T
        h0_ptr += states_size
        if SAVED > 0:
            saved_ptr += states_size * T * SAVED
        if CARRIED > 0:
            c_ptr += states_size * CARRIED * (T if KEEP_C else 1)
            c0_ptr += states_size * CARRIED
        if HELD > 0:
            held_ptr += states_size * HELD
        if NOISE > 0:
            seed_ptr += member
        if HAS_MARKS:
            codes_ptr += member.to(tl.int64) * T * batch
            starts_h_ptr += 2 * states_size
            if CARRIED > 0:
                starts_c_ptr += 2 * states_size * CARRIED
    offs_b = batch_rows(tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), mark_ptrs.order, B)
    mask_b = offs_b < B
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    if HAS_MARKS:
        p, t, t_x, steps = window(codes_ptr, p, t, t_x, dt, steps, offs_b, mask_b, B)
        mask_b = below(mask_b, 0, steps)
    mask = mask_b[:, None] & (offs_h < H)[None, :]
    off_x = offsets(offs_b, offs_h, G * H)
    off_h = offsets(offs_b, offs_h, DIRECTIONS * H)
    off_c = offsets(offs_b, offs_h, CARRIED * H)
    off_s = offsets(offs_b, offs_h, SAVED * H)

    # the states that enter the first step
    off = offsets(offs_b, offs_h, H)
    before = (t - dt).to(tl.int64) * batch
    before_c = before if KEEP_C else before * 0
    states = state_tiles(
        h_ptr + before * (DIRECTIONS * H), c_ptr, before_c * (CARRIED * H), off_h, off_c, below(mask, 0, p), H, CARRIED
    )
    starts = ()
    if HAS_MARKS:
        for n in tl.static_range(2):
            at = n * batch * H
            starts = starts + state_tiles(starts_h_ptr + at, starts_c_ptr, at * CARRIED, off, off_c, mask, H, CARRIED)
    else:
        first = state_tiles(h0_ptr, c0_ptr, 0, off, off_c, below(mask, 0, has_first), H, CARRIED)
        states = chosen(p == 0, first, states, STATES)
    held = blocks(held_ptr, offsets(offs_b, offs_h, HELD * H), mask, H, HELD)
    bias = ()
    if HAS_BIAS:
        for g in tl.static_range(G):
            bias = bias + (tl.load(bias_ptr + g * H + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)[None, :],)

    ahead_x = ()
    ahead_marks = ()
    for u in tl.static_range(AHEAD):
        later = tl.minimum(u, steps - 1)
        ahead_x = ahead_x + blocks(x_ptr + (t_x + later * dt).to(tl.int64) * batch * (G * H), off_x, mask, H, G)
        if HAS_MARKS:
            row = (t + later * dt).to(tl.int64) * batch + offs_b
            ahead_marks = ahead_marks + (tl.load(codes_ptr + row, mask=mask_b, other=PADDED),)
    for step in range(0, steps, AHEAD):
        next_x = ()
        next_marks = ()
        for u in tl.static_range(AHEAD):
            row = (t + (step + u) * dt).to(tl.int64) * batch
            runs = below(mask, step + u, steps)
            if HAS_MARKS:
                mark = ahead_marks[u].to(tl.int32)[:, None]
                runs = runs & (mark != PADDED)
                entered = entering(mark, starts, states, STATES)
            else:
                entered = states
            x_gates = taken(ahead_x, u * G, G)
            if HAS_BIAS:
                biased = ()
                for g in tl.static_range(G):
                    biased = biased + (x_gates[g] + bias[g],)
                x_gates = biased
            noise = noise_tiles(seed_ptr, row + offs_b.to(tl.int64)[:, None], offs_h[None, :], NOISE)
            new_states, saved = CELL(x_gates, (), entered, held + noise)

            h = round_to(new_states[0], h_ptr.dtype.element_ty, EMULATE_BF16)
            tl.store(h_ptr + row * (DIRECTIONS * H) + off_h, h, mask=runs)
            kept = (h.to(tl.float32),)
            for s in tl.static_range(CARRIED):
                kept = kept + (new_states[1 + s],)
                if KEEP_C:
                    tl.store(c_ptr + row * (CARRIED * H) + s * H + off_c, new_states[1 + s], mask=runs)
                elif HAS_MARKS:  # a row's last step may not be the program's
                    tl.store(c_ptr + s * H + off_c, new_states[1 + s], mask=runs)
            for s in tl.static_range(SAVED):
                tile = round_to(saved[s], saved_ptr.dtype.element_ty, EMULATE_BF16)
                tl.store(saved_ptr + row * (SAVED * H) + s * H + off_s, tile, mask=runs)
            states = chosen(runs, kept, states, STATES)

            later = tl.minimum(step + AHEAD + u, steps - 1)
            next_x = next_x + blocks(x_ptr + (t_x + later * dt).to(tl.int64) * batch * (G * H), off_x, mask, H, G)
            if HAS_MARKS:
                row = (t + later * dt).to(tl.int64) * batch + offs_b
                next_marks = next_marks + (tl.load(codes_ptr + row, mask=mask_b, other=PADDED),)
        ahead_x = next_x
        ahead_marks = next_marks
    if not KEEP_C and not HAS_MARKS:
        for s in tl.static_range(CARRIED):
            tl.store(c_ptr + s * H + off_c, states[1 + s], mask=mask)
