"""The states before a step, as both step kernels read them."""

import triton
import triton.language as tl

__all__ = ["before"]


@triton.jit
def before(
    states_ptr, row_size, start_ptr, start_size, t_before, is_first, offs_b, B, HAS_MARKS: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Pointers to each batch row of the state before a step: step t_before of states (T, B, row_size), or start
    (B, start_size) before the first. With marks that choice is `entering`'s. ALIGNED: as there."""
    if HAS_MARKS:
        return states_ptr + (t_before.to(tl.int64) * B + offs_b) * row_size
    else:
        size = tl.where(is_first, start_size, row_size)
        before = tl.where(is_first, 0, t_before).to(tl.int64) * B * size
        rows = tl.where(is_first, start_ptr, states_ptr) + before + offs_b.to(tl.int64) * size
        if ALIGNED:
            rows = tl.multiple_of(rows, 16)
        return rows
