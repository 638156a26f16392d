"""Recomputes the activations that backward needs, for all steps of a chunk at once: no state waits for another here.

    saved_t = cell.forward(W_ih x_t + b_ih, W_hh h_{t-1} + b_hh, states_{t-1}, given_t)

Every state is known, as it is forward's output. So each of the two sides is one product over all rows, made outside of this
kernel. What a cell saves may follow from its two sides alone, as that of the built-in cells. Then the loads of h_{t-1} are dead
code, which Triton removes, and the carried states need not be given.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.given import Given, held_tiles, noise_tiles, row_mean
from rnnfast.kernels.maths import round_to
from rnnfast.kernels.runtime import Launcher, as_a_gpu, emulates_bf16
from rnnfast.kernels.step.plan import row_tiles

__all__ = ["compute", "recompute_kernel"]

BLOCK_H = 256


@triton.jit(do_not_specialize=["first", "B"])
def recompute_kernel(
    x_ptr,  # (M, n, B, G * H) float32, W_ih x_t
    h_ptr,  # (M, n, B, G * H) float32, W_hh h_{t-1}; None without W_hh
    bias_x_ptr,  # (M, G * H) b_ih
    bias_h_ptr,  # (M, G * H) b_hh
    states_h_ptr,  # (M, n, B, H) h_{t-1}
    states_c_ptr,  # (M, n, B, CARRIED * H) float32, c_{t-1}; None for zeros
    given_ptrs,  # `Given`
    saved_ptr,  # (M, n, B, SAVED * H), written
    first,  # the first of the n steps
    B,
    H,
    CELL: tl.constexpr,
    G: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIED: tl.constexpr,
    HELD: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    member = tl.program_id(2)
    offs_r = tl.program_id(0) + tl.arange(0, 1)  # one row, so that tiles are as in other kernels
    row = member.to(tl.int64) * tl.num_programs(0) + offs_r
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    mask = mask_h[None, :]
    x_gates = ()
    h_gates = ()
    for g in tl.static_range(G):
        at = row[:, None] * (G * H) + g * H + offs_h[None, :]
        x_gate = tl.load(x_ptr + at, mask=mask, other=0.0)
        if bias_x_ptr is not None:
            x_gate += tl.load(bias_x_ptr + (member * G + g) * H + offs_h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
        x_gates = x_gates + (x_gate,)
        if h_ptr is not None:
            h_gate = tl.load(h_ptr + at, mask=mask, other=0.0)
            if bias_h_ptr is not None:
                h_gate += tl.load(bias_h_ptr + (member * G + g) * H + offs_h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
            h_gates = h_gates + (h_gate,)
    states = (tl.load(states_h_ptr + row[:, None] * H + offs_h[None, :], mask=mask, other=0.0).to(tl.float32),)
    if states_c_ptr is not None:
        states = states + held_tiles(states_c_ptr + row * (CARRIED * H), offs_h, mask, H, CARRIED)
    else:
        for _ in tl.static_range(CARRIED):
            states = states + (tl.zeros((1, BLOCK_H), tl.float32),)
    given = ()
    if HELD:
        held_rows = given_ptrs.held + (member.to(tl.int64) * B + offs_r % B) * (HELD * H)
        given = held_tiles(held_rows, offs_h, mask, H, HELD)
    if NOISE:
        rows = first.to(tl.int64) * B + offs_r[:, None]
        given = given + noise_tiles(given_ptrs.seeds + member, rows, offs_h[None, :], NOISE)
    if ROWS:
        _, saved = CELL(x_gates, h_gates, states, given, (mask, H), row_mean)
    else:
        _, saved = CELL(x_gates, h_gates, states, given)
    for s in tl.static_range(SAVED):
        tile = round_to(saved[s], saved_ptr.dtype.element_ty, EMULATE_BF16)
        tl.store(saved_ptr + row[:, None] * (SAVED * H) + s * H + offs_h[None, :], tile, mask=mask)


@functools.cache
def _launcher(cell: Cell, block_h: int, warps: int, dtype) -> Launcher:
    constants = {
        "CELL": cell.forward,
        "G": cell.gates,
        "SAVED": cell.saved,
        "CARRIED": cell.carried,
        "HELD": cell.held,
        "NOISE": cell.noise,
        "ROWS": cell.rows,
        "EMULATE_BF16": emulates_bf16(dtype),
        "BLOCK_H": block_h,
    }
    return Launcher(recompute_kernel, constants, num_warps=warps)


@as_a_gpu
def compute(cell: Cell, x, h, bias_x, bias_h, saved, states_h, states_c, given: Given, starts: list[int]) -> None:
    """Fill `saved` for n steps of each of M members. All tensors contiguous and on one device.

    Rows of x, h and the states at which no step runs may hold anything. What comes of them means nothing.

    Args:
        cell: the cell, which saves something.
        x, h: (M, n, B, G * H) float32, W_ih x_t and W_hh h_{t-1}; h is None for a cell without W_hh.
        bias_x, bias_h: (M, G * H), b_ih and b_hh; each may be None.
        saved: (M, n, B, cell.saved * H), written.
        states_h: (M, n, B, H), the h that enters each step.
        states_c: (M, n, B, cell.carried * H) float32, the carried states that enter each step; None if the cell has none, or
            if what it saves does not follow from them.
        given: as in the families' `forward`.
        starts: of each member, the first of its n steps, in time. It may lie before the sequence.
    """
    M, n, B, width = saved.shape
    H = width // cell.saved
    block_h, warps = row_tiles(H) if cell.rows else (BLOCK_H, 4)
    launcher = _launcher(cell, block_h, warps, saved.dtype)
    whole = (x, h, bias_x, bias_h, states_h, states_c, given.held, given.seeds, saved)
    # the noise of a step is that of its place in the sequence: a launch for each member
    parts = [slice(m, m + 1) for m in range(M)] if cell.noise else [slice(None)]
    for part, first in zip(parts, starts, strict=False):
        *inputs, held, seeds, out = (None if tensor is None else tensor[part] for tensor in whole)
        launcher((n * B, -(-H // block_h), len(out)), *inputs, Given(held, seeds), out, first, B, H)
