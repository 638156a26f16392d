"""What a program of a persistent kernel owns: BLOCK_B batch rows of BLOCK_H units, the marks of those rows, and what a step of
backward loads of them."""

import triton
import triton.language as tl

from rnnfast.kernels.marks import PADDED, batch_rows, entering, unpacked


@triton.jit
def program_tile(order_ptr, b_begin, B, H, UNITS_PADDED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """The rows' places in the order of the programs, the batch rows there, the units, and a mask (BLOCK_B, BLOCK_H or 1)."""
    slots = b_begin + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (slots < B)[:, None]
    if UNITS_PADDED:
        mask = mask & (offs_h < H)[None, :]
    return slots, batch_rows(slots, order_ptr, B), offs_h, mask


@triton.jit
def packed_marks(codes_ptr, b_begin, BLOCK_B: tl.constexpr):
    """Pointer to the word of this program's rows in the first step's words of `rnnfast.kernels.marks.pack_kernel`."""
    return codes_ptr.to(tl.pointer_type(tl.int64)) + b_begin // BLOCK_B + tl.program_id(1)


@triton.jit
def load_tiles(pointers, mask, H: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tiles that lie side by side: H elements from one to the next."""
    tiles = ()
    for n in tl.static_range(COUNT):
        tiles = tiles + (tl.load(pointers + n * H, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_tiles(pointers, tiles, mask, H: tl.constexpr):
    for n in tl.static_range(len(tiles)):
        tl.store(pointers + n * H, tiles[n], mask=mask)


@triton.jit
def load_step(
    dy_ptr, saved_ptr, h_ptr, h0_ptr, c_ptr, c0_ptr, dcs_ptr, starts_h, starts_c,
    t, dt, t_first, has_first, marks, offs_b, offs_h, mask, batch,
    H: tl.constexpr, ROW: tl.constexpr, SAVED: tl.constexpr, CARRIED: tl.constexpr, HAS_DY: tl.constexpr,
    HAS_DCS: tl.constexpr, HAS_MARKS: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """What step t needs besides the gate gradients of the next: dy or (), the gradients of the carried states or (), what was
    saved, and the states before it; with marks, of the rows that run."""
    if HAS_MARKS:
        mark = unpacked(marks, BLOCK_B)
        mask = mask & (mark != PADDED)[:, None]
    row = t * batch + offs_b
    dy = ()
    if HAS_DY:
        dy = (tl.load(dy_ptr + row[:, None] * ROW + offs_h[None, :], mask=mask, other=0.0),)
    dcs = ()
    if HAS_DCS:
        dcs = load_tiles(dcs_ptr + row[:, None] * (CARRIED * H) + offs_h[None, :], mask, H, CARRIED)
    saved = ()
    if SAVED > 0:
        saved = load_tiles(saved_ptr + row[:, None] * (SAVED * H) + offs_h[None, :], mask, H, SAVED)
    if HAS_MARKS:
        row_before = (t + dt) * batch + offs_b
        h_rows = entering(h_ptr + row_before * ROW, starts_h, mark, offs_b, batch, H, False)
        states = (tl.load(h_rows[:, None] + offs_h[None, :], mask=mask, other=0.0),)
        if CARRIED > 0:
            c_rows = entering(c_ptr + row_before * (CARRIED * H), starts_c, mark, offs_b, batch, CARRIED * H, False)
            states = states + load_tiles(c_rows[:, None] + offs_h[None, :], mask, H, CARRIED)
    else:
        # before the first step comes the initial state, or zeros
        is_first = t == t_first
        t_before = tl.where(is_first, 0, t + dt)
        mask_before = mask & (offs_b < tl.where(is_first, has_first * batch, batch))[:, None]
        row_before = (t_before * batch + offs_b)[:, None]
        h_before = row_before * H + offs_h[None, :]
        if ROW != H:
            h_before = row_before * tl.where(is_first, H, ROW) + offs_h[None, :]
        states = (tl.load(tl.where(is_first, h0_ptr, h_ptr) + h_before, mask=mask_before, other=0.0),)
        if CARRIED > 0:
            c_before = row_before * (CARRIED * H) + offs_h[None, :]
            states = states + load_tiles(tl.where(is_first, c0_ptr, c_ptr) + c_before, mask_before, H, CARRIED)
    return dy, dcs, saved, states


@triton.jit
def load_new_states(h_ptr, c_ptr, row, offs_h, mask, H: tl.constexpr, ROW: tl.constexpr, CARRIED: tl.constexpr):
    states = (tl.load(h_ptr + row[:, None] * ROW + offs_h[None, :], mask=mask, other=0.0),)
    if CARRIED > 0:
        states = states + load_tiles(c_ptr + row[:, None] * (CARRIED * H) + offs_h[None, :], mask, H, CARRIED)
    return states
