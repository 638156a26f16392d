"""Cells that no built-in one is like on the one-program kernels, against the equations: several carried states, held tiles and
their gradients, noise, two gates kept apart, five gates, means over rows."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from support.cells import CELLS
from support.equations import assert_right
from support.recurrence import Layer, assert_as_alone

from rnnfast.kernels import cells, one_program, runtime
from rnnfast.kernels.cells import Cell
from rnnfast.kernels.maths import tanh
from rnnfast.kernels.one_program.plan import PLAIN, OneProgramPlan, warps_for

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1"),
]
NEW = sorted(set(CELLS) - set(cells.CELLS))
T, B = 3, 3
LENGTHS, RESETS = [3, 0, 2], torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 1]]) > 0
MARKED = {"lengths": LENGTHS, "resets": RESETS}
sweep = pytest.mark.sweep


def of(H: int, rows: int, plain: bool = False) -> OneProgramPlan:
    units = 16 * warps_for(H)
    warps, parts = PLAIN[units] if plain else (units // 16, 0)
    return OneProgramPlan(rows, units, warps, 100, parts)


def both(layer: Layer, rows: int, chunk: int, plain: bool = False):
    plan = of(layer.shape[2], rows, plain)
    forward = layer.forward(one_program, plan, chunk=chunk)
    return forward, layer.backward(one_program, plan, *forward, chunk=chunk)


def equal(found, theirs):
    for a, b in zip(found, theirs, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


SIZES = {2: 29, 4: 32, 8: 18}  # by the rows of a program: units that are padded, whole, and padded in pairs
SOME = [("five", 2), ("five", 8), ("peephole", 4), ("slstm", 8), ("normed", 2), ("normed", 8)]
ALL = [pytest.param(cell, rows, marks=sweep) for cell in NEW for rows in SIZES if (cell, rows) not in SOME]


@pytest.mark.parametrize(("cell", "rows"), SOME + ALL)
def test_against_the_equations(cell, rows):
    """From given states, with gradients of all carried states; launches of two steps and one."""
    layer = Layer(cell, torch.float32, T, B, SIZES[rows], reverse=rows == 4, dcs=True)
    assert_right(layer, *both(layer, rows, 2))


MARKS = [("five", 8, True), ("peephole", 2, False), ("slstm", 4, False), ("normed", 4, True)]
ALL_MARKS = [
    pytest.param(cell, rows, reverse, marks=sweep)
    for cell in NEW
    for rows in SIZES
    for reverse in (False, True)
    if (cell, rows, reverse) not in MARKS
]


@pytest.mark.parametrize(("cell", "rows", "reverse"), MARKS + ALL_MARKS)
def test_marks(cell, rows, reverse):
    """Lengths and resets: a state that begins anew does so in each of its parts, and a padded step adds nothing to the gradient
    of what is held. The same bits from one launch and from two."""
    layer = Layer(cell, torch.float32, T, B, SIZES[rows], reverse=reverse, dcs=True, **MARKED)
    (forward, backward), (again, backward_again) = both(layer, rows, T), both(layer, rows, 2)
    assert_right(layer, forward, backward)
    assert_right(layer, again, backward_again)
    equal((*forward, *backward), (*again, *backward_again))


@pytest.mark.parametrize(("cell", "rows"), [("five", 4), ("normed", 2), pytest.param("slstm", 2, marks=sweep)])
def test_without_tensor_cores(cell, rows):
    """Several warps have each cell: it counts once in a mean, and in the gradient of what is held."""
    layer = Layer(cell, torch.float32, T, B, 29, dcs=True, **MARKED)
    assert_right(layer, *both(layer, rows, 2, plain=True))


@pytest.mark.parametrize(("cell", "rows", "dtype"), [("five", 8, torch.float16), ("slstm", 2, torch.bfloat16)])
def test_half_precision(cell, rows, dtype):
    """Inference gives the same states, and keeps the last carried ones only."""
    layer = Layer(cell, dtype, T, B, 18)
    forward, backward = both(layer, rows, T)
    assert_right(layer, forward, backward, tolerance=2e-2 if dtype == torch.float16 else 0.1)
    h, c, _ = layer.forward(one_program, of(18, rows), training=False, chunk=2)
    equal((h, c[0]), (forward[0], forward[1][-1]))


@pytest.mark.parametrize(
    ("cell", "marked", "plain"),
    [("five", True, False), ("five", False, True), pytest.param("normed", True, False, marks=sweep)],
)
def test_members(cell, marked, plain):
    """Three members side by side, as heads are: each has the bits that it has alone, its own noise too."""
    layers = [Layer(cell, torch.float32, T, B, 20, reverse=m == 1, seed=m, **(MARKED if marked else {})) for m in range(3)]
    assert_as_alone(one_program, of(20, 2, plain), layers, 2, side_by_side=True)


@triton.jit
def _scaled_forward(x_gates, h_gates, states, given):
    return (tanh((x_gates[0] + h_gates[0]) / given[0]),), ()


@triton.jit
def _scaled_backward(saved, states, new_states, given, d_states):
    y = new_states[0]
    d_a = d_states[0] * (1.0 - y * y) / given[0]
    sum_by = tl.where(tl.abs(y) < 1.0, 0.5 * tl.log((1.0 + y) / (1.0 - y)), 0.0)  # the sum, divided
    return (d_a,), (tl.zeros_like(d_a),), (-d_a * sum_by,)


SCALED = Cell(1, 0, 1, 0, False, _scaled_forward, _scaled_backward, held=1)


@pytest.mark.parametrize(("rows", "plain"), [(2, False), (8, False), (4, True)])
def test_padded_units_may_become_nan(rows, plain):
    """Where nothing is held, the cell divides 0 by 0: in units that are no one's, which must not reach the others."""
    layer = Layer(SCALED, torch.float32, T, B, 18)
    layer.held = layer.held.abs() + 1

    def step(x, h, states, given):
        return (torch.tanh((x[0] + h[0]) / given[0]),)

    assert_right(layer, *both(layer, rows, 2, plain), step=step)
