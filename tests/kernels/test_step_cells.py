"""Cells of every kind on the step kernels and in recomputing, against their equations in plain PyTorch."""

import pytest
import torch
from support.equations import assert_right
from support.recurrence import Layer, assert_as_alone, steps_of

from rnnfast.kernels import recompute, step
from rnnfast.kernels.given import Given
from rnnfast.kernels.runtime import Launcher

pytestmark = pytest.mark.numerical

T, B, H = 3, 3, 9  # units that are no power of two, so that rows are padded
CELLS = ("peephole", "slstm", "five", "normed")
RESETS = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]]).bool()


@pytest.mark.parametrize("options", [{}, {"reverse": True, "lengths": [3, 0, 2], "resets": RESETS, "dcs": True}])
@pytest.mark.parametrize("cell", CELLS)
def test_right(cell, options):
    """Outputs, states, gate gradients, and the gradients of the states and held tiles."""
    layer, plan = Layer(cell, torch.float32, T, B, H, **options), steps_of(H, torch.float32)
    forward = layer.forward(step, plan)
    assert_right(layer, forward, layer.backward(step, plan, *forward))


@pytest.mark.parametrize("cell", ["five", "normed"])
def test_heads(cell):
    """Two heads of two directions side by side, with lengths: each member bit by bit as alone."""
    layers = [Layer(cell, torch.float16, 2, 2, 8, reverse=m > 1, seed=m, lengths=[2, 1]) for m in range(4)]
    assert_as_alone(step, steps_of(8, torch.float16), layers, side_by_side=True)


@pytest.mark.parametrize("cell", ["five", "normed"])
def test_pipeline(cell):
    """Layers, in chunks, each bit by bit as alone. The noise is that of a member's own steps."""
    layers = [Layer(cell, torch.float32, T, 2, H, seed=m, h0=cell == "five", dcs=True) for m in range(2)]
    assert_as_alone(step, steps_of(H, torch.float32), layers, 2, by_chunk=True)


def test_launches_of_whole_rows(monkeypatch):
    """Two launches a step: the product in tiles, then the cell with a row a program. None where there is no product."""
    launches, bind = [], Launcher.bind

    def watched(self, grid, *args):
        launch, plain = bind(self, grid, *args)
        stage = self.constants["STAGE"]
        return lambda *args: (launches.append((stage, grid)), launch(*args)), plain

    monkeypatch.setattr(Launcher, "bind", watched)
    plan = steps_of(20, torch.float32)
    product, cell = ("product", (1, 2, 1)), ("cell", (B, 1, 1))
    for h0 in (True, False):
        launches.clear()
        Layer("normed", torch.float32, 2, B, 20, h0=h0).both(step, plan)
        assert launches == [product] * h0 + [cell, product, cell] + [cell, product, cell]


@pytest.mark.parametrize("cell", CELLS)
def test_recomputed(cell):
    """Two members, which are the first and the last steps of one layer, save together what its forward saved."""
    layer, n = Layer(cell, torch.float32, 4, 2, H), 2
    h, c, saved = layer.forward(step, steps_of(H, torch.float32))

    def entering(start, states):
        return None if states is None else torch.cat([start[None], states[:-1]]).unflatten(0, (2, n))

    def twice(tensor):
        return None if tensor is None else torch.stack([tensor, tensor])

    states_h = entering(layer.h0, h)
    sides = layer.x.unflatten(0, (2, n)), states_h @ layer.w.t()
    out, given = torch.full_like(saved, float("nan")), Given(twice(layer.held), twice(layer.seed))
    recompute.compute(
        layer.cell, *sides, twice(layer.bias_x), twice(layer.bias_h), out.unflatten(0, (2, n)), states_h,
        entering(layer.c0, c), given, [0, n],
    )  # fmt: skip
    torch.testing.assert_close(out, saved, rtol=1e-5, atol=1e-5)
