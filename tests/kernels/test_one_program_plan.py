"""The plans of the one-program kernels and the model behind them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnfast.kernels import hardware
from rnnfast.kernels.families import FAMILIES, family_of, plans_to_measure
from rnnfast.kernels.one_program import cost
from rnnfast.kernels.one_program.plan import (
    ROWS,
    OneProgramPlan,
    exchanged_bytes,
    largest_hidden,
    one_program_clocks,
    one_program_plan,
    one_program_plans,
    predicted,
)
from rnnfast.kernels.persistent.plan import GPUS, GpuLimits, NoPlan, PersistentPlan

KINDS = st.sampled_from([(2, "ieee"), (2, "half"), (4, "tf32"), (4, "ieee")])
H100 = GPUS["H100"]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(GPUS)),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 3000),
    st.integers(1, 300),
    KINDS,
    st.booleans(),
    st.sampled_from([1, 2, 6]),
)
def test_keeps_to_the_limits(gpu, gates, B, H, kind, backward, members):
    itemsize, precision = kind
    limits = GPUS[gpu]
    plan = one_program_plan(gates, B, H, itemsize, precision, backward, limits, members=members)
    assert plan == one_program_plan(gates, B, H, itemsize, precision, backward, limits, members=members)
    if isinstance(plan, NoPlan):
        assert plan.reason
        return
    assert plan.units >= H and (plan.units < 2 * H or plan.units == 16)
    assert (plan.PARTS > 0) == (kind == (4, "ieee")) and (plan.PARTS or plan.units == 16 * plan.num_warps)
    programs, *others = plan.grid(B, members)
    assert others == [1, members] and (programs - 1) * plan.BLOCK_B < B <= programs * plan.BLOCK_B
    assert plan.steps >= 1 and (backward or plan.steps == 1 or plan.steps * B * members <= ROWS)
    assert exchanged_bytes(H, plan.BLOCK_B, itemsize, backward) <= limits.shared_bytes
    # the weights, and as much again for all else
    assert gates * plan.units**2 * itemsize // 4 * 2 <= limits.registers
    assert family_of(plan) == "one_program"


@pytest.mark.parametrize("backward", [False, True])
def test_fewer_rows_while_there_are_sms(backward):
    """Two rows a program up to 264 rows on 132 SMs, then more, as long as memory does not bound the step."""
    found = [one_program_plan(4, B, 64, 2, "half", backward, H100).BLOCK_B for B in (1, 8, 264, 500, 1056)]
    assert found == [2, 2, 2, 4, 8]


@pytest.mark.parametrize("backward", [False, True])
def test_members_share_the_sms(backward):
    """The programs of all members count: 2 members of 264 rows are planned as one of 528. Nothing limits their number."""
    sizes = 264, 64, 2, "half", backward, H100
    plan, ranked = one_program_plan(4, *sizes, members=2), one_program_clocks(4, *sizes, False, 2)
    assert plan.BLOCK_B == 4 > one_program_plan(4, *sizes).BLOCK_B
    assert ranked == one_program_clocks(4, 528, *sizes[1:], False) > one_program_clocks(4, *sizes, False)
    assert plan.steps == one_program_plan(4, 528, *sizes[1:]).steps and plan.grid(264, 2) == (66, 1, 2)
    assert plan.words(264, 2).startswith("2 x 66 programs of up to 64 units and 4 rows")
    assert isinstance(one_program_plan(4, *sizes, members=1000), OneProgramPlan)


def test_marks_leave_less_room():
    """In backward, where the weights take most of the registers: two rows a program, whatever the batch."""
    rows = lambda H, backward, marked: one_program_plan(4, 1056, H, 2, "half", backward, H100, marked).BLOCK_B  # noqa: E731
    assert [rows(128, False, True), rows(128, True, False), rows(128, True, True), rows(64, True, True)] == [4, 8, 2, 8]


def test_where_there_is_none():
    for sizes, reason in (
        ((4, 1, 300, 2, "half", False), "a program has at most 256 units, and there are 300"),
        ((4, 1, 129, 2, "half", True), "the weights of 129 units take 256 registers of each thread, and there is room for 64"),
        ((4, 1, 65, 4, "ieee", False), "without TF32 a program has at most 64 units of so many gates, and there are 65"),
    ):
        assert one_program_plan(*sizes, H100) == NoPlan(reason)
        assert one_program_plans(*sizes, H100) == []
    old = GpuLimits("V100", 70, 80, 96 << 10, 65536, 6 << 20)
    assert one_program_plan(4, 1, 16, 2, "half", False, old) == NoPlan(
        "V100 has compute capability 7.0, and the one-program kernels need 8.0"
    )


@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_largest_hidden(gpu):
    """The sizes that docs/one-program.md states, on every GPU; every smaller size has a plan too."""
    kinds = (2, "half"), (4, "tf32"), (4, "ieee")
    sizes = {1: (256, 128, 128), 3: (128, 64, 64), 4: (128, 64, 64)}
    stated = {(gates, *kind): most for gates, found in sizes.items() for kind, most in zip(kinds, found, strict=True)}
    for (gates, *kind), most in stated.items():
        assert largest_hidden(gates, *kind, GPUS[gpu]) == most
        for H in range(1, most + 1):
            for backward in (False, True):
                assert isinstance(one_program_plan(gates, 1, H, *kind, backward, GPUS[gpu]), OneProgramPlan)


def test_on_a_cpu_as_on_an_h100():
    sizes = 3, 5, 40, 2, "half", True
    assert one_program_plan(*sizes, None) == one_program_plan(*sizes, H100)


def test_worth_measuring():
    """All three numbers of rows, beside the plans of the persistent kernels."""
    plans = plans_to_measure(4, 8, 128, 2, "half", False, H100)
    assert [plan.BLOCK_B for plan in plans if isinstance(plan, OneProgramPlan)] == [2, 4, 8]
    assert any(isinstance(plan, PersistentPlan) for plan in plans)
    assert not FAMILIES["one_program"].waits


def test_predicted():
    """Terms add up; small layers meet what was aimed at, and more rows than SMs take turns."""
    at = lambda B, H, backward=False, rows=2: predicted(4, B, H, 2, "half", backward, H100, rows)  # noqa: E731
    for H, goal in ((64, 0.30), (128, 0.60)):
        forward, backward = at(8, H), at(8, H, backward=True)
        assert forward.microseconds(hardware.GHZ["H100"]) <= goal
        assert backward.microseconds(hardware.GHZ["H100"]) <= 1.3 * goal
        assert abs(sum(forward.share().values()) - 1) < 1e-9 and forward.turns == forward.memory == 0
    assert at(265, 64).total == 2 * at(264, 64).total
    assert at(1056, 128, rows=8).memory > 0  # what a step saves, at the rate of the memory


def test_terms():
    """By hand: 8 warps, two a scheduler."""
    time = cost.program_time(
        sms=100, programs=150, warps=8, product=500, instructions=200, special_functions=40, exchanged_bytes=1280, barriers=2,
        bytes=1400 * 5000,
    )  # fmt: skip
    one = 500 + 400 + (40 * 8 * 2 - 400) + 10 + 70
    assert (time.issue, time.special, time.exchange, time.barriers, time.turns) == (400, 240, 10, 70, one)
    assert time.memory == 5000 - 2 * one and time.total == 5000
    assert time.microseconds(2.0) == 2.5
