"""`recompute`: the gates computed again in backward, a chunk at a time, and what is kept."""

import pickle

import pytest
import torch
from support.layers import NAMES, close, equal, flat, packed, pair, run, states
from support.recurrence import Layer, Members, steps_of, tiles
from support.side_by_side import together
from test_ops import CELLS, make, op_args

import rnnfast
from rnnfast import numerics, ops, reference
from rnnfast.choice import kernel_plan
from rnnfast.kernels import persistent, runtime, step
from rnnfast.kernels.persistent.plan import GPUS
from rnnfast.ops import recurrence

pytestmark = pytest.mark.numerical

T, B, I, H = 7, 3, 5, 6


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three steps a chunk: the last one, which may be the first in time, has one."""
    monkeypatch.setattr(recurrence, "CHUNK_ROWS", 3 * B)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_gradients(cell, dtype, reverse, marked, device):
    """All gradients within the contract: the yardstick is the reference in `dtype`."""
    tensors = make(cell, device, dtype, T=T, B=B, I=I, H=H)
    options = {"reverse": reverse}
    if marked:
        options["lengths"] = torch.tensor([T, 0, 4], device=device)
        options["resets"] = torch.arange(T * B, device=device).view(T, B) % 5 == 3

    def gradients(layer, kind, **recompute):
        given = {name: tensor.detach().to(kind).requires_grad_() for name, tensor in tensors.items()}
        start = tuple(given[name] for name in ("h0", "c0") if name in given)
        weights = (given[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh"))
        y, last = layer(cell, given["x"], start, *weights, **options, **recompute)
        upstream = [torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).to(kind) for out in (y, *last)]
        return dict(zip(given, torch.autograd.grad((y, *last), list(given.values()), upstream), strict=True))

    ours, theirs = gradients(ops.layer, dtype, recompute=True), gradients(reference.layer, dtype)
    assert not numerics.fault(ours, theirs, lambda: gradients(reference.layer, torch.float64), dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, device):
    """Both operators, as PyTorch checks them, with the gates computed again."""
    tensors = make(cell, device, T=T, B=B, I=I, H=H)
    arguments = (*op_args(cell, tensors, False, True), None, None, None, None, None, 0.0, True)
    torch.library.opcheck(ops.forward, arguments)
    with torch.no_grad():
        y, _, _, _, saved, c = ops.forward(*arguments)
        assert saved.numel() == 0
        _, x, h0, c0, w_ih, w_hh, b_ih, b_hh, *_ = (t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
        given = (cell, torch.randn_like(y), None, None, y, saved, c, h0, c0, w_hh, None, 0, True)
        torch.library.opcheck(ops.backward, (*given, None, None, None, None, None, None, 0.0, x, w_ih, b_ih, b_hh))


@pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
@pytest.mark.parametrize("family", [step, persistent])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_backward_by_chunks(cell, reverse, family):
    """A backward that is given what is saved a chunk at a time gives the bits of one that is given it at once."""
    layer = Layer(cell, torch.float32, T, B, 32, reverse=reverse)
    plans = steps_of(32, torch.float32) if family is step else tiles(32, block_h=16, steps=3)
    forward = layer.forward(step, steps_of(32, torch.float32))
    with together(1):
        whole = layer.backward(family, plans, *forward, chunk=None if family is step else 3)
        (parts,) = Members([layer], 3, by_chunk=True).backward(family, plans, [forward])
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True) if b is not None)


@pytest.mark.parametrize("name, kept", [("LSTM", 4), ("GRU", 0), ("RNN", 0)])
def test_bytes_kept(name, kept, device):
    """Besides input, output and weights: an LSTM's cell states in float32, nothing of the others."""
    layer = getattr(rnnfast, name)(I, H, device=device, backend="triton", recompute=True)
    x, seen = torch.randn(T, B, I, device=device), {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = layer(x)
    live = {tensor.untyped_storage().data_ptr() for tensor in (x, output, *layer.parameters())}
    assert sum(tensor.nbytes for pointer, tensor in seen.items() if pointer not in live) == kept * T * B * H


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_modules(name, backend, device):
    """Two layers and directions, dropout's random numbers included, give what they give without, on every backend."""
    layer, _ = pair(name, device, backend, I=I, H=H, num_layers=2, bidirectional=True, dropout=0.5)
    x, hx = torch.randn(T, B, I, device=device), states(name, 4, B, H, device=device)
    found = []
    for layer.recompute in (False, True):
        torch.manual_seed(1)
        found.append(run(layer, x, hx))
    close(found[1], found[0])
    assert equal(found[1][:2], found[0][:2])


@pytest.mark.parametrize("name", NAMES)
def test_is_shown(name, device):
    """repr and explain say it, where it is on; a module that was pickled before there was any has none."""
    layer = getattr(rnnfast, name)(I, H, recompute=True, device=device)
    x = torch.randn(T, B, I, device=device)
    assert repr(layer) == f"{name}({I}, {H}, recompute=True)"
    said = {"LSTM": "computes the gates again", "GRU": "computes the gates again", "RNN": "recompute changes nothing"}[name]
    assert said in rnnfast.explain(layer, x).details
    assert ("gates are kept" in rnnfast.explain(layer, x, return_gates=True).details) == (name != "RNN")
    with rnnfast.use_backend("torch"):
        assert "backward runs it once more" in rnnfast.explain(layer, x).details
    with torch.no_grad():
        assert said not in rnnfast.explain(layer, x).details
    old = pickle.loads(pickle.dumps(layer))
    assert old.recompute
    state = {key: value for key, value in old.__getstate__().items() if not key.endswith("recompute")}
    old = object.__new__(type(layer))
    old.__setstate__(state)
    assert not old.recompute and repr(old) == repr(getattr(torch.nn, name)(I, H))
    assert equal(flat(old(x)), flat(layer(x)))


@pytest.mark.parametrize("value", ["False", 1, None, torch.tensor(True)], ids=str)
def test_only_a_bool(value, device, no_launch):
    """Anything else is refused as torch.nn refuses a size of the wrong type, by module and function."""
    with pytest.raises(TypeError, match="recompute should be of type bool, got: "):
        rnnfast.LSTM(I, H, recompute=value)
    x, w_ih, w_hh = (torch.randn(*shape, device=device) for shape in ((T, B, I), (3 * H, I), (3 * H, H)))
    with pytest.raises(TypeError, match="recompute should be of type bool, got: "):
        rnnfast.functional.gru(x, None, w_ih, w_hh, recompute=value)


@pytest.mark.parametrize("edited", ["input", "h_0", "c_0", "weight_hh_l0"])
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_edit_in_place_after_forward(backend, edited, device):
    """What is computed again cannot be computed from other numbers unnoticed."""
    layer, _ = pair("LSTM", device, backend, I=I, H=H)
    layer.recompute = True
    x, hx = torch.randn(T, B, I, device=device), states("LSTM", 1, B, H, device=device)
    output, _ = layer(x, hx)
    with torch.no_grad():
        {"input": x, "h_0": hx[0], "c_0": hx[1], "weight_hh_l0": layer.weight_hh_l0}[edited].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_accelerated(device):
    """A layer keeps its ``recompute`` when it is exchanged and exchanged back."""
    layer = rnnfast.accelerate(torch.nn.LSTM(I, H, device=device), report=None)
    layer.recompute = True
    layer = rnnfast.accelerate(rnnfast.restore(layer, report=None), report=None)
    assert layer.recompute and "recompute=True" in repr(layer)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_functions(backend, device):
    """rnnfast.functional with it, plain and with lengths: the same outputs and gradients."""
    tensors = make("lstm", device, T=T, B=B, I=I, H=H)
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    x, h0, c0, *weights = (tensors[name] for name in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"))
    for options in ({}, {"lengths": [T, 0, 4], "return_all_states": True}):
        found = []
        for recompute in (False, True):
            y, last, *_ = rnnfast.functional.lstm(x, (h0, c0), *weights, backend=backend, recompute=recompute, **options)
            loss = y.square().sum() + sum(state.sum() for state in last)
            found.append([y, *last, *torch.autograd.grad(loss, list(tensors.values()))])
        close(found[1], found[0])


def test_other_calls(device):
    """Packed input, a projection, all states; and inference keeps nothing to compute again."""
    layer, _ = pair("LSTM", device, I=I, H=H, proj_size=2)
    x = torch.randn(T, B, I, device=device)
    calls = (
        lambda: (packed_output := layer(packed(x, [7, 2, 4])))[0].data.sum() + packed_output[1][1].sum(),
        lambda: layer(x, return_all_states=True)[2][0][1].square().sum(),
    )
    for call in calls:
        grads = []
        for layer.recompute in (False, True):
            grads.append(torch.autograd.grad(call(), list(layer.parameters())))
        close(grads[1], grads[0])
    with torch.no_grad():
        assert not flat(layer(x))[0].requires_grad


def gradients(layer, x, hx, options):
    """Outputs, and the gradients of input, states and parameters."""
    x, each = x.clone().requires_grad_(), [state.clone().requires_grad_() for state in (hx if isinstance(hx, tuple) else (hx,))]
    outputs = flat(layer(x, tuple(each) if len(each) > 1 else each[0], **options))
    upstream = [torch.linspace(-1, 1, out.numel()).view(out.shape) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x, *each, *layer.parameters()], upstream)]


@pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
@pytest.mark.parametrize("name, marked", [("LSTM", True), pytest.param("GRU", False, marks=pytest.mark.sweep)])
def test_on_the_persistent_kernels(name, marked, monkeypatch):
    """Both directions on an H100's plans, backward in three calls: what the same kernels give with all gates kept."""
    monkeypatch.setenv("RNNFAST_KERNELS", "persistent")
    monkeypatch.setattr(recurrence, "CHUNK_ROWS", 2 * 3 * B)
    layer, _ = pair(name, "cpu", I=I, H=32, bidirectional=True)
    x, hx = torch.randn(T, B, I), states(name, 2, B, 32, device="cpu")
    options = {"lengths": [T, 0, 4], "resets": torch.arange(T * B).view(T, B) % 5 == 3, "reset_to": hx} if marked else {}
    found, launches = [], []
    for layer.recompute in (False, True):
        with kernel_plan.pretend_gpu(GPUS["H100"]), together(1) as happened:
            found.append(gradients(layer, x, hx, options))
        launches.append([kernel for kernel, _ in happened.grids])
    close(found[1], found[0])
    assert [kernels.count("persistent_backward_kernel") for kernels in launches] == [1, 3]
    assert not any("step" in kernel for kernels in launches for kernel in kernels)
