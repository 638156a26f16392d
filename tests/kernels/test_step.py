"""The step kernels by themselves: what they write, how often they launch, and that they touch nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnfast import ops, reference
from rnnfast.kernels import cells, step
from rnnfast.kernels.groups import Group
from rnnfast.kernels.runtime import Launcher
from rnnfast.kernels.step import plan

pytestmark = pytest.mark.numerical

CELLS = list(cells.CELLS)
GUARD = 64  # elements before and after each output that must stay as they were


def poisoned(*shape, dtype=torch.float32, device="cpu"):
    """A tensor full of NaN between two guards of NaN, and a function that says whether the guards are still whole."""
    size = 1
    for n in shape:
        size *= n
    whole = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
    inner = whole[GUARD : GUARD + size].view(shape)
    return inner, lambda: bool(whole[:GUARD].isnan().all() and whole[GUARD + size :].isnan().all())


def run(cell, T, B, H, dtype, device, *, reverse=False, states=True, bias=True, training=True, chunk=None):
    """Forward and backward of one member on poisoned outputs; everything that a check may want."""
    spec = cells.CELLS[cell]
    G = spec.gates
    new = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    x, w = new(1, T, B, G * H), (new(1, G * H, H) / H**0.5).to(dtype)
    bias_x, bias_h = (new(1, G * H).to(dtype), new(1, G * H).to(dtype)) if bias else (None, None)
    h0 = new(1, B, H).to(dtype) if states else None
    c0 = new(1, B, H) if states and spec.carried else None
    tiles, guards = plan.step_plan(H, x.new_empty(0, dtype=dtype).element_size(), "ieee"), []
    options = {"group": Group(flips=int(reverse)), "precision": "ieee", "plan": tiles}

    def out(*shape, dtype):
        tensor, whole = poisoned(*shape, dtype=dtype, device=device)
        guards.append(whole)
        return tensor

    h = out(T, B, H, dtype=dtype)
    c = out(1, T if training else 1, B, H, dtype=torch.float32) if spec.carried else None
    saved = out(1, T, B, spec.saved * H, dtype=dtype) if training else None
    n = chunk or T
    rounds = []
    for begin in range(0, T, n):
        first = max(0, T - begin - n) if reverse else begin
        steps = x[0, first : T - begin if reverse else begin + n].contiguous()
        rounds.append((begin, len(steps), steps, 0))
    step.forward(spec, lambda: rounds, w, bias_x, bias_h, h0, c0, h, c, saved, **options)
    inputs = {"x": x, "w": w, "bias_x": bias_x, "bias_h": bias_h, "h0": h0, "c0": c0}
    outputs = {"h": h, "c": c, "saved": saved}
    if training:
        dy = new(T, B, H).to(dtype)
        d_h, d_c = new(1, B, H), new(1, B, H) if spec.carried else None
        upstream = {"dy": dy, "d_h": d_h.clone(), "d_c": None if d_c is None else d_c.clone()}
        d_gates = out(1, T, B, spec.grads * H, dtype=dtype)
        step.backward(spec, lambda: [(0, T, dy, saved)], h, h0, c, c0, w, d_gates, d_h, d_c, **options)
        outputs |= {"d_gates": d_gates, "d_h": d_h, "d_c": d_c}
        inputs |= upstream
    assert all(whole() for whole in guards), "a kernel wrote outside of its output"
    return inputs, outputs


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_writes_all_and_nothing_else(cell, dtype, reverse, device):
    """Every element of every output is written (no NaN is left of the poison), the guards beside them are not."""
    _, outputs = run(cell, 3, 5, 19, dtype, device, reverse=reverse)
    for name, tensor in outputs.items():
        assert tensor is None or not tensor.isnan().any(), name


@pytest.mark.parametrize("T, B, H", [(1, 1, 1), (3, 1, 1), (1, 33, 17), (2, 2, 33)])
@pytest.mark.parametrize("cell", CELLS)
def test_odd_sizes_against_float64(cell, T, B, H, device):
    """Forward states against the reference in float64, at sizes that leave tiles mostly masked."""
    inputs, outputs = run(cell, T, B, H, torch.float32, device)
    doubles = {name: None if tensor is None else tensor.double() for name, tensor in inputs.items()}
    doubles |= {name: tensor[0] for name, tensor in doubles.items() if tensor is not None and name != "dy"}
    eye = torch.eye(doubles["w"].shape[0], dtype=torch.float64, device=device)  # the input side is given, so W_ih is I
    states = (doubles["h0"], doubles["c0"]) if "lstm" in cell else (doubles["h0"],)
    y, last = reference.layer(cell, doubles["x"], states, eye, doubles["w"], doubles["bias_x"], doubles["bias_h"])
    assert (outputs["h"] - y).abs().max() < 1e-5
    if outputs["c"] is not None:
        assert (outputs["c"][0, -1] - last[1]).abs().max() < 1e-5


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_chunks_equal_the_whole(cell, reverse, device):
    """Input sides given in chunks of 2 steps (the last one shorter) give bitwise what one chunk gives."""
    torch.manual_seed(1)
    _, whole = run(cell, 5, 2, 6, torch.float32, device, reverse=reverse)
    torch.manual_seed(1)
    _, parts = run(cell, 5, 2, 6, torch.float32, device, reverse=reverse, chunk=2)
    for name, tensor in whole.items():
        assert tensor is None or torch.equal(tensor, parts[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_inference_saves_nothing(cell, device):
    """Without `saved` the states are bitwise the same and one cell state is kept, not T."""
    torch.manual_seed(1)
    _, training = run(cell, 4, 3, 5, torch.float32, device)
    torch.manual_seed(1)
    _, inference = run(cell, 4, 3, 5, torch.float32, device, training=False)
    assert torch.equal(training["h"], inference["h"]) and inference["saved"] is None
    if training["c"] is not None:
        assert inference["c"].shape[1] == 1 and torch.equal(training["c"][:, -1:], inference["c"])


@pytest.mark.parametrize("cell", CELLS)
def test_one_launch_a_step(cell, device, monkeypatch):
    """T launches forward and T backward, one of them at a time for each step, whatever T is."""
    launches, bind = [], Launcher.bind

    def watched(self, *args):
        launch, plain = bind(self, *args)
        return lambda *args: (launches.append(self.kernel.__name__), launch(*args)), plain

    monkeypatch.setattr(Launcher, "bind", watched)
    for T in (1, 6):
        launches.clear()
        run(cell, T, 2, 3, torch.float32, device)
        assert launches == ["forward_step_kernel"] * T + ["backward_step_kernel"] * T


def test_saved_bytes(device):
    """Bytes kept for backward per unit and step: as the docs of rnnfast.ops say."""
    T, B, H = 3, 2, 8
    for cell, G in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1)):
        for dtype, size in ((torch.float16, 2), (torch.float32, 4)):
            x, w_ih, w_hh = (torch.randn(*s, device=device).to(dtype) for s in ((T, B, 4), (1, G * H, 4), (1, G * H, H)))
            *_, saved, c = ops.forward(cell, x, None, None, w_ih, w_hh, None, None, None, 0, True)
            kept = (saved.numel() * saved.element_size() + c.numel() * c.element_size()) / (T * B * H)
            assert kept == {"lstm": 4 * size + 4, "gru": 4 * size, "rnn_tanh": 0}[cell]
            *_, saved, c = ops.forward(cell, x, None, None, w_ih, w_hh, None, None, None, 0, False)
            assert saved.numel() == c.numel() == 0


@settings(max_examples=15)
@given(
    cell=st.sampled_from(CELLS), T=st.integers(1, 3), B=st.integers(1, 40), H=st.integers(1, 40), bias=st.booleans(),
    states=st.booleans(), reverse=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_any_shape(device, cell, T, B, H, bias, states, reverse, dtype):
    """Any size and option: complete, finite, in bounds, and the same when run again."""
    torch.manual_seed(2)
    _, first = run(cell, T, B, H, dtype, device, bias=bias, states=states, reverse=reverse)
    torch.manual_seed(2)
    _, again = run(cell, T, B, H, dtype, device, bias=bias, states=states, reverse=reverse)
    for name, tensor in first.items():
        assert tensor is None or (tensor.isfinite().all() and torch.equal(tensor, again[name])), name
