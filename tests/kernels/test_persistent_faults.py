"""Mistakes planted in one program of a persistent kernel: each is caught, as a hang that names programs and step, or as a wrong
result."""

from __future__ import annotations

import pytest
import torch
from support.recurrence import TOLERANCE, Layer, steps_of, tiles
from support.side_by_side import Fault, Hang, together

from rnnfast.kernels import persistent, runtime, step
from rnnfast.kernels.persistent.plan import PersistentPlan

pytestmark = pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
T, B, H, DTYPE = 4, 2, 32, torch.float16
HANGS = ("missing", "skipped store", "skipped word", "misplaced store", "weak store")
WRONG = ("stale read", "unchecked", "torn store")


def plan(direction: str) -> PersistentPlan:
    """4 programs; in "backward in parts" 2 of them share their sums."""
    return PersistentPlan(8, 8, 16, 1, H, 4, 64, 1 << 20, PARTS=2) if "parts" in direction else tiles(H)


def made(cell: str) -> Layer:
    return Layer(cell, DTYPE, T, B, H)


def run(layer: Layer, direction: str, family, plan) -> list[torch.Tensor]:
    """The outputs of one direction, backward's from what the step kernels' forward saved."""
    if direction == "forward":
        found = layer.forward(family, plan)
    else:
        found = layer.backward(family, plan, *layer.forward(step, steps_of(H, DTYPE)))
    return [tensor for tensor in found if tensor is not None]


def is_right(layer: Layer, direction: str, seed: int, fault: Fault | None) -> bool:
    with together(seed, fault):
        ours = run(layer, direction, persistent, plan(direction))
    theirs = run(layer, direction, step, steps_of(H, DTYPE))
    tolerance = TOLERANCE[DTYPE]
    return all(torch.allclose(a, b, tolerance, tolerance, equal_nan=True) for a, b in zip(ours, theirs, strict=True))


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
    def test_as_a_hang(self, kind, cell, direction):
        at = 0 if kind == "missing" else 1
        # in parts program 0 waits for program 2 not before it gathers what it sums over, in the next step if that is of others
        first = f"[{at}{at + 1}]" if "parts" in direction else at
        with pytest.raises(Hang, match=rf"program \(0, 0, 0\) at step {first}.*program \(3, 0, 0\) at step {at}"):
            is_right(made(cell), direction, 1, planted(kind, direction, cell))

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
    with pytest.raises(Hang, match=r"program \(0, 0, 0\) at step 1"):
        is_right(layer, direction, 1, planted("empty value", direction, "rnn_relu"))
