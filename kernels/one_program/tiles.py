"""How the cells of a program lie in its registers, and their way from and to memory and the matrix product.

A program has 16 units a warp and R batch rows, 8, 4 or 2. The units are the rows of the product and the batch rows its columns.
A tensor core leaves an accumulator of 16 units x 8 rows in a warp like this:

    unit = lane // 4 + 8 u      row = 2 (lane % 4) + n      u, n: registers

Three choices make the layout of all loads and stores the same, so that no tile changes its layout between them and the product:

- *Units are numbered so that u is the lowest bit*: row 8 u + l of the product is unit 2 l + u (`unit_of`). So a thread has two
  units that lie side by side in memory. The summed axis is numbered likewise.
- *A tile of cells is [threads, units of a thread, rows of a thread]*, thread 32 w + 4 l + q of warp w. Loads and stores are of
  [threads, units] for each row, which leaves Triton one sensible layout.
- *With 4 or 2 rows* the tensor core leaves every cell in several lanes. So that each cell is computed once, a lane takes its
  own by a select: lane 4 l + 2 u + q takes unit 2 l + u, and rows 2 q and 2 q + 1 of 4, or row q of 2.
"""

import triton
import triton.language as tl

from rnnfast.kernels.given import noise_tiles
from rnnfast.kernels.marks import PADDED, STARTS, anew, batch_rows
from rnnfast.kernels.maths import dot


@triton.constexpr_function
def units_of_thread(R):
    return 2 if R == 8 else 1


@triton.constexpr_function
def rows_of_thread(R):
    return 1 if R == 2 else 2


@triton.jit
def unit_of(k):
    """The unit in row k of the product, or at place k of the summed axis."""
    return (k // 16) * 16 + (k % 8) * 2 + (k // 8) % 2


@triton.jit
def threads_unit(W: tl.constexpr, R: tl.constexpr):
    """The first unit of each thread, [32 W, 1]."""
    thread = tl.arange(0, 32 * W)[:, None]
    unit = thread // 32 * 16 + thread // 4 % 8 * 2
    if R < 8:
        unit += thread // 2 % 2
    return unit


@triton.jit
def threads_units(unit, R: tl.constexpr):
    """All units of each thread, [32 W, units, 1], from its first one."""
    if R == 8:
        unit += tl.arange(0, 2)[None, :]
    return unit[:, :, None]


@triton.jit
def threads_row(n: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """Row n of each thread, [32 W, 1]."""
    thread = tl.arange(0, 32 * W)[:, None]
    if R == 8:
        return thread % 4 * 2 + n
    elif R == 4:
        return thread % 2 * 2 + n
    else:
        return thread % 2


@triton.jit
def offsets(rows, unit, ROW: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr):
    """Offsets of a program's cells from its first row on, one [32 W, units] for each of `rows`, which are ROW apart. With 8
    rows and not PAIRED the two units of a thread, which are not aligned, have a load each."""
    found = ()
    for n in tl.static_range(rows_of_thread(R)):
        at = rows[n] * ROW + unit
        if R == 8 and PAIRED:
            found = found + (at + tl.arange(0, 2)[None, :],)
        elif R == 8:
            found = found + (at, at + 1)
        else:
            found = found + (at,)
    return found


@triton.jit
def masks(slots, count, unit, H: tl.constexpr, HP: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr):
    """For each of `offsets`: whether the slot is less than `count` and the unit less than H. PAIRED units are padded in
    pairs."""
    found = ()
    for n in tl.static_range(rows_of_thread(R)):
        if HP == H:
            found = found + ((slots[n] < count),)
            if R == 8 and not PAIRED:
                found = found + ((slots[n] < count),)
        else:
            found = found + ((slots[n] < count) & (unit < H),)
            if R == 8 and not PAIRED:
                found = found + ((slots[n] < count) & (unit + 1 < H),)
    return found


@triton.jit
def load(pointer, offsets, mask, R: tl.constexpr):
    """What lies there, as tiles [32 W, units] or [32 W, 1]. mask: () for all."""
    pieces = ()
    for i in tl.static_range(len(offsets)):
        if len(mask) > 0:
            pieces = pieces + (tl.load(pointer + offsets[i], mask=mask[i], other=0.0),)
        else:
            pieces = pieces + (tl.load(pointer + offsets[i]),)
    return pieces


@triton.jit
def cells(pieces, W: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr):
    """Loaded tiles as one of cells [32 W, units, rows]. All of it stays in registers."""
    if R == 2:
        return pieces[0][:, :, None]
    elif R == 4 or PAIRED:
        return tl.join(pieces[0], pieces[1])
    else:
        first = tl.reshape(tl.join(pieces[0], pieces[1]), (32 * W, 2))
        second = tl.reshape(tl.join(pieces[2], pieces[3]), (32 * W, 2))
        return tl.join(first, second)


@triton.jit
def load_cells(pointer, offsets, mask, W: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr):
    return cells(load(pointer, offsets, mask, R), W, R, PAIRED)


@triton.jit
def load_state(
    is_first, first_ptr, at_first, ptr, at, rows, unit, mask, H: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr,
    FIRST_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The state that enters a step, as `load` gives it: at the row at_first of first_ptr (B, FIRST_WIDTH * H) if this
    `is_first`, else at the row `at` of ptr (B, WIDTH * H). Rows are counted in UNITs of H."""
    if WIDTH > 1:
        at_first *= FIRST_WIDTH
        at *= WIDTH
        far = ()
        for n in tl.static_range(rows_of_thread(R)):
            far = far + (rows[n] * tl.where(is_first, FIRST_WIDTH, WIDTH),)
        rows = far
    start = tl.where(is_first, first_ptr, ptr) + tl.where(is_first, at_first, at) * UNIT
    return load(start, offsets(rows, unit, H, R, H % 2 == 0), mask, R)


@triton.jit
def load_tiles(pointer, offsets, mask, COUNT: tl.constexpr, H: tl.constexpr, R: tl.constexpr):
    """COUNT tiles that lie side by side, each as `load` gives it."""
    tiles = ()
    for n in tl.static_range(COUNT):
        tiles = tiles + (load(pointer + n * H, offsets, mask, R),)
    return tiles


@triton.jit
def load_states(
    is_first, first_ptr, at_first, ptr, at, rows, unit, mask, H: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr,
    CARRIED: tl.constexpr,
):  # fmt: skip
    """The states besides h that enter a step, which lie side by side, each as `load_state` gives it."""
    states = ()
    for s in tl.static_range(CARRIED):
        first = first_ptr + s * H
        state = load_state(is_first, first, at_first, ptr + s * H, at, rows, unit, mask, H, UNIT, R, CARRIED, CARRIED)
        states = states + (state,)
    return states


@triton.jit
def store_cells(pointer, offsets, mask, tile, W: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr):
    """The reverse of `load_cells`."""
    if R == 2:
        tl.store(pointer + offsets[0], tl.reshape(tile, (32 * W, 1)), mask=mask[0])
    else:
        rows = tl.split(tile)
        for n in tl.static_range(2):
            if R == 4 or PAIRED:
                tl.store(pointer + offsets[n], rows[n], mask=mask[n])
            else:
                units = tl.split(rows[n])
                for u in tl.static_range(2):
                    tl.store(pointer + offsets[2 * n + u], units[u][:, None], mask=mask[2 * n + u])


@triton.jit
def program_rows(order_ptr, B, W: tl.constexpr, R: tl.constexpr, HAS_MARKS: tl.constexpr):
    """For each row of a thread [32 W, 1]: its slot in the program, and its batch row counted from the first batch row, `base`;
    and how many rows there are. Those that are not there are loaded as the last one, and never stored."""
    first = tl.program_id(0) * R
    slots = ()
    rows = ()
    for n in tl.static_range(rows_of_thread(R)):
        slot = threads_row(n, W, R)
        slots = slots + (slot,)
        if HAS_MARKS:
            rows = rows + (batch_rows(tl.minimum(first + slot, B - 1), order_ptr, B).to(tl.int64),)
        else:
            rows = rows + (tl.minimum(slot, B - 1 - first),)
    base = first.to(tl.int64)
    if HAS_MARKS:  # in any order: counted from row 0, in 64 bits
        base = base * 0
    return slots, rows, base, B - first


@triton.jit
def units_inside(slots, unit, H: tl.constexpr, HP: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr):
    """The mask of loads, which need one only for padded units: () for none."""
    if HP == H:
        return ()
    else:
        return masks(slots, R, unit, H, HP, R, PAIRED)


@triton.jit
def mask_rows(mask, marks, R: tl.constexpr, PAIRED: tl.constexpr):
    """Of these masks, the rows that run."""
    found = ()
    for i in tl.static_range(len(mask)):
        found = found + (mask[i] & (marks[i // 2 if R == 8 and not PAIRED else i] != PADDED),)
    return found


@triton.jit
def bias_of(bias_ptr, unit, g: tl.constexpr, H: tl.constexpr, R: tl.constexpr):
    """The bias of gate g, [32 W, units, 1]."""
    if R == 8:
        unit += tl.arange(0, 2)[None, :]
    return tl.load(bias_ptr + g * H + unit, mask=unit < H, other=0.0).to(tl.float32)[:, :, None]


@triton.jit
def held_cells(
    held_ptr, rows, unit, mask, H: tl.constexpr, HELD: tl.constexpr, W: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr
):
    """The HELD tiles of held (B, HELD * H)."""
    at = offsets(rows, unit, HELD * H, R, PAIRED)
    found = ()
    for n in tl.static_range(HELD):
        found = found + (load_cells(held_ptr + n * H, at, mask, W, R, PAIRED),)
    return found


@triton.jit
def noise_cells(seed_ptr, first, rows, unit, NOISE: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """NOISE tiles of random numbers. first: t * B, and the batch row from which `rows` count."""
    if NOISE > 0:
        return noise_tiles(seed_ptr, by_row(rows, W, R) + first, threads_units(unit, R), NOISE)
    else:
        return ()


@triton.jit
def row_mean(tile, n, row):
    """The mean of each row of cells over all units, as cells. row: `threads_units` and H. n, the number of the call, names a
    place for the sums in kernels whose programs share a row."""
    W: tl.constexpr = tile.shape[0] // 32
    R: tl.constexpr = 2 * tile.shape[1] * tile.shape[2]
    H: tl.constexpr = row[1]
    if H < 16 * W:
        tile = tl.where(row[0] < H, tile, 0.0)
    if R == 8:
        t = tl.permute(tl.reshape(tile, (8 * W, 4, 2, 2)), (0, 2, 1, 3))
        mean = tl.sum(tl.reshape(t, (16 * W, R)), 0) * (1.0 / H)
        return tl.reshape(tl.broadcast_to(tl.reshape(mean, (1, 4, 1, 2)), (8 * W, 4, 2, 2)), tile.shape)
    else:
        mean = tl.sum(tl.reshape(tile, (16 * W, R)), 0) * (1.0 / H)
        return tl.reshape(tl.broadcast_to(tl.reshape(mean, (1, R)), (16 * W, R)), tile.shape)


@triton.jit
def row_marks(word, rows, R: tl.constexpr):
    """The marks in a word of `rnnfast.kernels.marks.pack_kernel`, [32 W, 1] for each row of a thread."""
    found = ()
    for n in tl.static_range(rows_of_thread(R)):
        found = found + (((word >> (2 * rows[n])) & 3).to(tl.int32),)
    return found


@triton.jit
def enter(starts_ptr, offsets, marks, mask, tile, size, W: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr):
    """The state `tile`, but from starts (2, B, H), initial and reset, `size` elements each, where it begins anew. There a load
    takes the place of the value; elsewhere it is masked out. In padded units 0 does, for what a padded step left may be NaN."""
    if R == 2:
        rows = (tl.reshape(tile, (32 * W, 1)),)
    else:
        rows = tl.split(tile)
    pieces = ()
    for n in tl.static_range(rows_of_thread(R)):
        begins = anew(marks[n])
        kept = tl.where(begins, 0.0, rows[n]).to(tile.dtype)
        at = starts_ptr + (marks[n] - STARTS).to(tl.int64) * size
        if R == 8 and not PAIRED:
            units = tl.split(kept)
            for u in tl.static_range(2):
                pieces = pieces + (tl.load(at + offsets[2 * n + u], mask=mask[2 * n + u] & begins, other=units[u][:, None]),)
        else:
            pieces = pieces + (tl.load(at + offsets[n], mask=mask[n] & begins, other=kept),)
    return cells(pieces, W, R, PAIRED)


@triton.jit
def enter_all(
    starts_ptr, offsets, marks, mask, tiles, size, H: tl.constexpr, W: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr
):
    """`enter` of several states, which lie side by side in starts (2, B, states * H)."""
    entered = ()
    for s in tl.static_range(len(tiles)):
        entered = entered + (enter(starts_ptr + s * H, offsets, marks, mask, tiles[s], size * len(tiles), W, R, PAIRED),)
    return entered


@triton.jit
def by_row(values, W: tl.constexpr, R: tl.constexpr):
    """One value for each row of a thread, each [32 W, 1], as a tile that goes with cells, [32 W, 1, rows]."""
    if R == 2:
        return values[0][:, :, None]
    else:
        return tl.join(values[0], values[1])


@triton.jit
def to_product(tile, W: tl.constexpr, R: tl.constexpr):
    """Cells as rows and columns of the product, [W, 16, R]."""
    if R == 8:
        t = tl.permute(tl.reshape(tile, (W, 8, 4, 2, 2)), (0, 3, 1, 2, 4))
    else:
        t = tl.permute(tl.reshape(tile, (W, 8, 2, R)), (0, 2, 1, 3))
    return tl.reshape(t, (W, 16, R))


@triton.jit
def from_product(sums, W: tl.constexpr, R: tl.constexpr):
    """Sums [W, 16, R] as cells."""
    if R == 8:
        return tl.reshape(tl.permute(tl.reshape(sums, (W, 2, 8, 4, 2)), (0, 2, 3, 1, 4)), (32 * W, 2, 2))
    else:
        a, b = tl.split(tl.permute(tl.reshape(sums, (W, 2, 8, R)), (0, 2, 3, 1)))  # W l row, of each u
        t = tl.where(tl.arange(0, 2)[None, None, :, None] == 1, b[:, :, None, :], a[:, :, None, :])  # W l u row
        if R == 4:
            return tl.reshape(t, (32 * W, 1, 2))
        else:
            a, b = tl.split(t)
            t = tl.where(tl.arange(0, 2)[None, None, None, :] == 1, b[:, :, :, None], a[:, :, :, None])
            return tl.reshape(t, (32 * W, 1, 1))


@triton.jit
def product(w, h, acc, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """w [W, 16, K] times h [W, 16, R], whose K = 16 W units every warp needs, plus acc [W, 16, R]. The leading axis of warps
    keeps Triton from the instructions of warp groups, whose sums lie otherwise."""
    W: tl.constexpr = acc.shape[0]
    R: tl.constexpr = acc.shape[2]
    return dot(w, tl.broadcast_to(tl.reshape(h, (1, 16 * W, R)), (W, 16 * W, R)), acc, PRECISION, EMULATE_BF16)


@triton.jit
def sum_parts(parts, W: tl.constexpr, R: tl.constexpr):
    """Sums of each warp [W, 16 W, R], added in a fixed order, as cells."""
    if W == 1:
        return from_product(parts, W, R)
    else:
        if R == 8:
            t = tl.permute(tl.reshape(parts, (W, W, 2, 8, 4, 2)), (1, 3, 4, 2, 5, 0))
        else:
            t = tl.permute(tl.reshape(parts, (W, W, 2, 8, R)), (1, 3, 2, 4, 0))
        t = tl.reshape(t, (32 * W, units_of_thread(R), rows_of_thread(R), W))
        if W == 16:
            a, b = tl.split(tl.reshape(t, (32 * W, units_of_thread(R), rows_of_thread(R), 8, 2)))
            t = a + b
        if W >= 8:
            a, b = tl.split(tl.reshape(t, (32 * W, units_of_thread(R), rows_of_thread(R), 4, 2)))
            t = a + b
        if W >= 4:
            a, b = tl.split(tl.reshape(t, (32 * W, units_of_thread(R), rows_of_thread(R), 2, 2)))
            t = a + b
        a, b = tl.split(t)
        return a + b


@triton.jit
def _add(pointers, tile, mask, COPIES: tl.constexpr):
    found = tl.load(pointers, mask=mask, other=0.0)
    if COPIES:  # only one of them stores
        tl.debug_barrier()
    tl.store(pointers, found + tile, mask=mask)


@triton.jit
def hand_over(
    d_starts_ptr, offsets, marks, mask, tile, size, W: tl.constexpr, R: tl.constexpr, PAIRED: tl.constexpr, COPIES: tl.constexpr
):
    """Add gradients of states that began anew to d_starts (2, B, H), initial and reset, `size` elements each. A thread adds to
    its own cells only, whatever the step. COPIES: several warps have each cell."""
    if R == 2:
        rows = (tl.reshape(tile, (32 * W, 1)),)
    else:
        rows = tl.split(tile)
    for n in tl.static_range(rows_of_thread(R)):
        begins = anew(marks[n])
        at = d_starts_ptr + (marks[n] - STARTS).to(tl.int64) * size
        if R == 8 and not PAIRED:
            units = tl.split(rows[n])
            for u in tl.static_range(2):
                _add(at + offsets[2 * n + u], units[u][:, None], mask[2 * n + u] & begins, COPIES)
        else:
            _add(at + offsets[n], rows[n], mask[n] & begins, COPIES)
