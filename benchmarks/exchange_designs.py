"""Ways for the programs of a persistent kernel to hand one another a step's result, compiled for absent GPUs and compared by count.

    python -m benchmarks.exchange_designs [--arch 90] [--json FILE]

One LSTM recurrence in float16 with resident weights, as the persistent forward kernel computes it, four ways:

    data      each word is its own flag: polled until none is EMPTY (what the persistent kernels do)
    sentinel  the same, but one word of each producer is polled first, and all words once these are there
    flags     plain stores, then a release of the producer's step number; polled with acquire loads, then the data loaded once
    tma       flags, but the data comes by asynchronous copies (TMA) straight into shared memory

docs/exchange.md says what follows from the counts. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl

from rnnfast.kernels.cells import lstm
from rnnfast.kernels.persistent.exchange import over_parts, over_rows, poll, product, publish
from rnnfast.kernels.persistent.forward import _load_gates, _split_gates

DESIGNS = ("data", "sentinel", "flags", "tma")
SHAPES = ((768, 16), (1024, 32), (512, 64), (512, 128))  # (H, B)
# Triton 3.6 has no atomic loads and stores: there an exchange releases, and an addition of zero acquires
LOADS_AND_STORES = tl.constexpr(hasattr(tl, "atomic_load"))


@triton.jit
def _all_words_of(pointers, mask):
    """Poll a vector of words, one of each producer, until none is EMPTY."""
    words = tl.load(pointers, mask=mask, other=0, volatile=True)
    while tl.min(words.to(tl.uint32, bitcast=True) ^ 0xFFFFFFFF, axis=0) == 0:
        words = tl.load(pointers, mask=mask, other=0, volatile=True)


@triton.jit
def _release(flag_ptr, value):
    """Every store of this program so far becomes visible before the flag does."""
    tl.debug_barrier()
    if LOADS_AND_STORES:
        tl.atomic_store(flag_ptr, value, sem="release", scope="gpu")
    else:
        tl.atomic_xchg(flag_ptr, value, sem="release", scope="gpu")


@triton.jit
def _load_flags(pointers, mask, value):
    if LOADS_AND_STORES:
        flags = tl.atomic_load(pointers, mask=mask, sem="acquire", scope="gpu")
    else:
        flags = tl.atomic_add(pointers, tl.zeros_like(mask).to(tl.int32), mask=mask, sem="acquire", scope="gpu")
    return tl.where(mask, flags, value)


@triton.jit
def _acquire(pointers, mask, value):
    """Until every flag has `value` or more."""
    while tl.min(_load_flags(pointers, mask, value), axis=0) < value:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["steps", "B"])
def exchange_kernel(
    x_ptr,  # (T, B, 4 * H) float32, W_ih x_t and the biases
    w_ptr,  # (4 * H, H) W_hh
    h_ptr,  # (T, B, H) h_t; EMPTY on entry for "data" and "sentinel"
    flags_ptr,  # (batch tiles, UNITS) int32, steps finished by each program; zero on entry
    steps,
    B,
    H: tl.constexpr,
    DESIGN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRODUCERS: tl.constexpr,
):
    UNITS: tl.constexpr = H // BLOCK_H
    CHUNKS: tl.constexpr = H // BLOCK_K
    ROWS: tl.constexpr = 4 * BLOCK_H
    WORDS: tl.constexpr = H // 2
    offs_b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_word = tl.program_id(0) * (BLOCK_H // 2) + tl.arange(0, BLOCK_H // 2)
    offs_row = tl.arange(0, ROWS)
    producers = tl.arange(0, PRODUCERS)
    mask = (offs_b < B)[:, None]
    batch = B.to(tl.int64)
    words_ptr = h_ptr.to(tl.pointer_type(tl.int32))
    flags_ptr += tl.program_id(1) * UNITS
    if DESIGN == "tma":
        blocks = tl.make_tensor_descriptor(h_ptr, [steps, B, H], [batch * H, H, 1], [1, BLOCK_B, BLOCK_K])

    w_rows = (offs_row % 4 * H + tl.program_id(0) * BLOCK_H + offs_row // 4).to(tl.int64) * H
    w = ()
    chunks = ()
    for j in tl.static_range(CHUNKS):
        w = w + (tl.load(w_ptr + over_parts(w_rows, H, BLOCK_K, 1) + j * BLOCK_K),)
        chunks = chunks + (tl.zeros((BLOCK_B, BLOCK_K), h_ptr.dtype.element_ty),)
    h = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    c = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    x_gates = _load_gates(x_ptr + offs_b.to(tl.int64)[:, None] * (4 * H) + offs_h[None, :], mask, H, 4)
    for step in range(steps):
        row = step.to(tl.int64) * batch + offs_b
        mask_next = offs_b < tl.where(step + 1 < steps, B, 0)
        x_next = x_ptr + (row + batch)[:, None] * (4 * H) + offs_h[None, :]
        x_gates_next = _load_gates(x_next, mask_next[:, None], H, 4)
        h_rows = product(w, chunks, ROWS, BLOCK_B, CHUNKS, 1, "ieee", False)
        states, _ = lstm.forward(x_gates, _split_gates(h_rows, BLOCK_B, BLOCK_H, 4), (h, c))
        c = states[1]
        rounded = states[0].to(h_ptr.dtype.element_ty)
        h = rounded.to(tl.float32)

        if DESIGN == "data" or DESIGN == "sentinel":
            publish(words_ptr + row[:, None] * WORDS + offs_word[None, :], rounded, mask, 2)
            if DESIGN == "sentinel":
                row_words = words_ptr + (step.to(tl.int64) * batch + tl.program_id(1) * BLOCK_B) * WORDS
                _all_words_of(row_words + producers * (BLOCK_H // 2), (producers < UNITS) & (step + 1 < steps))
            words = words_ptr + over_parts(row * WORDS, WORDS, BLOCK_K // 2, 1)
            chunks = poll(words, over_rows(mask_next, 1), CHUNKS, BLOCK_K // 2, h_ptr.dtype.element_ty, 2, 1)
        else:
            tl.store(h_ptr + row[:, None] * H + offs_h[None, :], rounded, mask=mask)
            _release(flags_ptr + tl.program_id(0), step + 1)
            _acquire(flags_ptr + producers, producers < UNITS, step + 1)
            chunks = ()
            for j in tl.static_range(CHUNKS):
                if DESIGN == "tma":
                    tile = blocks.load([step, tl.program_id(1) * BLOCK_B, j * BLOCK_K]).reshape(BLOCK_B, BLOCK_K)
                else:
                    tile = tl.load(h_ptr + over_parts(row * H, H, BLOCK_K, 1) + j * BLOCK_K, mask=over_rows(mask_next, 1), other=0.0)
                chunks = chunks + (tile,)
        x_gates = x_gates_next


def launch(x, w, design: str, block_b: int, block_h: int, block_k: int, **options) -> torch.Tensor:
    """h (T, B, H) of the recurrence over x (T, B, 4 * H), from zeros."""
    T, B, H = x.shape[0], x.shape[1], w.shape[1]
    h = torch.full((T * B * H // 2,), -1, dtype=torch.int32).view(w.dtype).view(T, B, H)
    units, tiles = H // block_h, -(-B // block_b)
    flags = torch.zeros(tiles, units, dtype=torch.int32)
    exchange_kernel[units, tiles](
        x, w, h, flags, T, B, H=H, DESIGN=design, BLOCK_B=block_b, BLOCK_H=block_h, BLOCK_K=block_k,
        PRODUCERS=triton.next_power_of_2(units), **options,
    )  # fmt: skip
    return h
