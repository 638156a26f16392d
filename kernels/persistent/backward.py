"""Persistent backward: one launch runs many time steps from the last to the first, W_hh^T on chip throughout.

    d_h_t = d_y_t + W^T d_gates_{t+1}      d_gates_t = cell.backward(saved_t, ..., d_h_t, d_c_t)

A program owns BLOCK_H units of BLOCK_B batch rows: it keeps the carried gradients of their states, and their columns of W. The
programs of one batch tile exchange the hidden side of the gate gradients after each step (see exchange.py).

With PARTS > 1 that many programs, one beside another, share the sums of all their units: each keeps the columns of W of all of
them, but only its own part of the summed axis, and so gathers only that part of the gate gradients. A second exchange, of
float32 sums, then brings each program the PARTS partial sums of its own units, which it adds in a fixed order.

With marks (`rnnfast.kernels.marks`) the gate gradients of a row that does not run are zero, and the gradients of its last
states wait in their owner's registers. Where a state began anew, its owner adds the whole gradient of what entered to that of
the initial or the reset state, and goes on from zero. A tile begins with the last step at which one of its rows runs, and ends
with the first. Without, HAS_MARKS is off and the arguments that go with it are None.

A program adds the gradients of its HELD tiles up over the steps, and to memory once a launch. The NOISE is made again.

A launch runs a chunk of steps of each member of a group, as in forward.

Legend: M members, T steps, N of them in a chunk, B batch, H hidden units, H_PAD = H rounded up to whole tiles, G gates, GATES =
G rounded up to a power of two, D blocks of gate gradients, K the summed axis, here G * H_PAD. ROWS are the units whose sums a
program has a part in. A step's row is t * B + b, where t counts the steps of all members: T * member + the step. Next and
before are meant in forward's order: this kernel comes from the next step and goes on to the one before.
"""

import triton
import triton.language as tl

from rnnfast.kernels.given import held_tiles, noise_tiles
from rnnfast.kernels.groups import place
from rnnfast.kernels.marks import ALL_PADDED, CONTINUES, PADDED, RESETS, STARTS, anew, unpacked
from rnnfast.kernels.maths import round_to
from rnnfast.kernels.persistent.exchange import (
    FIRST_WAIT,
    LATER_WAITS,
    add_product,
    as_operands,
    columns,
    joined,
    load_words,
    operands,
    over_parts,
    over_rows,
    piece,
    poll,
    publish,
    sum_parts,
    tile_words,
    vector,
    zero_sums,
)
from rnnfast.kernels.persistent.gates import side_by_side
from rnnfast.kernels.persistent.tile import load_new_states, load_step, load_tiles, packed_marks, program_tile, store_tiles


@triton.jit
def _nobody_runs(marks, marks_next, NEEDS_STARTS: tl.constexpr):
    """Whether there is nothing to do at a step: no row runs, and none hands over the gradient of what entered the next."""
    return ((marks & marks_next) if NEEDS_STARTS else marks) == ALL_PADDED


@triton.jit
def _load_both(pointers, size, mask):
    """The gradients of the initial and the reset state, `size` elements apart."""
    return tl.load(pointers, mask=mask, other=0.0), tl.load(pointers + size, mask=mask, other=0.0)


@triton.jit
def _store_both(pointers, size, tiles, mask):
    tl.store(pointers, tiles[0], mask=mask)
    tl.store(pointers + size, tiles[1], mask=mask)


@triton.jit
def _exchange_sums(
    partial, words_ptr, index, slots, batch, mask, give_up, most,
    H_PAD: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Publishes partial sums (BLOCK_B, ROWS) of the units of this program and its partners, and returns the whole sums
    (BLOCK_B, BLOCK_H) of its own units. The exchange has a row of words for each part of the sum."""
    PARTS: tl.constexpr = ROWS // BLOCK_H
    own_part = tl.program_id(0) % PARTS
    first = tl.program_id(0) // PARTS * ROWS
    row = words_ptr + ((index * batch + slots) * (PARTS * H_PAD))[:, None]
    publish(row + (own_part * H_PAD + first + tl.arange(0, ROWS))[None, :], partial, mask, 1)
    own = row + (first + own_part * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    parts = poll(own, mask, PARTS, 1, H_PAD, 1, WARPS, give_up, most, tl.minimum(index + 1, 1))
    total = parts[0].to(tl.float32, bitcast=True)
    for part in tl.static_range(1, PARTS):
        total += parts[part].to(tl.float32, bitcast=True)
    return total


@triton.jit(do_not_specialize=["begin", "lag", "N", "T", "flips", "of_chunk", "has_first", "b_begin", "B", "name"])
def persistent_backward_kernel(
    # inputs
    dy_ptr,  # (M, N, B, H) gradient of the chunk's outputs; of one member or directions (T, B, DIRECTIONS * H), of all
    saved_ptr,  # (M, T, B, SAVED * H) activations that forward saved; if `of_chunk` (M, N, B, SAVED * H)
    h_ptr,  # (M, T, B, H) h_t; with DIRECTIONS > 1 (T, B, DIRECTIONS * H)
    h0_ptr,  # (M, B, H) the hidden state before a member's first step
    c_ptr,  # (M, T, B, CARRIED * H) float32, the carried states
    c0_ptr,  # (M, B, CARRIED * H) float32, those before it
    w_ptr,  # (M, G * H, H) W_hh
    dcs_ptr,  # (M, T, B, CARRIED * H) float32, gradient of the carried states from outside, besides the last ones'
    mark_ptrs,  # `Marks`, its codes (M, T, tiles) words
    given_ptrs,  # `Given`
    give_up_ptrs,  # `GiveUp`
    # outputs
    # (M, N, B, X_ROW) hidden-side gate gradients from X_OFFSET on of the chunk's steps, EMPTY on entry; unless APART
    # d_gates_ptr itself
    exchange_ptr,
    sums_ptr,  # (M, N, B, PARTS * H_PAD) float32 partial sums, EMPTY on entry; unused with PARTS = 1
    d_gates_ptr,  # (M * T * B, D * H) gate gradients
    d_h_ptr,  # (M, B, H) float32, carried from launch to launch: gradient of h_t that comes neither from dy nor through W_hh
    d_c_ptr,  # (M, B, CARRIED * H) float32, carried likewise: gradient of the carried states
    d_held_ptr,  # (M, B, HELD * H) float32, added to: gradient of what is held
    d_start_ptrs,  # `StartGrads`
    # sizes
    begin,  # these five as `place` has them
    lag,
    N,
    T,
    flips,
    of_chunk,
    has_first,  # 0 if forward began from zeros
    b_begin,  # the first batch row of this launch
    B,
    name,  # of this launch, for the host if it gives up
    H: tl.constexpr,
    # flags
    CELL: tl.constexpr,
    G: tl.constexpr,
    GATES: tl.constexpr,
    D: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIED: tl.constexpr,
    HELD: tl.constexpr,
    NOISE: tl.constexpr,
    DIRECT: tl.constexpr,
    PER_WORD: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    GROUPED: tl.constexpr,  # whether there are several members
    DIRECTIONS: tl.constexpr,  # members side by side in a row of h
    PLAN: tl.constexpr,  # `PersistentPlan.tiles`
):
    HAS_DY: tl.constexpr = dy_ptr is not None
    HAS_DCS: tl.constexpr = dcs_ptr is not None
    HAS_MARKS: tl.constexpr = mark_ptrs.codes is not None
    NEEDS_STARTS: tl.constexpr = d_start_ptrs.h is not None
    BLOCK_B: tl.constexpr = PLAN.BLOCK_B
    BLOCK_H: tl.constexpr = PLAN.BLOCK_H
    BLOCK_K: tl.constexpr = PLAN.BLOCK_K
    SPLIT: tl.constexpr = PLAN.SPLIT
    JOIN: tl.constexpr = PLAN.JOIN
    IN_REGISTERS: tl.constexpr = PLAN.IN_REGISTERS
    H_PAD: tl.constexpr = PLAN.H_PAD
    PARTS: tl.constexpr = PLAN.PARTS
    ROW: tl.constexpr = DIRECTIONS * H  # from a row of h to the next
    UNITS_PADDED: tl.constexpr = H_PAD != H
    APART: tl.constexpr = UNITS_PADDED or HAS_MARKS
    ROWS: tl.constexpr = PARTS * BLOCK_H
    OWN_K: tl.constexpr = G * H_PAD // PARTS
    PART: tl.constexpr = OWN_K // SPLIT
    CHUNKS: tl.constexpr = PART // BLOCK_K
    OPERANDS: tl.constexpr = operands(CHUNKS, JOIN)
    X_ROW: tl.constexpr = G * H_PAD if APART else D * H
    X_OFFSET: tl.constexpr = 0 if APART else (D - G) * H
    CHUNK_WORDS: tl.constexpr = BLOCK_K // PER_WORD
    WORD_TILES: tl.constexpr = PART // PER_WORD // piece(CHUNK_WORDS, SPLIT) * vector(CHUNK_WORDS)
    DTYPE: tl.constexpr = d_gates_ptr.dtype.element_ty
    words_ptr = exchange_ptr.to(tl.pointer_type(tl.int32)) + X_OFFSET // PER_WORD
    if PARTS > 1:
        sums_ptr = sums_ptr.to(tl.pointer_type(tl.int32))

    # what is exchanged lies in the order of the programs, all else in that of the batch
    slots, offs_b, offs_h, mask = program_tile(mark_ptrs.order, b_begin, B, H, UNITS_PADDED, BLOCK_B, BLOCK_H)
    mask_b = (slots < B)[:, None]
    # a row of words to publish: GATES times these units
    column = tl.arange(0, GATES * BLOCK_H // PER_WORD)
    gate_of_word = column // (BLOCK_H // PER_WORD)
    offs_word = gate_of_word * (H_PAD // PER_WORD) + tl.program_id(0) * (BLOCK_H // PER_WORD) + column % (BLOCK_H // PER_WORD)
    mask_word = mask_b
    if GATES != G:
        mask_word = mask_b & (gate_of_word < G)[None, :]
    unit_of_column = tl.program_id(0) * BLOCK_H + tl.arange(0, GATES * BLOCK_H) % BLOCK_H
    batch = B.to(tl.int64)  # 64-bit addresses

    # this member's place and buffers; t is an index in buffers of all steps of all members
    member = 0
    if GROUPED:
        member = tl.program_id(2)
    p, t, dt, steps, t_x = place(begin, lag, N, T, flips, member, True)
    t, t_x = t.to(tl.int64), t_x.to(tl.int64)
    t_first = tl.where(dt > 0, T - 1, 0)  # of forward's steps
    has_next = tl.minimum(p, 1)
    starts_h, starts_c = mark_ptrs.starts_h, mark_ptrs.starts_c
    d_starts_h, d_starts_c = d_start_ptrs.h, d_start_ptrs.c
    held_ptr, seed_ptr = given_ptrs.held, given_ptrs.seeds
    if GROUPED:
        if steps <= 0:
            return
        member = member.to(tl.int64)
        t += member * T
        t_x += member * N
        t_first += member * T
        w_ptr += member * (G * H * H)
        h0_ptr += member * batch * H
        d_h_ptr += member * batch * H
        if PARTS > 1:
            sums_ptr += member * N * batch * (PARTS * H_PAD)
        if CARRIED > 0:
            c0_ptr += member * batch * (CARRIED * H)
            d_c_ptr += member * batch * (CARRIED * H)
        if HAS_MARKS:
            starts_h += member * 2 * batch * H
            if CARRIED > 0:
                starts_c += member * 2 * batch * (CARRIED * H)
        if NEEDS_STARTS:
            d_starts_h += member * 2 * batch * H
            if CARRIED > 0:
                d_starts_c += member * 2 * batch * (CARRIED * H)
        if HELD > 0:
            held_ptr += member * batch * (HELD * H)
            d_held_ptr += member * batch * (HELD * H)
        if NOISE > 0:
            seed_ptr += member
        if DIRECTIONS > 1:
            beside = member * (H - T * batch * ROW)
            h_ptr += beside
            if HAS_DY:
                dy_ptr += beside
    # buffers of the chunk, so that t is an index in them too
    if GROUPED and DIRECTIONS == 1 and HAS_DY:
        dy_ptr += (t_x - t) * batch * H
    if SAVED > 0:
        saved_ptr += (t_x - t) * of_chunk * batch * (SAVED * H)
    if APART:
        words_ptr += (t_x - t) * batch * (X_ROW // PER_WORD)
    # which rows a next step ran, and of which the gradient of the last state is still to come
    mask_next, mask_ends = slots < B * has_next, slots < B * (1 - has_next)
    mask_runs = mask
    marks = 0
    step = 0
    if HAS_MARKS:
        tiles = tl.cdiv(B, BLOCK_B)
        tile_marks = packed_marks(mark_ptrs.codes, b_begin, BLOCK_B)
        marks = tl.load(tile_marks + t * tiles)
        marks_next = tl.load(tile_marks + (t - dt) * tiles, mask=has_next > 0, other=ALL_PADDED)
        while (step < steps) & _nobody_runs(marks, marks_next, NEEDS_STARTS):
            step += 1
            t += dt
            marks_next = marks
            marks = tl.load(tile_marks + t * tiles, mask=step < steps, other=ALL_PADDED)
        mask_next = mask_next & (unpacked(marks_next, BLOCK_B) != PADDED)
        mask_ends = unpacked(marks_next, BLOCK_B) == PADDED
        mask_runs = mask & (unpacked(marks, BLOCK_B) != PADDED)[:, None]
        marks_before = tl.load(tile_marks + (t + dt) * tiles, mask=step + 1 < steps, other=ALL_PADDED)

    # what stays on chip: columns of W, and the carried gradients
    first_k = tl.program_id(0) % PARTS * OWN_K
    own_ptr = words_ptr + first_k // PER_WORD
    row_next = (t - dt) * batch + offs_b
    d_next = d_gates_ptr + (D - G) * H + over_rows(row_next * (D * H), SPLIT)
    d_mask = over_rows(mask_next, SPLIT)
    unit = over_rows(tl.program_id(0) // PARTS * ROWS + tl.arange(0, ROWS), SPLIT)
    row_k = tl.full((1,), first_k, tl.int32)
    w = ()
    d_words = ()
    for j in tl.static_range(CHUNKS):
        if joined(j, CHUNKS, JOIN) > 0:
            k = over_parts(row_k, PART, columns(j, joined(j, CHUNKS, JOIN), BLOCK_K, PER_WORD, SPLIT), SPLIT)
            w_mask = (unit < H) & (k % H_PAD < H)
            w_at = (k // H_PAD * H + k % H_PAD).to(tl.int64) * H + unit
            w = w + (tl.load(w_ptr + w_at, mask=w_mask, other=0.0),)
    for j in tl.static_range(WORD_TILES):
        k = over_parts(row_k, PART, tile_words(j, CHUNK_WORDS, SPLIT) * PER_WORD, SPLIT)
        d_words = d_words + (load_words(d_next + (k // H_PAD * H + k % H_PAD), d_mask, k % H_PAD, H, PER_WORD),)
    d_chunks = as_operands(d_words, CHUNKS, JOIN, DTYPE, PER_WORD, SPLIT)

    carried = offs_b.to(tl.int64)[:, None] * H + offs_h[None, :]
    mask_direct = mask
    if not DIRECT:
        mask_direct = mask & mask_ends[:, None]
    d_h_direct = tl.load(d_h_ptr + carried, mask=mask_direct, other=0.0)
    new_states = load_new_states(h_ptr, c_ptr, t * batch + offs_b, offs_h, mask_runs, H, ROW, CARRIED)
    carried_c = offs_b.to(tl.int64)[:, None] * (CARRIED * H) + offs_h[None, :]
    d_c = ()
    if CARRIED > 0:
        d_c = load_tiles(d_c_ptr + carried_c, mask, H, CARRIED)
    held, d_held = (), ()
    if HELD > 0:
        held = held_tiles(held_ptr + offs_b.to(tl.int64) * (HELD * H), offs_h, mask, H, HELD)
        d_held_at = d_held_ptr + offs_b.to(tl.int64)[:, None] * (HELD * H) + offs_h[None, :]
        d_held = load_tiles(d_held_at, mask, H, HELD)
    noise = ()
    if NOISE > 0:
        others = member * T * batch  # a member's own steps count
        noise = noise_tiles(seed_ptr, (t * batch + offs_b - others)[:, None], offs_h[None, :], NOISE)
    started_h, started_c = (), ()
    if NEEDS_STARTS:
        started_h = _load_both(d_starts_h + carried, batch * H, mask)
        for s in tl.static_range(CARRIED):
            started_c = started_c + (_load_both(d_starts_c + carried_c + s * H, batch * (CARRIED * H), mask),)

    dy, dcs, saved, states = load_step(
        dy_ptr, saved_ptr, h_ptr, h0_ptr, c_ptr, c0_ptr, dcs_ptr, starts_h, starts_c, t, dt, t_first,
        has_first, marks, offs_b, offs_h, mask, batch,
        H, ROW, SAVED, CARRIED, HAS_DY, HAS_DCS, HAS_MARKS, BLOCK_B,
    )  # fmt: skip
    # a while loop: Triton moves weights that only one product takes out of it, into registers, but back into a for loop
    none = zero_sums(1, ROWS, BLOCK_B, SPLIT)
    d_sums = add_product(none, w, d_chunks, 0, IN_REGISTERS, SPLIT, PRECISION, EMULATE_BF16)
    for j in tl.static_range(IN_REGISTERS, OPERANDS):
        # a loop of one turn: so these weights are read from shared memory in each step
        for _ in range(tl.where(step < steps, tl.minimum(step + has_next, 1), 0)):
            d_sums = add_product(d_sums, w, d_chunks, j, j + 1, SPLIT, PRECISION, EMULATE_BF16)
    most = FIRST_WAIT
    give_up = (give_up_ptrs.flag, give_up_ptrs.told, name)
    while step < steps:
        row = t * batch + offs_b
        row_x = t * batch + slots
        following = marks
        if HAS_MARKS:
            following = marks_before
            steps = tl.where(_nobody_runs(marks_before, marks, NEEDS_STARTS), step + 1, steps)
        # the last step needs nothing from a step before it, and waits for nobody
        mask_more = slots < tl.where(step + 1 < steps, B, 0)
        # in flight until the next iteration, that is through the poll and a product
        dy_before, dcs_before, saved_before, states_before = load_step(
            dy_ptr, saved_ptr, h_ptr, h0_ptr, c_ptr, c0_ptr, dcs_ptr, starts_h, starts_c, t + dt, dt, t_first,
            has_first, following, offs_b, offs_h, mask & mask_more[:, None], batch,
            H, ROW, SAVED, CARRIED, HAS_DY, HAS_DCS, HAS_MARKS, BLOCK_B,
        )  # fmt: skip
        new_states_before = states
        if HAS_MARKS:
            mask_before = mask & (mask_more & (unpacked(marks_before, BLOCK_B) != PADDED))[:, None]
            new_states_before = load_new_states(h_ptr, c_ptr, (t + dt) * batch + offs_b, offs_h, mask_before, H, ROW, CARRIED)

        d_h = sum_parts(d_sums[0], ROWS, BLOCK_B, SPLIT)
        if PARTS > 1:
            d_h = _exchange_sums(d_h, sums_ptr, step, slots, batch, mask_b, give_up, most, H_PAD, BLOCK_H, ROWS, PLAN.num_warps)
        d_h += d_h_direct
        if HAS_MARKS:
            mark, mark_next = unpacked(marks, BLOCK_B)[:, None], unpacked(marks_next, BLOCK_B)[:, None]
            mask_runs = mask & (mark != PADDED)
            if NEEDS_STARTS:
                started, reset = tl.where(mark_next == STARTS, d_h, 0.0), tl.where(mark_next == RESETS, d_h, 0.0)
                started_h = (started_h[0] + started, started_h[1] + reset)
            d_h = tl.where(anew(mark_next), 0.0, d_h)
        if HAS_DY:
            d_h += dy[0].to(tl.float32)
        saved_tiles = ()
        for s in tl.static_range(SAVED):
            saved_tiles = saved_tiles + (saved[s].to(tl.float32),)
        states_32 = (states[0].to(tl.float32),)
        new_states_32 = (new_states[0].to(tl.float32),)
        d_states = (d_h,)
        for s in tl.static_range(CARRIED):
            states_32 = states_32 + (states[1 + s],)
            new_states_32 = new_states_32 + (new_states[1 + s],)
            if HAS_DCS:
                d_states = d_states + (d_c[s] + dcs[s],)
            else:
                d_states = d_states + (d_c[s],)
        d_gates, d_before, d_held_step = CELL(saved_tiles, states_32, new_states_32, held + noise, d_states)

        hidden_sides = ()
        for g in tl.static_range(D - G, D):
            hidden_sides = hidden_sides + (d_gates[g],)
        d_hidden = round_to(side_by_side(hidden_sides, BLOCK_B, BLOCK_H, GATES), DTYPE, EMULATE_BF16)
        if UNITS_PADDED:
            d_hidden = tl.where(unit_of_column[None, :] < H, d_hidden, 0.0).to(DTYPE)
        if HAS_MARKS:
            d_hidden = tl.where(mark != PADDED, d_hidden, 0.0).to(DTYPE)
        publish(words_ptr + row_x[:, None] * (X_ROW // PER_WORD) + offs_word[None, :], d_hidden, mask_word, PER_WORD)
        for d in tl.static_range(D if APART else D - G):
            d_pointers = d_gates_ptr + row[:, None] * (D * H) + d * H + offs_h[None, :]
            tl.store(d_pointers, round_to(d_gates[d], DTYPE, EMULATE_BF16), mask=mask_runs)
        if NOISE > 0:
            # of the step before, while the exchange is on its way
            noise = noise_tiles(seed_ptr, (row + dt * batch - others)[:, None], offs_h[None, :], NOISE)
        if HAS_MARKS:
            marks_next = marks
            marks = marks_before
            marks_before = tl.load(tile_marks + (t + 2 * dt) * tiles, mask=step + 2 < steps, other=ALL_PADDED)
        d_words = poll(
            own_ptr + over_parts(row_x * (X_ROW // PER_WORD), PART // PER_WORD, tile_words(0, CHUNK_WORDS, SPLIT), SPLIT),
            over_rows(mask_more, SPLIT), WORD_TILES, vector(CHUNK_WORDS), piece(CHUNK_WORDS, SPLIT), SPLIT, PLAN.num_warps,
            give_up, most, tl.minimum(step + 1, 1),
        )  # fmt: skip
        most = LATER_WAITS
        d_chunks = as_operands(d_words, CHUNKS, JOIN, DTYPE, PER_WORD, SPLIT)
        d_sums = add_product(none, w, d_chunks, 0, IN_REGISTERS, SPLIT, PRECISION, EMULATE_BF16)
        for j in tl.static_range(IN_REGISTERS, OPERANDS):
            # a loop of one turn: so these weights are read from shared memory in each step
            for _ in range(tl.where(step + 1 < steps, 1, 0)):
                d_sums = add_product(d_sums, w, d_chunks, j, j + 1, SPLIT, PRECISION, EMULATE_BF16)

        d_h_through = d_before[0]
        if not DIRECT:
            d_h_through = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        d_c_before, started_c_before = (), ()
        for s in tl.static_range(CARRIED):
            d_state = d_before[1 + s]
            if HAS_MARKS:
                if NEEDS_STARTS:
                    started, reset = tl.where(mark == STARTS, d_state, 0.0), tl.where(mark == RESETS, d_state, 0.0)
                    started_c_before = started_c_before + ((started_c[s][0] + started, started_c[s][1] + reset),)
                d_state = tl.where(mark == CONTINUES, d_state, tl.where(mark == PADDED, d_c[s], 0.0))
            d_c_before = d_c_before + (d_state,)
        d_held_before = ()
        for n in tl.static_range(HELD):
            if HAS_MARKS:
                d_held_before = d_held_before + (d_held[n] + tl.where(mark != PADDED, d_held_step[n], 0.0),)
            else:
                d_held_before = d_held_before + (d_held[n] + d_held_step[n],)
        if HAS_MARKS:
            d_h_through = tl.where(mark != PADDED, d_h_through, d_h_direct)
        d_h_direct = d_h_through
        d_c, d_held = d_c_before, d_held_before
        if NEEDS_STARTS:
            started_c = started_c_before
        dy = dy_before
        dcs = dcs_before
        saved = saved_before
        new_states = new_states_before
        states = states_before
        t += dt
        step += 1
    if DIRECT:
        tl.store(d_h_ptr + carried, d_h_direct, mask=mask)
    if CARRIED > 0:
        store_tiles(d_c_ptr + carried_c, d_c, mask, H)
    if HELD > 0:
        store_tiles(d_held_at, d_held, mask, H)
    if NEEDS_STARTS:
        _store_both(d_starts_h + carried, batch * H, started_h, mask)
        for s in tl.static_range(CARRIED):
            _store_both(d_starts_c + carried_c + s * H, batch * (CARRIED * H), started_c[s], mask)
