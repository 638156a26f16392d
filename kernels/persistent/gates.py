"""The gates of a program's units: as the rows of a product, side by side in a tile, and as tiles of their own.

A power of two of gates lies unit by unit in one tile, the gates of a unit side by side. Any other number of gates is a product
each where that saves rows; their sums then go from warp to warp together, four gates at a time.
"""

import triton
import triton.language as tl

from rnnfast.kernels.persistent.exchange import sum_parts


@triton.constexpr_function
def _places(gates):
    return 1 << (gates - 1).bit_length()


@triton.constexpr_function
def _together(first, gates):
    """How many gates go together from number `first` on."""
    return min(4, gates - first)


@triton.jit
def _joined(tiles, PLACES: tl.constexpr):
    """`tiles` with a new last axis: place i has tile i, and the last tile the places that are left. The axis is as many axes of
    two as PLACES, a power of two, takes."""
    joined = ()
    for i in tl.static_range(PLACES):
        joined = joined + (tiles[i if i < len(tiles) else len(tiles) - 1],)
    for level in tl.static_range(1, 4):
        if PLACES >> level > 0:
            pairs = ()
            for i in tl.static_range(PLACES >> level):
                pairs = pairs + (tl.join(joined[i], joined[i + (PLACES >> level)]),)
            joined = pairs
    return joined[0]


@triton.jit
def _split(rows, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, GATES: tl.constexpr):
    """(BLOCK_B, BLOCK_H * GATES), a unit's gates side by side, as GATES tiles (BLOCK_B, BLOCK_H)."""
    tl.static_assert(GATES == 1 or GATES == 2 or GATES == 4 or GATES == 8)
    tiles = (rows,)
    for level in tl.static_range(1, 4):
        if GATES >> level > 0:
            even, odd = (), ()
            for i in tl.static_range(len(tiles)):
                first, second = tl.split(tl.reshape(tiles[i], (BLOCK_B, BLOCK_H * (GATES >> level), 2)))
                even, odd = even + (first,), odd + (second,)
            tiles = even + odd
    return tiles


@triton.jit
def side_by_side(tiles, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, GATES: tl.constexpr):
    """Tiles (BLOCK_B, BLOCK_H) as one (BLOCK_B, GATES * BLOCK_H), tile after tile, by one change of layout. The last tile takes
    the places that are left."""
    if GATES == 1:
        return tiles[0]
    else:
        joined = tl.reshape(_joined(tiles, GATES), (BLOCK_B, BLOCK_H, GATES))
        return tl.reshape(tl.permute(joined, (0, 2, 1)), (BLOCK_B, GATES * BLOCK_H))


@triton.jit
def _sums_of(tiles, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr):
    """The sums over the parts of up to four tiles (SPLIT, BLOCK_H, BLOCK_B), a gate each."""
    PLACES: tl.constexpr = _places(len(tiles))
    rows = tiles[0]
    if PLACES > 1:
        rows = tl.reshape(_joined(tiles, PLACES), (SPLIT, BLOCK_H, BLOCK_B, PLACES))
        rows = tl.reshape(tl.permute(rows, (0, 1, 3, 2)), (SPLIT, BLOCK_H * PLACES, BLOCK_B))
    return _split(sum_parts(rows, BLOCK_H * PLACES, BLOCK_B, SPLIT), BLOCK_B, BLOCK_H, PLACES)


@triton.jit
def gate_sums(sums, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, GATES: tl.constexpr, SPLIT: tl.constexpr):
    """The gates (BLOCK_B, BLOCK_H) from the sums of `exchange.add_product`: one tile of GATES rows a unit, or a tile a gate."""
    if len(sums) == 1:
        return _split(sum_parts(sums[0], BLOCK_H * GATES, BLOCK_B, SPLIT), BLOCK_B, BLOCK_H, GATES)
    else:
        gates = ()
        for first in tl.static_range(0, len(sums), 4):
            some = ()
            for i in tl.static_range(_together(first, len(sums))):
                some = some + (sums[first + i],)
            gates = gates + _sums_of(some, BLOCK_B, BLOCK_H, SPLIT)
        return gates
