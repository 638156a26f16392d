"""Cells that no built-in one is like on the persistent kernels, their programs side by side, against the equations: several
carried states, held tiles and their gradients, noise, two gates kept apart, five gates."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl  # noqa: F401 - the interpreter wants it in sight of every jit function
from support.cells import CELLS
from support.equations import assert_right
from support.recurrence import Layer, assert_as_alone, tiles
from support.side_by_side import Fault, together

from rnnfast.kernels import cells, persistent, runtime
from rnnfast.kernels.persistent.plan import PersistentPlan

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1"),
]
NEW = sorted(name for name in set(CELLS) - set(cells.CELLS) if not CELLS[name].rows)  # means over rows are none of theirs
T, B = 3, 3
SHARED = PersistentPlan(8, 8, 16, 1, 32, 4, 64, 1 << 20, PARTS=2, IN_REGISTERS=1)  # 4 programs, 2 share their units' sums
LENGTHS, RESETS = [3, 0, 2], torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 1]]) > 0


def made(cell: str, dtype=torch.float32, H: int = 32, **options) -> Layer:
    return Layer(cell, dtype, T, B, H, **options)


def plan(H: int, wide: bool):
    """Two programs. `wide`: of 16 units, the summed axis split: products of 16 rows, one a gate if the gates are no power of
    two."""
    return tiles(H, block_h=16, split=2 if wide else 1)


def equal(found, theirs):
    assert len(found) == len(theirs) and all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("cell", NEW)
def test_against_the_equations(cell, wide):
    """From given states, with gradients of all carried states; launches of two steps and one."""
    H = 29 if wide else 32  # padded
    layer = made(cell, H=H, reverse=wide, dcs=True)
    with together(1):
        forward = layer.forward(persistent, plan(H, wide), chunk=2)
        backward = layer.backward(persistent, plan(H, wide), *forward, chunk=2)
    assert_right(layer, forward, backward)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", NEW)
def test_marks(cell, reverse):
    """Lengths and resets: a state that begins anew does so in each of its parts, and a padded step adds nothing to the gradient
    of what is held. The same bits from one launch and from two."""
    layer = made(cell, reverse=reverse, dcs=True, lengths=LENGTHS, resets=RESETS)
    found = []
    for seed, chunk in enumerate((T, 2)):
        with together(seed):
            forward = layer.forward(persistent, plan(32, True), chunk=chunk)
            found.append((forward, layer.backward(persistent, plan(32, True), *forward, chunk=chunk)))
    assert_right(layer, *found[0])
    for ours, again in zip(*found, strict=True):
        equal(*([tensor for tensor in each if tensor is not None] for each in (ours, again)))


@pytest.mark.parametrize("marked", [pytest.param(False, marks=pytest.mark.sweep), True])
@pytest.mark.parametrize("cell", [*(pytest.param(cell, marks=pytest.mark.sweep) for cell in NEW if cell != "five"), "five"])
def test_parts(cell, marked):
    """Programs that share their units' sums."""
    layer = made(cell, **({"lengths": LENGTHS, "resets": RESETS} if marked else {}))
    with together(2):
        forward = layer.forward(persistent, plan(32, False))
        backward = layer.backward(persistent, SHARED, *forward, chunk=2)
    assert_right(layer, forward, backward)


@pytest.mark.parametrize("marked", [pytest.param(False, marks=pytest.mark.sweep), True])
@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.sweep), 3])
def test_members(count, marked):
    """Both directions, or three members side by side, as heads are: each has the bits that it has alone, its own noise too."""
    options = {"lengths": LENGTHS, "resets": RESETS} if marked else {}
    layers = [made("five", reverse=m == 1, seed=m, **options) for m in range(count)]
    with together(3):
        assert_as_alone(persistent, plan(32, True), layers, 2, side_by_side=True)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.sweep)], ids=str)
@pytest.mark.parametrize("cell", NEW)
def test_half_precision(cell, dtype):
    """Two elements a word; inference gives the same states, and keeps the last carried ones only."""
    layer = made(cell, dtype)
    with together(4):
        forward = layer.forward(persistent, plan(32, True))
        backward = layer.backward(persistent, plan(32, True), *forward)
        h, c, _ = layer.forward(persistent, plan(32, True), training=False, chunk=2)
    assert_right(layer, forward, backward, tolerance=2e-2 if dtype == torch.float16 else 0.1)
    equal((h, c[0]), (forward[0], forward[1][-1]))


@pytest.mark.parametrize("direction", ["forward", "backward", "backward in parts"])
def test_a_lost_word_is_found_in_all_that_depends_on_it(direction):
    """All programs end. Each number is as without the fault, or NaN: of every carried state, and of the gradients of the
    carried states before and of what is held."""
    layer = made("five", torch.float16)
    tiled = SHARED if "parts" in direction else tiles(32)
    fault = Fault("skipped word", (2, 0, 0), step=1, within="_exchange_sums" if "parts" in direction else None)

    def run(family_plan, fault, *forward):
        with together(5, fault) as happened:
            found = layer.backward(persistent, family_plan, *forward) if forward else layer.forward(persistent, family_plan)
        return happened, found

    forward = () if direction == "forward" else run(tiles(32), None)[1]
    _, right = run(tiled, None, *forward)
    happened, ours = run(tiled, fault, *forward)
    assert f"{direction.split()[0]} of support.cells with 32 hidden units" in happened.gave_up
    for a, b in zip(ours, right, strict=True):
        assert ((a == b) | a.isnan()).all() and not b.isnan().any()
    several = [ours[1][-1]] if direction == "forward" else [ours[2], ours[3]]
    assert all(block.isnan().any() for tensor in several for block in tensor.chunk(2, -1))
