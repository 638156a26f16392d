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
from rnnfast.kernels.scan.tiles import below, blocks, chosen, entering, pointers, start_states, states_at, window

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
    H: tl.constexpr,
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
    AHEAD: tl.constexpr = PLAN.AHEAD
    batch = B.to(tl.int64)
    member = tl.program_id(2) if GROUPED else 0
    p, t, dt, steps, t_x = place(begin, lag, N, T, flips, member, False)
    codes_ptr, seed_ptr = mark_ptrs.codes, given_ptrs.seeds
    others = batch * 0  # batch rows of the members before
    if GROUPED:
        if steps <= 0:
            return
        t_x += tl.where(member == 0, x_first, (member - 1) * N)
        others = member * batch
        if HAS_BIAS:
            bias_ptr += member * (G * H)
        h_ptr += member * H if DIRECTIONS > 1 else others * T * H
        if HAS_MARKS:
            codes_ptr += others * T
        if NOISE > 0:
            seed_ptr += member
    offs_b = batch_rows(tl.program_id(0) * PLAN.BLOCK_B + tl.arange(0, PLAN.BLOCK_B), mark_ptrs.order, B)
    mask_b = offs_b < B
    offs_h = tl.program_id(1) * PLAN.BLOCK_H + tl.arange(0, PLAN.BLOCK_H)
    if HAS_MARKS:
        p, t, t_x, steps = window(codes_ptr, p, t, t_x, dt, steps, offs_b, mask_b, B)
        mask_b = below(mask_b, 0, steps)
    mask = mask_b[:, None] & (offs_h < H)[None, :]

    # the states that enter the first step
    row = t * batch
    to_next = dt * batch
    row_c = others * T + row if KEEP_C else others  # of the carried states
    last_c = row_c - to_next if KEEP_C else others
    states = states_at(
        h_ptr, c_ptr, row - to_next, last_c, offs_b, offs_h, below(mask, 0, p), DIRECTIONS * H, H, CARRIED
    )  # fmt: skip
    starts = ()
    if HAS_MARKS:
        starts = start_states(mark_ptrs.starts_h, mark_ptrs.starts_c, 2 * others, offs_b, offs_h, mask, B, H, CARRIED)
    else:
        first = states_at(h0_ptr, c0_ptr, others, others, offs_b, offs_h, below(mask, 0, has_first), H, H, CARRIED)
        states = chosen(p == 0, first, states, STATES)
    held = ()
    if HELD > 0:
        held = blocks(pointers(given_ptrs.held, others, offs_b, offs_h, HELD * H), mask, H, HELD)
    bias = ()
    if HAS_BIAS:
        for g in tl.static_range(G):
            bias = bias + (tl.load(bias_ptr + g * H + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)[None, :],)

    # where the step reads, and where it writes
    x_at = pointers(x_ptr, t_x * batch, offs_b, offs_h, G * H)
    h_at = pointers(h_ptr, row, offs_b, offs_h, DIRECTIONS * H)
    c_at, saved_at, code_at = h_at, h_at, offs_b
    if CARRIED > 0:
        c_at = pointers(c_ptr, row_c, offs_b, offs_h, CARRIED * H)
    if SAVED > 0:
        saved_at = pointers(saved_ptr, others * T + row, offs_b, offs_h, SAVED * H)
    ahead_x = ()
    ahead_marks = ()
    for u in tl.static_range(AHEAD):
        ahead_x = ahead_x + blocks(x_at, below(mask, u, steps), H, G)
        x_at += to_next * (G * H)
    if HAS_MARKS:
        code_at = codes_ptr + row + offs_b
        for u in tl.static_range(AHEAD):
            ahead_marks = ahead_marks + (tl.load(code_at, mask=below(mask_b, u, steps), other=PADDED),)
            code_at += to_next
    for step in range(0, steps, AHEAD):
        next_x = ()
        next_marks = ()
        for u in tl.static_range(AHEAD):
            entered = states
            if HAS_MARKS:
                mark = ahead_marks[u].to(tl.int32)[:, None]
                runs = mask & (mark != PADDED)
                entered = entering(mark, starts, states, STATES)
            else:
                runs = below(mask, step + u, steps)
            x_gates = ()
            for g in tl.static_range(G):
                x_gates = x_gates + (ahead_x[u * G + g] + bias[g] if HAS_BIAS else ahead_x[u * G + g],)
            noise = noise_tiles(seed_ptr, (row + offs_b)[:, None], offs_h[None, :], NOISE)
            new_states, saved = CELL(x_gates, (), entered, held + noise)

            h = round_to(new_states[0], h_ptr.dtype.element_ty, EMULATE_BF16)
            tl.store(h_at, h, mask=runs)
            kept = (h.to(tl.float32),)
            for s in tl.static_range(CARRIED):
                kept = kept + (new_states[1 + s],)
                if KEEP_C or HAS_MARKS:  # a row's last step may not be the program's
                    tl.store(c_at + s * H, new_states[1 + s], mask=runs)
            for s in tl.static_range(SAVED):
                tl.store(saved_at + s * H, round_to(saved[s], saved_ptr.dtype.element_ty, EMULATE_BF16), mask=runs)
            states = chosen(runs, kept, states, STATES)

            next_x = next_x + blocks(x_at, below(mask, step + AHEAD + u, steps), H, G)
            if HAS_MARKS:
                next_marks = next_marks + (tl.load(code_at, mask=below(mask_b, step + AHEAD + u, steps), other=PADDED),)
                code_at += to_next
            x_at += to_next * (G * H)
            h_at += to_next * (DIRECTIONS * H)
            row += to_next
            if CARRIED > 0 and KEEP_C:
                c_at += to_next * (CARRIED * H)
            if SAVED > 0:
                saved_at += to_next * (SAVED * H)
        ahead_x = next_x
        ahead_marks = next_marks
    if not KEEP_C and not HAS_MARKS:
        for s in tl.static_range(CARRIED):
            tl.store(c_at + s * H, states[1 + s], mask=mask)
