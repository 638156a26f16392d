"""What the scan kernels share: tiles of BLOCK_B batch rows by BLOCK_H units, one cell a thread.

A tile of pointers for each tensor goes from step to step. Several tiles of a step lie side by side, in blocks of H columns,
which are constants of the machine code.

What a step needs is loaded AHEAD steps before it is used: a kernel keeps the tiles of so many steps in registers, and loads
those of another step in place of what it has used. Such tuples are flat: the tiles of step u begin at u * COUNT. Tiles keep
the dtype of memory until they are used, because a conversion would wait for the load.
"""

import triton
import triton.language as tl

from rnnfast.kernels.marks import PADDED, RESETS, STARTS


@triton.jit
def pointers(ptr, row, offs_b, offs_h, width):
    """To each cell's element of the batch rows from `row` on, of a tensor with `width` columns."""
    return ptr + (row + offs_b.to(tl.int64))[:, None] * width + offs_h[None, :]


@triton.jit
def below(mask, a, b):
    """The mask if a < b, else nothing. Triton's interpreter makes integers of a mask and a scalar."""
    return mask & (a + tl.zeros(mask.shape, tl.int32) < b)


@triton.jit
def blocks(at, mask, H: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tiles, side by side in memory."""
    tiles = ()
    for n in tl.static_range(COUNT):
        tiles = tiles + (tl.load(at + n * H, mask=mask, other=0.0),)
    return tiles


@triton.jit
def taken(tiles, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of the tiles, in float32."""
    found = ()
    for n in tl.static_range(COUNT):
        found = found + (tiles[FIRST + n].to(tl.float32),)
    return found


@triton.jit
def states_at(h_ptr, c_ptr, row_h, row_c, offs_b, offs_h, mask, WIDTH: tl.constexpr, H: tl.constexpr, CARRIED: tl.constexpr):
    """The states in float32: h of the batch rows from row_h on, of a tensor with WIDTH columns, then the carried ones, from
    row_c on. Without any, c_ptr is None."""
    tiles = taken(blocks(pointers(h_ptr, row_h, offs_b, offs_h, WIDTH), mask, H, 1), 0, 1)
    if CARRIED > 0:
        tiles = tiles + blocks(pointers(c_ptr, row_c, offs_b, offs_h, CARRIED * H), mask, H, CARRIED)
    return tiles


@triton.jit
def start_states(h_ptr, c_ptr, row, offs_b, offs_h, mask, B, H: tl.constexpr, CARRIED: tl.constexpr):
    """The initial states, then those of a reset, or the gradients of both. row: the first batch row of the initial ones."""
    initial = states_at(h_ptr, c_ptr, row, row, offs_b, offs_h, mask, H, H, CARRIED)
    return initial + states_at(h_ptr, c_ptr, row + B, row + B, offs_b, offs_h, mask, H, H, CARRIED)


@triton.jit
def chosen(condition, yes, no, COUNT: tl.constexpr):
    """Tile by tile, `yes` where the condition holds, else `no`."""
    found = ()
    for n in tl.static_range(COUNT):
        found = found + (tl.where(condition, yes[n], no[n]),)
    return found


@triton.jit
def entering(mark, starts, states, STATES: tl.constexpr):
    """The states that enter a step, by each row's mark. starts: the initial states, then those of a reset."""
    found = ()
    for s in tl.static_range(STATES):
        began = tl.where(mark == RESETS, starts[STATES + s], states[s])
        found = found + (tl.where(mark == STARTS, starts[s], began),)
    return found


@triton.jit
def running(codes_ptr, first, count, offs_b, mask_b, B):
    """How many of `count` steps from `first` on, in time, some row of the tile has: padding is a row's last steps."""
    low = first * 0
    high = low + count
    while low < high:
        middle = (low + high) // 2
        marks = tl.load(codes_ptr + (first + middle).to(tl.int64) * B + offs_b, mask=mask_b, other=PADDED)
        some = tl.max((marks != PADDED).to(tl.int32), 0) > 0
        low = tl.where(some, middle + 1, low)
        high = tl.where(some, high, middle)
    return low


@triton.jit
def window(codes_ptr, p, t, t_x, dt, steps, offs_b, mask_b, B):
    """`place` without the steps at which no row of the tile runs: its p, t, t_x and steps."""
    count = running(codes_ptr, tl.where(dt > 0, t, t - steps + 1), steps, offs_b, mask_b, B)
    skipped = tl.where(dt > 0, 0, steps - count)
    return p + skipped, t + skipped * dt, t_x + skipped * dt, count
