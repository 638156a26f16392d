"""Backward of the scan kernels: N steps from the last to the first, the gradients of the states in registers.

    d_gates_t, d_states_{t-1}, d_held = cell.backward(saved_t, states_{t-1}, states_t, given, d_states_t + d_y_t)

A step's dy, saved tiles and the states before it are loaded AHEAD steps before they are used (tiles.py). The states after a
step are those before the step processed last. The gradients of held tiles and of states that begin anew are summed in
registers and added to memory at the end.

Legend: as in forward.py; E held tiles. Next and before are meant in forward's order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rnnfast.kernels.given import noise_tiles
from rnnfast.kernels.groups import place
from rnnfast.kernels.marks import PADDED, RESETS, STARTS, anew, batch_rows
from rnnfast.kernels.maths import round_to
from rnnfast.kernels.scan.tiles import below, blocks, chosen, entering, offsets, state_tiles, taken, window

__all__ = ["scan_backward_kernel"]


@triton.jit
def _added(at_ptr, offs, tile, mask):
    tl.store(at_ptr + offs, tl.load(at_ptr + offs, mask=mask, other=0.0) + tile, mask=mask)


@triton.jit
def _inputs(
    dy_ptr, saved_ptr, h_ptr, c_ptr, dcs_ptr, t, t_saved, t_dy, dt, step, is_first, off_h, off_c, off_s, mask, batch, H,
    SAVED: tl.constexpr, CARRIED: tl.constexpr, DCS: tl.constexpr, DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """What a step reads: the states before it (where it is the first, any that are there), the saved tiles, the gradients of
    the carried states and of h."""
    row_before = (t + tl.where(is_first, step, step + 1) * dt).to(tl.int64) * batch
    row_saved = (t_saved + step * dt).to(tl.int64) * batch
    tiles = blocks(h_ptr + row_before * (DIRECTIONS * H), off_h, mask, H, 1)
    if CARRIED > 0:
        tiles = tiles + blocks(c_ptr + row_before * (CARRIED * H), off_c, mask, H, CARRIED)
    if SAVED > 0:
        tiles = tiles + blocks(saved_ptr + row_saved * (SAVED * H), off_s, mask, H, SAVED)
    if DCS > 0:
        tiles = tiles + blocks(dcs_ptr + (t + step * dt).to(tl.int64) * batch * (CARRIED * H), off_c, mask, H, CARRIED)
    if dy_ptr is not None:
        row_dy = (t_dy + step * dt).to(tl.int64) * batch
        tiles = tiles + blocks(dy_ptr + row_dy * (DIRECTIONS * H), off_h, mask, H, 1)
    return tiles


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
    H,
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
    INPUTS: tl.constexpr = STATES + SAVED + DCS + (1 if HAS_DY else 0)
    BLOCK_B: tl.constexpr = PLAN.BLOCK_B
    BLOCK_H: tl.constexpr = PLAN.BLOCK_H
    AHEAD: tl.constexpr = PLAN.AHEAD
    batch = B.to(tl.int64)
    member = tl.program_id(2) if GROUPED else 0
    p, t, dt, steps, t_x = place(begin, lag, N, T, flips, member, True)
    codes_ptr, starts_h_ptr, starts_c_ptr = mark_ptrs.codes, mark_ptrs.starts_h, mark_ptrs.starts_c
    d_starts_h_ptr, d_starts_c_ptr = d_start_ptrs.h, d_start_ptrs.c
    held_ptr, seed_ptr = given_ptrs.held, given_ptrs.seeds
    if GROUPED:
        if steps <= 0:
            return
        states_size = member.to(tl.int64) * batch * H  # from the first member to this one, of (M, B, H)
        if HAS_DY:
            dy_ptr += member * H if DIRECTIONS > 1 else states_size * N
        if SAVED > 0:
            saved_ptr += states_size * saved_steps * SAVED
        h_ptr += member * H if DIRECTIONS > 1 else states_size * T
        h0_ptr += states_size
        d_gates_ptr += states_size * T * G
        d_h_ptr += states_size
        if CARRIED > 0:
            c_ptr += states_size * T * CARRIED
            c0_ptr += states_size * CARRIED
            d_c_ptr += states_size * CARRIED
            if DCS > 0:
                dcs_ptr += states_size * T * CARRIED
        if HELD > 0:
            held_ptr += states_size * HELD
            d_held_ptr += states_size * HELD
        if NOISE > 0:
            seed_ptr += member
        if HAS_MARKS:
            codes_ptr += member.to(tl.int64) * T * batch
            starts_h_ptr += 2 * states_size
            if CARRIED > 0:
                starts_c_ptr += 2 * states_size * CARRIED
        if NEEDS_STARTS:
            d_starts_h_ptr += 2 * states_size
            if CARRIED > 0:
                d_starts_c_ptr += 2 * states_size * CARRIED
    offs_b = batch_rows(tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), mark_ptrs.order, B)
    mask_b = offs_b < B
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    if HAS_MARKS:
        p, t, t_x, steps = window(codes_ptr, p, t, t_x, dt, steps, offs_b, mask_b, B)
        mask_b = below(mask_b, 0, steps)
    t_saved = tl.where(saved_steps == T, t, t_x)
    t_dy = t_x if GROUPED and DIRECTIONS == 1 else t
    mask = mask_b[:, None] & (offs_h < H)[None, :]
    off = offsets(offs_b, offs_h, H)
    off_g = offsets(offs_b, offs_h, G * H)
    off_h = offsets(offs_b, offs_h, DIRECTIONS * H)
    off_c = offsets(offs_b, offs_h, CARRIED * H)
    off_s = offsets(offs_b, offs_h, SAVED * H)
    off_e = offsets(offs_b, offs_h, HELD * H)

    d_states = state_tiles(d_h_ptr, d_c_ptr, 0, off, off_c, mask, H, CARRIED)
    starts = ()
    d_starts = ()
    if HAS_MARKS:
        for n in tl.static_range(2):
            at = n * batch * H
            starts = starts + state_tiles(starts_h_ptr + at, starts_c_ptr, at * CARRIED, off, off_c, mask, H, CARRIED)
    else:
        starts = state_tiles(h0_ptr, c0_ptr, 0, off, off_c, below(mask, 0, has_first), H, CARRIED)
    if NEEDS_STARTS:
        for _ in tl.static_range(2 * STATES):
            d_starts = d_starts + (tl.zeros((BLOCK_B, BLOCK_H), tl.float32),)
    held = blocks(held_ptr, off_e, mask, H, HELD)
    d_held = ()
    for _ in tl.static_range(HELD):
        d_held = d_held + (tl.zeros((BLOCK_B, BLOCK_H), tl.float32),)

    row = t.to(tl.int64) * batch
    new_states = state_tiles(h_ptr + row * (DIRECTIONS * H), c_ptr, row * (CARRIED * H), off_h, off_c, mask, H, CARRIED)
    ahead = ()
    ahead_marks = ()
    for u in tl.static_range(AHEAD):
        later = tl.minimum(u, steps - 1)
        ahead = ahead + _inputs(
            dy_ptr, saved_ptr, h_ptr, c_ptr, dcs_ptr, t, t_saved, t_dy, dt, later, p + later == T - 1, off_h, off_c, off_s,
            mask, batch, H, SAVED, CARRIED, DCS, DIRECTIONS,
        )  # fmt: skip
        if HAS_MARKS:
            at = (t + later * dt).to(tl.int64) * batch + offs_b
            ahead_marks = ahead_marks + (tl.load(codes_ptr + at, mask=mask_b, other=PADDED),)
    for step in range(0, steps, AHEAD):
        following = ()
        following_marks = ()
        for u in tl.static_range(AHEAD):
            row = (t + (step + u) * dt).to(tl.int64) * batch
            is_first = p + step + u == T - 1  # of forward
            runs = below(mask, step + u, steps)
            before = taken(ahead, u * INPUTS, STATES)
            if HAS_MARKS:
                mark = ahead_marks[u].to(tl.int32)[:, None]
                runs = runs & (mark != PADDED)
                states = entering(mark, starts, before, STATES)
            else:
                states = chosen(is_first, starts, before, STATES)
            saved = taken(ahead, u * INPUTS + STATES, SAVED)
            d_outs = ()
            for s in tl.static_range(STATES):
                d_out = d_states[s]
                if s == 0 and HAS_DY:
                    d_out += ahead[u * INPUTS + STATES + SAVED + DCS].to(tl.float32)
                if s > 0 and DCS > 0:
                    d_out += ahead[u * INPUTS + STATES + SAVED + s - 1]
                d_outs = d_outs + (d_out,)
            noise = noise_tiles(seed_ptr, row + offs_b.to(tl.int64)[:, None], offs_h[None, :], NOISE)
            d_gates, d_before, d_tiles = CELL(saved, states, new_states, held + noise, d_outs)

            for g in tl.static_range(G):
                tile = round_to(d_gates[g], d_gates_ptr.dtype.element_ty, EMULATE_BF16)
                tl.store(d_gates_ptr + row * (G * H) + g * H + off_g, tile, mask=runs)
            d_nexts = ()
            d_sums = ()
            for s in tl.static_range(STATES):
                d_state = d_before[s]
                if s == 0 and not DIRECT:
                    d_state = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
                if HAS_MARKS:  # h's gradient stays in d_h at the step that forward began with, as without marks
                    hands_over = anew(mark) & ((s > 0) | (not is_first))
                    if NEEDS_STARTS:
                        d_sums = d_sums + (tl.where(runs & hands_over, d_state, 0.0),)
                    d_state = tl.where(hands_over, 0.0, d_state)
                d_nexts = d_nexts + (tl.where(runs, d_state, d_states[s]),)
            d_states = d_nexts
            if NEEDS_STARTS:
                d_added = ()
                for n in tl.static_range(2):
                    for s in tl.static_range(STATES):
                        own = tl.where(mark == (STARTS if n == 0 else RESETS), d_sums[s], 0.0)
                        d_added = d_added + (d_starts[n * STATES + s] + own,)
                d_starts = d_added
            held_added = ()
            for n in tl.static_range(HELD):
                held_added = held_added + (d_held[n] + tl.where(runs, d_tiles[n], 0.0),)
            d_held = held_added
            new_states = before

            later = tl.minimum(step + AHEAD + u, steps - 1)
            following = following + _inputs(
                dy_ptr, saved_ptr, h_ptr, c_ptr, dcs_ptr, t, t_saved, t_dy, dt, later, p + later == T - 1, off_h, off_c,
                off_s, mask, batch, H, SAVED, CARRIED, DCS, DIRECTIONS,
            )  # fmt: skip
            if HAS_MARKS:
                at = (t + later * dt).to(tl.int64) * batch + offs_b
                following_marks = following_marks + (tl.load(codes_ptr + at, mask=mask_b, other=PADDED),)
        ahead = following
        ahead_marks = following_marks

    tl.store(d_h_ptr + off, d_states[0], mask=mask)
    for s in tl.static_range(CARRIED):
        tl.store(d_c_ptr + s * H + off_c, d_states[1 + s], mask=mask)
    for n in tl.static_range(HELD):
        _added(d_held_ptr + n * H, off_e, d_held[n], mask)
    if NEEDS_STARTS:
        for n in tl.static_range(2):
            _added(d_starts_h_ptr + n * batch * H, off, d_starts[n * STATES], mask)
            for s in tl.static_range(CARRIED):
                at_c = d_starts_c_ptr + n * batch * (CARRIED * H) + s * H
                _added(at_c, off_c, d_starts[n * STATES + 1 + s], mask)
