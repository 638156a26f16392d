"""Applies dropout between layers and joins two directions, in one pass. The mask is never stored.

    out[r, j] = keep[r, j] / (1 - p) * joined[r, j]        joined = the directions side by side, r a step and batch row

keep[r, j] says whether word j % 4 of Philox4x32-10 (Salmon et al., 2011) is at least p * 2^32. The counter is
(j // 4, low and high word of r, 0), the key the 64 bits of a seed. So a seed fixes the mask, whatever the tiles, the GPU
or the order of the programs, and backward makes the mask again from the seed.
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


@triton.jit(do_not_specialize=["threshold", "scale"])
def dropout_kernel(
    joined_ptr,  # (rows, W) both directions side by side: written, or in backward the gradient that is read
    first_ptr,  # (rows, H) one direction: read, or in backward written
    second_ptr,  # (rows, H) the other, if W is 2 H
    seed_ptr,  # one int64
    threshold,  # int64, p * 2^32
    scale,  # float32, 1 / (1 - p), 0 for p = 1
    H,
    W,
    BACKWARD: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    words = _draw(tl.load(seed_ptr), row, tl.program_id(1) * (BLOCK_J // 4) + tl.arange(0, BLOCK_J // 4))
    factor = tl.where(words.to(tl.int64) >= threshold, scale, 0.0)
    in_first = offs_j < H
    in_second = (offs_j >= H) & (offs_j < W)
    at_first = first_ptr + row * H + offs_j
    at_second = second_ptr + row * H + offs_j - H
    at_joined = joined_ptr + row * W + offs_j
    if BACKWARD:
        tile = tl.load(at_joined, mask=offs_j < W, other=0.0).to(tl.float32)
    else:
        tile = tl.load(at_first, mask=in_first, other=0.0).to(tl.float32)
        tile += tl.load(at_second, mask=in_second, other=0.0).to(tl.float32)
    # a select, not a product: what is dropped is 0, also of a NaN or an infinity
    tile = round_to(tl.where(factor > 0.0, tile * factor, 0.0), joined_ptr.dtype.element_ty, EMULATE_BF16)
    if BACKWARD:
        tl.store(at_first, tile, mask=in_first)
        tl.store(at_second, tile, mask=in_second)
    else:
        tl.store(at_joined, tile, mask=offs_j < W)


@functools.cache
def _launcher(backward: bool, dtype, block: int) -> Launcher:
    constants = {"BACKWARD": backward, "EMULATE_BF16": emulates_bf16(dtype), "BLOCK_J": block}
    return Launcher(dropout_kernel, constants, num_warps=4)


@as_a_gpu
def apply(joined, first, second, seed, p: float, *, backward: bool) -> None:
    """Drop out from `first` and `second` into `joined`, or, for `backward`, from `joined` into them.

    Args:
        joined: (rows, W), contiguous, as all.
        first, second: (rows, H), with W = 2 H, or W = H and `second` None.
        seed: one int64 on their device.
        p: the probability to be dropped, 0 to 1.
    """
    rows, W = joined.shape
    block = min(BLOCK_J, max(128, triton.next_power_of_2(W)))
    _launcher(backward, joined.dtype, block)(
        (rows, -(-W // block), 1), joined, first, first if second is None else second, seed, round(p * 2**32),
        0.0 if p == 1 else 1 / (1 - p), first.shape[1], W,
    )  # fmt: skip
