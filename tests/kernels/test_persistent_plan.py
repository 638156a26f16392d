"""The plans of the persistent kernels: what they keep to on every known GPU, and what they say where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnfast.kernels.persistent.plan import GPUS, MOST_LAUNCHES, NoPlan, PersistentPlan, persistent_plan

KINDS = st.sampled_from([(2, "ieee"), (4, "tf32"), (4, "ieee")])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(GPUS)), st.sampled_from([1, 3, 4, 5, 8]), st.integers(1, 300), st.integers(1, 2200), KINDS,
    st.booleans(), st.sampled_from([0, 3, 9]),
)  # fmt: skip
def test_keeps_to_the_limits(gpu, gates, B, H, kind, backward, extra):
    itemsize, precision = kind
    limits = GPUS[gpu]
    plan = persistent_plan(gates, B, H, itemsize, precision, backward, limits, extra=extra)
    assert plan == persistent_plan(gates, B, H, itemsize, precision, backward, limits, extra=extra)
    if isinstance(plan, NoPlan):
        assert plan.reason.startswith("no tiles fit: ")
        return
    # whole tiles
    assert plan.H_PAD >= H and plan.H_PAD % plan.BLOCK_H == 0
    columns = plan.H_PAD * (gates if backward else 1)
    assert columns % (plan.SPLIT * plan.BLOCK_K) == 0
    # every program resident, every batch row once
    launches = list(plan.launches(B))
    assert len(launches) <= MOST_LAUNCHES
    rows = 0
    for (units, tiles, _), b_begin in launches:
        assert units * tiles <= limits.sms
        assert units == plan.H_PAD // plan.BLOCK_H
        assert b_begin == rows
        rows += tiles * plan.BLOCK_B
    assert rows - plan.BLOCK_B < B <= rows
    # the weights on chip
    weights = plan.BLOCK_H * gates * H * itemsize
    assert weights < limits.shared_bytes


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("gpu", ["A100", "H100", "H200", "B200"])
def test_the_main_shapes_are_in(gpu, backward):
    for H, B in ((512, 64), (768, 16), (1024, 16)):
        for gates in (1, 3, 4):
            assert isinstance(persistent_plan(gates, B, H, 2, "ieee", backward, GPUS[gpu]), PersistentPlan), (H, B, gates)


def test_what_a_cell_keeps_takes_the_place_of_weights():
    """Three tiles more than an LSTM's leave room for the weights of fewer operands; with thirty there still is a plan."""
    kept, fewer, _ = (persistent_plan(4, 16, 768, 2, "ieee", True, GPUS["H100"], extra=extra) for extra in (0, 3, 30))
    assert kept.IN_REGISTERS > fewer.IN_REGISTERS > 0


def test_programs_spread_over_the_gpu():
    """The main shape takes at least the 48 SMs that its units make."""
    ((units, tiles, _), _) = next(persistent_plan(4, 16, 768, 2, "ieee", False, GPUS["H100"]).launches(16))
    assert units * tiles >= 48


@pytest.mark.parametrize(
    ("limits", "H", "B", "words"),
    [
        (GPUS["H100"], 2048, 16, "KiB of shared memory, where a CTA has 227 KiB"),
        (GPUS["H100"], 8192, 16, "programs, where there are 132 SMs"),
        (GPUS["H100"], 768, 4096, "launches in turn, where 4 is the most"),
        (replace(GPUS["H100"], name="V100", capability=70), 128, 1, "V100 has compute capability 7.0"),
        (replace(GPUS["H100"], registers=1 << 14), 128, 1, "registers, where an SM has 16384"),
        (replace(GPUS["H100"], l2_bytes=1 << 10), 128, 16, "where L2 has 0 MiB"),
    ],
)
def test_says_why_not(limits, H, B, words):
    plan = persistent_plan(4, B, H, 2, "ieee", False, limits)
    assert isinstance(plan, NoPlan)
    assert words in plan.reason
