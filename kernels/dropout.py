"""Applies dropout between layers, in one pass. The mask is never stored.

    out[r, j] = keep[r, j] / (1 - p) * x[r, j]        r a step and batch row, j a unit; two directions lie side by side in a row

keep[r, j] says whether word j % 4 of Philox4x32-10 (Salmon et al., 2011) is at least p * 2^32. The counter is
(j // 4, low and high word of r, 0), the key the 64 bits of a seed. So a seed fixes the mask, whatever the tiles, the GPU
or the order of the programs, and backward, which is the same function of the gradient, makes the mask again from the seed.
The layers of a pipeline (`rnnfast.kernels.groups`) have a seed each, and one launch serves a chunk of each of them.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from rnnfast.kernels.maths import round_to
from rnnfast.kernels.runtime import Launcher, as_a_gpu, emulates_bf16

__all__ = ["apply", "dropout_kernel"]

BLOCK_J = 1024  # columns to a program, less for a layer that has less


@triton.jit
def _draw(seed, row, group):
    """The four words of each group of four columns, side by side."""
    zero = tl.zeros_like(group)
    low = (row & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = (row >> 32).to(tl.int32)
    first, second, third, fourth = tl.philox(seed, group, zero + low, zero + high, zero)
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (group.shape[0] * 4,))


@triton.jit(do_not_specialize=["total", "begin", "lag", "threshold", "scale"])
def dropout_kernel(
    x_ptr,  # (members, rows, W), the members x_stride elements apart
    out_ptr,  # likewise, out_stride apart, written
    seeds_ptr,  # (members,) int64
    x_stride,
    out_stride,
    total,  # counters of a whole sequence
    begin,  # counter of member 0's first row
    lag,  # from a member's counter to the next one's
    threshold,  # int64, p * 2^32
    scale,  # float32, 1 / (1 - p), 0 for p = 1
    W,
    EMULATE_BF16: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    member = tl.program_id(2).to(tl.int64)
    counter = begin + member * lag + row
    if (counter < 0) | (counter >= total):
        return
    offs_j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    mask = offs_j < W
    words = _draw(tl.load(seeds_ptr + member), counter, tl.program_id(1) * (BLOCK_J // 4) + tl.arange(0, BLOCK_J // 4))
    factor = tl.where(words.to(tl.int64) >= threshold, scale, 0.0)
    tile = tl.load(x_ptr + member * x_stride + row * W + offs_j, mask=mask, other=0.0).to(tl.float32)
    # a select, not a product: what is dropped is 0, also of a NaN or an infinity
    tile = round_to(tl.where(factor > 0.0, tile * factor, 0.0), out_ptr.dtype.element_ty, EMULATE_BF16)
    tl.store(out_ptr + member * out_stride + row * W + offs_j, tile, mask=mask)


@functools.cache
def _launcher(dtype, block: int) -> Launcher:
    return Launcher(dropout_kernel, {"EMULATE_BF16": emulates_bf16(dtype), "BLOCK_J": block}, num_warps=4)


@as_a_gpu
def apply(x, out, seeds, p: float, total: int, begin: int = 0, lag: int = 0) -> None:
    """Drop out from rows of `x` into `out`, which may be `x`; for backward, from rows of the gradient.

    Row r of member k has the counter begin + k * lag + r, which is that of a step and batch row: t * B + b. So a chunk of a
    pipeline's layers (`rnnfast.kernels.groups`) gets the masks that each layer gets at once. Rows whose counter is below 0 or
    from `total` on are neither read nor written.

    Args:
        x, out: (K, n, W) of one dtype, on one device. Each member contiguous, at any distance from the next.
        seeds: (K,) int64 on their device.
        p: the probability to be dropped, 0 to 1.
        total: the counters of a whole sequence, T * B.
        begin, lag: see above.
    """
    K, n, W = x.shape
    block = min(BLOCK_J, max(128, triton.next_power_of_2(W)))
    _launcher(out.dtype, block)(
        (n, -(-W // block), K), x, out, seeds, x.stride(0), out.stride(0), total, begin, lag, round(p * 2**32),
        0.0 if p == 1 else 1 / (1 - p), W,
    )  # fmt: skip
