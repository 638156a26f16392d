"""One program's forward: all units of R batch rows through many time steps, W_hh on chip throughout.

    gates_t = x_t + b_ih + W h_{t-1} + b_hh      states_t, saved_t = cell.forward(...)

A warp owns 16 units with all their gates. Every warp needs all of h_{t-1}: it goes through shared memory, two barriers a step.
The states stay in registers; see tiles.py for how. The loop over steps is a `while`: Triton moves the load of the weights from
shared memory out of it, into registers, but back into a `for`.

With marks (`rnnfast.kernels.marks`), the state that enters a step is loaded anew where the mark says so, after the step before.
A program begins with the first step at which one of its rows runs and ends with the last. Without, the arguments that go with
marks are None.

Legend: M members of the group (`rnnfast.kernels.groups`), T steps, B batch, H hidden units, HP = 16 W units of a program of W
warps, G gates, R batch rows of a program. A member's rows are counted from the first member's on: those of T steps each in h,
c and saved, of N steps in x.
"""

import triton
import triton.language as tl

from rnnfast.kernels.groups import place
from rnnfast.kernels.marks import ALL_PADDED
from rnnfast.kernels.maths import round_to
from rnnfast.kernels.one_program.plain import plain_product, plain_weights, sum_plain
from rnnfast.kernels.one_program.tiles import (
    bias_of,
    cells,
    enter,
    enter_all,
    from_product,
    held_cells,
    load,
    load_state,
    load_states,
    mask_rows,
    masks,
    noise_cells,
    offsets,
    product,
    program_rows,
    row_marks,
    row_mean,
    rows_of_thread,
    store_cells,
    threads_unit,
    threads_units,
    to_product,
    units_inside,
    units_of_thread,
)
from rnnfast.kernels.one_program.weights import forward_weights


@triton.jit(do_not_specialize=["x_first", "begin", "lag", "N", "T", "flips", "has_first", "B"])
def one_program_forward_kernel(
    # inputs
    x_ptr,  # (rows, B, G * H) float32, W_ih x_t of the N positions of each member, in time
    w_ptr,  # (M, G * H, H) W_hh
    bias_x_ptr,  # (M, G * H) b_ih
    bias_h_ptr,  # (M, G * H) b_hh
    h0_ptr,  # (M, B, H) the initial hidden state
    c0_ptr,  # (M, B, CARRIED * H) float32, the other initial states
    mark_ptrs,  # `Marks`, packed for R rows a tile
    given_ptrs,  # `Given`
    # outputs
    h_ptr,  # (T, B, DIRECTIONS * H) h_t, or (M, T, B, H)
    c_ptr,  # (M, T, B, CARRIED * H) float32, the other states at t, if KEEP_C, else (M, 1, B, CARRIED * H), the last
    saved_ptr,  # (M, T, B, SAVED * H) activations for backward
    # sizes
    x_first,  # the row of x where member 0 begins; the others come first, one after another
    begin,  # these: see `rnnfast.kernels.groups`
    lag,
    N,
    T,
    flips,
    has_first,  # 0 if the initial states are zero
    B,
    H: tl.constexpr,
    # flags
    CELL: tl.constexpr,
    G: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIED: tl.constexpr,  # states besides h
    HELD: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    APART: tl.constexpr,  # gates, the last ones, whose two sides the cell keeps apart
    KEEP_C: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,  # of the summed axis, without tensor cores; 0 with them
    GROUPED: tl.constexpr,  # several members
    DIRECTIONS: tl.constexpr,
):
    HAS_BIAS: tl.constexpr = bias_x_ptr is not None
    HAS_MARKS: tl.constexpr = mark_ptrs.codes is not None
    HP: tl.constexpr = 16 * W
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    PAIRED: tl.constexpr = H % 2 == 0
    UNIT: tl.constexpr = 16 if H % 16 == 0 else 8 if H % 8 == 0 else 4 if H % 4 == 0 else 2 if H % 2 == 0 else 1
    STRIDE: tl.constexpr = H // UNIT  # addresses are counted in UNITs, so that Triton sees how they are aligned
    batch = B.to(tl.int64)
    member = tl.program_id(2) if GROUPED else 0
    p, t, dt, steps, t_x = place(begin, lag, N, T, flips, member, False)
    if GROUPED:
        if steps <= 0:
            return
    else:  # an argument, so that the loop compares with one: a launch of one member has no steps that are not
        steps = N
    dt = dt.to(tl.int64)
    t = t.to(tl.int64)
    t_x = t_x.to(tl.int64)
    t_own = t  # counted from the member's first step
    starts_h, starts_c = mark_ptrs.starts_h, mark_ptrs.starts_c
    held_ptr, seed_ptr = given_ptrs.held, given_ptrs.seeds
    others = 0  # batch rows of the members before
    if GROUPED:
        member = member.to(tl.int64)
        others = member * batch
        w_ptr += member * (G * H * H)
        if HAS_BIAS:
            bias_x_ptr += member * (G * H)
            bias_h_ptr += member * (G * H)
        if HAS_MARKS:
            starts_h += others * (2 * H)
            if CARRIED > 0:
                starts_c += others * (2 * CARRIED * H)
        if NOISE > 0:
            seed_ptr += member
        if DIRECTIONS > 1:  # side by side, not one after another as in what else has a row for each step
            h_ptr += (member - others * DIRECTIONS * T) * H
        t += member * T
        t_x += tl.where(member == 0, x_first, (member - 1) * N)

    w = ()
    for g in tl.static_range(G):
        if PARTS > 0:
            w = w + (plain_weights(w_ptr, g, H, HP, PARTS, False),)
        else:
            w = w + (forward_weights(w_ptr, g, H, W, DTYPE.primitive_bitwidth == 16),)

    unit = threads_unit(W, R)
    slots, rows, base, count = program_rows(mark_ptrs.order, B, W, R, HAS_MARKS)
    off = offsets(rows, unit, H, R, PAIRED)
    off_h = offsets(rows, unit, DIRECTIONS * H, R, PAIRED)
    off_x = offsets(rows, unit, G * H, R, PAIRED)
    off_c = offsets(rows, unit, CARRIED * H, R, PAIRED)
    off_s = offsets(rows, unit, SAVED * H, R, PAIRED)
    mask = masks(slots, count, unit, H, HP, R, PAIRED)
    inside = units_inside(slots, unit, H, HP, R, PAIRED)
    bias = ()
    bias_apart = ()
    if HAS_BIAS:
        for g in tl.static_range(G):
            bias_x = bias_of(bias_x_ptr, unit, g, H, R)
            bias_h = bias_of(bias_h_ptr, unit, g, H, R)
            if g >= G - APART:
                bias = bias + (bias_x,)
                bias_apart = bias_apart + (bias_h,)
            else:
                bias = bias + (bias_x + bias_h,)

    # the first step at which a row of this program runs
    step = 0
    word = 0
    if HAS_MARKS:
        tiles = tl.cdiv(B, R)
        words_ptr = mark_ptrs.codes.to(tl.pointer_type(tl.int64)) + tl.program_id(0)
        word = tl.load(words_ptr + t * tiles)
        while (step < steps) & (word == ALL_PADDED):
            step += 1
            word = tl.load(words_ptr + (t + step * dt) * tiles, mask=step < steps, other=ALL_PADDED)
    at_x = ((t_x + step * dt) * batch + base) * (G * STRIDE)
    at = ((t + step * dt) * batch + base) * STRIDE
    to_next = dt * batch * STRIDE

    # the states that enter it
    is_first = p == 0
    at_first = (others + base) * STRIDE  # in the states, which have a row for each batch row
    at_before = ((t - dt) * batch + base) * STRIDE
    entered = masks(slots, tl.where(is_first, count * has_first, count), unit, H, HP, R, PAIRED)
    h = load_state(is_first, h0_ptr, at_first, h_ptr, at_before, rows, unit, entered, H, UNIT, R, 1, DIRECTIONS)
    h = cells(h, W, R, PAIRED)
    at_before = at_before if KEEP_C else at_first
    entering = load_states(is_first, c0_ptr, at_first, c_ptr, at_before, rows, unit, entered, H, UNIT, R, CARRIED)
    c = ()
    for s in tl.static_range(CARRIED):
        c = c + (cells(entering[s], W, R, PAIRED),)
    if HAS_MARKS:
        marks = row_marks(word, slots, R)
        h = enter(starts_h, off, marks, mask, h, batch * H, W, R, PAIRED)
        c = enter_all(starts_c, off_c, marks, mask, c, batch * H, H, W, R, PAIRED)
    hf = h.to(tl.float32)
    held = ()
    if HELD > 0:
        held = held_cells(held_ptr + at_first * (UNIT * HELD), rows, unit, inside, H, HELD, W, R, PAIRED)
    units = threads_units(unit, R)

    zeros = tl.zeros((32 * W, units_of_thread(R), rows_of_thread(R)), tl.float32)
    # -0.0, by its bits, which Triton 3.6 would take for 0.0: x + -0.0 is x, and the compiler leaves it out
    nothing = tl.full(zeros.shape, -0x80000000, tl.int32).to(tl.float32, bitcast=True)
    xs = ()
    if HAS_MARKS:
        at_x = tl.where(step < steps, at_x, 0)  # an address that is there
    for g in tl.static_range(G):
        xs = xs + (load(x_ptr + at_x * UNIT + g * H, off_x, inside, R),)
    while step < steps:
        # in flight during the product; the last step loads its own again
        more = step + 1 < steps
        at_x += tl.where(more, to_next, 0) * G
        xs_next = ()
        for g in tl.static_range(G):
            xs_next = xs_next + (load(x_ptr + at_x * UNIT + g * H, off_x, inside, R),)
        if HAS_MARKS:
            word = tl.load(words_ptr + (t + (step + 1) * dt) * tiles, mask=more, other=ALL_PADDED)

        plain_sums = ()
        if PARTS > 0:
            for g in tl.static_range(G):
                plain_sums = plain_sums + (plain_product(w[g], h, PARTS, R),)
            plain_sums = sum_plain(plain_sums, PARTS, R)
        operand = to_product(h, W, R)
        x_sides = ()
        h_sides = ()
        for g in tl.static_range(G):
            x_side = cells(xs[g], W, R, PAIRED)
            h_side = zeros
            if HAS_BIAS:
                x_side += bias[g]
                if g >= G - APART:
                    h_side += bias_apart[g - (G - APART)]
            if PARTS > 0:
                h_side += plain_sums[g]
            elif R == 8:  # what is added to the sum is its first value
                if g >= G - APART:
                    h_side = from_product(product(w[g], operand, to_product(h_side, W, R), PRECISION, EMULATE_BF16), W, R)
                else:
                    h_side = from_product(product(w[g], operand, to_product(x_side, W, R), PRECISION, EMULATE_BF16), W, R)
                    x_side = nothing
            else:  # lanes have sums of cells that are not theirs
                sums = product(w[g], operand, tl.zeros((W, 16, R), tl.float32), PRECISION, EMULATE_BF16)
                h_side += from_product(sums, W, R)
            x_sides = x_sides + (x_side,)
            h_sides = h_sides + (h_side,)
        given = held + noise_cells(seed_ptr, (t_own + step * dt) * batch + base, rows, unit, NOISE, W, R)
        if ROWS:
            new_states, saved = CELL(x_sides, h_sides, (hf,) + c, given, (units, H), row_mean)
        else:
            new_states, saved = CELL(x_sides, h_sides, (hf,) + c, given)

        written = mask
        if HAS_MARKS:
            written = mask_rows(mask, marks, R, PAIRED)
        h = round_to(new_states[0], DTYPE, EMULATE_BF16)
        if HP > H:  # the product takes them times 0: a cell may make anything of padded units
            h = tl.where(units < H, h, 0.0).to(DTYPE)
        store_cells(h_ptr + at * (DIRECTIONS * UNIT), off_h, written, h, W, R, PAIRED)
        c = ()
        for s in tl.static_range(CARRIED):
            c = c + (new_states[1 + s],)
            if KEEP_C or HAS_MARKS:  # with marks a row's last step may not be the program's
                at_c = at if KEEP_C else at_first
                store_cells(c_ptr + at_c * (UNIT * CARRIED) + s * H, off_c, written, c[s], W, R, PAIRED)
        for s in tl.static_range(SAVED):
            tile = round_to(saved[s], DTYPE, EMULATE_BF16)
            store_cells(saved_ptr + at * (UNIT * SAVED) + s * H, off_s, written, tile, W, R, PAIRED)
        at += to_next
        if HAS_MARKS:
            marks = row_marks(word, slots, R)
            h = enter(starts_h, off, marks, mask, h, batch * H, W, R, PAIRED)
            c = enter_all(starts_c, off_c, marks, mask, c, batch * H, H, W, R, PAIRED)
            steps = tl.where(word == ALL_PADDED, step + 1, steps)
        hf = h.to(tl.float32)
        xs = xs_next
        step += 1
    if not KEEP_C and not HAS_MARKS:
        for s in tl.static_range(CARRIED):
            store_cells(c_ptr + at_first * (UNIT * CARRIED) + s * H, off_c, mask, c[s], W, R, PAIRED)
