"""Groups of the one-program kernels: each member gets the bits that it has alone, whatever the others do."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support import recurrence
from support.recurrence import Layer, Members

from rnnfast.kernels import one_program, runtime
from rnnfast.kernels.cells import CELLS
from rnnfast.kernels.one_program.plan import PLAIN, OneProgramPlan, warps_for
from rnnfast.kernels.runtime import Launcher

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1"),
]
KINDS = {  # whether each member runs from the last step to the first
    "two directions": (False, True),
    "two directions, the reverse one first": (True, False),
    "2 layers": (False,) * 2,
    "3 layers": (False,) * 3,
    "3 layers in reverse": (True,) * 3,
}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
T = 4
sweep = pytest.mark.sweep


def some(*chosen):
    """For `pytest.mark.parametrize`: all combinations, of which the sweep alone runs those that are not chosen."""
    return lambda *axes: [each if each in chosen else pytest.param(*each, marks=sweep) for each in product(*axes)]


def plan_of(H: int, rows: int, plain: bool = False) -> OneProgramPlan:
    units = 16 * warps_for(H)
    warps, parts = PLAIN[units] if plain else (units // 16, 0)
    return OneProgramPlan(rows, units, warps, 100, parts)


def layers_of(kind: str, cell: str, dtype: torch.dtype, H: int, B: int = 3, T: int = T, marked: bool = False, **options):
    """Layers of other weights, inputs and states each, and if `marked` of other lengths and resets."""
    layers = []
    for m, reverse in enumerate(KINDS[kind]):
        marks = {}
        if marked:
            marks["lengths"] = [(T, m % 2 * T, T - 1, 1)[(row + m) % 4] for row in range(B)]
            marks["resets"] = torch.arange(T * B).view(T, B) % (m + 3) == 2
        layers.append(Layer(cell, dtype, T, B, H, reverse=reverse, seed=m, **marks, **options))
    return layers


def assert_as_alone(layers: list[Layer], plan: OneProgramPlan, *chunks: int, **options) -> None:
    recurrence.assert_as_alone(one_program, plan, layers, *chunks, **options)


KIND_CASES = some(
    ("two directions", 1, True), ("two directions", 3, False), ("3 layers", 1, False), ("3 layers", 3, True),
    ("3 layers", T + 2, False),
)(KINDS, (1, 3, T, T + 2), (False, True))  # fmt: skip


@pytest.mark.parametrize(("kind", "N", "marked"), KIND_CASES)
def test_kinds(kind, N, marked):
    """Every kind of group, in launches of one step to more than all; the programs of a member have 2 of its 3 rows."""
    assert_as_alone(layers_of(kind, "lstm", torch.float32, 20, marked=marked), plan_of(20, 2), N)


ROWS = {2: (torch.float32, 16), 4: (torch.float16, 29), 8: (torch.bfloat16, 34)}  # of a program: dtype and H
CELL_CASES = some(
    ("lstm", "two directions", False, 4), ("lstm", "2 layers", True, 8), ("gru", "two directions", True, 2),
    ("gru", "2 layers", False, 4), ("rnn_tanh", "two directions", False, 8), ("rnn_relu", "2 layers", False, 2),
)(CELLS, ("two directions", "2 layers"), (False, True), ROWS)  # fmt: skip


@pytest.mark.parametrize(("cell", "kind", "marked", "rows"), CELL_CASES)
def test_cells(cell, kind, marked, rows):
    """Every cell and dtype, each way to share cells out among the lanes; whole tiles, an odd size and one of units in pairs."""
    dtype, H = ROWS[rows]
    assert_as_alone(layers_of(kind, cell, dtype, H, rows + 1, T=3, marked=marked), plan_of(H, rows), 2)


@pytest.mark.parametrize(("kind", "rows", "H", "marked"), [("two directions", 2, 29, True), ("2 layers", 4, 16, False)])
def test_without_tensor_cores(kind, rows, H, marked):
    """The products of float32 that is not TF32."""
    assert_as_alone(layers_of(kind, "lstm", torch.float32, H, T=3, marked=marked), plan_of(H, rows, plain=True), 2)


@sweep
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, None], ids=str)
@pytest.mark.parametrize("H", [1, 15, 50, 64])
@pytest.mark.parametrize("rows", [8, 4, 2])
@pytest.mark.parametrize("kind", ["two directions", "3 layers"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_sizes(cell, kind, rows, H, dtype, marked):
    """`dtype` None is float32 without tensor cores, which has no plan with 8 rows."""
    plan = plan_of(H, min(rows, 4) if dtype is None else rows, plain=dtype is None)
    for B, T in ((1, 1), (2 * rows + 1, 3)):
        assert_as_alone(layers_of(kind, cell, dtype or torch.float32, H, B, T, marked=marked), plan, 2)


OPTIONS: list[dict] = [
    {"h0": False, "dy": False},
    {"bias": False},
    {"dcs": True},
    {"dcs": True, "marked": True, "h0": False},
    {"marked": True, "starts": False, "dy": False},
]
OPTION_CASES = some(
    ("lstm", "two directions", 0), ("lstm", "3 layers", 1), ("lstm", "3 layers", 2), ("lstm", "two directions", 3),
    ("gru", "3 layers", 4),
)(("lstm", "gru"), ("two directions", "3 layers"), range(len(OPTIONS)))  # fmt: skip


@pytest.mark.parametrize(("cell", "kind", "options"), OPTION_CASES)
def test_optional_inputs(cell, kind, options):
    """Without initial states, biases and gradients of the outputs; with a gradient of all cell states."""
    assert_as_alone(layers_of(kind, cell, torch.float16, 20, T=3, **OPTIONS[options]), plan_of(20, 4), 2)


@pytest.mark.parametrize(
    ("kind", "marked"), some(("two directions", False), ("3 layers", True))(("two directions", "3 layers"), (False, True))
)
def test_saved_by_chunk(kind, marked):
    """Backward given what is saved a chunk at a time, in chunks of its own length."""
    assert_as_alone(layers_of(kind, "lstm", torch.float32, 18, marked=marked), plan_of(18, 2), 3, 2, by_chunk=True)


@pytest.mark.parametrize(("kind", "rounds"), [("two directions", 2), ("3 layers", 4)])
def test_one_launch_a_round(kind, rounds, monkeypatch):
    """All members are on the grid of each launch, and arguments are bound once a call: 4 steps in chunks of 2."""
    launches, binds, bind = [], [], Launcher.bind

    def watched(self, grid, *args):
        launch, plain = bind(self, grid, *args)
        binds.append(self.kernel.__name__)
        return lambda *args: (launches.append((self.kernel.__name__, grid)), launch(*args)), plain

    monkeypatch.setattr(Launcher, "bind", watched)
    layers = layers_of(kind, "lstm", torch.float32, 16)
    members, plan = Members(layers, 2), plan_of(16, 2)
    members.backward(one_program, plan, members.forward(one_program, plan))
    names = ["one_program_forward_kernel", "one_program_backward_kernel"]
    assert launches == [(name, (2, 1, len(layers))) for name in names for _ in range(rounds)] and binds == names
