"""The one-program kernels against the step kernels, which are held to the float64 reference elsewhere, and against it
directly."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401 - the interpreter wants it in sight of every jit function
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recurrence import UNWRITTEN, Layer, assert_close, steps_of

from rnnfast import reference
from rnnfast.kernels import one_program, runtime, step
from rnnfast.kernels.cells import CELLS, Cell
from rnnfast.kernels.maths import sigmoid, tanh
from rnnfast.kernels.one_program.plan import PLAIN, OneProgramPlan, warps_for

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1"),
]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
NAMES = list(CELLS)


def of(H: int, rows: int, steps: int = 1 << 16, plain: bool = False) -> OneProgramPlan:
    units = 16 * warps_for(H)
    warps, parts = PLAIN[units] if plain else (units // 16, 0)
    return OneProgramPlan(rows, units, warps, steps, parts)


def compare(layer: Layer, rows: int, chunk: int | None = None, plain: bool = False):
    """Forward and backward beside the step kernels, forward in chunks and backward in launches of `chunk` steps."""
    T, _, H = layer.shape
    dtype = layer.w.dtype
    ours = layer.both(one_program, of(H, rows, chunk or T, plain), chunk=chunk)
    assert_close(ours, layer.both(step, steps_of(H, dtype)), dtype)


@pytest.mark.parametrize("rows", [8, 4, 2])
@pytest.mark.parametrize("cell", NAMES)
def test_cells(cell, rows):
    """Each way to share cells out among the lanes, with a batch that is no multiple; a size of whole tiles and two odd ones."""
    for dtype, H, reverse in ((torch.float32, 16, False), (torch.float16, 29, True), (torch.bfloat16, 34, False)):
        compare(Layer(cell, dtype, 3, rows + 1, H, reverse=reverse), rows, chunk=2)


@pytest.mark.parametrize(("cell", "rows", "H"), [("lstm", 2, 29), ("gru", 4, 20), ("rnn_relu", 2, 16), ("lstm", 4, 16)])
def test_without_tensor_cores(cell, rows, H):
    """The products of float32 that is not TF32: parts of the summed axis, rows of weights aligned or not."""
    compare(Layer(cell, torch.float32, 3, rows + 1, H), rows, 2, plain=True)
    marks = {"lengths": [0, 2, 3, 1, 3][: rows + 1], "resets": torch.tensor([[0, 1, 0, 0, 1]] * 3)[:, : rows + 1] > 0}
    compare(Layer(cell, torch.float32, 3, rows + 1, H, reverse=True, dcs=True, **marks), rows, plain=True)


@pytest.mark.sweep
@pytest.mark.parametrize("H", [1, 2, 31, 48, 64, 128])
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("cell", [*NAMES, "mgu"])
def test_sizes_without_tensor_cores(cell, rows, H):
    compare(Layer(MGU if cell == "mgu" else cell, torch.float32, 3, 2 * rows + 1, H), rows, plain=True)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("H", [1, 2, 3, 15, 17, 33, 50, 64, 66, 96, 127, 128])
@pytest.mark.parametrize("rows", [8, 4, 2])
@pytest.mark.parametrize("cell", NAMES)
def test_sizes(cell, rows, H, dtype):
    for T, B, reverse in ((1, 1, False), (3, 2 * rows + 1, True)):
        compare(Layer(cell, dtype, T, B, H, reverse=reverse), rows)


@pytest.mark.parametrize(("cell", "dtype", "H"), [("lstm", torch.float16, 128), ("rnn_tanh", torch.bfloat16, 256)])
def test_largest(cell, dtype, H):
    compare(Layer(cell, dtype, 2, 3, H), 2)


@pytest.mark.parametrize("optional", [{"h0": False}, {"bias": False}, {"dy": False}, {"dcs": True}], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_optional_inputs(cell, optional):
    compare(Layer(cell, torch.float16, 3, 3, 20, **optional), 4)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_any_chunks(cell, reverse):
    """T = 1, and the same bits whatever the number of steps a launch."""
    compare(Layer(cell, torch.float32, 1, 2, 20, reverse=reverse), 2)
    layer = Layer(cell, torch.float32, 5, 3, 20, reverse=reverse)
    runs = [layer.both(one_program, of(20, 2, steps), chunk=steps) for steps in (1, 2, 5)]
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh"])
def test_inference_saves_nothing(cell, marked):
    """Without `saved` the states are bitwise the same, from chunk to chunk too, and one cell state is kept, not T."""
    lengths = [4, 0, 2] if marked else None
    layer = Layer(cell, torch.float16, 4, 3, 18, lengths=lengths)
    h, c, _ = layer.forward(one_program, of(18, 2), training=False, chunk=3)
    trained = layer.forward(one_program, of(18, 2))
    assert torch.equal(h, trained[0])
    if c is not None:
        last = [trained[1][n - 1, row] if n else torch.full((18,), UNWRITTEN) for row, n in enumerate(lengths or [4] * 3)]
        assert torch.equal(c[0], torch.stack(last))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_either_backward_on_either_forward(cell):
    """The families write the same buffers, so that either's backward runs on what either's forward saved."""
    layer = Layer(cell, torch.float16, 3, 3, 24)
    plan, tiles = of(24, 4), steps_of(24, torch.float16)
    ours = layer.backward(one_program, plan, *layer.forward(step, tiles))
    theirs = layer.backward(step, tiles, *layer.forward(one_program, plan))
    assert_close([each for each in ours if each is not None], [each for each in theirs if each is not None], torch.float16)


@pytest.mark.parametrize("cell", NAMES)
def test_matches_reference(cell):
    """The states of a long sequence against the reference in float64."""
    T, B, H = 30, 3, 20
    layer = Layer(cell, torch.float32, T, B, H)
    h, c, _ = layer.forward(one_program, of(H, 2), chunk=16)
    doubles = [tensor.double() for tensor in (layer.x, layer.w, layer.bias_x, layer.bias_h)]
    x, w, bias_x, bias_h = doubles
    starts = tuple(tensor.double() for tensor in (layer.h0, layer.c0) if tensor is not None)
    y, last = reference.layer(cell, x, starts, torch.eye(w.shape[0], dtype=torch.float64), w, bias_x, bias_h)
    assert (h - y).abs().max() < 1e-5
    assert c is None or (c[-1] - last[1]).abs().max() < 1e-5


def test_nan_stays_in_its_row():
    """A row of the batch whose input is NaN spoils no other row of its program."""
    layer = Layer("lstm", torch.float16, 3, 4, 20)
    clean = layer.both(one_program, of(20, 4))
    layer.x[1, 2] = float("nan")
    spoiled = layer.both(one_program, of(20, 4))
    for a, b in zip(clean, spoiled, strict=True):
        batch = a.dim() - 2
        others = torch.tensor([0, 1, 3])
        assert torch.equal(a.index_select(batch, others), b.index_select(batch, others))
    assert spoiled[0][1:, 2].isnan().all()


@triton.jit
def _mgu_forward(x_gates, h_gates, states, given):
    f = sigmoid(x_gates[0] + h_gates[0])
    n = tanh(x_gates[1] + f * h_gates[1])
    return (n + (1.0 - f) * (states[0] - n),), (f, n, h_gates[1])


@triton.jit
def _mgu_backward(saved, states, new_states, given, d_states):
    f, n, h_n = saved
    d_h = d_states[0]
    d_xn = d_h * f * (1.0 - n * n)
    d_f = d_h * (n - states[0]) * f * (1.0 - f) + d_xn * h_n * f * (1.0 - f)
    return (d_xn, d_f, d_xn * f), (d_h * (1.0 - f),), ()


MGU = Cell(gates=2, saved=3, grads=3, carried=0, direct=True, forward=_mgu_forward, backward=_mgu_backward)


@pytest.mark.parametrize("rows", [8, 2])
def test_another_cell(rows):
    """Two gates, the sides of the last apart, three saved: a cell that no kernel knows of."""
    compare(Layer(MGU, torch.float32, 3, 3, 20), rows)


T, B = 5, 9
LENGTHS = [0, 2, 1, 0, 5, 2, 1, 3, 5]
RESETS = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.3
MARKED = {
    "all": {"lengths": LENGTHS, "resets": RESETS, "dcs": True},
    "lengths": {"lengths": LENGTHS, "starts": False},
    "resets": {"resets": RESETS},
    "from zeros": {"lengths": LENGTHS, "resets": RESETS, "h0": False, "bias": False, "dy": False, "starts": False},
    "all empty": {"lengths": [0] * B},
}
SOME = [("lstm", 4, False, "all"), ("lstm", 8, True, "all"), ("gru", 2, True, "all"), ("rnn_tanh", 8, False, "all")]
SOME += [("lstm", 2, False, name) for name in MARKED if name != "all"]
ALL = [
    pytest.param(cell, rows, reverse, name, marks=pytest.mark.sweep)
    for cell in NAMES
    for rows in (8, 4, 2)
    for reverse in (False, True)
    for name in MARKED
]


@pytest.mark.parametrize(("cell", "rows", "reverse", "name"), SOME + ALL)
def test_marks(cell, rows, reverse, name):
    """Lengths and resets, from given states to given states, in one launch and in several."""
    for H, chunk in ((20, None), (19, 2)):
        layer = Layer(cell, torch.float32, T, B, H, reverse=reverse, **MARKED[name])
        compare(layer, rows, chunk)


@pytest.mark.sweep
@settings(max_examples=300)
@given(
    cell=st.sampled_from(NAMES), T=st.integers(1, 5), B=st.integers(1, 20), H=st.integers(1, 70), bias=st.booleans(),
    h0=st.booleans(), dy=st.booleans(), dcs=st.booleans(), reverse=st.booleans(), dtype=st.sampled_from(FLOATS),
    rows=st.sampled_from([8, 4, 2]), chunk=st.integers(1, 5), marked=st.booleans(), data=st.data(),
)  # fmt: skip
def test_any_layer(cell, T, B, H, bias, h0, dy, dcs, reverse, dtype, rows, chunk, marked, data):
    marks = {}
    if marked:
        marks = {"lengths": data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B)), "starts": data.draw(st.booleans())}
        marks["resets"] = torch.tensor(data.draw(st.lists(st.booleans(), min_size=T * B, max_size=T * B))).view(T, B)
    layer = Layer(cell, dtype, T, B, H, bias=bias, h0=h0, dy=dy, dcs=dcs, reverse=reverse, **marks)
    compare(layer, rows, chunk)
