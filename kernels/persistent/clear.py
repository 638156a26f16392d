"""Fills what a launch exchanges through with EMPTY, for all members of a group at once."""

import triton
import triton.language as tl

from rnnfast.kernels.groups import place
from rnnfast.kernels.persistent.exchange import EMPTY


@triton.jit(do_not_specialize=["begin", "lag", "N", "T", "flips", "rows", "sum_words"])
def clear_kernel(
    # (M, T, rows, WORDS) words of 32 bits; if OF_CHUNK (M, N, rows, WORDS); of two directions (T, rows, 2, WORDS)
    exchange_ptr,
    sums_ptr,  # (M, N, sum_words) words, or None
    begin,  # these five as `place` has them
    lag,
    N,
    T,
    flips,
    rows,  # of a step
    sum_words,
    WORDS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    OF_CHUNK: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each member the rows of the steps that the launch runs, and nothing else."""
    member = tl.program_id(2)
    _, t, dt, steps, t_x = place(begin, lag, N, T, flips, member, BACKWARD)
    first = (t_x if OF_CHUNK else t) + tl.minimum(dt, 0) * (steps - 1)  # in time
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    empty = tl.full((BLOCK,), EMPTY, tl.int32)
    words = steps.to(tl.int64) * rows * WORDS
    if DIRECTIONS > 1:
        at = offs // WORDS * (DIRECTIONS * WORDS) + offs % WORDS
        at += (first.to(tl.int64) * rows * DIRECTIONS + member) * WORDS
    else:
        at = offs + (member.to(tl.int64) * (N if OF_CHUNK else T) + first) * rows * WORDS
    tl.store(exchange_ptr.to(tl.pointer_type(tl.int32)) + at, empty, mask=offs < words)
    if sums_ptr is not None:
        at = offs + member.to(tl.int64) * N * sum_words
        tl.store(sums_ptr.to(tl.pointer_type(tl.int32)) + at, empty, mask=offs < steps.to(tl.int64) * sum_words)
