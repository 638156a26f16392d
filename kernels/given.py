"""What a cell is given besides its gates and its states: tiles that no step changes, and random numbers that are new at each.

held    values of each batch row and unit: a learned vector, as of a peephole, or a mask that stays as it is over time.
        float32
noise   numbers of each step, batch row and unit, uniform in [0, 1): words of Philox4x32-10 (Salmon et al., 2011) with the
        64 bits of the member's seed as key, for the counter (unit, low and high word of t * B + b, 0). Tile n is word n,
        its upper 24 bits. So backward makes them again from the seed
rows    the mean of a row over all units, for a cell that needs it (`row_mean`)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["Given", "held_tiles", "noise_tiles", "row_mean"]


class Given(NamedTuple):
    """What the cells of M members are given (`rnnfast.kernels.groups`); each None where the cell has none.

    Attributes:
        held: (M, B, cell.held * H) float32, the tiles side by side.
        seeds: (M,) int64.
    """

    held: Any = None
    seeds: Any = None


@triton.jit
def held_tiles(held_rows, offs_h, mask, H, HELD: tl.constexpr):
    """HELD tiles that lie side by side in memory, as held values do and carried states. held_rows: pointers to the batch rows
    of this member's (B, HELD * H)."""
    tiles = ()
    for n in tl.static_range(HELD):
        tiles = tiles + (tl.load(held_rows[:, None] + (n * H + offs_h)[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def noise_tiles(seed_ptr, row, unit, NOISE: tl.constexpr):
    """NOISE tiles, at most 4, of the shape that ``row`` and ``unit`` have together. row: t * B + b in 64 bits, where t is a
    step of the member, not of all members; unit: in 32 bits."""
    tl.static_assert(NOISE <= 4)
    tiles = ()
    if NOISE > 0:
        low = (row & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
        high = (row >> 32).to(tl.int32)
        zero = unit * 0 + low * 0
        words = tl.philox(tl.load(seed_ptr), zero + unit, zero + low, zero + high, zero)
        for n in tl.static_range(NOISE):
            tiles = tiles + ((words[n].to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * (1.0 / (1 << 24)),)
    return tiles


@triton.jit
def row_mean(tile, n, row):
    """The mean of each row over all units, of the shape of `tile` (rows, units), for a program that has whole rows. row: which
    of the tile's units there are, (1, units), and their number. n: not needed here (see `rnnfast.kernels.cells`)."""
    exists, H = row
    mean = tl.sum(tl.where(exists, tile, 0.0), 1, keep_dims=True) / H
    return tl.broadcast_to(mean, tile.shape)
