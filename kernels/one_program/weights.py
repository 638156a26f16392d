"""The weights, loaded as the tensor core wants them: straight into the registers of the product, not through shared memory.

HMMA takes 16 rows x 32 bytes of the summed axis. Of these thread 4 l + q of a warp has rows l and l + 8, and of each the places

    of half precision   2 q + e + 8 f        of TF32   q + 4 f + 8 e (in two instructions)        e, f = 0, 1

The units are numbered so (`unit_of`) that row 8 u + l is unit 2 l + u, and place 8 b + a of the summed axis unit 2 a + b. So
the four places of a thread are the units 4 q + 2 e + f, or with TF32 8 f + 2 q + e. A tile of loads is [threads, neighbours in
memory], as in tiles.py, one for each value of the other bits.
"""

import triton
import triton.language as tl


@triton.jit
def joined(pieces):
    """2^n tiles [threads, V] as one [threads, V, 2, ..., 2]: the last axes, row by row, count the tiles."""
    for _ in tl.static_range(8):
        if len(pieces) > 1:
            halves = ()
            for i in tl.static_range(len(pieces) // 2):
                halves = halves + (tl.join(pieces[i], pieces[i + len(pieces) // 2]),)
            pieces = halves
    return pieces[0]


@triton.jit
def _threads(W: tl.constexpr):
    """Of each thread, [32 W, 1]: the first unit of its warp, l and q."""
    thread = tl.arange(0, 32 * W)[:, None]
    return thread // 32 * 16, thread // 4 % 8, thread % 4


@triton.constexpr_function
def _place(i, HALF):
    """The unit of place i of a thread's four, from that of its first: i is 2 e + f, or 2 f + e with TF32."""
    return i if HALF else i // 2 * 8 + i % 2


@triton.jit
def forward_weights(w_ptr, g: tl.constexpr, H: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr):
    """The rows of gate g, [W, 16, 16 W]: a warp has those of its units."""
    V: tl.constexpr = 1 if H % 2 else 4 if H % 4 == 0 and HALF else 2
    warp, l, q = _threads(W)
    k = (4 * q if HALF else 2 * q) + tl.arange(0, V)[None, :]
    pieces = ()
    for i in tl.static_range(8 * W // V):  # blocks of 16 units, u, places
        row = warp + 2 * l + i // (4 // V) % 2
        unit = k + (i // (8 // V) * 16 + _place(i % (4 // V) * V, HALF))
        at = w_ptr + (g * H + row).to(tl.int64) * H + unit
        pieces = pieces + (tl.load(at, mask=(row < H) & (unit < H), other=0.0),)
    t = joined(pieces)
    if V == 4:
        t = tl.permute(tl.reshape(t, (W, 8, 4, 2, 2, W, 2)), (0, 6, 1, 5, 4, 2, 3))  # W l q e f block u
    elif V == 2 and HALF:
        t = tl.permute(tl.reshape(t, (W, 8, 4, 2, W, 2, 2)), (0, 5, 1, 4, 3, 2, 6))  # W l q f block u e
    elif V == 2:
        t = tl.permute(tl.reshape(t, (W, 8, 4, 2, W, 2, 2)), (0, 5, 1, 4, 3, 6, 2))  # W l q e block u f
    elif HALF:
        t = tl.permute(tl.reshape(t, (W, 8, 4, W, 2, 2, 2)), (0, 4, 1, 3, 6, 2, 5))  # W l q block u e f
    else:
        t = tl.permute(tl.reshape(t, (W, 8, 4, W, 2, 2, 2)), (0, 4, 1, 3, 6, 5, 2))  # W l q block u f e
    return tl.reshape(t, (W, 16, 16 * W))


@triton.jit
def backward_weights(w_ptr, g: tl.constexpr, H: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr):
    """The columns of gate g, [W, 16 W, 16]: a warp has the rows of its own units, which it sums over."""
    V: tl.constexpr = 1 if H % 2 else 2
    warp, l, q = _threads(W)
    column = 2 * l + tl.arange(0, V)[None, :]
    pieces = ()
    for i in tl.static_range(8 * W // V):  # blocks of 16 columns, u if not side by side, places
        row = warp + (4 * q if HALF else 2 * q) + _place(i % 4, HALF)
        unit = column + (i // (8 // V) * 16 + (i // 4 % 2 if V == 1 else 0))
        at = w_ptr + (g * H + row).to(tl.int64) * H + unit
        pieces = pieces + (tl.load(at, mask=(row < H) & (unit < H), other=0.0),)
    t = joined(pieces)
    if V == 2 and HALF:
        t = tl.permute(tl.reshape(t, (W, 8, 4, 2, W, 2, 2)), (0, 4, 3, 1, 6, 2, 5))  # W l q u block e f
    elif V == 2:
        t = tl.permute(tl.reshape(t, (W, 8, 4, 2, W, 2, 2)), (0, 4, 3, 1, 6, 5, 2))  # W l q u block f e
    elif HALF:
        t = tl.permute(tl.reshape(t, (W, 8, 4, W, 2, 2, 2)), (0, 3, 4, 1, 6, 2, 5))  # W l q block u e f
    else:
        t = tl.permute(tl.reshape(t, (W, 8, 4, W, 2, 2, 2)), (0, 3, 4, 1, 6, 5, 2))  # W l q block u f e
    return tl.reshape(t, (W, 16 * W, 16))
