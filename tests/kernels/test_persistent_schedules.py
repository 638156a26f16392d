"""The persistent kernels under random schedules: a few here, hundreds with `make schedules`, sizes and plans at random."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import schedules
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recurrence import Layer, assert_close, steps_of, tiles
from support.side_by_side import together

from rnnfast.kernels import persistent, runtime, step
from rnnfast.kernels.cells import CELLS
from rnnfast.kernels.persistent.plan import PersistentPlan

pytestmark = pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1")


HERE = {"LSTM": "float16", "GRU": "float32", "RNN": "bfloat16"}  # the sweep has each cell in each dtype
PAIRS = [
    pytest.param(cell, dtype, marks=() if HERE[cell] == dtype else pytest.mark.sweep)
    for cell in schedules.CELLS
    for dtype in schedules.DTYPES
]


@pytest.mark.parametrize(("cell", "dtype"), PAIRS)
def test_any_schedule(cell, dtype):
    """Grids of 16 programs, both designs of backward: the same bits from schedule to schedule, within the numerics contract."""
    outcome = schedules.run(cell, dtype, schedules.PARTS, range(2))
    assert outcome.grids == ((8, 2, 1),) * (1 + len(schedules.PARTS))
    assert outcome.switches > 500 and outcome.late_words > 1000
    assert outcome.ok, outcome


@pytest.mark.parametrize("cell", ["RNN", *(pytest.param(cell, marks=pytest.mark.sweep) for cell in ("LSTM", "GRU"))])
def test_any_schedule_of_both_directions(cell):
    """Grids of 32 programs, 16 a direction."""
    outcome = schedules.run(cell, "float16", schedules.PARTS, range(2), "directions")
    assert outcome.grids == ((8, 2, 2),) * (1 + len(schedules.PARTS))
    assert outcome.ok, outcome


def test_outcomes_add_up():
    """What `make schedules` concludes from: other bits, or one error too large, are not ok."""
    one = schedules.run("RNN", "float32", (1,), range(1))
    assert one.ok and (one + one).schedules == 2
    other_bits = schedules.replace(one, digests=frozenset(["other"]))
    assert not (one + other_bits).ok and "2 DIFFERENT RESULTS" in str(one + other_bits)
    too_large = schedules.replace(one, worst=schedules.replace(one.worst, ours=2 * one.worst.allowed))
    assert not (one + too_large).ok and "TOO LARGE" in str(one + too_large)


@dataclass(frozen=True)
class Example:
    """A small layer, a plan, the time steps given at once forward and backward, and a schedule."""

    cell: str
    dtype: torch.dtype
    T: int
    B: int
    H: int
    reverse: bool
    optional: dict
    block_h: int
    split: int
    chunk: int
    gradient_chunk: int
    parts: int  # of backward's sums
    seed: int

    def plan(self, backward: bool) -> PersistentPlan:
        if backward and self.parts > 1:
            return PersistentPlan(8, 8, 16, 1, -(-self.H // 64) * 64, 4, 64, 1 << 20, PARTS=self.parts)
        return tiles(self.H, block_h=self.block_h, split=self.split)


examples = st.builds(
    Example,
    cell=st.sampled_from(list(CELLS)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    T=st.integers(1, 4),
    B=st.integers(1, 10),
    H=st.integers(1, 40),
    reverse=st.booleans(),
    optional=st.fixed_dictionaries({name: st.booleans() for name in ("h0", "bias", "dy")}),
    block_h=st.sampled_from([8, 16]),
    split=st.sampled_from([1, 2]),
    chunk=st.integers(1, 4),
    gradient_chunk=st.integers(1, 4),
    parts=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**32),
)


def check_example(example: Example):
    layer = Layer(example.cell, example.dtype, example.T, example.B, example.H, reverse=example.reverse, **example.optional)
    with together(example.seed):
        forward = layer.forward(persistent, example.plan(False), chunk=example.chunk)
        backward = layer.backward(persistent, example.plan(True), *forward, chunk=example.gradient_chunk)
    ours = [tensor for tensor in (*forward, *backward) if tensor is not None]
    assert_close(ours, layer.both(step, steps_of(example.H, example.dtype)), example.dtype)


@settings(max_examples=6)
@given(examples)
def test_any_size_and_plan(example):
    check_example(example)


@pytest.mark.sweep
@settings(max_examples=200)
@given(examples)
def test_many_sizes_and_plans(example):
    check_example(example)
