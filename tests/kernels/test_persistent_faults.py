"""Mistakes planted in one program of a persistent kernel. Where words do not come, all programs end, the host is told, and what
was not computed is NaN. Other mistakes give a wrong result, which shows that the tests would see one."""

from __future__ import annotations

import re

import pytest
import torch
from support.recurrence import TOLERANCE, Layer, steps_of, tiles
from support.side_by_side import Fault, together

from rnnfast.kernels import persistent, runtime, step
from rnnfast.kernels.persistent.plan import PersistentPlan

pytestmark = pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
T, B, H, DTYPE = 4, 2, 32, torch.float16
HANGS = ("missing", "skipped store", "skipped word", "misplaced store", "weak store")
WRONG = ("stale read", "unchecked", "torn store")


def plan(direction: str) -> PersistentPlan:
    """4 programs; in "backward in parts" 2 of them share their sums."""
    return PersistentPlan(8, 8, 16, 1, H, 4, 64, 1 << 20, PARTS=2) if "parts" in direction else tiles(H)


def made(cell: str, **options) -> Layer:
    return Layer(cell, DTYPE, T, B, options.pop("H", H), **options)


def run(layer: Layer, direction: str, family, plan) -> list[torch.Tensor]:
    """The outputs of one direction, backward's from what the step kernels' forward saved."""
    if direction == "forward":
        found = layer.forward(family, plan)
    else:
        found = layer.backward(family, plan, *layer.forward(step, steps_of(layer.shape[2], DTYPE)))
    return [tensor for tensor in found if tensor is not None]


def is_right(layer: Layer, direction: str, seed: int, fault: Fault | None) -> bool:
    with together(seed, fault):
        ours = run(layer, direction, persistent, plan(direction))
    theirs = run(layer, direction, step, steps_of(H, DTYPE))
    tolerance = TOLERANCE[DTYPE]
    return all(torch.allclose(a, b, tolerance, tolerance, equal_nan=True) for a, b in zip(ours, theirs, strict=True))


def given_up(layer: Layer, direction: str, seed: int, fault: Fault, plan: PersistentPlan):
    """The run of a layer whose programs give up: each number of its outputs is right, or NaN, or written by neither family.

    A program that is missing writes nothing. Launches are cooperative so that there is none on a GPU. One that stores to a
    wrong place gives wrong numbers there.
    """
    with together(seed, fault) as happened:
        ours = run(layer, direction, persistent, plan)
    theirs = run(layer, direction, step, steps_of(layer.shape[2], DTYPE))
    tolerance = TOLERANCE[DTYPE]
    for a, b in zip(ours, theirs, strict=True):
        right = torch.isclose(a, b, tolerance, tolerance, equal_nan=True)
        assert fault.kind in ("missing", "misplaced store") or (right | a.isnan()).all()
    assert any(a.isnan().sum() > b.isnan().sum() for a, b in zip(ours, theirs, strict=True))
    assert f"{direction.split()[0]} of" in happened.gave_up
    return happened


def planted(kind: str, direction: str, cell: str) -> Fault:
    """At the second step, in parts in the exchange of sums. Each step's rows follow those of the one before, but for gate
    gradients it is the other way round."""
    if "parts" in direction:
        return Fault(kind, (2, 0, 0), step=1, back=B * 2 * H * 4, within="_exchange_sums")
    blocks = 1 if direction == "forward" or cell == "rnn_tanh" else 4
    row = B * H * DTYPE.itemsize * blocks
    return Fault(kind, (2, 0, 0), step=1, back=row if direction == "forward" else -row)


CASES = [
    pytest.param(cell, direction, marks=[] if default else pytest.mark.sweep)
    for cell, direction, default in (
        ("lstm", "forward", True),
        ("lstm", "backward", False),
        ("lstm", "backward in parts", False),
        ("gru", "forward", False),
        ("gru", "backward", True),
        ("gru", "backward in parts", False),
        ("rnn_tanh", "forward", True),
        ("rnn_tanh", "backward", True),
        ("rnn_tanh", "backward in parts", True),
    )
]


@pytest.mark.parametrize(("cell", "direction"), CASES)
class TestCaught:
    def test_right_without(self, cell, direction):
        assert is_right(made(cell), direction, 0, None)

    @pytest.mark.parametrize("kind", HANGS)
    def test_ends(self, kind, cell, direction):
        at = 0 if kind == "missing" else 1
        # in parts program 0 waits for program 2 not before it gathers what it sums over, in the next step if that is of others
        first = f"[{at}{at + 1}]" if "parts" in direction else at
        happened = given_up(made(cell), direction, 1, planted(kind, direction, cell), plan(direction))
        assert re.search(rf"program \(0, 0, 0\) at step {first}.*program \(3, 0, 0\) at step {at}", happened.stuck)

    @pytest.mark.parametrize("kind", WRONG)
    def test_as_a_wrong_result(self, kind, cell, direction):
        """In one of ten schedules: where the other programs happen to be early, there is nothing wrong to see."""
        layer, fault = made(cell), planted(kind, direction, cell)
        assert any(not is_right(layer, direction, seed, fault) for seed in range(10))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_result_that_looks_empty(direction):
    """relu hands on a NaN as it is: with the bits of EMPTY, which must not be published."""
    layer = made("rnn_relu")
    layer.x.view(torch.int32)[:, 0] = -1
    layer.dy.view(torch.int16)[:, 0] = -1
    assert is_right(layer, direction, 1, None)
    with together(1, planted("empty value", direction, "rnn_relu")) as happened:
        run(layer, direction, persistent, plan(direction))
    assert "program (0, 0, 0) at step 1" in happened.stuck and happened.gave_up


OTHERS = {
    "padded": {"H": 29},
    "marked": {"lengths": [4, 3], "resets": torch.tensor([[0, 0], [0, 1], [0, 0], [1, 0]]) > 0},
    "padded and marked, without starts": {"H": 29, "lengths": [2, 4], "starts": False},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("direction", ["forward", "backward", "backward in parts"])
@pytest.mark.parametrize("cell", ["lstm", *(pytest.param(cell, marks=pytest.mark.sweep) for cell in ("gru", "rnn_relu"))])
def test_ends_whatever_is_called(cell, direction, options):
    """A lost word where the exchange is a buffer of its own, and states begin anew."""
    fault = Fault("skipped word", (2, 0, 0), step=1, within="_exchange_sums" if "parts" in direction else None)
    given_up(made(cell, **options), direction, 1, fault, plan(direction))


def test_ends_in_inference():
    """Only the last c is kept, and it is NaN."""
    layer, fault = made("lstm"), Fault("skipped word", (2, 0, 0), step=1)
    with together(1, fault):
        h, c, _ = layer.forward(persistent, tiles(H), training=False)
    assert c.isnan().any(1).all() and h[-1].isnan().any(1).all()


def test_launches_after_one_that_gave_up():
    """They wait no more, and go on from the NaN that they get."""
    layer, fault = made("lstm"), Fault("skipped store", (2, 0, 0), step=1)
    with together(1, fault) as happened:
        h, c, _ = layer.forward(persistent, tiles(H), chunk=2)
    assert len(happened.grids) == 4 and happened.switches < 1000
    assert h[2:].isnan().all() and c[2:].isnan().all()
