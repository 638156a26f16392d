"""Persistent forward: one launch runs many time steps, the recurrent weights on chip throughout.

    h_gates = W h_{t-1} + b_hh      states_t, saved_t = cell.forward(x_gates_t, h_gates, states_{t-1})

A program owns BLOCK_H units of BLOCK_B batch rows: it keeps their rows of W, and their states, from the first step to the
last. The programs of one batch tile exchange h_t after each step (see exchange.py); batch tiles know nothing of each other.

With marks (`rnnfast.kernels.marks`) they exchange the h that enters the next step instead: where that begins anew, the owner of
a unit puts the initial or the reset state in h_t's place, so the product is the same. A tile begins with the first step at
which one of its rows runs, and ends with the last. Without, HAS_MARKS is off and the arguments that go with it are None.

Only h is exchanged. The CARRIED other states of a unit never leave its program, and the HELD tiles of `rnnfast.kernels.given`
stay there from the first step to the last. The NOISE of the next step is drawn while the exchange is on its way.

A launch runs a chunk of steps of each member of a group (`rnnfast.kernels.groups`). The programs of a member and batch tile
exchange with one another only. All buffers have the members in front, but h may have them side by side.

Legend: M members, T steps, N of them in a chunk, B batch, H hidden units, H_PAD = H rounded up to whole tiles, G gates, K the
summed axis, here H_PAD. A step's row is t * B + b, where t counts the steps of all members: T * member + the step. GATES is
G rounded up to a power of two. ROWS are the weight rows of a product: GATES to a unit, those beyond G zero. Or it is of one
gate, with TILES of them.
"""

import triton
import triton.language as tl

from rnnfast.kernels.given import held_tiles, noise_tiles
from rnnfast.kernels.groups import place
from rnnfast.kernels.marks import ALL_PADDED, PADDED, anew, entering, start_rows, unpacked
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
    tile_words,
    vector,
    zero_sums,
)
from rnnfast.kernels.persistent.gates import gate_sums
from rnnfast.kernels.persistent.tile import load_tiles, packed_marks, program_tile


@triton.jit(do_not_specialize=["x_first", "begin", "lag", "N", "T", "flips", "has_first", "b_begin", "B", "name"])
def persistent_forward_kernel(
    # inputs
    x_ptr,  # (rows, B, G * H) float32, W_ih x_t of the N positions of each member, in time
    w_ptr,  # (M, G * H, H) W_hh
    bias_x_ptr,  # (M, G * H) b_ih
    bias_h_ptr,  # (M, G * H) b_hh
    h0_ptr,  # (M, B, H) the hidden state before a member's first step
    c0_ptr,  # (M, B, CARRIED * H) float32, the carried states before it
    mark_ptrs,  # `Marks`, its codes (M, T, tiles) words
    given_ptrs,  # `Given`
    give_up_ptrs,  # `GiveUp`
    # outputs
    # (M, N, B, H_PAD) what is exchanged after each of the chunk's steps, EMPTY on entry; unless APART h_ptr itself
    exchange_ptr,
    h_ptr,  # (M, T, B, H) h_t; with DIRECTIONS > 1 (T, B, DIRECTIONS * H)
    c_ptr,  # (M, T, B, CARRIED * H) float32, the carried states; without KEEP_C (M, 1, B, CARRIED * H), the last
    saved_ptr,  # (M, T, B, SAVED * H) activations for backward
    # sizes
    x_first,  # the row of x where member 0 begins; the others come first, one after another
    begin,  # these five as `place` has them
    lag,
    N,
    T,
    flips,
    has_first,  # 0 if members begin from zeros
    b_begin,  # the first batch row of this launch
    B,
    name,  # of this launch, for the host if it gives up
    H: tl.constexpr,
    # flags
    CELL: tl.constexpr,
    G: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIED: tl.constexpr,
    HELD: tl.constexpr,
    NOISE: tl.constexpr,
    KEEP_C: tl.constexpr,
    PER_WORD: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    GROUPED: tl.constexpr,  # whether there are several members
    DIRECTIONS: tl.constexpr,  # members side by side in a row of h
    PLAN: tl.constexpr,  # `PersistentPlan.tiles`
):
    HAS_BIAS: tl.constexpr = bias_x_ptr is not None
    HAS_MARKS: tl.constexpr = mark_ptrs.codes is not None
    BLOCK_B: tl.constexpr = PLAN.BLOCK_B
    BLOCK_H: tl.constexpr = PLAN.BLOCK_H
    BLOCK_K: tl.constexpr = PLAN.BLOCK_K
    SPLIT: tl.constexpr = PLAN.SPLIT
    JOIN: tl.constexpr = PLAN.JOIN
    IN_REGISTERS: tl.constexpr = PLAN.IN_REGISTERS
    H_PAD: tl.constexpr = PLAN.H_PAD
    UNITS_PADDED: tl.constexpr = H_PAD != H
    APART: tl.constexpr = UNITS_PADDED or HAS_MARKS
    PART: tl.constexpr = H_PAD // SPLIT
    CHUNKS: tl.constexpr = PART // BLOCK_K
    ROW: tl.constexpr = DIRECTIONS * H  # from a row of h to the next
    WORDS: tl.constexpr = (H_PAD if APART else ROW) // PER_WORD  # from a row of the exchange to the next
    OPERANDS: tl.constexpr = operands(CHUNKS, JOIN)
    CHUNK_WORDS: tl.constexpr = BLOCK_K // PER_WORD
    WORD_TILES: tl.constexpr = PART // PER_WORD // piece(CHUNK_WORDS, SPLIT) * vector(CHUNK_WORDS)
    # three gates of 16 units are three products of 16 rows, where a product of all would have to be one of 64; likewise five
    TILES: tl.constexpr = G if G != GATES and SPLIT > 1 and BLOCK_H >= 16 else 1
    TILE_GATES: tl.constexpr = GATES if TILES == 1 else 1
    ROWS: tl.constexpr = BLOCK_H * TILE_GATES
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    words_ptr = exchange_ptr.to(tl.pointer_type(tl.int32))

    # what is exchanged lies in the order of the programs, all else in that of the batch
    slots, offs_b, offs_h, mask = program_tile(mark_ptrs.order, b_begin, B, H, UNITS_PADDED, BLOCK_B, BLOCK_H)
    offs_word = tl.program_id(0) * (BLOCK_H // PER_WORD) + tl.arange(0, BLOCK_H // PER_WORD)
    mask_b = slots < B
    batch = B.to(tl.int64)  # 64-bit addresses

    # this member's place and buffers; t is an index in buffers of all steps of all members
    member = 0
    if GROUPED:
        member = tl.program_id(2)
    p, t, dt, steps, t_x = place(begin, lag, N, T, flips, member, False)
    t, t_x = t.to(tl.int64), t_x.to(tl.int64)
    x_row = t_x
    starts_h, starts_c = mark_ptrs.starts_h, mark_ptrs.starts_c
    held_ptr, seed_ptr = given_ptrs.held, given_ptrs.seeds
    if GROUPED:
        if steps <= 0:
            return
        member = member.to(tl.int64)
        t += member * T
        x_row = t_x + tl.where(member == 0, x_first, (member - 1) * N)
        t_x += member * N
        w_ptr += member * (G * H * H)
        h0_ptr += member * batch * H
        if HAS_BIAS:
            bias_x_ptr += member * (G * H)
            bias_h_ptr += member * (G * H)
        if CARRIED > 0:
            c0_ptr += member * batch * (CARRIED * H)
            if not KEEP_C:
                c_ptr += member * batch * (CARRIED * H)
        if HAS_MARKS:
            starts_h += member * 2 * batch * H
            if CARRIED > 0:
                starts_c += member * 2 * batch * (CARRIED * H)
        if HELD > 0:
            held_ptr += member * batch * (HELD * H)
        if NOISE > 0:
            seed_ptr += member
        if DIRECTIONS > 1:
            beside = member * (H - T * batch * ROW)
            h_ptr += beside
            if not APART:
                words_ptr += beside // PER_WORD
    # buffers of the chunk, so that t is an index in them too
    x_ptr += (x_row - t) * batch * (G * H)
    if APART:
        words_ptr += (t_x - t) * batch * WORDS
    has_prev = tl.where(p == 0, has_first, 1)
    rows_prev = h_ptr + ((t - dt) * batch + offs_b) * ROW
    if not HAS_MARKS:
        rows_prev = tl.where(p == 0, h0_ptr + offs_b.to(tl.int64) * H, rows_prev)
    mask_prev = slots < B * has_prev
    step = 0
    if HAS_MARKS:
        tiles = tl.cdiv(B, BLOCK_B)
        tile_marks = packed_marks(mark_ptrs.codes, b_begin, BLOCK_B)
        marks = tl.load(tile_marks + t * tiles)
        while (step < steps) & (marks == ALL_PADDED):
            step += 1
            t += dt
            marks = tl.load(tile_marks + t * tiles, mask=step < steps, other=ALL_PADDED)
        marks_next = tl.load(tile_marks + (t + dt) * tiles, mask=step + 1 < steps, other=ALL_PADDED)
        mark = unpacked(marks, BLOCK_B)
        rows_prev = entering(rows_prev, starts_h, mark, offs_b, batch, H, False)
        mask_prev = mask_b & (mark != PADDED)

    # what stays on chip: these units' rows of W, their biases and their states
    offs_row = tl.arange(0, ROWS)
    unit = tl.program_id(0) * BLOCK_H + offs_row // TILE_GATES
    gate = offs_row % TILE_GATES
    w_rows = (gate * H + unit).to(tl.int64) * H
    w_mask = over_rows((gate < G) & (unit < H), SPLIT)
    h_mask = over_rows(mask_prev, SPLIT)
    no_row = tl.zeros((1,), tl.int32)
    w = ()
    h_words = ()
    for j in tl.static_range(CHUNKS):
        if joined(j, CHUNKS, JOIN) > 0:
            k = columns(j, joined(j, CHUNKS, JOIN), BLOCK_K, PER_WORD, SPLIT)
            w_chunk_mask = w_mask
            if UNITS_PADDED:
                w_chunk_mask = w_mask & (over_parts(no_row, PART, k, SPLIT) < H)
            for i in tl.static_range(TILES):
                w_at = over_parts(w_rows + i * (H * H), PART, k, SPLIT)
                w = w + (tl.load(w_ptr + w_at, mask=w_chunk_mask, other=0.0),)
    for j in tl.static_range(WORD_TILES):
        k = over_parts(no_row, PART, tile_words(j, CHUNK_WORDS, SPLIT) * PER_WORD, SPLIT)
        h_words = h_words + (load_words(over_rows(rows_prev, SPLIT) + k, h_mask, k, H, PER_WORD),)
    h_chunks = as_operands(h_words, CHUNKS, JOIN, DTYPE, PER_WORD, SPLIT)

    bias_x = ()
    bias_h = ()
    for g in tl.static_range(G):
        if HAS_BIAS:
            bias_x = bias_x + (tl.load(bias_x_ptr + g * H + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)[None, :],)
            bias_h = bias_h + (tl.load(bias_h_ptr + g * H + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)[None, :],)

    mask_state = mask & mask_prev[:, None]
    h_prev = tl.load(rows_prev[:, None] + offs_h[None, :], mask=mask_state, other=0.0)
    states = (h_prev.to(tl.float32),)
    if CARRIED > 0:
        c_rows = c_ptr + offs_b.to(tl.int64) * (CARRIED * H)
        if KEEP_C:
            c_rows += (t - dt) * batch * (CARRIED * H)
        if not HAS_MARKS:
            c_rows = tl.where(p == 0, c0_ptr + offs_b.to(tl.int64) * (CARRIED * H), c_rows)
        if HAS_MARKS:
            c_rows = entering(c_rows, starts_c, mark, offs_b, batch, CARRIED * H, False)
            if not KEEP_C:
                mask_state = mask  # a row that has ended keeps its last states
        states = states + load_tiles(c_rows[:, None] + offs_h[None, :], mask_state, H, CARRIED)
    held = ()
    if HELD > 0:
        held = held_tiles(held_ptr + offs_b.to(tl.int64) * (HELD * H), offs_h, mask, H, HELD)
    noise = ()
    if NOISE > 0:
        # a member's own steps count
        others = member * T * batch
        noise = noise_tiles(seed_ptr, (t * batch + offs_b - others)[:, None], offs_h[None, :], NOISE)

    mask_first = mask
    if HAS_MARKS:
        # where no row of the tile runs, t is past the last step
        mask_first = mask & (slots < tl.where(step < steps, B, 0))[:, None]
    x_gates = load_tiles(x_ptr + (t * batch + offs_b)[:, None] * (G * H) + offs_h[None, :], mask_first, H, G)
    # a while loop: Triton moves weights that only one product takes out of it, into registers, but back into a for loop
    none = zero_sums(TILES, ROWS, BLOCK_B, SPLIT)
    h_sums = add_product(none, w, h_chunks, 0, IN_REGISTERS, SPLIT, PRECISION, EMULATE_BF16)
    for j in tl.static_range(IN_REGISTERS, OPERANDS):
        # a loop of one turn: so these weights are read from shared memory in each step
        for _ in range(tl.where(step < steps, tl.minimum(step + has_prev, 1), 0)):
            h_sums = add_product(h_sums, w, h_chunks, j, j + 1, SPLIT, PRECISION, EMULATE_BF16)
    most = FIRST_WAIT
    give_up = (give_up_ptrs.flag, give_up_ptrs.told, name)
    while step < steps:
        row = t * batch + offs_b
        row_x = t * batch + slots
        row_next = row + dt * batch
        mask_runs = mask
        if HAS_MARKS:
            mask_runs = mask & (unpacked(marks, BLOCK_B) != PADDED)[:, None]
            steps = tl.where(marks_next == ALL_PADDED, step + 1, steps)
        # the last step needs nothing from a next one, and waits for nobody
        mask_next = slots < tl.where(step + 1 < steps, B, 0)
        # in flight until the next iteration, that is through the poll and a product
        x_gates_next = load_tiles(x_ptr + row_next[:, None] * (G * H) + offs_h[None, :], mask & mask_next[:, None], H, G)
        h_gates = gate_sums(h_sums, BLOCK_B, BLOCK_H, GATES, SPLIT)
        x_sides = ()
        h_sides = ()
        for g in tl.static_range(G):
            if HAS_BIAS:
                x_sides = x_sides + (x_gates[g] + bias_x[g],)
                h_sides = h_sides + (h_gates[g] + bias_h[g],)
            else:
                x_sides = x_sides + (x_gates[g],)
                h_sides = h_sides + (h_gates[g],)
        new_states, saved = CELL(x_sides, h_sides, states, held + noise)

        h = round_to(new_states[0], DTYPE, EMULATE_BF16)
        if UNITS_PADDED:
            h = tl.where((offs_h < H)[None, :], h, 0.0).to(DTYPE)
        enters = h
        if HAS_MARKS:
            # loaded only here, as it is seldom wanted. A row that does not run may load anything: nobody keeps it
            mark_next = unpacked(marks_next, BLOCK_B)
            restarts = anew(mark_next)[:, None]
            start_h = start_rows(starts_h, mark_next, offs_b, batch, H)[:, None] + offs_h[None, :]
            enters = tl.where(restarts, tl.load(start_h, mask=mask & restarts, other=0.0), h)
        publish(words_ptr + row_x[:, None] * WORDS + offs_word[None, :], enters, mask_b[:, None], PER_WORD)
        if APART:
            tl.store(h_ptr + row[:, None] * ROW + offs_h[None, :], h, mask=mask_runs)
        next_states = (enters.to(tl.float32),)
        for s in tl.static_range(1, CARRIED + 1):
            c = new_states[s]
            if KEEP_C:
                tl.store(c_ptr + row[:, None] * (CARRIED * H) + (s - 1) * H + offs_h[None, :], c, mask=mask_runs)
            if HAS_MARKS:
                start_c = start_rows(starts_c, mark_next, offs_b, batch, CARRIED * H)[:, None] + (s - 1) * H + offs_h[None, :]
                start_c = tl.load(start_c, mask=mask & restarts, other=0.0)
                c = tl.where(restarts, start_c, tl.where(mask_runs, c, states[s]))
            next_states = next_states + (c,)
        states = next_states
        for s in tl.static_range(SAVED):
            saved_pointers = saved_ptr + row[:, None] * (SAVED * H) + s * H + offs_h[None, :]
            tl.store(saved_pointers, round_to(saved[s], saved_ptr.dtype.element_ty, EMULATE_BF16), mask=mask_runs)
        if NOISE > 0:
            # of the next step, while the exchange is on its way
            noise = noise_tiles(seed_ptr, (row_next - others)[:, None], offs_h[None, :], NOISE)
        if HAS_MARKS:
            marks = marks_next
            marks_next = tl.load(tile_marks + (t + 2 * dt) * tiles, mask=step + 2 < steps, other=ALL_PADDED)
        h_words = poll(
            words_ptr + over_parts(row_x * WORDS, PART // PER_WORD, tile_words(0, CHUNK_WORDS, SPLIT), SPLIT),
            over_rows(mask_next, SPLIT), WORD_TILES, vector(CHUNK_WORDS), piece(CHUNK_WORDS, SPLIT), SPLIT, PLAN.num_warps,
            give_up, most, tl.minimum(step + 1, 1),
        )  # fmt: skip
        most = LATER_WAITS
        h_chunks = as_operands(h_words, CHUNKS, JOIN, DTYPE, PER_WORD, SPLIT)
        h_sums = add_product(none, w, h_chunks, 0, IN_REGISTERS, SPLIT, PRECISION, EMULATE_BF16)
        for j in tl.static_range(IN_REGISTERS, OPERANDS):
            # a loop of one turn: so these weights are read from shared memory in each step
            for _ in range(tl.where(step + 1 < steps, 1, 0)):
                h_sums = add_product(h_sums, w, h_chunks, j, j + 1, SPLIT, PRECISION, EMULATE_BF16)
        x_gates = x_gates_next
        t += dt
        step += 1
    if CARRIED > 0 and not KEEP_C:
        c_at = c_ptr + offs_b.to(tl.int64)[:, None] * (CARRIED * H) + offs_h[None, :]
        for s in tl.static_range(CARRIED):
            tl.store(c_at + s * H, states[1 + s], mask=mask)
