"""Persistent backward: one launch runs many time steps from the last to the first, W_hh^T on chip throughout.

    d_h_t = d_y_t + W^T d_gates_{t+1}      d_gates_t = cell.backward(saved_t, ..., d_h_t, d_c_t)

A program owns BLOCK_H units of BLOCK_B batch rows: it keeps their columns of W, and the carried gradients of their states.
The programs of one batch tile exchange the hidden side of the gate gradients after each step (see exchange.py).

Legend: T steps, B batch, H hidden units, H_PAD = H rounded up to whole tiles, G gates, GATES = G rounded up to a power of two,
D blocks of gate gradients, K the summed axis, here G * H_PAD. A step's row is t * B + b. Next and before are meant in
forward's order: this kernel comes from the next step and goes on to the one before.
"""

import triton
import triton.language as tl

from rnnfast.kernels.maths import round_to
from rnnfast.kernels.persistent.exchange import over_parts, over_rows, poll, product, publish


@triton.jit
def _load_step(
    dy_ptr,
    saved_ptr,
    h_ptr,
    h0_ptr,
    c_ptr,
    c0_ptr,
    t,
    dt,
    t_first,
    has_first,
    offs_b,
    offs_h,
    mask,
    batch,
    H: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIES_C: tl.constexpr,
    HAS_DY: tl.constexpr,
):
    """What step t needs besides the gate gradients of the next: dy or (), what was saved, and the states before it."""
    row = t * batch + offs_b
    at = row[:, None] * H + offs_h[None, :]
    dy = ()
    if HAS_DY:
        dy = (tl.load(dy_ptr + at, mask=mask, other=0.0),)
    saved = ()
    for s in tl.static_range(SAVED):
        tile = tl.load(saved_ptr + row[:, None] * (SAVED * H) + s * H + offs_h[None, :], mask=mask, other=0.0)
        saved = saved + (tile,)
    # before the first step comes the initial state, or zeros
    is_first = t == t_first
    t_before = tl.where(is_first, 0, t + dt)
    mask_before = mask & (offs_b < tl.where(is_first, has_first * batch, batch))[:, None]
    at_before = (t_before * batch + offs_b)[:, None] * H + offs_h[None, :]
    states = (tl.load(tl.where(is_first, h0_ptr, h_ptr) + at_before, mask=mask_before, other=0.0),)
    if CARRIES_C:
        states = states + (tl.load(tl.where(is_first, c0_ptr, c_ptr) + at_before, mask=mask_before, other=0.0),)
    return dy, saved, states


@triton.jit
def _side_by_side(d_gates, D: tl.constexpr, G: tl.constexpr, GATES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """The last G of the D tiles as one (BLOCK_B, GATES * BLOCK_H), gate by gate: one change of layout, not one a gate."""
    tl.static_assert(GATES == 1 or GATES == 2 or GATES == 4)
    if GATES == 1:
        return d_gates[D - 1]
    else:
        if GATES == 2:
            joined = tl.join(d_gates[D - 2], d_gates[D - 1])
        else:
            # of three gates the last takes the fourth place too, which is not stored
            joined = tl.join(tl.join(d_gates[D - G], d_gates[D - G + 2]), tl.join(d_gates[D - G + 1], d_gates[D - 1]))
            joined = tl.reshape(joined, (BLOCK_B, BLOCK_H, 4))
        return tl.reshape(tl.permute(joined, (0, 2, 1)), (BLOCK_B, GATES * BLOCK_H))


@triton.jit(do_not_specialize=["t", "t_x", "dt", "steps", "t_first", "has_first", "t_next", "has_next", "b_begin", "B"])
def persistent_backward_kernel(
    # inputs
    dy_ptr,  # (T, B, H) gradient of the outputs
    saved_ptr,  # (T, B, SAVED * H) activations that forward saved
    h_ptr,  # (T, B, H) h_t
    h0_ptr,  # (B, H) the hidden state before step t_first
    c_ptr,  # (T, B, H) float32, c_t
    c0_ptr,  # (B, H) float32, the cell state before step t_first
    w_ptr,  # (G * H, H) W_hh
    # outputs
    # (n, B, X_ROW) hidden-side gate gradients from X_OFFSET on, at index t_x, EMPTY on entry; unless PADDED those rows of
    # d_gates_ptr themselves
    exchange_ptr,
    d_gates_ptr,  # (T * B, D * H) gate gradients
    d_h_ptr,  # (B, H) float32, carried from launch to launch: gradient of h_t that comes neither from dy nor through W_hh
    d_c_ptr,  # (B, H) float32, carried likewise: gradient of c_t
    # sizes
    t,  # the first step that this launch runs
    t_x,  # its index in the exchange
    dt,  # from it to the one before, 1 or -1
    steps,
    t_first,  # the step that forward began with
    has_first,  # 0 if it began from zeros
    t_next,
    has_next,  # 0 if there is no next step
    b_begin,  # the first batch row of this launch
    B,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    # flags
    CELL: tl.constexpr,
    G: tl.constexpr,
    GATES: tl.constexpr,
    D: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIES_C: tl.constexpr,
    DIRECT: tl.constexpr,
    HAS_DY: tl.constexpr,
    PER_WORD: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    # tiles
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    PADDED: tl.constexpr = H_PAD != H
    PART: tl.constexpr = G * H_PAD // SPLIT
    CHUNKS: tl.constexpr = PART // BLOCK_K
    X_ROW: tl.constexpr = G * H_PAD if PADDED else D * H
    X_OFFSET: tl.constexpr = 0 if PADDED else (D - G) * H
    CHUNK_WORDS: tl.constexpr = BLOCK_K // PER_WORD
    DTYPE: tl.constexpr = d_gates_ptr.dtype.element_ty
    words_ptr = exchange_ptr.to(tl.pointer_type(tl.int32)) + X_OFFSET // PER_WORD

    offs_b = b_begin + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (offs_b < B)[:, None]
    # a row of words to publish: GATES times these units
    column = tl.arange(0, GATES * BLOCK_H // PER_WORD)
    gate_of_word = column // (BLOCK_H // PER_WORD)
    offs_word = gate_of_word * (H_PAD // PER_WORD) + tl.program_id(0) * (BLOCK_H // PER_WORD) + column % (BLOCK_H // PER_WORD)
    mask_word = mask
    if GATES != G:
        mask_word = mask & (gate_of_word < G)[None, :]
    unit_of_column = tl.program_id(0) * BLOCK_H + tl.arange(0, GATES * BLOCK_H) % BLOCK_H
    if PADDED:
        mask = mask & (offs_h < H)[None, :]
    batch = B.to(tl.int64)  # 64-bit addresses
    t = t.to(tl.int64)
    t_x = t_x.to(tl.int64)

    # what stays on chip: these units' columns of W, and the carried gradients
    row_next = t_next.to(tl.int64) * batch + offs_b
    d_next = d_gates_ptr + (D - G) * H
    d_mask = over_rows(offs_b < B * has_next, SPLIT)
    unit = over_rows(offs_h, SPLIT)
    w = ()
    d_chunks = ()
    for j in tl.static_range(CHUNKS):
        k = over_parts(tl.full((1,), j * BLOCK_K, tl.int32), PART, BLOCK_K, SPLIT)
        w_chunk_mask = unit < H
        d_chunk_mask = d_mask
        if PADDED:
            within = k % H_PAD < H
            w_chunk_mask = w_chunk_mask & within
            d_chunk_mask = d_chunk_mask & within
            k = k // H_PAD * H + k % H_PAD
        w = w + (tl.load(w_ptr + k.to(tl.int64) * H + unit, mask=w_chunk_mask, other=0.0),)
        d_chunks = d_chunks + (tl.load(d_next + over_rows(row_next * (D * H), SPLIT) + k, mask=d_chunk_mask, other=0.0),)

    carried = offs_b.to(tl.int64)[:, None] * H + offs_h[None, :]
    mask_direct = mask
    if not DIRECT:
        mask_direct = mask & (offs_b < B * (1 - has_next))[:, None]
    d_h_direct = tl.load(d_h_ptr + carried, mask=mask_direct, other=0.0)
    at = (t * batch + offs_b)[:, None] * H + offs_h[None, :]
    new_states = (tl.load(h_ptr + at, mask=mask, other=0.0),)
    d_c = ()
    if CARRIES_C:
        new_states = new_states + (tl.load(c_ptr + at, mask=mask, other=0.0),)
        d_c = (tl.load(d_c_ptr + carried, mask=mask, other=0.0),)

    dy, saved, states = _load_step(
        dy_ptr, saved_ptr, h_ptr, h0_ptr, c_ptr, c0_ptr, t, dt, t_first, has_first, offs_b, offs_h, mask, batch,
        H, SAVED, CARRIES_C, HAS_DY,
    )  # fmt: skip
    for step in range(steps):
        row = t * batch + offs_b
        row_x = t_x * batch + offs_b
        # the last step needs nothing of one before it, and waits for nobody
        mask_more = offs_b < tl.where(step + 1 < steps, B, 0)
        # in flight until the next iteration, that is through the product and the poll
        dy_before, saved_before, states_before = _load_step(
            dy_ptr, saved_ptr, h_ptr, h0_ptr, c_ptr, c0_ptr, t + dt, dt, t_first, has_first, offs_b, offs_h,
            mask & mask_more[:, None], batch, H, SAVED, CARRIES_C, HAS_DY,
        )  # fmt: skip

        d_h = product(w, d_chunks, BLOCK_H, BLOCK_B, CHUNKS, SPLIT, PRECISION, EMULATE_BF16) + d_h_direct
        if HAS_DY:
            d_h += dy[0].to(tl.float32)
        saved_tiles = ()
        for s in tl.static_range(SAVED):
            saved_tiles = saved_tiles + (saved[s].to(tl.float32),)
        before = (states[0].to(tl.float32),)
        after = (new_states[0].to(tl.float32),)
        d_states = (d_h,)
        if CARRIES_C:
            before = before + (states[1],)
            after = after + (new_states[1],)
            d_states = d_states + (d_c[0],)
        d_gates, d_h_through, d_c_before = CELL(saved_tiles, before, after, d_states)

        d_hidden = round_to(_side_by_side(d_gates, D, G, GATES, BLOCK_B, BLOCK_H), DTYPE, EMULATE_BF16)
        if PADDED:
            d_hidden = tl.where(unit_of_column[None, :] < H, d_hidden, 0.0).to(DTYPE)
        publish(words_ptr + row_x[:, None] * (X_ROW // PER_WORD) + offs_word[None, :], d_hidden, mask_word, PER_WORD)
        for d in tl.static_range(D if PADDED else D - G):
            d_pointers = d_gates_ptr + row[:, None] * (D * H) + d * H + offs_h[None, :]
            tl.store(d_pointers, round_to(d_gates[d], DTYPE, EMULATE_BF16), mask=mask)
        d_chunks = poll(
            words_ptr + over_parts(row_x * (X_ROW // PER_WORD), PART // PER_WORD, CHUNK_WORDS, SPLIT),
            over_rows(mask_more, SPLIT),
            CHUNKS,
            CHUNK_WORDS,
            DTYPE,
            PER_WORD,
            SPLIT,
        )

        if DIRECT:
            d_h_direct = d_h_through
        else:
            d_h_direct = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        if CARRIES_C:
            d_c = (d_c_before,)
        dy = dy_before
        saved = saved_before
        new_states = states
        states = states_before
        t += dt
        t_x += dt
    if DIRECT:
        tl.store(d_h_ptr + carried, d_h_direct, mask=mask)
    if CARRIES_C:
        tl.store(d_c_ptr + carried, d_c[0], mask=mask)
