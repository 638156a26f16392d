"""Recomputes the activations that backward needs, for all steps of a chunk at once: no state waits for another here.

    saved_t = cell.forward(W_ih x_t + b_ih, W_hh h_{t-1} + b_hh)

Every h_{t-1} is known, as it is forward's output. So each of the two sides is one product over all rows, made outside of this
kernel. What a cell saves follows from its two sides alone, not from the state that they update.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.maths import round_to
from rnnfast.kernels.runtime import Launcher, as_a_gpu, emulates_bf16

__all__ = ["compute", "recompute_kernel"]

BLOCK_H = 256


@triton.jit
def recompute_kernel(
    x_ptr,  # (M, rows, G * H) float32, W_ih x_t
    h_ptr,  # (M, rows, G * H) float32, W_hh h_{t-1}
    bias_x_ptr,  # (M, G * H) b_ih
    bias_h_ptr,  # (M, G * H) b_hh
    saved_ptr,  # (M, rows, SAVED * H), written
    H,
    CELL: tl.constexpr,
    G: tl.constexpr,
    SAVED: tl.constexpr,
    CARRIES_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    member = tl.program_id(2)
    row = member.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = offs_h < H
    x_gates = ()
    h_gates = ()
    for g in tl.static_range(G):
        x_gate = tl.load(x_ptr + row * (G * H) + g * H + offs_h, mask=mask, other=0.0)
        h_gate = tl.load(h_ptr + row * (G * H) + g * H + offs_h, mask=mask, other=0.0)
        if HAS_BIAS:
            x_gate += tl.load(bias_x_ptr + (member * G + g) * H + offs_h, mask=mask, other=0.0).to(tl.float32)
            h_gate += tl.load(bias_h_ptr + (member * G + g) * H + offs_h, mask=mask, other=0.0).to(tl.float32)
        x_gates = x_gates + (x_gate,)
        h_gates = h_gates + (h_gate,)
    state = tl.zeros((BLOCK_H,), tl.float32)
    states = (state,)
    if CARRIES_C:
        states = states + (state,)
    _, saved = CELL(x_gates, h_gates, states, ())
    for s in tl.static_range(SAVED):
        tile = round_to(saved[s], saved_ptr.dtype.element_ty, EMULATE_BF16)
        tl.store(saved_ptr + row * (SAVED * H) + s * H + offs_h, tile, mask=mask)


@functools.cache
def _launcher(cell: Cell, has_bias: bool, dtype) -> Launcher:
    constants = {
        "CELL": cell.forward,
        "G": cell.gates,
        "SAVED": cell.saved,
        "CARRIES_C": cell.carried > 0,
        "HAS_BIAS": has_bias,
        "EMULATE_BF16": emulates_bf16(dtype),
        "BLOCK_H": BLOCK_H,
    }
    return Launcher(recompute_kernel, constants, num_warps=4)


@as_a_gpu
def compute(cell: Cell, x, h, bias_x, bias_h, saved) -> None:
    """Fill `saved` for some steps of each of M members. All tensors contiguous and on one device.

    Args:
        cell: the cell, from `rnnfast.kernels.cells.CELLS`.
        x, h: (M, n, B, G * H) float32, W_ih x_t and W_hh h_{t-1}.
        bias_x, bias_h: (M, G * H), b_ih and b_hh, or both None.
        saved: (M, n, B, cell.saved * H), written.
    """
    M, n, B, width = saved.shape
    H = width // cell.saved
    has_bias = bias_x is not None
    bias_x, bias_h = (bias_x, bias_h) if has_bias else (x, x)
    _launcher(cell, has_bias, saved.dtype)((n * B, -(-H // BLOCK_H), M), x, h, bias_x, bias_h, saved, H)
