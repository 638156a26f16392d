"""Products without tensor cores, for float32 that is not TF32: each thread multiplies and adds by itself.

A program of HP units cuts the summed axis into P parts of KP units. Thread HP p + u has, of each gate, the weights between unit
u and the units of part p. It multiplies them with part p of the operand; then the P sums of a unit meet in shared memory.

With 4 or 2 rows a program, cells (tiles.py) are in the order of units and rows: a reshape makes them [HP, R].
"""

import triton
import triton.language as tl

from rnnfast.kernels.maths import dot
from rnnfast.kernels.one_program.tiles import rows_of_thread
from rnnfast.kernels.one_program.weights import joined


@triton.jit
def plain_weights(w_ptr, g: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, BACKWARD: tl.constexpr):
    """The weights of gate g, [P, HP, KP]: rows of a unit forward, columns of it backward."""
    KP: tl.constexpr = HP // P
    V: tl.constexpr = 1 if BACKWARD or H % 4 else 4
    thread = tl.arange(0, HP * P)[:, None]
    unit = thread % HP
    pieces = ()
    for i in tl.static_range(KP // V):
        k = thread // HP * KP + i * V + tl.arange(0, V)[None, :]
        row, column = (k, unit) if BACKWARD else (unit, k)
        at = w_ptr + (g * H + row).to(tl.int64) * H + column
        pieces = pieces + (tl.load(at, mask=(row < H) & (column < H), other=0.0),)
    t = tl.reshape(joined(pieces), (HP * P, V, KP // V))
    return tl.reshape(tl.permute(t, (0, 2, 1)), (P, HP, KP))


@triton.jit
def plain_product(w, tile, P: tl.constexpr, R: tl.constexpr):
    """w [P, HP, KP] times cells: the sums of each part, [P, HP, R]."""
    HP: tl.constexpr = w.shape[1]
    operand = tl.reshape(tile, (P, HP // P, R))
    return dot(w, operand, tl.zeros((P, HP, R), tl.float32), "ieee", False)


@triton.jit
def sum_plain(parts, P: tl.constexpr, R: tl.constexpr):
    """The sums of the parts of the summed axis [P, HP, R], of each gate: added in a fixed order, as cells of each."""
    sums = ()
    for first in tl.static_range(0, len(parts), 4):
        some = ()
        for g in tl.static_range(first, min(first + 4, len(parts))):
            some = some + (parts[g],)
        sums = sums + _sum_plain(some, P, R)
    return sums


@triton.jit
def _sum_plain(parts, P: tl.constexpr, R: tl.constexpr):
    """`sum_plain` of up to four gates."""
    G: tl.constexpr = len(parts)
    HP: tl.constexpr = parts[0].shape[1]
    if G == 1:
        t = parts[0][:, :, :, None]
    elif G == 2:
        t = tl.join(parts[0], parts[1])
    else:  # the last of three takes the fourth place too
        t = tl.reshape(tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[G - 1])), (P, HP, R, 4))
    GATES: tl.constexpr = t.shape[3]
    t = tl.permute(t, (1, 2, 3, 0))  # HP R GATES P: through shared memory
    for _ in tl.static_range(4):
        if t.shape[3] > 1:
            a, b = tl.split(tl.reshape(t, (HP, R, GATES, t.shape[3] // 2, 2)))
            t = a + b
    t = tl.reshape(t, (2 * HP, 1, rows_of_thread(R), GATES))
    if G == 1:
        return (tl.reshape(t, (2 * HP, 1, rows_of_thread(R))),)
    elif G == 2:
        return tl.split(t)
    else:
        even, odd = tl.split(tl.reshape(t, (2 * HP, 1, rows_of_thread(R), 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        if G == 3:
            return a, b, c
        else:
            return a, b, c, d
