"""How the programs of a persistent kernel hand one another a step's result: through global memory, the data its own flag.

The exchange buffer is filled with EMPTY words before the launch. Whoever computes a part of step t stores it, once, at an
address that belongs to step t alone; whoever needs it loads it again and again until no word is EMPTY. There is no barrier, no
counter, no fence, and no address is ever used twice, so the only order needed is that of each word with itself. It rests on:

- Words of 32 bits, stored and loaded at that one scalar width: two 16-bit elements, or one of 32 bits.
- Strong accesses: ``ld.relaxed.gpu``, and ``st.relaxed.gpu`` where Triton has it. Triton 3.6 stores with ".cg", which becomes
  ``st.global.cg``, and the assembler makes of that the instruction that it makes of ``st.relaxed.gpu``.
- No result looks EMPTY: EMPTY is a pattern of NaNs, and `publish` stores another NaN in its place.
- num_stages=1 at the launch, which turns Triton's pipeliner off.

Every poll ends. One that gives up has EMPTY in place of the words that did not come. That is NaN, and it goes through the
product, the cell and the next exchange into everything that depends on those words. See `poll` and give_up.py.

Legend: SPLIT is the number of parts that the summed axis K is cut into, so that each warp multiplies its own part, a
leading axis of every tile that has K; with SPLIT = 1 there is no such axis. A part is cut into CHUNKS of BLOCK_K, all of one
shape, and multiplied in OPERANDS of up to JOIN chunks.

The words of a part are polled in tiles of one word for each row and lane. With SPLIT > 1 four lanes share a row, as in the
operand of a tensor core, and each loads 16 bytes at once, which are words of four tiles. `columns` says which column of K this
makes of each column of an operand. The order in which K is summed is free, so the weights are loaded in that order, and no
word leaves its lane on the way from the poll to the product.
"""

import triton
import triton.language as tl

from rnnfast.kernels.maths import INTERPRETED, dot

EMPTY = tl.constexpr(-1)
# bounds of `poll`: 16 for each change of the clock, which is every 4.29 seconds. The first wait may be for SMs that others have
FIRST_WAIT, LATER_WAITS = tl.constexpr(28 * 16), tl.constexpr(4 * 16)
HAS_RELAXED_STORES = tl.constexpr(hasattr(tl, "atomic_store"))  # from Triton 3.9 on
INTERPRETED_TRIES = tl.constexpr(30)
NOT_A_NUMBER = tl.constexpr(0x7FFF7FFF)  # two NaNs of either 16-bit type, or one float32 NaN


@triton.constexpr_function
def joined(chunk, CHUNKS, JOIN):
    """How many chunks are one operand from number `chunk` on: a power of two, as large as is left, up to JOIN; else 0."""
    first = 0
    while first <= chunk:
        tiles = min(JOIN, 1 << ((CHUNKS - first).bit_length() - 1))
        if first == chunk:
            return tiles
        first += tiles
    return 0


@triton.constexpr_function
def operands(CHUNKS, JOIN):
    return CHUNKS // JOIN + (CHUNKS % JOIN).bit_count()


@triton.constexpr_function
def vector(CHUNK_WORDS):
    """Neighbouring words that a lane loads at once: 16 bytes, or less where a chunk has less for each of four lanes."""
    return min(4, CHUNK_WORDS // 4)


@triton.constexpr_function
def piece(CHUNK_WORDS, SPLIT):
    """Words of a row that its lanes load at once: four lanes, as a tensor core's operand has it; with SPLIT = 1 a chunk."""
    return CHUNK_WORDS if SPLIT == 1 else 4 * vector(CHUNK_WORDS)


@triton.jit
def _place(tile, VECTOR: tl.constexpr, SPLIT: tl.constexpr):
    """Which of the VECTOR words that a lane loads at once belongs to a tile. A tensor core takes two of every other tile from
    neighbouring registers, where such a load puts neighbouring words."""
    place = tile % VECTOR
    if SPLIT > 1 and VECTOR == 4:
        place = place % 2 * 2 + place // 2
    return place


@triton.jit
def tile_words(TILE: tl.constexpr, CHUNK_WORDS: tl.constexpr, SPLIT: tl.constexpr):
    """Where the words of a tile lie along its part of K: of the lanes' pieces, one word of each lane."""
    VECTOR: tl.constexpr = vector(CHUNK_WORDS)
    PIECE: tl.constexpr = piece(CHUNK_WORDS, SPLIT)
    return TILE // VECTOR * PIECE + tl.arange(0, PIECE // VECTOR) * VECTOR + _place(TILE, VECTOR, SPLIT)


@triton.jit
def columns(FIRST: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr, PER_WORD: tl.constexpr, SPLIT: tl.constexpr):
    """Where the columns of an operand lie along its part of K. It has CHUNKS chunks from number FIRST on, merged."""
    k = tl.arange(0, CHUNKS * BLOCK_K)
    if SPLIT > 1:
        VECTOR: tl.constexpr = vector(BLOCK_K // PER_WORD)
        word = k // PER_WORD
        tile, lane = word // 8 * 2 + word % 2, word % 8 // 2
        word = tile // VECTOR * (4 * VECTOR) + lane * VECTOR + _place(tile, VECTOR, SPLIT)
        k = word * PER_WORD + k % PER_WORD
    return FIRST * BLOCK_K + k


@triton.jit
def over_parts(rows, PART: tl.constexpr, columns, SPLIT: tl.constexpr):
    """Offsets of some columns of each part, PART columns apart: ([SPLIT,] ROWS, columns) from row offsets."""
    if SPLIT == 1:
        return rows[:, None] + columns[None, :]
    else:
        parts = tl.arange(0, SPLIT) * PART
        return rows[None, :, None] + (parts[:, None, None] + columns[None, None, :])


@triton.jit
def over_rows(tile, SPLIT: tl.constexpr):
    """A vector along the row axis of `over_parts`."""
    if SPLIT == 1:
        return tile[:, None]
    else:
        return tile[None, :, None]


@triton.jit
def _in_turn(a, b, SPLIT: tl.constexpr):
    """Two tiles as one, column by column in turn."""
    if SPLIT == 1:
        ROWS: tl.constexpr = a.shape[0]
        WIDTH: tl.constexpr = a.shape[1] * 2
        return tl.reshape(tl.join(a, b), (ROWS, WIDTH))
    else:
        ROWS: tl.constexpr = a.shape[1]
        WIDTH: tl.constexpr = a.shape[2] * 2
        return tl.reshape(tl.join(a, b), (SPLIT, ROWS, WIDTH))


@triton.jit
def _one_after_another(a, b):
    """Two tiles (SPLIT, ROWS, columns) as one, the columns of `a` first."""
    SPLIT: tl.constexpr = a.shape[0]
    ROWS: tl.constexpr = a.shape[1]
    WIDTH: tl.constexpr = a.shape[2] * 2
    return tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), (SPLIT, ROWS, WIDTH))


@triton.jit
def _merged(words, FIRST: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr):
    """TILES tiles of words from number FIRST on as one, in the order of `columns`. Each word stays in its register."""
    tiles = ()
    for i in tl.static_range(TILES):
        tiles = tiles + (words[FIRST + i],)
    for level in tl.static_range(1, 10):
        if TILES >> level > 0:
            halves = ()
            for i in tl.static_range(TILES >> level):
                if SPLIT == 1:
                    halves = halves + (_in_turn(tiles[i], tiles[i + (TILES >> level)], SPLIT),)
                elif level == 1:
                    halves = halves + (_in_turn(tiles[2 * i], tiles[2 * i + 1], SPLIT),)
                else:
                    halves = halves + (_one_after_another(tiles[2 * i], tiles[2 * i + 1]),)
            tiles = halves
    return tiles[0]


@triton.jit
def _elements(words, DTYPE: tl.constexpr, PER_WORD: tl.constexpr, SPLIT: tl.constexpr):
    """The elements of a tile of words, in the order of the summed axis."""
    if PER_WORD == 1:
        return words.to(DTYPE, bitcast=True)
    else:
        even = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        odd = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return _in_turn(even, odd, SPLIT)


@triton.jit
def as_operands(
    words, CHUNKS: tl.constexpr, JOIN: tl.constexpr, DTYPE: tl.constexpr, PER_WORD: tl.constexpr, SPLIT: tl.constexpr
):
    """The tiles of words of CHUNKS chunks as the operands of `add_product`."""
    TILES: tl.constexpr = len(words) // CHUNKS
    chunks = ()
    for j in tl.static_range(CHUNKS):
        if joined(j, CHUNKS, JOIN) > 0:
            tile = _merged(words, j * TILES, joined(j, CHUNKS, JOIN) * TILES, SPLIT)
            chunks = chunks + (_elements(tile, DTYPE, PER_WORD, SPLIT),)
    return chunks


@triton.jit
def load_words(pointers, mask, unit, H: tl.constexpr, PER_WORD: tl.constexpr):
    """Words made of the elements at `pointers`, where they begin with `unit`: zeros from unit H on.

    For what was not exchanged: Triton lays an operand out by how it came about, and two products share weights in registers
    only if their operands are laid out alike.
    """
    even = tl.load(pointers, mask=mask & (unit < H), other=0.0)
    if PER_WORD == 1:
        return even.to(tl.int32, bitcast=True)
    else:
        odd = tl.load(pointers + 1, mask=mask & (unit + 1 < H), other=0.0)
        return _pack(even, odd)


@triton.jit
def _pack(even, odd):
    return (even.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (odd.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.constexpr_function
def _assembly(TILES, VECTOR, STRIDE, SPLIT, PACK):
    """`poll` in PTX, for PACK pointers a thread.

    A warp stays together, and its lanes load again only what they lack. After every 16 tries it looks at the word of programs
    that gave up, and at the upper half of the clock, which changes every 4.29 seconds. It counts the changes and not the time
    between them, as the GPU may have stopped all programs in between. Register n is 16 for each change seen, the first look
    included, plus the tries since the last look.
    """
    words, at = TILES * PACK, TILES * PACK
    here, flag, told, name, most = (at + PACK * i for i in range(1, 6))
    lacks = ", ".join(f"p{e}" for e in range(PACK))
    lines = ["{", f".reg .pred p, q, {lacks};", ".reg .b32 r, n, clock;"]
    lines += [f"setp.ne.b32 p{e}, ${here + e}, 0;" for e in range(PACK)]
    places = (0, 2, 1, 3) if SPLIT > 1 and VECTOR == 4 else range(VECTOR)  # as `_place` has it
    lines += [f"mov.b32 ${i}, 0;" for i in range(words)] + ["mov.b32 n, 0;", "mov.b32 clock, 0;", "AGAIN:"]
    for tile in range(0, TILES, VECTOR):
        for e in range(PACK):
            into = ", ".join(f"${(tile + i) * PACK + e}" for i in places)
            width, into = (f".v{VECTOR}", f"{{{into}}}") if VECTOR > 1 else ("", into)
            lines.append(f"@p{e} ld.relaxed.gpu.global{width}.b32 {into}, [${at + e} + {tile // VECTOR * STRIDE * 4}];")
    for e in range(PACK):
        lines.append(f"mov.b32 r, ${e};")
        lines += [f"max.u32 r, r, ${tile * PACK + e};" for tile in range(1, TILES)]
        lines.append(f"setp.eq.u32 p{e}, r, -1;")
    lines.append("mov.pred p, p0;")
    lines += [f"or.pred p, p, p{e};" for e in range(1, PACK)]
    return "\n".join(
        [
            *lines,
            "vote.sync.any.pred q, p, -1;",
            "@!q bra.uni DONE;",
            "add.u32 n, n, 1;",
            "and.b32 r, n, 15;",
            "setp.ne.u32 q, r, 0;",
            "@q bra.uni AGAIN;",
            f"ld.relaxed.gpu.global.b32 r, [${flag}];",
            "setp.ne.u32 q, r, 0;",
            "vote.sync.any.pred q, q, -1;",
            "@q bra.uni DONE;",
            "mov.u32 r, %globaltimer_hi;",
            "setp.eq.u32 q, r, clock;",
            "mov.b32 clock, r;",
            "@q sub.u32 n, n, 16;",
            f"setp.gt.u32 q, n, ${most};",
            "vote.sync.any.pred q, q, -1;",
            "@!q bra.uni AGAIN;",
            f"@p st.relaxed.gpu.global.b32 [${flag}], 1;",
            f"@p st.relaxed.sys.global.b32 [${told}], ${name};",
            "DONE: }",
        ]
    )


@triton.constexpr_function
def _constraints(TILES, PACK):
    return ",".join(["=&r"] * (TILES * PACK) + [kind for kind in "lrllrr" for _ in range(PACK)])


@triton.constexpr_function
def _per_thread(pointers, WARPS):
    return max(1, pointers.numel // (32 * WARPS))


@triton.constexpr_function
def _types(TILES):
    return (tl.int32,) * TILES


@triton.jit
def _interpreted_poll(
    pointers, mask, TILES: tl.constexpr, VECTOR: tl.constexpr, STRIDE: tl.constexpr, SPLIT: tl.constexpr, give_up
):
    """`poll` as Triton's interpreter can run it; its bound is a number of tries."""
    flag, told, name = give_up
    numbers = tl.arange(0, triton.next_power_of_2(TILES))
    offsets = numbers // VECTOR * STRIDE + _place(numbers, VECTOR, SPLIT)
    mask = tl.expand_dims(mask, -1) & (numbers < TILES)
    pointers = tl.expand_dims(pointers, -1) + offsets
    words = tl.load(pointers, mask=mask, other=0, volatile=True)
    tries = 0
    while (tries < INTERPRETED_TRIES) & (tl.max(tl.ravel((words == EMPTY).to(tl.int32)), 0) > 0):
        words = tl.load(pointers, mask=mask, other=0, volatile=True)
        tries = tl.where(tl.load(flag) != 0, INTERPRETED_TRIES, tries + 1)
    lacks = tl.max(tl.ravel((words == EMPTY).to(tl.int32)), 0) > 0
    tl.store(flag, 1, mask=lacks, cache_modifier=".cg")
    tl.store(told, name, mask=lacks)
    tiles = ()
    for tile in tl.static_range(TILES):
        tiles = tiles + (tl.sum(tl.where(numbers == tile, words, 0), -1),)
    return tiles


@triton.jit
def poll(
    pointers,
    mask,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    WARPS: tl.constexpr,
    give_up,
    most,
    once,
):
    """TILES tiles of words, once all are there; where they do not come in time, of words that are EMPTY, which is NaN.

    Args:
        pointers: of each lane's first word.
        mask: lanes without it get zeros.
        TILES: tile number i has the words i // VECTOR * STRIDE + `_place` of i after `pointers`.
        VECTOR: words that a lane loads at once.
        STRIDE: words from one such load to the next.
        SPLIT: as above; 1 for tiles without that axis.
        WARPS: of the program.
        give_up: the two words of `GiveUp`, and what to tell the host.
        most: a warp gives up after `most` / 16 changes of the clock, or when another has given up.
        once: 1, from a value that the compiler does not know.

    All loads go out before the one check, so that a try is one round trip to L2.
    """
    if INTERPRETED:
        return _interpreted_poll(pointers, mask, TILES, VECTOR, STRIDE, SPLIT, give_up)
    else:
        PACK: tl.constexpr = _per_thread(pointers, WARPS)
        at = pointers.to(tl.int64)
        here = tl.broadcast_to(mask, pointers.shape).to(tl.int32)
        flag, told, name = give_up
        words = ()
        for _ in tl.static_range(TILES):
            words = words + (tl.zeros(pointers.shape, tl.int32),)
        # a loop of one turn: Triton 3.6 would move changes of layout in front of the poll, and repeat it for each
        for _ in range(once):
            words = tl.inline_asm_elementwise(
                _assembly(TILES, VECTOR, STRIDE, SPLIT, PACK),
                _constraints(TILES, PACK),
                [at, here, flag.to(tl.int64), told.to(tl.int64), name, most],
                _types(TILES),
                is_pure=False,
                pack=PACK,
            )
        return words


@triton.jit
def publish(pointers, tile, mask, PER_WORD: tl.constexpr):
    """Store `tile` (BLOCK_B, units), of the exchanged dtype, as words at `pointers` (BLOCK_B, units / PER_WORD)."""
    if PER_WORD == 1:
        words = tile.to(tl.int32, bitcast=True)
    else:
        BLOCK_B: tl.constexpr = tile.shape[0]
        PAIRS: tl.constexpr = tile.shape[1] // 2
        even, odd = tl.split(tl.reshape(tile, (BLOCK_B, PAIRS, 2)))
        words = _pack(even, odd)
    words = tl.where(words == EMPTY, NOT_A_NUMBER, words)
    if HAS_RELAXED_STORES:
        tl.atomic_store(pointers, words, mask=mask, sem="relaxed", scope="gpu")
    else:
        tl.store(pointers, words, mask=mask, cache_modifier=".cg")


@triton.jit
def _sum_by_halves(partial, ROWS: tl.constexpr, BLOCK_B: tl.constexpr, SPLIT: tl.constexpr):
    """(SPLIT, ROWS, BLOCK_B) to (BLOCK_B, ROWS), by halves: tl.sum would leave all warps with all of the tile."""
    total = tl.permute(partial, (2, 1, 0))
    tl.static_assert(SPLIT == 2 or SPLIT == 4 or SPLIT == 8 or SPLIT == 16)
    if SPLIT == 16:
        even, odd = tl.split(tl.reshape(total, (BLOCK_B, ROWS, 8, 2)))
        total = even + odd
    if SPLIT >= 8:
        even, odd = tl.split(tl.reshape(total, (BLOCK_B, ROWS, 4, 2)))
        total = even + odd
    if SPLIT >= 4:
        even, odd = tl.split(tl.reshape(total, (BLOCK_B, ROWS, 2, 2)))
        total = even + odd
    even, odd = tl.split(tl.reshape(total, (BLOCK_B, ROWS, 2)))
    return even + odd


@triton.jit
def zero_sums(TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK_B: tl.constexpr, SPLIT: tl.constexpr):
    """TILES sums to add products to: ([SPLIT,] ROWS, BLOCK_B) each."""
    sums = ()
    for _ in tl.static_range(TILES):
        if SPLIT == 1:
            sums = sums + (tl.zeros((ROWS, BLOCK_B), tl.float32),)
        else:
            sums = sums + (tl.zeros((SPLIT, ROWS, BLOCK_B), tl.float32),)
    return sums


@triton.jit
def add_product(
    sums,
    w,
    chunks,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """To each of the `sums` the operands FIRST to LAST of the resident w, tiles ([SPLIT,] ROWS, columns), one for each sum in
    turn, times those of the chunks, ([SPLIT,] BLOCK_B, columns).

    The weights' rows are the rows of the product, because the tensor cores of sm_90 and later want 64 of those and take few
    columns: the batch.
    """
    for j in tl.static_range(FIRST, LAST):
        if SPLIT == 1:
            chunk = tl.trans(chunks[j])
        else:
            chunk = tl.permute(chunks[j], (0, 2, 1))
        larger = ()
        for i in tl.static_range(len(sums)):
            larger = larger + (dot(w[j * len(sums) + i], chunk, sums[i], PRECISION, EMULATE_BF16),)
        sums = larger
    return sums


@triton.jit
def sum_parts(sums, ROWS: tl.constexpr, BLOCK_B: tl.constexpr, SPLIT: tl.constexpr):
    """The sums over all parts, (BLOCK_B, ROWS), from a tile ([SPLIT,] ROWS, BLOCK_B)."""
    if SPLIT == 1:
        return tl.trans(sums)
    else:
        return _sum_by_halves(sums, ROWS, BLOCK_B, SPLIT)
