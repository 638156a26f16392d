"""One program's backward: all units of R batch rows from the last step to the first, W_hh^T on chip throughout.

    d_h_t = d_y_t + W^T d_gates_{t+1}      d_gates_t = cell.backward(saved_t, ..., d_h_t, d_c_t)

A warp owns 16 units. The warps share the summed axis: each multiplies the gate gradients of its own units, so its operand is
its own, and the sums of all warps go through shared memory. The gradients of the states stay in registers; see tiles.py for
how.

With marks (`rnnfast.kernels.marks`) the gate gradients of a row that does not run are zero, and the gradients of its last
states wait. Where a state began anew, the whole gradient of what entered is added to that of the initial or the reset state,
and the program goes on from zero. It begins with the last step at which one of its rows runs, and ends with the first.

Legend: M members of the group (`rnnfast.kernels.groups`), T steps, B batch, H hidden units, HP = 16 W units of a program of W
warps, G gates, D blocks of gate gradients, R batch rows of a program. A member's rows are counted from the first member's on,
as in forward. Next and before are meant in forward's order: this kernel comes from the next step and goes on to the one before.
"""

import triton
import triton.language as tl

from rnnfast.kernels.groups import place
from rnnfast.kernels.marks import ALL_PADDED, CONTINUES, PADDED, anew
from rnnfast.kernels.maths import dot, round_to
from rnnfast.kernels.one_program.plain import plain_product, plain_weights, sum_plain
from rnnfast.kernels.one_program.tiles import (
    by_row,
    cells,
    enter,
    enter_all,
    hand_over,
    held_cells,
    load,
    load_cells,
    load_state,
    load_states,
    load_tiles,
    mask_rows,
    masks,
    noise_cells,
    offsets,
    program_rows,
    row_marks,
    row_mean,
    store_cells,
    sum_parts,
    threads_unit,
    threads_units,
    to_product,
    units_inside,
)
from rnnfast.kernels.one_program.weights import backward_weights


@triton.jit
def _nobody_runs(word, word_next, NEEDS_STARTS: tl.constexpr):
    """Whether there is nothing to do at a step: no row runs, and none hands over the gradient of what entered the next."""
    return ((word & word_next) if NEEDS_STARTS else word) == ALL_PADDED


@triton.jit(do_not_specialize=["begin", "lag", "N", "T", "flips", "has_first", "saved_steps", "B"])
def one_program_backward_kernel(
    # inputs
    dy_ptr,  # gradient of the outputs: as h for one member or two directions, else (M, N, B, H), of this launch's positions
    saved_ptr,  # (M, saved_steps, B, SAVED * H) activations that forward saved
    h_ptr,  # (T, B, DIRECTIONS * H) h_t, or (M, T, B, H)
    h0_ptr,  # (M, B, H) the initial hidden state
    c_ptr,  # (M, T, B, CARRIED * H) float32, the other states at t
    c0_ptr,  # (M, B, CARRIED * H) float32, the other initial states
    w_ptr,  # (M, G * H, H) W_hh
    dcs_ptr,  # as c, gradient of the other states at t from outside, besides the last ones'
    mark_ptrs,  # `Marks`, packed for R rows a tile
    given_ptrs,  # `Given`
    # outputs
    d_gates_ptr,  # (M, T, B, D * H) gate gradients; those of the step next to the first of this launch are read
    d_h_ptr,  # (M, B, H) float32, carried from launch to launch: gradient of h_t that comes neither from dy nor through W_hh
    d_c_ptr,  # (M, B, CARRIED * H) float32, carried likewise: gradient of the other states at t
    d_start_ptrs,  # `StartGrads`
    d_held_ptr,  # (M, B, HELD * H) float32, added to: gradients of the held tiles
    # sizes
    begin,  # these: see `rnnfast.kernels.groups`
    lag,
    N,
    T,
    flips,
    has_first,  # 0 if forward began from zeros, or if marks say where it began
    saved_steps,  # T, or N for those of this launch's positions
    B,
    H: tl.constexpr,
    # flags
    CELL: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIED: tl.constexpr,  # states besides h
    HELD: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,  # of the summed axis, without tensor cores; 0 with them
    GROUPED: tl.constexpr,  # several members
    DIRECTIONS: tl.constexpr,
):
    HAS_DY: tl.constexpr = dy_ptr is not None
    HAS_DCS: tl.constexpr = dcs_ptr is not None
    HAS_MARKS: tl.constexpr = mark_ptrs.codes is not None
    NEEDS_STARTS: tl.constexpr = d_start_ptrs.h is not None
    HP: tl.constexpr = 16 * W
    DTYPE: tl.constexpr = d_gates_ptr.dtype.element_ty
    PAIRED: tl.constexpr = H % 2 == 0
    UNIT: tl.constexpr = 16 if H % 16 == 0 else 8 if H % 8 == 0 else 4 if H % 4 == 0 else 2 if H % 2 == 0 else 1
    STRIDE: tl.constexpr = H // UNIT  # addresses are counted in UNITs, so that Triton sees how they are aligned
    batch = B.to(tl.int64)
    member = tl.program_id(2) if GROUPED else 0
    p, t, dt, steps, t_x = place(begin, lag, N, T, flips, member, True)
    if GROUPED:
        if steps <= 0:
            return
    else:  # an argument, so that the loop compares with one: a launch of one member has no steps that are not
        steps = N
    t_saved = tl.where(saved_steps == T, t, t_x).to(tl.int64)
    t_first = tl.where(dt > 0, T - 1, 0).to(tl.int64)  # the step that forward began with
    has_next = tl.where(p > 0, 1, 0)
    dt = dt.to(tl.int64)
    t = t.to(tl.int64)
    starts_h, starts_c = mark_ptrs.starts_h, mark_ptrs.starts_c
    d_starts_h, d_starts_c = d_start_ptrs.h, d_start_ptrs.c
    held_ptr, seed_ptr = given_ptrs.held, given_ptrs.seeds
    t_own = t  # counted from the member's first step
    others = 0  # batch rows of the members before
    if GROUPED:
        member = member.to(tl.int64)
        others = member * batch
        w_ptr += member * (G * H * H)
        if HAS_MARKS:
            starts_h += others * (2 * H)
            if CARRIED > 0:
                starts_c += others * (2 * CARRIED * H)
        if NEEDS_STARTS:
            d_starts_h += others * (2 * H)
            if CARRIED > 0:
                d_starts_c += others * (2 * CARRIED * H)
        if NOISE > 0:
            seed_ptr += member
        if DIRECTIONS > 1:  # side by side, not one after another as in what else has a row for each step
            h_ptr += (member - others * DIRECTIONS * T) * H
            if HAS_DY:
                dy_ptr += (member - others * DIRECTIONS * T) * H
        t += member * T
        t_first += member * T
        t_saved += member * saved_steps
        if HAS_DY and DIRECTIONS == 1:
            dy_ptr += (member * N + t_x - t) * batch * H
    saved_ptr += (t_saved - t) * batch * (SAVED * H)

    w = ()
    for g in tl.static_range(G):
        if PARTS > 0:
            w = w + (plain_weights(w_ptr, g, H, HP, PARTS, True),)
        else:
            w = w + (backward_weights(w_ptr, g, H, W, DTYPE.primitive_bitwidth == 16),)

    unit = threads_unit(W, R)
    slots, rows, base, count = program_rows(mark_ptrs.order, B, W, R, HAS_MARKS)
    off = offsets(rows, unit, H, R, PAIRED)
    off_h = offsets(rows, unit, DIRECTIONS * H, R, PAIRED)
    off_c = offsets(rows, unit, CARRIED * H, R, PAIRED)
    off_s = offsets(rows, unit, SAVED * H, R, PAIRED)
    off_d = offsets(rows, unit, D * H, R, PAIRED)
    mask = masks(slots, count, unit, H, HP, R, PAIRED)
    inside = units_inside(slots, unit, H, HP, R, PAIRED)

    # the last step at which a row of this program runs
    step = 0
    word = 0
    word_next = 0
    if HAS_MARKS:
        tiles = tl.cdiv(B, R)
        words_ptr = mark_ptrs.codes.to(tl.pointer_type(tl.int64)) + tl.program_id(0)
        word = tl.load(words_ptr + t * tiles)
        word_next = tl.load(words_ptr + (t - dt) * tiles, mask=has_next > 0, other=ALL_PADDED)
        while (step < steps) & _nobody_runs(word, word_next, NEEDS_STARTS):
            step += 1
            word_next = word
            word = tl.load(words_ptr + (t + step * dt) * tiles, mask=step < steps, other=ALL_PADDED)

    # the gradients that come from the next step
    carried = (others + base) * H
    row_next = (t - dt) * batch + base
    came = masks(slots, count * has_next, unit, H, HP, R, PAIRED)
    ends = masks(slots, count * (1 - has_next), unit, H, HP, R, PAIRED)
    if HAS_MARKS:
        marks_next = row_marks(word_next, slots, R)
        came = masks(slots, tl.where(step == 0, count * has_next, 0), unit, H, HP, R, PAIRED)
        came = mask_rows(came, marks_next, R, PAIRED)
        ends = mask
    d_next = ()
    for g in tl.static_range(G):
        at_g = d_gates_ptr + row_next * (D * STRIDE) * UNIT + (D - G + g) * H
        d_next = d_next + (load_cells(at_g, off_d, came, W, R, PAIRED),)
    d_direct = load_cells(d_h_ptr + carried, off, mask if DIRECT else ends, W, R, PAIRED)
    d_c = ()
    for s in tl.static_range(CARRIED):
        d_c = d_c + (load_cells(d_c_ptr + carried * CARRIED + s * H, off_c, mask, W, R, PAIRED),)
    if HAS_MARKS:
        mark_next = by_row(marks_next, W, R)
        if not DIRECT:
            d_direct = tl.where(mark_next == PADDED, d_direct, 0.0)
        d_waiting = d_c
        d_c = ()
        for s in tl.static_range(CARRIED):
            d_c = d_c + (tl.where(anew(mark_next), 0.0, d_waiting[s]),)

    # what the first step needs, and the states before it
    t_now = tl.where(step < steps, t + step * dt, t)  # an address that is there
    at = (t_now * batch + base) * STRIDE  # of the step whose inputs are loaded
    at_d = at * D
    at_first = (others + base) * STRIDE  # in the states, which have a row for each batch row
    back = dt * batch * STRIDE
    is_first = t_now == t_first
    before = masks(slots, tl.where(t_now == t_first, count * has_first, count), unit, H, HP, R, PAIRED)
    dy = ()
    dcs = ()
    if HAS_DY:
        dy = load(dy_ptr + at * (DIRECTIONS * UNIT), off_h, inside, R)
    if HAS_DCS:
        dcs = load_tiles(dcs_ptr + at * (UNIT * CARRIED), off_c, inside, CARRIED, H, R)
    saved = load_tiles(saved_ptr + at * (UNIT * SAVED), off_s, inside, SAVED, H, R)
    h_new = load(h_ptr + at * (DIRECTIONS * UNIT), off_h, inside, R)
    h_old = load_state(is_first, h0_ptr, at_first, h_ptr, at + back, rows, unit, before, H, UNIT, R, 1, DIRECTIONS)
    c_new = ()
    if CARRIED > 0:
        c_new = load_tiles(c_ptr + at * (UNIT * CARRIED), off_c, inside, CARRIED, H, R)
    c_old = load_states(is_first, c0_ptr, at_first, c_ptr, at + back, rows, unit, before, H, UNIT, R, CARRIED)
    held = ()
    d_held = ()
    if HELD > 0:
        held = held_cells(held_ptr + at_first * (UNIT * HELD), rows, unit, inside, H, HELD, W, R, PAIRED)
        d_held = held_cells(d_held_ptr + at_first * (UNIT * HELD), rows, unit, mask, H, HELD, W, R, PAIRED)
    units = threads_units(unit, R)
    while step < steps:
        # of the step before, in flight during this one; the last loads its own again
        more = step + 1 < steps
        now = tl.where(more, back, 0)
        at += now
        t_now += tl.where(more, dt, 0)
        is_first = t_now == t_first
        before = masks(slots, tl.where(t_now == t_first, count * has_first, count), unit, H, HP, R, PAIRED)
        dy_before = ()
        dcs_before = ()
        if HAS_DY:
            dy_before = load(dy_ptr + at * (DIRECTIONS * UNIT), off_h, inside, R)
        if HAS_DCS:
            dcs_before = load_tiles(dcs_ptr + at * (UNIT * CARRIED), off_c, inside, CARRIED, H, R)
        saved_before = load_tiles(saved_ptr + at * (UNIT * SAVED), off_s, inside, SAVED, H, R)
        h_before = load_state(is_first, h0_ptr, at_first, h_ptr, at + back, rows, unit, before, H, UNIT, R, 1, DIRECTIONS)
        c_before = load_states(is_first, c0_ptr, at_first, c_ptr, at + back, rows, unit, before, H, UNIT, R, CARRIED)
        word_before = word
        if HAS_MARKS:
            word_before = tl.load(words_ptr + (t + (step + 1) * dt) * tiles, mask=more, other=ALL_PADDED)

        if PARTS > 0:
            sums = plain_product(w[0], d_next[0], PARTS, R)
            for g in tl.static_range(1, G):
                sums += plain_product(w[g], d_next[g], PARTS, R)
            d_h = sum_plain((sums,), PARTS, R)[0] + d_direct
        else:
            sums = tl.zeros((W, HP, R), tl.float32)
            for g in tl.static_range(G):
                sums = dot(w[g], to_product(d_next[g], W, R), sums, PRECISION, EMULATE_BF16)
            d_h = sum_parts(sums, W, R) + d_direct
        written = mask
        if HAS_MARKS:
            marks = row_marks(word, slots, R)
            mark = by_row(marks, W, R)
            written = mask_rows(mask, marks, R, PAIRED)
            if NEEDS_STARTS:
                hand_over(d_starts_h, off, marks_next, mask, d_h, batch * H, W, R, PAIRED, PARTS > 0)
            d_h = tl.where(anew(by_row(marks_next, W, R)), 0.0, d_h)
        if HAS_DY:
            d_h += cells(dy, W, R, PAIRED).to(tl.float32)
        kept = ()
        for s in tl.static_range(SAVED):
            kept = kept + (cells(saved[s], W, R, PAIRED).to(tl.float32),)
        old_h = cells(h_old, W, R, PAIRED)
        if HAS_MARKS:
            old_h = enter(starts_h, off, marks, mask, old_h, batch * H, W, R, PAIRED)
        old_c = ()
        new = (cells(h_new, W, R, PAIRED).to(tl.float32),)
        d_states = (d_h,)
        for s in tl.static_range(CARRIED):
            old_c = old_c + (cells(c_old[s], W, R, PAIRED),)
            new = new + (cells(c_new[s], W, R, PAIRED),)
            if HAS_DCS:
                d_states = d_states + (d_c[s] + cells(dcs[s], W, R, PAIRED),)
            else:
                d_states = d_states + (d_c[s],)
        if HAS_MARKS:
            old_c = enter_all(starts_c, off_c, marks, mask, old_c, batch * H, H, W, R, PAIRED)
        old = (old_h.to(tl.float32),) + old_c
        given = held + noise_cells(seed_ptr, (t_own + step * dt) * batch + base, rows, unit, NOISE, W, R)
        if ROWS:
            d_gates, d_before, d_given = CELL(kept, old, new, given, d_states, (units, H), row_mean)
        else:
            d_gates, d_before, d_given = CELL(kept, old, new, given, d_states)
        d_through = d_before[0]

        d_next = ()
        for d in tl.static_range(D):
            tile = round_to(d_gates[d], DTYPE, EMULATE_BF16)
            store_cells(d_gates_ptr + at_d * UNIT + d * H, off_d, written, tile, W, R, PAIRED)
            if HAS_MARKS:
                tile = tl.where(mark != PADDED, tile, 0.0).to(DTYPE)
            if HP > H:  # the product takes them times 0: a cell may make anything of padded units
                tile = tl.where(units < H, tile, 0.0).to(DTYPE)
            if d >= D - G:
                d_next = d_next + (tile,)
        if not DIRECT:
            d_through = tl.zeros(d_h.shape, tl.float32)
        d_held_before = d_held
        d_held = ()
        for n in tl.static_range(HELD):
            d_held = d_held + (d_held_before[n] + (tl.where(mark != PADDED, d_given[n], 0.0) if HAS_MARKS else d_given[n]),)
        d_c_next = d_c
        d_c = ()
        if HAS_MARKS:
            d_direct = tl.where(mark != PADDED, d_through, d_direct)
            for s in tl.static_range(CARRIED):
                d_s = d_before[1 + s]
                if NEEDS_STARTS:
                    at_s = d_starts_c + s * H
                    hand_over(at_s, off_c, marks, mask, d_s, batch * (CARRIED * H), W, R, PAIRED, PARTS > 0)
                d_c = d_c + (tl.where(mark == PADDED, d_c_next[s], tl.where(mark == CONTINUES, d_s, 0.0)),)
            steps = tl.where(_nobody_runs(word_before, word, NEEDS_STARTS), step + 1, steps)
            marks_next = marks
            word = word_before
        else:
            d_direct = d_through
            for s in tl.static_range(CARRIED):
                d_c = d_c + (d_before[1 + s],)
        at_d += back * D
        dy = dy_before
        dcs = dcs_before
        saved = saved_before
        h_new = h_old
        h_old = h_before
        c_new = c_old
        c_old = c_before
        step += 1
    if DIRECT:
        store_cells(d_h_ptr + carried, off, mask, d_direct, W, R, PAIRED)
    for s in tl.static_range(CARRIED):
        store_cells(d_c_ptr + carried * CARRIED + s * H, off_c, mask, d_c[s], W, R, PAIRED)
    off_e = offsets(rows, unit, HELD * H, R, PAIRED)
    for n in tl.static_range(HELD):
        store_cells(d_held_ptr + carried * HELD + n * H, off_e, mask, d_held[n], W, R, PAIRED)
