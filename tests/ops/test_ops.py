"""The operators: PyTorch's own checks, every gradient, and what nobody needs not being computed."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rnnfast import numerics, ops, reference
from rnnfast.check import Case, compare
from rnnfast.choice import kernel_plan
from rnnfast.kernels import cells
from rnnfast.ops import recurrence

pytestmark = pytest.mark.numerical

CELLS = list(reference.GATES)
T, B, I, H = 4, 3, 5, 6


def make(cell, device, dtype=torch.float32, T=T, B=B, I=I, H=H, states=True, bias=True, grad=True, scale=1.0):
    rows = reference.GATES[cell] * H
    shapes = {"x": (T, B, I)}
    if states:
        shapes |= {"h0": (B, H)} | ({"c0": (B, H)} if reference.STATES[cell] > 1 else {})
    shapes |= {"w_ih": (rows, I), "w_hh": (rows, H)} | ({"b_ih": (rows,), "b_hh": (rows,)} if bias else {})
    size = {"x": scale, "w_ih": I**-0.5, "w_hh": H**-0.5}
    made = {name: torch.randn(*shape, device=device) * size.get(name, 1) for name, shape in shapes.items()}
    return {name: tensor.to(dtype).requires_grad_(grad) for name, tensor in made.items()}


def call(layer, cell, tensors, reverse=False):
    """y and the last states of `ops.layer` or `reference.layer`."""
    states = tuple(tensors[name] for name in ("h0", "c0") if name in tensors) or None
    weights = [tensors.get(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    y, last = layer(cell, tensors["x"], states, *weights, reverse=reverse)
    return (y, *last)


def grouped(tensor):
    """With a group of one member in front; what may require gradients is a leaf."""
    return None if tensor is None else tensor.detach().unsqueeze(0).requires_grad_(tensor.requires_grad)


def op_args(cell, tensors, reverse, save):
    """The arguments of `rnnfast::forward` for a layer in one direction."""
    own = (grouped(tensors.get(name)) for name in ("h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"))
    return (cell, tensors["x"], *own, None, int(reverse), save)


def test_shapes_known_without_triton():
    """What the fake kernels say of a cell is what the kernels' own description says."""
    for cell, spec in cells.CELLS.items():
        known = reference.CELLS[cell]
        assert (known.gates, known.saved, known.grads) == (spec.gates, spec.saved, spec.grads)
        assert known.states == 1 + spec.carried


@pytest.mark.parametrize("bare, grad", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, bare, grad, device):
    """torch.library.opcheck: schema, autograd registration, fake kernels and AOT dispatch with dynamic shapes."""
    tensors = make(cell, device, states=not bare, bias=not bare, grad=grad)
    torch.library.opcheck(ops.forward, op_args(cell, tensors, bare, grad))
    with torch.no_grad():
        y, h_n, _, _, saved, c = ops.forward(*op_args(cell, tensors, bare, True))
        upstream = (torch.randn_like(y), None, None) if bare else (None, torch.randn_like(h_n), None)
        h0, c0, w_hh = (tensors[name].detach()[None] if name in tensors else None for name in ("h0", "c0", "w_hh"))
        torch.library.opcheck(ops.backward, (cell, *upstream, y, saved, c, h0, c0, w_hh, None, int(bare), not bare))


@pytest.mark.parametrize("cell, reverse", [("lstm", False), ("gru", True)])
def test_opcheck_of_marked_calls(cell, reverse, device):
    """With lengths and resets: what is returned of padding is the same in every run too."""
    tensors = make(cell, device)
    lengths = torch.tensor([2, 0, T], device=device)
    resets = torch.zeros(T, B, dtype=torch.bool, device=device)
    resets[1] = True
    marks = reference.marks(tensors["x"], lengths, resets, reverse)[None]
    states = [torch.randn(1, B, H, device=device, requires_grad=True) for _ in range(2 if cell == "lstm" else 1)]
    marked = (marks, lengths, *states)
    torch.library.opcheck(ops.forward, (*op_args(cell, tensors, reverse, True), *marked))
    with torch.no_grad():
        y, h_n, _, _, saved, c = ops.forward(*op_args(cell, tensors, reverse, True), *marked)
        padded = marks == reference.PADDED
        assert all(not kept[padded].any() for kept in (y[None], saved, c) if kept.numel())
        dcs = torch.randn_like(c) if cell == "lstm" else None
        start = [tensors[name].detach()[None] if name in tensors else None for name in ("h0", "c0", "w_hh")]
        detached = [tensor.detach() for tensor in marked]
        given = (cell, torch.randn_like(y), torch.randn_like(h_n), None, y, saved, c, *start, None, int(reverse), True)
        torch.library.opcheck(ops.backward, (*given, dcs, *detached))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_every_gradient(cell, dtype, reverse, device):
    """Outputs and all gradients against the float64 reference; the yardstick is the same reference run in `dtype`."""
    tensors, upstream = make(cell, device, dtype), []

    def results(layer, kind):
        given = {name: tensor.detach().to(kind, copy=True).requires_grad_() for name, tensor in tensors.items()}
        outputs = call(layer, cell, given, reverse)
        if not upstream:
            upstream.extend(torch.randn_like(out) for out in outputs)
        grads = torch.autograd.grad(outputs, list(given.values()), [gradient.to(kind) for gradient in upstream])
        return {f"output {n}": out for n, out in enumerate(outputs)} | dict(zip(given, grads, strict=True))

    ours, theirs = (results(layer, dtype) for layer in (ops.layer, reference.layer))
    assert not numerics.fault(ours, theirs, lambda: results(reference.layer, torch.float64), dtype)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_backward_twice(cell, device):
    """retain_graph: the second backward gives bitwise what the first gave (saved activations are not overwritten)."""
    tensors = make(cell, device)
    outputs = call(ops.layer, cell, tensors)
    loss = sum(out.square().sum() for out in outputs)
    first = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(tensors.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_each_output_alone(cell, device):
    """A loss of only one output gives what the reference gives: absent upstream gradients count as zero."""
    tensors = make(cell, device)
    right = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    for n in range(3 if cell == "lstm" else 2):
        ours = torch.autograd.grad(call(ops.layer, cell, tensors)[n].sum(), list(tensors.values()))
        exact = torch.autograd.grad(call(reference.layer, cell, right)[n].sum(), list(right.values()))
        for a, b in zip(ours, exact, strict=True):
            assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5)


class Counter(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func._schema.name)
        return func(*args, **kwargs or {})

    def count(self, *names):
        return sum(name in names for name in self.calls)


PRODUCTS = {"x": 1, "w_ih": 1, "w_hh": 2, "b_ih": 0, "b_hh": 0}  # w_hh: the steps, and the first step with h0
SUMS = {"b_ih": 1, "b_hh": 1}


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_only_what_is_needed(cell, device):
    """For every subset of inputs that require gradients: those gradients, and no product or sum for any other."""
    names = ["x", "w_ih", "w_hh", "b_ih", "b_hh"]
    everything = make(cell, device, T=2, B=2)
    grads = torch.autograd.grad(call(ops.layer, cell, everything)[0].sum(), list(everything.values()))
    full = dict(zip(everything, grads, strict=True))
    for needed in (subset for n in range(1, 6) for subset in itertools.combinations(names, n)):
        tensors = {name: tensor.detach().requires_grad_(name in needed) for name, tensor in everything.items()}
        loss = call(ops.layer, cell, tensors)[0].sum()
        with Counter() as counter:
            grads = torch.autograd.grad(loss, [tensors[name] for name in needed])
        assert all(torch.equal(grad, full[name]) for name, grad in zip(needed, grads, strict=True))
        products = counter.count("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
        assert products == sum(PRODUCTS[name] for name in needed)
        assert counter.count("aten::sum") == sum(SUMS.get(name, 0) for name in needed)


def test_no_grad_saves_nothing(device):
    """Neither no_grad nor inputs without gradients keep anything; an input that needs one does."""
    tensors = make("lstm", device)
    with torch.no_grad():
        assert call(ops.layer, "lstm", tensors)[0].grad_fn is None
    assert not call(ops.layer, "lstm", make("lstm", device, grad=False))[0].requires_grad
    with pytest.raises(RuntimeError, match="save=False"):
        ops.forward(*op_args("lstm", tensors, False, False))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layouts(cell, device):
    """Transposed, strided, expanded and misaligned inputs give what contiguous ones give, and stay as they were."""
    base = make(cell, device, grad=False)
    expected = call(ops.layer, cell, base)
    shift = lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)  # noqa: E731 - off the 16-byte boundary
    wide = lambda t: torch.stack([t, t], -1)[..., 0]  # noqa: E731
    turn = lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t  # noqa: E731
    for change in (shift, wide, turn):
        changed = {name: change(tensor) for name, tensor in base.items()}
        copies = {name: tensor.clone() for name, tensor in changed.items()}
        for a, b in zip(call(ops.layer, cell, changed), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
        assert all(torch.equal(changed[name], copies[name]) for name in changed)
    same = dict(base, x=base["x"][:1].expand(T, B, I), h0=base["h0"][:1].expand(B, H))
    dense = {name: tensor.contiguous() for name, tensor in same.items()}
    assert all(torch.equal(a, b) for a, b in zip(call(ops.layer, cell, same), call(ops.layer, cell, dense), strict=True))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_large_values(cell, device):
    """Inputs of 1e4 saturate the gates and give finite outputs and gradients."""
    tensors = make(cell, device, scale=1e4)
    outputs = call(ops.layer, cell, tensors)
    grads = torch.autograd.grad(sum(out.sum() for out in outputs), list(tensors.values()))
    assert all(tensor.isfinite().all() for tensor in (*outputs, *grads))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_inf_stay_in_their_row(cell, bad, device):
    """One bad element makes NaN exactly where the reference has it, and never in another batch row."""
    tensors = make(cell, device, grad=False)
    tensors["x"][1, 2, 0] = bad
    outputs, right = call(ops.layer, cell, tensors), call(reference.layer, cell, tensors)
    for ours, exact in zip(outputs, right, strict=True):
        assert torch.equal(ours.isnan(), exact.isnan())
        assert torch.equal(ours.isinf(), exact.isinf())
    assert outputs[0][:, :2].isfinite().all()


@pytest.mark.parametrize("T, B, steps", [(100, 16, 100), (1000, 16, 128), (10, 5000, 1), (1, 1, 1), (10**6, 1, 2048)])
def test_steps_of_a_chunk(T, B, steps, monkeypatch):
    """The kernels take at least one step at a time, at most T, and otherwise about CHUNK_ROWS rows: every step once."""
    taken = []

    def run(direction, choice, device, spec, chunks, *args, **options):
        taken.extend((begin, N) for begin, N, _, _ in chunks())
        return choice

    monkeypatch.setattr(kernel_plan, "run", run)
    x, w = torch.zeros(T, B, 1), torch.zeros(1, 1, 1)
    recurrence.forward("rnn_tanh", x, None, None, w, w, None, None, None, 0, False)
    assert taken[0] == (0, steps) and taken[-1][0] + taken[-1][1] == T
    assert [begin for begin, _ in taken] == list(range(0, T, steps))


def test_eager_calls_pass_over_the_operator(device):
    """And no others: under a mode or a profiler, or with a subclass of Tensor, the operator is called."""
    from torch.utils.flop_counter import FlopCounterMode

    tensors = make("gru", device)

    def name() -> str:
        return type(call(ops.layer, "gru", tensors)[0].grad_fn).__name__

    assert name() == "RnnfastForwardBackward"
    with FlopCounterMode(display=False):
        assert "rnnfast_forward" in name()
    with torch.autograd.profiler.profile():
        assert "rnnfast_forward" in name()
    with torch.device(device):  # a mode of torch functions
        assert "rnnfast_forward" in name()

    class Marked(torch.Tensor):
        pass

    tensors["x"] = tensors["x"].detach().as_subclass(Marked)
    assert not recurrence.is_eager(*tensors.values())
    assert recurrence.is_eager(*make("gru", device).values(), "gru", None, False)


def test_chunked_input_side(device, monkeypatch):
    """A sequence longer than a chunk: the same states, in both directions, with a last chunk that is shorter."""
    tensors = make("lstm", device, grad=False)
    for reverse in (False, True):
        whole = call(ops.layer, "lstm", tensors, reverse)
        monkeypatch.setattr(recurrence, "CHUNK_ROWS", 3 * B)
        chunked = call(ops.layer, "lstm", tensors, reverse)
        monkeypatch.undo()
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(whole, chunked, strict=True))


@settings(max_examples=12)
@given(
    cell=st.sampled_from(CELLS), T=st.integers(1, 3), B=st.integers(1, 34), I=st.integers(1, 20), H=st.integers(1, 34),
    reverse=st.booleans(), states=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_any_shape(device, cell, T, B, I, H, reverse, states, bias):
    """Outputs and gradients against float64 for any shape and option."""
    tensors = make(cell, device, T=T, B=B, I=I, H=H, states=states, bias=bias)
    right = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    ours, exact = call(ops.layer, cell, tensors, reverse), call(reference.layer, cell, right, reverse)
    our_grads = torch.autograd.grad(sum(out.square().sum() for out in ours), list(tensors.values()))
    exact_grads = torch.autograd.grad(sum(out.square().sum() for out in exact), list(right.values()))
    for a, b in zip((*ours, *our_grads), (*exact, *exact_grads), strict=True):
        assert numerics.rms(a - b) <= 2e-6 * (1 + b.abs().max().item())


def test_autocast(device):
    """Under autocast everything is cast to the lower precision, in the operator nothing is cast behind its back."""
    tensors = make("lstm", device)
    low = {name: tensor.detach().bfloat16().requires_grad_() for name, tensor in tensors.items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = call(ops.layer, "lstm", tensors)
        inside = ops.forward(*op_args("lstm", make("lstm", device), False, True))
    for a, b in zip(cast, call(ops.layer, "lstm", low), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b)
    assert inside[0].dtype == torch.float32
    grads = torch.autograd.grad(sum(out.float().sum() for out in cast), list(tensors.values()))
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no TF32")
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_tf32(cell, device):
    """float32 with TF32 allowed, within the contract of TF32."""
    for result in compare(Case(cell, 6, 16, 64, 128, torch.float32), device, tf32=True):
        assert result.ok, result
