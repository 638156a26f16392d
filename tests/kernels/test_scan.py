"""Scan kernels: cells without W_hh, against the equations, and their plans."""

import itertools

import pytest
import torch
from support.diagonal import CELLS, STEPS
from support.equations import assert_right
from support.recurrence import TOLERANCE, Layer, Members, assert_as_alone

from rnnfast.kernels import runtime, scan
from rnnfast.kernels.families import FAMILIES, OF_TORCH, for_any_size
from rnnfast.kernels.persistent.limits import GPUS
from rnnfast.kernels.scan.plan import AHEAD_TILES, ScanPlan, block, cell_bytes, predicted, scan_clocks, scan_plan

interpreted = pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
T, B, H = 5, 3, 19
PLAN = ScanPlan(4, 32, 2, 4, 100)
RESETS = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]]).bool()
CASES = {
    "plain": {},
    "reversed": {"reverse": True, "dcs": True},
    "zeros": {"h0": False, "bias": False, "dy": False},
    "marked": {"lengths": [4, 0, 5], "resets": RESETS, "dcs": True},
    "marked, reversed": {"lengths": [4, 0, 2], "resets": RESETS, "reverse": True},
    "marked, no gradient of starts": {"lengths": [4, 0, 5], "starts": False},
}
RUN = [("mixed", case) for case in CASES] + [("quasi", "marked"), ("indrnn", "marked, reversed"), ("indrnn", "plain")]


@interpreted
@pytest.mark.numerical
@pytest.mark.parametrize(("cell", "case"), RUN)
def test_matches_the_equations(cell, case):
    layer = Layer(CELLS[cell], torch.float32, T, B, H, **CASES[case])
    forward = layer.forward(scan, PLAN)
    assert_right(layer, forward, layer.backward(scan, PLAN, *forward), step=STEPS[cell])


@interpreted
@pytest.mark.numerical
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    layer = Layer(CELLS["mixed"], dtype, T, B, H)
    forward = layer.forward(scan, PLAN)
    assert_right(layer, forward, layer.backward(scan, PLAN, *forward), step=STEPS["mixed"], tolerance=2 * TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("marked", [False, True])
def test_launches_may_be_cut_anywhere(marked):
    """And programs may have any tiles: the bits are the same. In inference too, which keeps the last carried states only."""
    layer = Layer(CELLS["mixed"], torch.float16, T, B, H, reverse=marked, **({"lengths": [4, 0, 2]} if marked else {}))
    whole, small = PLAN, ScanPlan(2, 16, 4, 1, 2)
    right, cut = layer.both(scan, whole), layer.both(scan, small, chunk=2)
    assert all(map(torch.equal, right, cut))
    h, c, _ = layer.forward(scan, small, training=False, chunk=2)
    ran = torch.ones(B, dtype=torch.bool) if not marked else torch.tensor([True, False, True])
    assert torch.equal(h, right[0]) and torch.equal(c[0, ran], right[1][0 if marked else -1, ran])


@interpreted
@pytest.mark.parametrize("heads", [False, True])
def test_members_are_as_alone(heads):
    """Three members side by side, the second one reversed, with lengths; or three layers in a pipeline."""
    options = {"lengths": [2, 3], "dcs": True} if heads else {}
    layers = [
        Layer(CELLS["mixed" if heads else "quasi"], torch.float32, 3, 2, 5, reverse=heads and m == 1, seed=m, **options)
        for m in range(3)
    ]
    assert_as_alone(scan, ScanPlan(2, 16, 2, 1, 2), layers, 2, 2, side_by_side=heads)


@interpreted
def test_a_cell_with_w_hh_is_refused():
    layer = Layer("gru", torch.float32, 2, 1, 3)
    with pytest.raises(AssertionError, match="do not run"):
        Members([layer]).forward(scan, PLAN)


# Plans


@pytest.mark.parametrize("name", list(GPUS))
def test_there_is_a_plan_for_any_size(name):
    limits = GPUS[name]
    for gates, size, backward, itemsize in itertools.product((1, 4, 8), ((1, 1), (7, 50), (4096, 4096)), (False, True), (2, 4)):
        for members, extra, marked in ((1, 0, False), (6, 9, True)):
            sizes = gates, *size, itemsize, "ieee", backward, limits, marked, members, extra
            plan = scan_plan(*sizes)
            rows, units, count = plan.grid(*size, members)
            assert rows * plan.BLOCK_B >= size[0] and units * plan.BLOCK_H >= size[1] and count == members
            assert 32 * plan.num_warps == plan.BLOCK_B * plan.BLOCK_H and plan.steps >= 1
            assert plan.AHEAD >= 2 and plan.AHEAD * (gates + 3 * backward + marked + extra) <= max(AHEAD_TILES, 2 * 21)
            assert scan_clocks(*sizes) == predicted(*sizes[:4], backward, limits, plan.AHEAD, members, extra).total > 0
    assert scan_plan(4, 16, 512, 2, "half", False, None) == scan_plan(4, 16, 512, 2, "half", False, GPUS["H100"])


def test_what_bounds_a_step():
    """A large layer memory; a small one its instructions, as enough is loaded ahead."""
    large, small = predicted(4, 512, 4096, 2, False, GPUS["H100"], 2), predicted(4, 16, 512, 2, False, GPUS["H100"], 8)
    assert large.total == large.memory and small.total == small.issue > small.trip
    assert large.memory == pytest.approx(512 * 4096 * cell_bytes(4, 4, 1, 2, False) / 3350e9 * 1.98e9)


def test_bytes_of_a_cell():
    """Of a diagonal LSTM in float16: the input side, h, four activations and c; then dy, h, the activations, c and d_gates."""
    assert cell_bytes(4, 4, 1, 2, False) == 16 + 2 + 8 + 4 and cell_bytes(4, 4, 1, 2, False, training=False) == 18
    assert cell_bytes(4, 4, 1, 2, True) == 2 + 2 + 8 + 4 + 8


def test_few_threads_have_nothing_to_do():
    assert block(16, 512, 32) == (1, 32) and block(16, 512, 128) == (1, 128)
    assert block(16, 72, 128) == (8, 16) and block(3, 16, 32) == (2, 16) and block(64, 100, 128) == (8, 16)


def test_which_cells_a_family_runs():
    assert {name for name, family in FAMILIES.items() if not family.refusal(False, False)} == {"scan"} == {for_any_size(False)}
    assert {name for name, family in FAMILIES.items() if not family.refusal(True, False)} == set(OF_TORCH)
    assert {name for name, family in FAMILIES.items() if not family.refusal(True, True)} == {"step", "one_program"}
    assert "W_hh" in FAMILIES["scan"].refusal(True, False) and "rows" in FAMILIES["persistent"].refusal(True, True)
    assert for_any_size(True) == "step"
