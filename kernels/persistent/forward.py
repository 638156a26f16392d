"""Persistent forward: one launch runs many time steps, the recurrent weights on chip throughout.

    h_gates = W h_{t-1} + b_hh      states_t, saved_t = cell.forward(x_gates_t, h_gates, states_{t-1})

A program owns BLOCK_H units of BLOCK_B batch rows: it keeps their rows of W, and their states, from the first step to the
last. The programs of one batch tile exchange h_t after each step (see exchange.py); batch tiles know nothing of each other.

With marks (`rnnfast.kernels.marks`) they exchange the h that enters the next step instead: where that begins anew, the owner of
a unit puts the initial or the reset state in h_t's place, so the product is the same. A tile begins with the first step at
which one of its rows runs, and ends with the last. Without, HAS_MARKS is off and the arguments that go with it are None.

Legend: T steps, B batch, H hidden units, H_PAD = H rounded up to whole tiles, G gates, K the summed axis, here H_PAD. A step's
row is t * B + b. ROWS are the weight rows of a program, GATES to a unit: G rounded up to a power of two, the rest zero.
"""

import triton
import triton.language as tl

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
    sum_parts,
    tile_words,
    vector,
    zero_sums,
)
from rnnfast.kernels.persistent.tile import packed_marks, program_tile


@triton.jit
def _load_gates(pointers, mask, H: tl.constexpr, G: tl.constexpr):
    gates = ()
    for g in tl.static_range(G):
        gates = gates + (tl.load(pointers + g * H, mask=mask, other=0.0),)
    return gates


@triton.jit
def _split_gates(rows, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, GATES: tl.constexpr):
    """(BLOCK_B, BLOCK_H * GATES), a unit's gates side by side, as GATES tiles (BLOCK_B, BLOCK_H)."""
    tl.static_assert(GATES == 1 or GATES == 2 or GATES == 4)
    if GATES == 1:
        return (rows,)
    elif GATES == 2:
        return tl.split(tl.reshape(rows, (BLOCK_B, BLOCK_H, 2)))
    else:
        even, odd = tl.split(tl.reshape(rows, (BLOCK_B, BLOCK_H, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit(do_not_specialize=["t", "t_x", "dt", "steps", "t_prev", "has_prev", "t_c_prev", "b_begin", "B", "name"])
def persistent_forward_kernel(
    # inputs
    x_ptr,  # (n, B, G * H) float32, W_ih x_t at index t_x
    w_ptr,  # (G * H, H) W_hh
    bias_x_ptr,  # (G * H,) b_ih
    bias_h_ptr,  # (G * H,) b_hh
    h_prev_ptr,  # (*, B, H) the hidden state to start from, at index t_prev
    c_prev_ptr,  # (*, B, H) float32, the cell state to start from, at index t_c_prev
    mark_ptrs,  # `Marks`, its codes those of the n steps, at index t_x
    give_up_ptrs,  # `GiveUp`
    # outputs
    exchange_ptr,  # (n, B, H_PAD) what is exchanged after step t, at index t_x, EMPTY on entry; unless APART h_ptr's own rows
    h_ptr,  # (T, B, H) h_t at index t
    c_ptr,  # (T, B, H) float32, c_t at index t; without KEEP_C (1, B, H), the last
    saved_ptr,  # (T, B, SAVED * H) activations for backward, at index t
    # sizes
    t,  # the first step of this launch
    t_x,  # its index in the chunk
    dt,  # from a step to the next in the order of processing, 1 or -1
    steps,
    t_prev,
    has_prev,  # 0 to start from zeros
    t_c_prev,
    b_begin,  # the first batch row of this launch
    B,
    name,  # of this launch, for the host if it gives up
    H: tl.constexpr,
    # flags
    CELL: tl.constexpr,
    G: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIES_C: tl.constexpr,
    KEEP_C: tl.constexpr,
    PER_WORD: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
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
    WORDS: tl.constexpr = H_PAD // PER_WORD
    OPERANDS: tl.constexpr = operands(CHUNKS, JOIN)
    CHUNK_WORDS: tl.constexpr = BLOCK_K // PER_WORD
    WORD_TILES: tl.constexpr = PART // PER_WORD // piece(CHUNK_WORDS, SPLIT) * vector(CHUNK_WORDS)
    ROWS: tl.constexpr = BLOCK_H * GATES
    # three gates of 16 units are three products of 16 rows, where a product of all would have to be one of 64
    TILES: tl.constexpr = 3 if G == 3 and SPLIT > 1 and BLOCK_H >= 16 else 1
    TILE_GATES: tl.constexpr = GATES if TILES == 1 else 1
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    words_ptr = exchange_ptr.to(tl.pointer_type(tl.int32))

    # what is exchanged lies in the order of the programs, all else in that of the batch
    slots, offs_b, offs_h, mask = program_tile(mark_ptrs.order, b_begin, B, H, UNITS_PADDED, BLOCK_B, BLOCK_H)
    offs_word = tl.program_id(0) * (BLOCK_H // PER_WORD) + tl.arange(0, BLOCK_H // PER_WORD)
    mask_b = slots < B
    batch = B.to(tl.int64)  # 64-bit addresses
    t = t.to(tl.int64)
    t_x = t_x.to(tl.int64)
    row_prev = t_prev.to(tl.int64) * batch + offs_b
    rows_prev = h_prev_ptr + row_prev * H
    mask_prev = slots < B * has_prev
    step = 0
    if HAS_MARKS:
        tiles = tl.cdiv(B, BLOCK_B)
        tile_marks = packed_marks(mark_ptrs.codes, b_begin, BLOCK_B)
        marks = tl.load(tile_marks + t_x * tiles)
        while (step < steps) & (marks == ALL_PADDED):
            step += 1
            t += dt
            t_x += dt
            marks = tl.load(tile_marks + t_x * tiles, mask=step < steps, other=ALL_PADDED)
        marks_next = tl.load(tile_marks + (t_x + dt) * tiles, mask=step + 1 < steps, other=ALL_PADDED)
        mark = unpacked(marks, BLOCK_B)
        rows_prev = entering(rows_prev, mark_ptrs.starts_h, mark, offs_b, batch, H, False)
        mask_prev = mask_b & (mark != PADDED)

    # what stays on chip: these units' rows of W, their biases and their states
    offs_row = tl.arange(0, BLOCK_H * TILE_GATES)
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
    if CARRIES_C:
        c_rows = c_prev_ptr + (t_c_prev.to(tl.int64) * batch + offs_b) * H
        if HAS_MARKS:
            c_rows = entering(c_rows, mark_ptrs.starts_c, mark, offs_b, batch, H, False)
            if not KEEP_C:
                mask_state = mask  # a row that has ended keeps its last state
        states = states + (tl.load(c_rows[:, None] + offs_h[None, :], mask=mask_state, other=0.0),)

    mask_first = mask
    if HAS_MARKS:
        # where no row of the tile runs, t_x is past the last step
        mask_first = mask & (slots < tl.where(step < steps, B, 0))[:, None]
    x_gates = _load_gates(x_ptr + (t_x * batch + offs_b)[:, None] * (G * H) + offs_h[None, :], mask_first, H, G)
    # a while loop: Triton moves weights that only one product takes out of it, into registers, but back into a for loop
    none = zero_sums(TILES, ROWS // GATES * TILE_GATES, BLOCK_B, SPLIT)
    h_sums = add_product(none, w, h_chunks, 0, IN_REGISTERS, SPLIT, PRECISION, EMULATE_BF16)
    for j in tl.static_range(IN_REGISTERS, OPERANDS):
        # a loop of one turn: so these weights are read from shared memory in each step
        for _ in range(tl.where(step < steps, tl.minimum(step + has_prev, 1), 0)):
            h_sums = add_product(h_sums, w, h_chunks, j, j + 1, SPLIT, PRECISION, EMULATE_BF16)
    most = FIRST_WAIT
    give_up = (give_up_ptrs.flag, give_up_ptrs.told, name)
    while step < steps:
        row = t * batch + offs_b
        row_x = t_x * batch + slots
        row_x_next = t_x * batch + offs_b + dt * batch
        mask_runs = mask
        if HAS_MARKS:
            mask_runs = mask & (unpacked(marks, BLOCK_B) != PADDED)[:, None]
            steps = tl.where(marks_next == ALL_PADDED, step + 1, steps)
        # the last step needs nothing from a next one, and waits for nobody
        mask_next = slots < tl.where(step + 1 < steps, B, 0)
        # in flight until the next iteration, that is through the poll and a product
        x_gates_next = _load_gates(x_ptr + row_x_next[:, None] * (G * H) + offs_h[None, :], mask & mask_next[:, None], H, G)
        h_rows = sum_parts(h_sums, ROWS, BLOCK_B, SPLIT)
        h_gates = _split_gates(h_rows, BLOCK_B, BLOCK_H, GATES)
        x_sides = ()
        h_sides = ()
        for g in tl.static_range(G):
            if HAS_BIAS:
                x_sides = x_sides + (x_gates[g] + bias_x[g],)
                h_sides = h_sides + (h_gates[g] + bias_h[g],)
            else:
                x_sides = x_sides + (x_gates[g],)
                h_sides = h_sides + (h_gates[g],)
        new_states, saved = CELL(x_sides, h_sides, states)

        h = round_to(new_states[0], DTYPE, EMULATE_BF16)
        if UNITS_PADDED:
            h = tl.where((offs_h < H)[None, :], h, 0.0).to(DTYPE)
        enters = h
        if HAS_MARKS:
            # loaded only here, as it is seldom wanted. A row that does not run may load anything: nobody keeps it
            mark_next = unpacked(marks_next, BLOCK_B)
            restarts = anew(mark_next)[:, None]
            start_h = start_rows(mark_ptrs.starts_h, mark_next, offs_b, batch, H)[:, None] + offs_h[None, :]
            enters = tl.where(restarts, tl.load(start_h, mask=mask & restarts, other=0.0), h)
        publish(words_ptr + row_x[:, None] * WORDS + offs_word[None, :], enters, mask_b[:, None], PER_WORD)
        at = row[:, None] * H + offs_h[None, :]
        if APART:
            tl.store(h_ptr + at, h, mask=mask_runs)
        if CARRIES_C:
            c = new_states[1]
            if KEEP_C:
                tl.store(c_ptr + at, c, mask=mask_runs)
            if HAS_MARKS:
                start_c = start_rows(mark_ptrs.starts_c, mark_next, offs_b, batch, H)[:, None] + offs_h[None, :]
                start_c = tl.load(start_c, mask=mask & restarts, other=0.0)
                c = tl.where(restarts, start_c, tl.where(mask_runs, c, states[1]))
            states = (enters.to(tl.float32), c)
        else:
            states = (enters.to(tl.float32),)
        for s in tl.static_range(SAVED):
            saved_pointers = saved_ptr + row[:, None] * (SAVED * H) + s * H + offs_h[None, :]
            tl.store(saved_pointers, round_to(saved[s], saved_ptr.dtype.element_ty, EMULATE_BF16), mask=mask_runs)
        if HAS_MARKS:
            marks = marks_next
            marks_next = tl.load(tile_marks + (t_x + 2 * dt) * tiles, mask=step + 2 < steps, other=ALL_PADDED)
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
        t_x += dt
        step += 1
    if CARRIES_C and not KEEP_C:
        tl.store(c_ptr + offs_b.to(tl.int64)[:, None] * H + offs_h[None, :], states[1], mask=mask)
