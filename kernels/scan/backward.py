"""Backward of the scan kernels: N steps from the last to the first, the gradients of the states in registers.

    d_gates_t, d_states_{t-1}, d_held = cell.backward(saved_t, states_{t-1}, states_t, given, d_states_t + d_y_t)

A step's dy, saved tiles and the states before it are loaded AHEAD steps before they are used (tiles.py). The states after a
step are those before the step processed last. The gradients of held tiles and of states that begin anew are summed in
registers too, from what memory has, so that it does not matter where the launches of a sequence are cut.

Legend: as in forward.py; E held tiles. Next and before are meant in forward's order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnnfast.kernels.given import noise_tiles
from rnnfast.kernels.groups import place
from rnnfast.kernels.marks import PADDED, RESETS, STARTS, anew, batch_rows
from rnnfast.kernels.maths import round_to
from rnnfast.kernels.scan.tiles import below, blocks, chosen, entering, pointers, start_states, states_at, taken, window

__all__ = ["scan_backward_kernel"]


@triton.jit
def _inputs(
    at, mask, mask_before, H: tl.constexpr, CARRIED: tl.constexpr, SAVED: tl.constexpr, DCS: tl.constexpr, HAS_DY: tl.constexpr
):
    """What a step reads: the states before it, the saved tiles, the gradients of the carried states and of h."""
    states = blocks(at[0], mask_before, H, 1) + blocks(at[1], mask_before, H, CARRIED)
    return states + blocks(at[2], mask, H, SAVED) + blocks(at[3], mask, H, DCS) + blocks(at[4], mask, H, HAS_DY)


@triton.jit
def _advanced(
    at, rows, H: tl.constexpr, CARRIED: tl.constexpr, SAVED: tl.constexpr, DCS: tl.constexpr, DIRECTIONS: tl.constexpr
):
    """The pointers of `_inputs` for the step processed next, `rows` batch rows on."""
    h_rows = rows * (DIRECTIONS * H)
    return (at[0] + h_rows, at[1] + rows * (CARRIED * H), at[2] + rows * (SAVED * H), at[3] + rows * (DCS * H), at[4] + h_rows)


@triton.jit(do_not_specialize=["begin", "lag", "N", "T", "flips", "has_first", "saved_steps", "B"])
def scan_backward_kernel(
    # inputs
    dy_ptr,  # gradient of the outputs: (T, B, D_H), or of layers (M, N, B, H), of this launch's positions, in time
    saved_ptr,  # (M, saved_steps, B, SAVED * H) activations that forward saved
    h_ptr,  # (T, B, D_H) h_t, or (M, T, B, H)
    h0_ptr,  # (M, B, H) the state before each member's first step of forward
    c_ptr,  # (M, T, B, K * H) float32, c_t
    c0_ptr,  # (M, B, K * H) float32, likewise
    dcs_ptr,  # (M, T, B, K * H) float32, gradient of c_t from outside, besides the last one's
    mark_ptrs,  # `Marks`
    given_ptrs,  # `Given`
    # outputs
    d_gates_ptr,  # (M, T, B, G * H) gate gradients
    d_h_ptr,  # (M, B, H) float32, carried from launch to launch: gradient of h_t
    d_c_ptr,  # (M, B, K * H) float32, carried likewise: gradient of c_t
    d_start_ptrs,  # `StartGrads`
    d_held_ptr,  # (M, B, E * H) float32, added to
    # sizes
    begin,  # these: see `rnnfast.kernels.groups`
    lag,
    N,
    T,
    flips,
    has_first,  # 0 if every member of forward began from zeros
    saved_steps,  # T, or N: of the chunk's steps, in time
    B,
    H: tl.constexpr,
    # flags
    CELL: tl.constexpr,
    G: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIED: tl.constexpr,
    HELD: tl.constexpr,
    NOISE: tl.constexpr,
    DIRECT: tl.constexpr,
    GROUPED: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    PLAN: tl.constexpr,  # `ScanPlan`
):
    HAS_DY: tl.constexpr = dy_ptr is not None
    DCS: tl.constexpr = CARRIED if dcs_ptr is not None else 0
    HAS_MARKS: tl.constexpr = mark_ptrs.codes is not None
    NEEDS_STARTS: tl.constexpr = d_start_ptrs.h is not None
    STATES: tl.constexpr = 1 + CARRIED
    INPUTS: tl.constexpr = STATES + SAVED + DCS + HAS_DY
    AHEAD: tl.constexpr = PLAN.AHEAD
    batch = B.to(tl.int64)
    member = tl.program_id(2) if GROUPED else 0
    p, t, dt, steps, t_x = place(begin, lag, N, T, flips, member, True)
    codes_ptr, seed_ptr = mark_ptrs.codes, given_ptrs.seeds
    others = batch * 0  # batch rows of the members before
    if GROUPED:
        if steps <= 0:
            return
        others = member * batch
        if HAS_DY:
            dy_ptr += member * H if DIRECTIONS > 1 else others * N * H
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

    d_states = states_at(d_h_ptr, d_c_ptr, others, others, offs_b, offs_h, mask, H, H, CARRIED)
    if HAS_MARKS:
        starts = start_states(mark_ptrs.starts_h, mark_ptrs.starts_c, 2 * others, offs_b, offs_h, mask, B, H, CARRIED)
    else:
        starts = states_at(h0_ptr, c0_ptr, others, others, offs_b, offs_h, below(mask, 0, has_first), H, H, CARRIED)
    d_starts = ()
    if NEEDS_STARTS:
        d_starts = start_states(d_start_ptrs.h, d_start_ptrs.c, 2 * others, offs_b, offs_h, mask, B, H, CARRIED)
    held = ()
    d_held = ()
    if HELD > 0:
        held = blocks(pointers(given_ptrs.held, others, offs_b, offs_h, HELD * H), mask, H, HELD)
        d_held = blocks(pointers(d_held_ptr, others, offs_b, offs_h, HELD * H), mask, H, HELD)

    # the states after the step, and where the step reads and writes
    row = t * batch
    row_c = others * T + row
    to_next = dt * batch
    new_states = states_at(h_ptr, c_ptr, row, row_c, offs_b, offs_h, mask, DIRECTIONS * H, H, CARRIED)
    d_gates_at = pointers(d_gates_ptr, row_c, offs_b, offs_h, G * H)
    h_at = pointers(h_ptr, row + to_next, offs_b, offs_h, DIRECTIONS * H)  # before the step
    c_at, saved_at, dcs_at, dy_at, code_at = h_at, h_at, h_at, h_at, offs_b
    if CARRIED > 0:
        c_at = pointers(c_ptr, row_c + to_next, offs_b, offs_h, CARRIED * H)
    if SAVED > 0:
        t_saved = tl.where(saved_steps == T, t, t_x)
        saved_at = pointers(saved_ptr, others * saved_steps + t_saved * batch, offs_b, offs_h, SAVED * H)
    if DCS > 0:
        dcs_at = pointers(dcs_ptr, row_c, offs_b, offs_h, CARRIED * H)
    if HAS_DY:
        t_dy = t_x if GROUPED and DIRECTIONS == 1 else t
        dy_at = pointers(dy_ptr, t_dy * batch, offs_b, offs_h, DIRECTIONS * H)
    at = (h_at, c_at, saved_at, dcs_at, dy_at)
    ahead = ()
    for u in tl.static_range(AHEAD):
        now = below(mask, u, steps)
        ahead = ahead + _inputs(at, now, below(now, p + u, T - 1), H, CARRIED, SAVED, DCS, HAS_DY)
        at = _advanced(at, to_next, H, CARRIED, SAVED, DCS, DIRECTIONS)
    ahead_marks = ()
    if HAS_MARKS:
        code_at = codes_ptr + row + offs_b
        for u in tl.static_range(AHEAD):
            ahead_marks = ahead_marks + (tl.load(code_at, mask=below(mask_b, u, steps), other=PADDED),)
            code_at += to_next
    for step in range(0, steps, AHEAD):
        following = ()
        next_marks = ()
        for u in tl.static_range(AHEAD):
            is_first = p + step + u == T - 1  # of forward
            before = taken(ahead, u * INPUTS, STATES)
            if HAS_MARKS:
                mark = ahead_marks[u].to(tl.int32)[:, None]
                runs = mask & (mark != PADDED)
                states = entering(mark, starts, before, STATES)
            else:
                runs = below(mask, step + u, steps)
                states = chosen(is_first, starts, before, STATES)
            d_outs = ()
            for s in tl.static_range(STATES):
                d_out = d_states[s]
                if s == 0 and HAS_DY:
                    d_out += ahead[u * INPUTS + INPUTS - 1].to(tl.float32)
                if s > 0 and DCS > 0:
                    d_out += ahead[u * INPUTS + STATES + SAVED + s - 1]
                d_outs = d_outs + (d_out,)
            noise = noise_tiles(seed_ptr, (row + offs_b)[:, None], offs_h[None, :], NOISE)
            saved = taken(ahead, u * INPUTS + STATES, SAVED)
            d_gates, d_before, d_tiles = CELL(saved, states, new_states, held + noise, d_outs)

            for g in tl.static_range(G):
                tl.store(d_gates_at + g * H, round_to(d_gates[g], d_gates_ptr.dtype.element_ty, EMULATE_BF16), mask=runs)
            d_nexts = ()
            handed = ()
            for s in tl.static_range(STATES):
                d_state = d_before[s]
                if s == 0 and not DIRECT:
                    d_state = tl.zeros(mask.shape, tl.float32)
                if HAS_MARKS:  # h's gradient stays in d_h at the step that forward began with, as without marks
                    cut = runs & anew(mark)
                    if s == 0:
                        cut = below(cut, p + step + u, T - 1)
                    handed = handed + (tl.where(cut, d_state, 0.0),)
                    d_state = tl.where(cut, 0.0, d_state)
                d_nexts = d_nexts + (tl.where(runs, d_state, d_states[s]),)
            d_states = d_nexts
            if NEEDS_STARTS:
                sums = ()
                for n in tl.static_range(2):
                    for s in tl.static_range(STATES):
                        own = tl.where(mark == (STARTS if n == 0 else RESETS), handed[s], 0.0)
                        sums = sums + (d_starts[n * STATES + s] + own,)
                d_starts = sums
            held_sums = ()
            for n in tl.static_range(HELD):
                held_sums = held_sums + (d_held[n] + tl.where(runs, d_tiles[n], 0.0),)
            d_held = held_sums
            new_states = before

            now = below(mask, step + AHEAD + u, steps)
            following = following + _inputs(
                at, now, below(now, p + step + AHEAD + u, T - 1), H, CARRIED, SAVED, DCS, HAS_DY
            )  # fmt: skip
            at = _advanced(at, to_next, H, CARRIED, SAVED, DCS, DIRECTIONS)
            if HAS_MARKS:
                next_marks = next_marks + (tl.load(code_at, mask=below(mask_b, step + AHEAD + u, steps), other=PADDED),)
                code_at += to_next
            d_gates_at += to_next * (G * H)
            row += to_next
        ahead = following
        ahead_marks = next_marks

    tl.store(pointers(d_h_ptr, others, offs_b, offs_h, H), d_states[0], mask=mask)
    for s in tl.static_range(CARRIED):
        tl.store(pointers(d_c_ptr, others, offs_b, offs_h, CARRIED * H) + s * H, d_states[1 + s], mask=mask)
    for n in tl.static_range(HELD):
        tl.store(pointers(d_held_ptr, others, offs_b, offs_h, HELD * H) + n * H, d_held[n], mask=mask)
    if NEEDS_STARTS:
        for n in tl.static_range(2):
            first = 2 * others + n * batch
            tl.store(pointers(d_start_ptrs.h, first, offs_b, offs_h, H), d_starts[n * STATES], mask=mask)
            for s in tl.static_range(CARRIED):
                at_c = pointers(d_start_ptrs.c, first, offs_b, offs_h, CARRIED * H) + s * H
                tl.store(at_c, d_starts[n * STATES + 1 + s], mask=mask)
