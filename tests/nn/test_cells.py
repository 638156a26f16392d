"""The cells beside torch.nn's own: results and gradients, errors, state, and that a step runs on the kernels."""

import copy
import pickle

import pytest
import torch
from support.layers import equal, outcome
from torch import nn

import rnnfast
from rnnfast import numerics

pytestmark = pytest.mark.numerical

B, I, H = 3, 29, 31
CELLS = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"})]
NAMES = ["LSTMCell", "GRUCell", "RNNCell"]


def pair(name, device, backend="triton", **options):
    theirs = getattr(nn, name)(I, H, **options, device=device)
    ours = getattr(rnnfast, name)(I, H, **options, device=device, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states(name, *shape, **options):
    made = [torch.randn(*shape, **options) for _ in range(2 if name == "LSTMCell" else 1)]
    return tuple(made) if len(made) == 2 else made[0]


def flat(result):
    return list(result) if isinstance(result, tuple) else [result]


def run(cell, x, hx, dtype):
    """New states and the gradients of input, states and parameters, by name."""
    x, *each = (tensor.to(dtype).requires_grad_() for tensor in (x, *flat(() if hx is None else hx)))
    outputs = flat(cell(x, None if hx is None else tuple(each) if isinstance(hx, tuple) else each[0]))
    upstream = [torch.linspace(-1, 1, out.numel()).to(out).view(out.shape) for out in outputs]
    return numerics.named([*outputs, *torch.autograd.grad(outputs, [x, *each, *cell.parameters()], upstream)])


@pytest.mark.parametrize(
    "batched, given, bias", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, options", CELLS)
def test_one_step(name, options, dtype, batched, given, bias, device, monkeypatch):
    """States and all gradients within the contract, and nothing falls back."""
    monkeypatch.setenv("RNNFAST_STRICT", "1")
    ours, theirs = (cell.to(dtype) for cell in pair(name, device, bias=bias, **options))
    shape = (B,) if batched else ()
    x, hx = torch.randn(*shape, I, device=device).to(dtype), states(name, *shape, H, device=device) if given else None
    hx = tuple(h.to(dtype) for h in hx) if isinstance(hx, tuple) else hx if hx is None else hx.to(dtype)
    exact, found = copy.deepcopy(theirs).double(), run(ours, x, hx, dtype)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert not numerics.fault(found, run(theirs, x, hx, dtype), lambda: run(exact, x, hx, torch.float64), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_launches(name, device, saved):
    """One launch a step; without gradients nothing is kept for backward."""
    ours, _ = pair(name, device)
    x = torch.randn(B, I, device=device)
    ours(x)
    with torch.no_grad():
        ours(x)
    assert len(saved) == 2 and saved[0] is not None and saved[1] is None


@pytest.mark.parametrize("name, options", CELLS)
def test_loop_equals_layer(name, options, device):
    """Step by step, with gradients through time, a cell computes what the layer does in one call."""
    ours, _ = pair(name, device, **options)
    layer = getattr(rnnfast, name.removesuffix("Cell"))(I, H, **options, device=device, backend="triton")
    layer.load_state_dict({f"{key}_l0": weight for key, weight in ours.state_dict().items()})
    x, hx, outputs = torch.randn(3, B, I, device=device), None, []
    for step in x:
        hx = ours(step, hx)
        outputs.append(hx[0] if isinstance(hx, tuple) else hx)
    found, expected = torch.stack(outputs), layer(x)[0]
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(out.square().sum(), list(m.parameters())) for out, m in ((found, ours), (expected, layer))]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


WRONG = {
    "0-D": lambda t: t[0, 0],
    "1-D": lambda t: t[0],
    "3-D": lambda t: t[None],
    "few rows": lambda t: t[:-1],
    "no rows": lambda t: t[:0],
    "few features": lambda t: t[:, :-1],
    "many features": lambda t: torch.cat([t, t], 1),
    "no features": lambda t: t[:, :0],
    "unbatched, few features": lambda t: t[0, :-1],
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "int64": lambda t: t.long(),
    "sparse": lambda t: t.to_sparse(),
    "list": lambda t: t.tolist(),
    "number": lambda t: 1.0,
    "text": lambda t: "t",
}


def same(ours, theirs, *args):
    """Whether both cells raise the same, or return the same."""
    found, expected = outcome(ours, *args), outcome(theirs, *args)
    if isinstance(expected, tuple) and isinstance(expected[0], type):
        assert found == expected
    else:
        assert equal(flat(found), flat(expected))


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name, kind, device, no_launch):
    """A wrong input or state, also one of an LSTM's two: torch.nn's error, type and text, or its result, without a launch."""
    ours, theirs = pair(name, device, backend=None)
    x, h = torch.randn(B, I, device=device), torch.randn(B, H, device=device)
    good = (h, h) if name == "LSTMCell" else h
    if kind not in ("1-D", "few rows"):  # which are right
        same(ours, theirs, WRONG[kind](x))
    same(ours, theirs, WRONG[kind](x), good)
    bad = WRONG[kind](h)
    for hx in [(bad, h), (h, bad), (bad, bad)] if name == "LSTMCell" else [bad]:
        same(ours, theirs, x, hx)
        if kind != "1-D":  # which an input without a batch has
            same(ours, theirs, x[0], hx)


@pytest.mark.parametrize("name", NAMES)
def test_containers(name, device, no_launch):
    """States packed otherwise than the cell takes them: torch.nn's error."""
    ours, theirs = pair(name, device, backend=None)
    x, h = torch.randn(B, I, device=device), torch.randn(B, H, device=device)
    others = [(h,), (), [], {"h": h}, 0, "hx", False, (h, h, h)] + ([h] if name == "LSTMCell" else [(h, h)])
    for hx in others:
        same(ours, theirs, x, hx)


@pytest.mark.parametrize("name", NAMES)
def test_state(name, device):
    """One seed gives torch.nn's weights; repr, keys, copies and backend are as on the layers."""
    made = []
    for space in (rnnfast, nn):
        torch.manual_seed(5)
        made.append(getattr(space, name)(I, H, device=device, dtype=torch.float64))
    ours, theirs = made
    assert repr(ours) == repr(theirs) and isinstance(ours, getattr(nn, name)) and [*ours.state_dict()] == [*theirs.state_dict()]
    assert equal([*ours.parameters()], [*theirs.parameters()])
    x = torch.randn(B, I, device=device, dtype=torch.float64)
    assert equal(flat(pickle.loads(pickle.dumps(ours))(x)), flat(theirs(x)))
    assert repr(getattr(rnnfast, name)(I, H, bias=False, backend="torch")) == f"{name}(29, 31, bias=False, backend='torch')"
    with pytest.raises(ValueError, match="should be one of 'triton'"):
        getattr(rnnfast, name)(I, H, backend="cudnn")
    with rnnfast.use_backend("triton"), pytest.warns(rnnfast.FallbackWarning, match="the dtype is torch.float64"):
        ours(x)
    with rnnfast.use_backend("reference"):
        torch.testing.assert_close(flat(ours(x)), flat(theirs(x)))


ARGUMENTS = [((), {}), ((3,), {}), ((3, 0), {}), ((0, 4), {}), ((3, -1), {}), (("3", 4), {}), ((3, 4.0), {}), ((3, True), {})]
ARGUMENTS += [((3, 4), {"bias": 1}), ((3, 4, None), {}), ((3, 4), {"nonlinearity": "gelu"}), ((3, 4), {"num_layers": 1})]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_constructor_arguments(name, arguments):
    """torch.nn's error, or a cell that looks and fails the same."""
    made = [outcome(getattr(space, name), *arguments[0], **arguments[1]) for space in (rnnfast, nn)]
    said = [m if isinstance(m, tuple) else (repr(m), [p.shape for p in m.parameters()]) for m in made]
    assert said[0] == said[1]
    if "nonlinearity" in arguments[1] and name == "RNNCell":
        assert outcome(made[0], torch.zeros(B, 3)) == outcome(made[1], torch.zeros(B, 3))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_explain(name, device):
    """explain says of a cell what runs it: one step on the kernels, PyTorch's own, or an error for an option of layers."""
    cell = getattr(rnnfast, name)(I, H, device=device, backend="triton")
    for x in (torch.zeros(B, I, device=device), torch.zeros(I, device=device)):
        explained = rnnfast.explain(cell, x)
        assert explained.backend == "triton" and "1 layers x 1 directions x 1 steps" in explained.details
    cell.backend = "torch"
    assert rnnfast.explain(cell, x).details == "PyTorch's own cell"
    assert rnnfast.explain(cell, x.double()).backend == "torch"
    with pytest.raises(TypeError, match=f"{name} takes no lengths"):
        rnnfast.explain(cell, x, lengths=[1])
