"""What a program of a persistent kernel owns: BLOCK_B batch rows of BLOCK_H units, and the marks of those rows."""

import triton
import triton.language as tl

from rnnfast.kernels.marks import batch_rows


@triton.jit
def program_tile(order_ptr, b_begin, B, H, UNITS_PADDED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """The rows' places in the order of the programs, the batch rows there, the units, and a mask (BLOCK_B, BLOCK_H or 1)."""
    slots = b_begin + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (slots < B)[:, None]
    if UNITS_PADDED:
        mask = mask & (offs_h < H)[None, :]
    return slots, batch_rows(slots, order_ptr, B), offs_h, mask


@triton.jit
def packed_marks(codes_ptr, b_begin, BLOCK_B: tl.constexpr):
    """Pointer to the word of this program's rows in the first step's words of `rnnfast.kernels.marks.pack_kernel`."""
    return codes_ptr.to(tl.pointer_type(tl.int64)) + b_begin // BLOCK_B + tl.program_id(1)
