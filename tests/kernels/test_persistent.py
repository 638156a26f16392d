"""The persistent kernels, their programs side by side, against the step kernels.

The step kernels are held to the float64 reference elsewhere; `test_matches_reference` holds the persistent ones to it directly.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401 - the interpreter wants it in sight of every jit function
from support.recurrence import TOLERANCE, Layer, assert_close, steps_of, tiles
from support.side_by_side import together

from rnnfast import reference
from rnnfast.kernels import persistent, runtime, step
from rnnfast.kernels.cells import CELLS, Cell
from rnnfast.kernels.groups import ALONE
from rnnfast.kernels.maths import sigmoid, tanh
from rnnfast.kernels.persistent.plan import GPUS, persistent_plan

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1"),
]
SWEPT_DTYPES = [pytest.param(dtype, marks=pytest.mark.sweep) for dtype in (torch.float32, torch.bfloat16)]
HALF_SWEPT = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.sweep)]
SOME_SWEPT = ["lstm", "gru", *(pytest.param(cell, marks=pytest.mark.sweep) for cell in ("rnn_tanh", "rnn_relu"))]


@pytest.mark.parametrize("dtype", HALF_SWEPT, ids=str)
@pytest.mark.parametrize("H", [29, pytest.param(50, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("cell", SOME_SWEPT)
def test_odd_sizes(cell, H, dtype):
    """A padded exchange, the summed axis split, chunks of two steps, in reverse."""
    layer = Layer(cell, dtype, 5, 3, H, reverse=True)
    with together(H):
        ours = layer.both(persistent, tiles(H, split=2, block_h=16), chunk=2)
    assert_close(ours, layer.both(step, steps_of(H, dtype)), dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cell", "H"), [("lstm", 29), ("gru", 50), ("rnn_tanh", 64), ("rnn_relu", 20)])
def test_real_plans(cell, H, dtype):
    """The tiles that an H100 would get."""
    layer = Layer(cell, dtype, 3, 3, H)
    choices = [persistent_plan(CELLS[cell].gates, 3, H, dtype.itemsize, "ieee", b, GPUS["H100"]) for b in (False, True)]
    with together(10):
        forward = layer.forward(persistent, choices[0])
        ours = [*forward, *layer.backward(persistent, choices[1], *forward)]
    assert_close([tensor for tensor in ours if tensor is not None], layer.both(step, steps_of(H, dtype)), dtype)


@pytest.mark.parametrize("cell", SOME_SWEPT)
@pytest.mark.parametrize(
    "optional",
    [
        *(pytest.param({name: False}, marks=pytest.mark.sweep) for name in ("h0", "bias", "dy")),
        {"h0": False, "bias": False, "dy": False},
    ],
)
def test_optional_inputs(cell, optional):
    layer = Layer(cell, torch.float16, 3, 2, 32, **optional)
    with together(1):
        ours = layer.both(persistent, tiles(32, block_h=16))
    assert_close(ours, layer.both(step, steps_of(32, torch.float16)), torch.float16)


@pytest.mark.parametrize("cell", SOME_SWEPT)
def test_inference_saves_nothing(cell):
    """Without `saved` the states are bitwise the same, from chunk to chunk too, and one cell state is kept, not T."""
    layer = Layer(cell, torch.float16, 4, 2, 32)
    with together(2):
        h, c, _ = layer.forward(persistent, tiles(32, block_h=16), training=False, chunk=3)
        trained = layer.forward(persistent, tiles(32, block_h=16))
    assert torch.equal(h, trained[0])
    if c is not None:
        assert torch.equal(c[0], trained[1][-1])


@pytest.mark.parametrize("cell", ["lstm", pytest.param("gru", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("reverse", [False, True])
def test_one_step_and_any_chunks(cell, reverse):
    """T = 1, and the same bits whatever the number of steps a launch."""
    one = Layer(cell, torch.float32, 1, 2, 32, reverse=reverse)
    with together(3):
        assert_close(one.both(persistent, tiles(32)), one.both(step, steps_of(32, torch.float32)), torch.float32)
    layer = Layer(cell, torch.float32, 5, 2, 32, reverse=reverse)
    runs = []
    for steps in (1, 2, 5):
        with together(steps):
            runs.append(layer.both(persistent, tiles(32, block_h=16), chunk=steps))
    for run in runs:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a, b)


def test_clears_its_own_rows_only():
    """The rest of h, which an earlier chunk wrote, and the guards of a test stay."""
    layer = Layer("rnn_tanh", torch.float32, 5, 2, 32)
    h = torch.full((5, 2, 32), 7.0)
    with together(12):
        persistent.forward(
            layer.cell, lambda: [(2, 2, layer.x[2:4], 0)], layer.w[None], None, None, None, None, h, None, None,
            group=ALONE, precision="ieee", plan=tiles(32),
        )  # fmt: skip
    assert (h[[0, 1, 4]] == 7.0).all() and (h[2:4] != 7.0).all()


@pytest.mark.sweep
def test_batch_in_several_launches():
    layer = Layer("lstm", torch.float16, 3, 20, 32)
    narrow = replace(tiles(32), programs=4)  # one batch tile of eight rows at a time
    assert [grid for grid, _ in narrow.launches(20)] == [(4, 1, 1)] * 3
    with together(4):
        ours = layer.both(persistent, narrow, chunk=2)
        whole = layer.both(persistent, tiles(32))
    for a, b in zip(ours, whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", [pytest.param("lstm", marks=pytest.mark.sweep), "gru"])
def test_families_mix(cell):
    """Backward of either family on what the other's forward saved."""
    layer = Layer(cell, torch.float32, 4, 3, 32)
    with together(5):
        ours = layer.forward(persistent, tiles(32))
        theirs = layer.forward(step, steps_of(32, torch.float32))
        mixed = [layer.backward(step, steps_of(32, torch.float32), *ours), layer.backward(persistent, tiles(32), *theirs)]
    for a, b in zip(*mixed, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float16, *SWEPT_DTYPES])
@pytest.mark.parametrize("cell", SOME_SWEPT)
def test_bad_numbers_do_not_hang(cell, dtype):
    """NaN, also of the pattern that means empty, and infinities: what the step kernels give, and no hang."""
    layer = Layer(cell, dtype, 4, 3, 32)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    layer.x[1, 0] = float("nan")
    layer.x.view(torch.int32)[2, 1] = -1
    layer.x[1, 2] = float("inf")
    layer.h0.view(bits)[1, 4:8] = -1
    layer.dy.view(bits)[3, 2] = -1
    with together(6):
        ours = layer.both(persistent, tiles(32))
    for a, b in zip(ours, layer.both(step, steps_of(32, dtype)), strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize(
    "cell", [pytest.param("lstm", marks=pytest.mark.sweep), "gru", pytest.param("rnn_tanh", marks=pytest.mark.sweep)]
)
def test_matches_reference(cell):
    """Forward and backward against float64 autograd through the definition."""
    T, B, H = 5, 3, 50
    layer = Layer(cell, torch.float32, T, B, H)
    with together(7):
        h, c, saved = layer.forward(persistent, tiles(H, block_h=16))
        d_gates, d_h, d_c = layer.backward(persistent, tiles(H, block_h=16, split=2, block_k=64), h, c, saved)
    x, w, b_ih, b_hh, h0 = (
        tensor.double().requires_grad_() for tensor in (layer.x, layer.w, layer.bias_x, layer.bias_h, layer.h0)
    )
    states = (h0,) if layer.c0 is None else (h0, layer.c0.double().requires_grad_())
    # the input side of the gates is the input itself: W_ih is the identity
    y, last = reference.layer(cell, x, states, torch.eye(x.shape[2], dtype=torch.float64), w, b_ih, b_hh)
    gradients = [layer.dy.double(), layer.d_h.double()] + ([layer.d_c.double()] if layer.d_c is not None else [])
    dx, dh0, *dc0 = torch.autograd.grad([y, *last], [x, *states], gradients)
    blocks = d_gates.split(H, dim=-1)
    d_input = torch.cat((*blocks[1:3], blocks[0]), -1) if cell == "gru" else d_gates  # stored as n, r, z, and n's hidden side
    hidden = d_gates[0, :, -layer.cell.gates * H :].double()
    ours = hidden @ layer.w.double() + (0 if d_h is None else d_h)
    torch.testing.assert_close(h.double(), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_input.double(), dx, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, dh0, rtol=1e-5, atol=1e-5)
    if dc0:
        torch.testing.assert_close(d_c.double(), dc0[0], rtol=1e-5, atol=1e-5)


@triton.jit
def two_gates_forward(x_gates, h_gates, states, given):
    f = sigmoid(x_gates[0] + h_gates[0])
    n = tanh(x_gates[1] + h_gates[1])
    return (n + f * (states[0] - n),), (f, n)


@triton.jit
def two_gates_backward(saved, states, new_states, given, d_states):
    f, n = saved
    d_h = d_states[0]
    return (d_h * (states[0] - n) * f * (1.0 - f), d_h * (1.0 - f) * (1.0 - n * n)), (d_h * f,), ()


def test_a_cell_of_ones_own():
    """Of two gates, which none of the library's has."""
    cell = Cell(2, 2, 2, carried=0, direct=True, forward=two_gates_forward, backward=two_gates_backward)
    layer = Layer(cell, torch.float16, 3, 3, 40)
    with together(11):
        ours = layer.both(persistent, tiles(40, block_h=16))
    assert_close(ours, layer.both(step, steps_of(40, torch.float16)), torch.float16)
