"""How often the persistent kernels are launched for a whole module, and that it makes no difference to the result."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.layers import run
from support.recurrence import tiles
from support.side_by_side import Fault, together

import rnnfast
from rnnfast.choice import kernel_plan
from rnnfast.kernels import runtime
from rnnfast.kernels.persistent.plan import GPUS

pytestmark = pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
T, LAYERS, DIRECTIONS = 5, 2, 2


@pytest.mark.parametrize("name", ["LSTM", pytest.param("GRU", marks=pytest.mark.sweep)])
def test_one_launch_for_each_n_steps(name, monkeypatch):
    """A layer, both directions at once: one forward and one backward, each after one that clears its exchange; the next N go on
    from h and c, so that the outputs and the gradients of everything are the same bits for every N."""
    layer = getattr(rnnfast, name)(3, 16, LAYERS, bidirectional=DIRECTIONS == 2, backend="triton")
    x = torch.randn(T, 2, 3)
    # one weight of the input a row: else torch may add up its products in an order that depends on the number of rows
    for key, weight in layer.named_parameters():
        if "weight_ih" in key:
            rows, columns = weight.shape
            weight.data *= torch.arange(rows)[:, None] % columns == torch.arange(columns)
    monkeypatch.setenv("RNNFAST_KERNELS", "persistent")
    results = []
    for N in (1, 2, T):
        monkeypatch.setattr(
            "rnnfast.kernels.persistent.plan.persistent_plan", lambda *_, N=N, **members: tiles(16, block_h=16, steps=N)
        )
        with kernel_plan.pretend_gpu(GPUS["H100"]), together(N) as happened:
            results.append(run(layer, x))
        launches = LAYERS * -(-T // N)
        assert Counter(kernel for kernel, _ in happened.grids) == {
            "clear_kernel": 2 * launches,
            "persistent_forward_kernel": launches,
            "persistent_backward_kernel": launches,
        }
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert torch.equal(one, other)


def test_a_call_that_waits_in_vain(monkeypatch):
    """Its output is NaN where a word was lost; backward raises the one error, and the next call runs the step kernels."""
    for name, empty in (("_waiting", {}), ("_gave_up", {}), ("_unannounced", [])):
        monkeypatch.setattr(kernel_plan, name, empty)
    monkeypatch.setenv("RNNFAST_KERNELS", "persistent")
    monkeypatch.setattr("rnnfast.kernels.persistent.plan.persistent_plan", lambda *_, **members: tiles(32))
    layer, x = rnnfast.LSTM(3, 32, backend="triton"), torch.randn(T, 2, 3)
    expected = layer(x)[0]
    with kernel_plan.pretend_gpu(GPUS["H100"]), together(0, Fault("skipped word", (2, 0, 0), step=1)) as happened:
        y = layer(x)[0]
        assert (y.isclose(expected, 1e-5, 1e-5) | y.isnan()).all() and y[-1].isnan().any()
        with pytest.raises(RuntimeError, match="gave up: in forward of lstm with 32 hidden units in float32"):
            y.sum().backward()
        with pytest.warns(rnnfast.FallbackWarning, match="gave up"):
            assert torch.equal(layer(x)[0], expected)
    assert happened.grids[-1][0] == "forward_step_kernel"
