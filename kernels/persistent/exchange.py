"""How the programs of a persistent kernel hand one another a step's result: through global memory, the data its own flag.

The exchange buffer is filled with EMPTY words before the launch. Whoever computes a part of step t stores it, once, at an
address that belongs to step t alone; whoever needs it loads it again and again until no word is EMPTY. There is no barrier, no
counter, no fence, and no address is ever used twice, so the only order needed is that of each word with itself. It rests on:

- Words of 32 bits, stored and loaded at that one scalar width: two 16-bit elements, or one of 32 bits.
- Strong accesses: volatile loads, and stores with ".cg", which Triton turns into ``st.global.cg`` and the assembler into a
  store to L2, where every SM looks.
- No result looks EMPTY: EMPTY is a pattern of NaNs, and `publish` stores another NaN in its place.
- num_stages=1 at the launch: Triton's pipeliner ignores volatile and would move a polling load ahead of the poll before it.

Legend: SPLIT is the number of parts that the summed axis K is cut into, so that each warp multiplies its own part, a
leading axis of every tile that has K; with SPLIT = 1 there is no such axis. A part is loaded in CHUNKS of BLOCK_K, all of one
shape, so that one check of all is cheap, and multiplied in OPERANDS of up to JOIN chunks: each takes a pass through shared
memory with a barrier before and after.
"""

import triton
import triton.language as tl

from rnnfast.kernels.maths import dot

EMPTY = tl.constexpr(-1)
NOT_A_NUMBER = tl.constexpr(0x7FFF7FFF)  # two NaNs of either 16-bit type, or one float32 NaN


@triton.jit(do_not_specialize=["words"])
def clear_kernel(exchange_ptr, words, BLOCK: tl.constexpr):
    """Fills `words` 32-bit words with EMPTY."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(exchange_ptr.to(tl.pointer_type(tl.int32)) + offs, tl.full((BLOCK,), EMPTY, tl.int32), mask=offs < words)


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


@triton.jit
def columns(FIRST: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, PER_WORD: tl.constexpr):
    """Where the columns of an operand lie along its part of K: TILES chunks from number FIRST on, word by word in turn."""
    k = tl.arange(0, TILES * BLOCK_K)
    if TILES == 1:
        return FIRST * BLOCK_K + k
    else:
        word = k // PER_WORD
        return (FIRST + word % TILES) * BLOCK_K + (word // TILES * PER_WORD + k % PER_WORD)


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
def _load_words(pointers, mask, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    words = ()
    for j in tl.static_range(CHUNKS):
        words = words + (tl.load(pointers + j * WIDTH, mask=mask, other=0, volatile=True),)
    return words


@triton.jit
def _any_empty(words, CHUNKS: tl.constexpr):
    """EMPTY is the largest word of all if read as unsigned, so one maximum a word finds it."""
    largest = words[0].to(tl.uint32, bitcast=True)
    for j in tl.static_range(1, CHUNKS):
        largest = tl.maximum(largest, words[j].to(tl.uint32, bitcast=True))
    return tl.max(tl.ravel(largest), axis=0) == 0xFFFFFFFF


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
def _join(words, FIRST: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr):
    """TILES tiles of words from number FIRST on as one, in the order of `columns`: in registers, where it costs nothing."""
    tiles = ()
    for i in tl.static_range(TILES):
        tiles = tiles + (words[FIRST + i],)
    for level in tl.static_range(1, 6):
        if TILES >> level > 0:
            halves = ()
            for i in tl.static_range(TILES >> level):
                halves = halves + (_in_turn(tiles[i], tiles[i + (TILES >> level)], SPLIT),)
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
    """CHUNKS tiles of words as the operands of `product`."""
    chunks = ()
    for j in tl.static_range(CHUNKS):
        if joined(j, CHUNKS, JOIN) > 0:
            chunks = chunks + (_elements(_join(words, j, joined(j, CHUNKS, JOIN), SPLIT), DTYPE, PER_WORD, SPLIT),)
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


@triton.jit
def poll(
    pointers,
    mask,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    JOIN: tl.constexpr,
    DTYPE: tl.constexpr,
    PER_WORD: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """CHUNKS tiles of words, WIDTH apart, as operands, once all words are there.

    All loads go out before the one check, so that a try is one round trip to L2.
    """
    words = _load_words(pointers, mask, CHUNKS, WIDTH)
    while _any_empty(words, CHUNKS):
        words = _load_words(pointers, mask, CHUNKS, WIDTH)
    return as_operands(words, CHUNKS, JOIN, DTYPE, PER_WORD, SPLIT)


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
    """The sums over all parts, (BLOCK_B, ROWS): of one tile, or of three (SPLIT, ROWS // 4, BLOCK_B) row by row in turn, with
    zeros in the fourth place."""
    if SPLIT == 1:
        return tl.trans(sums[0])
    elif len(sums) == 1:
        return _sum_by_halves(sums[0], ROWS, BLOCK_B, SPLIT)
    else:
        tl.static_assert(len(sums) == 3)
        joined = tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], tl.zeros_like(sums[0])))
        joined = tl.permute(tl.reshape(joined, (SPLIT, ROWS // 4, BLOCK_B, 4)), (0, 1, 3, 2))
        return _sum_by_halves(tl.reshape(joined, (SPLIT, ROWS, BLOCK_B)), ROWS, BLOCK_B, SPLIT)
