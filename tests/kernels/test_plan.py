"""Launch plans are pure functions: their promises hold for every size."""

from hypothesis import given
from hypothesis import strategies as st

from rnnfast.kernels.step import plan


@given(
    H=st.integers(1, 10_000),
    itemsize=st.sampled_from([2, 4]),
    precision=st.sampled_from(["ieee", "tf32"]),
    B=st.integers(1, 10**6),
)
def test_step_plan(H, itemsize, precision, B):
    """The grid covers every row and unit once, no tile is below tl.dot's least, and powers of two throughout."""
    tiles = plan.step_plan(H, itemsize, precision)
    assert tiles == plan.step_plan(H, itemsize, precision)
    rows, units, _ = tiles.grid(B, H)
    assert (rows - 1) * tiles.BLOCK_B < B <= rows * tiles.BLOCK_B
    assert (units - 1) * tiles.BLOCK_H < H <= units * tiles.BLOCK_H
    for size in (tiles.BLOCK_B, tiles.BLOCK_H, tiles.BLOCK_K):
        assert size >= 16 and size & (size - 1) == 0
