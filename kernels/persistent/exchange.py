"""How the programs of a persistent kernel hand one another a step's result: through global memory, the data its own flag.

The exchange buffer is filled with EMPTY words before the launch. Whoever computes a part of step t stores it, once, at an
address that belongs to step t alone; whoever needs it loads it again and again until no word is EMPTY. There is no barrier, no
counter, no fence, and no address is ever used twice, so nothing is ordered but each word with itself. What that rests on:

- Words of 32 bits, stored and loaded at that one scalar width: two 16-bit elements, or one of 32 bits.
- Strong accesses: volatile loads, and stores with ".cg", which Triton turns into ``st.global.cg`` and the assembler into a
  store to L2, where every SM looks.
- No result looks EMPTY: EMPTY is a pattern of NaNs, and `publish` stores another NaN in its place.
- num_stages=1 at the launch: Triton's pipeliner ignores volatile and would move a polling load ahead of the poll before it.

Legend: SPLIT is the number of parts that the summed axis K is cut into, so that each warp multiplies its own part, a
leading axis of every tile that has K; with SPLIT = 1 there is no such axis. A part is walked in CHUNKS of BLOCK_K.
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


@triton.jit
def over_parts(rows, PART: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr):
    """Offsets of the first WIDTH columns of each part, PART columns apart: ([SPLIT,] ROWS, WIDTH) from row offsets."""
    columns = tl.arange(0, WIDTH)
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
def _elements(words, DTYPE: tl.constexpr, PER_WORD: tl.constexpr, SPLIT: tl.constexpr):
    """The elements of a tile of words, in the order of the summed axis."""
    if PER_WORD == 1:
        return words.to(DTYPE, bitcast=True)
    else:
        even = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        odd = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        if SPLIT == 1:
            BLOCK_B: tl.constexpr = words.shape[0]
            BLOCK_K: tl.constexpr = words.shape[1] * 2
            return tl.reshape(tl.join(even, odd), (BLOCK_B, BLOCK_K))
        else:
            BLOCK_B: tl.constexpr = words.shape[1]
            BLOCK_K: tl.constexpr = words.shape[2] * 2
            return tl.reshape(tl.join(even, odd), (SPLIT, BLOCK_B, BLOCK_K))


@triton.jit
def poll(
    pointers, mask, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, PER_WORD: tl.constexpr, SPLIT: tl.constexpr
):
    """The elements of CHUNKS tiles of words, WIDTH apart, once all are there.

    All loads go out before the one check, so that a try is one round trip to L2.
    """
    words = _load_words(pointers, mask, CHUNKS, WIDTH)
    while _any_empty(words, CHUNKS):
        words = _load_words(pointers, mask, CHUNKS, WIDTH)
    chunks = ()
    for j in tl.static_range(CHUNKS):
        chunks = chunks + (_elements(words[j], DTYPE, PER_WORD, SPLIT),)
    return chunks


@triton.jit
def publish(pointers, tile, mask, PER_WORD: tl.constexpr):
    """Store `tile` (BLOCK_B, units), of the exchanged dtype, as words at `pointers` (BLOCK_B, units / PER_WORD)."""
    if PER_WORD == 1:
        words = tile.to(tl.int32, bitcast=True)
    else:
        BLOCK_B: tl.constexpr = tile.shape[0]
        PAIRS: tl.constexpr = tile.shape[1] // 2
        even, odd = tl.split(tl.reshape(tile.to(tl.int16, bitcast=True), (BLOCK_B, PAIRS, 2)))
        words = (even.to(tl.int32) & 0xFFFF) | (odd.to(tl.int32) << 16)
    words = tl.where(words == EMPTY, NOT_A_NUMBER, words)
    tl.store(pointers, words, mask=mask, cache_modifier=".cg")


@triton.jit
def _sum_parts(partial, ROWS: tl.constexpr, BLOCK_B: tl.constexpr, SPLIT: tl.constexpr):
    """(SPLIT, ROWS, BLOCK_B) to (BLOCK_B, ROWS), by halves: tl.sum would leave all warps with all of the tile."""
    total = tl.permute(partial, (2, 1, 0))
    tl.static_assert(SPLIT == 2 or SPLIT == 4 or SPLIT == 8)
    if SPLIT == 8:
        even, odd = tl.split(tl.reshape(total, (BLOCK_B, ROWS, 4, 2)))
        total = even + odd
    if SPLIT >= 4:
        even, odd = tl.split(tl.reshape(total, (BLOCK_B, ROWS, 2, 2)))
        total = even + odd
    even, odd = tl.split(tl.reshape(total, (BLOCK_B, ROWS, 2)))
    return even + odd


@triton.jit
def product(
    w,
    chunks,
    ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """The resident w, CHUNKS tiles ([SPLIT,] ROWS, BLOCK_K), times the chunks ([SPLIT,] BLOCK_B, BLOCK_K): (BLOCK_B, ROWS).

    The weights' rows are the rows of the product, because the tensor cores of sm_90 and later want 64 of those and take few
    columns: the batch.
    """
    if SPLIT == 1:
        total = tl.zeros((ROWS, BLOCK_B), tl.float32)
        for j in tl.static_range(CHUNKS):
            total = dot(w[j], tl.trans(chunks[j]), total, PRECISION, EMULATE_BF16)
        return tl.trans(total)
    else:
        partial = tl.zeros((SPLIT, ROWS, BLOCK_B), tl.float32)
        for j in tl.static_range(CHUNKS):
            partial = dot(w[j], tl.permute(chunks[j], (0, 2, 1)), partial, PRECISION, EMULATE_BF16)
        return _sum_parts(partial, ROWS, BLOCK_B, SPLIT)
