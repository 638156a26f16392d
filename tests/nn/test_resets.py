"""resets=: states that begin anew inside a sequence, at the ends of episodes say."""

import pytest
import torch
from support import loops
from support.layers import CELLS, B, H, I, close, flat, pair, states

import rnnfast
from rnnfast import functional, numerics

pytestmark = pytest.mark.numerical

T = 4
MASK = torch.tensor([[0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)  # twice running, at once, never


def layer(name, nonlinearity, device, backend="triton", **options):
    options |= {"nonlinearity": nonlinearity} if name == "RNN" else {}
    return getattr(rnnfast, name)(I, options.pop("H", H), **options, device=device, backend=backend)


@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [
        (torch.float32, [2, 4, 0, 3, 1]),
        (torch.float16, None),
        (torch.bfloat16, [2, 4, 0, 3, 1]),
        *(pytest.param(dtype, None, marks=pytest.mark.sweep) for dtype in (torch.float32, torch.bfloat16)),
        pytest.param(torch.float16, [2, 4, 0, 3, 1], marks=pytest.mark.sweep),
    ],
    ids=str,
)
@pytest.mark.parametrize("name, nonlinearity", CELLS)
def test_equals_a_loop(name, nonlinearity, dtype, lengths, device):
    """Both directions, from given states to given states: outputs and all gradients, those of hx and reset_to too, within the
    contract of the loop in the same dtype."""
    ours = layer(name, nonlinearity, device, H=15, bidirectional=True, dtype=dtype)
    tensors = loops.arguments(ours, T, 5, reset_to=True)
    options = {"resets": torch.rand(T, 5, device=device) < 0.4, "lengths": lengths}
    found = loops.everything(loops.by_module(ours, options), tensors, dtype)
    loop = loops.by_loop(ours, options)
    common = loops.everything(loop, tensors, dtype)
    assert not numerics.fault(found, common, lambda: loops.everything(loop, tensors, torch.float64), dtype)
    assert all(found[name].any() for name in tensors)


@pytest.mark.parametrize("name, options", [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {})])
def test_two_layers(name, options, device):
    """A stack restarts every layer; hx may be missing where reset_to is given, and the other way about."""
    mask = MASK[:3]
    ours = layer(name, "tanh", device, num_layers=2, bidirectional=True, **options)
    for hx, reset_to in ((False, True), (True, False)):
        tensors = loops.arguments(ours, 3, B, hx=hx, reset_to=reset_to)
        found = loops.everything(loops.by_module(ours, {"resets": mask.to(device)}), tensors, torch.float32)
        exact = loops.everything(loops.by_loop(ours, {"resets": mask}), tensors, torch.float64)
        close(found.values(), [tensor.float() for tensor in exact.values()])


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_equals_two_calls(name, backend, device):
    """A reset of all rows before step 2 is torch.nn's layer called twice, the second time from zeros."""
    ours, theirs = pair(name, device, backend, num_layers=2)
    x, hx = torch.randn(T, B, I, device=device), states(name, 2, B, H, device=device)
    resets = torch.zeros(T, B, dtype=torch.bool, device=device)
    resets[2] = True
    output, last = ours(x, hx, resets=resets)
    first, (second, theirs_last) = theirs(x[:2], hx)[0], theirs(x[2:])
    close(flat((output, last)), flat((torch.cat([first, second]), theirs_last)))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_nothing_leaks_over_a_reset(name, device):
    """What comes before a reset, NaN even, does not reach what comes after, in either direction; gradients neither."""
    ours = layer(name, "tanh", device, bidirectional=True)
    x = torch.randn(T, B, I, device=device)
    resets = torch.zeros(T, B, dtype=torch.bool, device=device)
    resets[2, 1] = True
    bad = x.clone()
    bad[1, 1] = float("nan")
    output = ours(bad, resets=resets)[0]
    assert torch.equal(output[2:, 1], ours(x, resets=resets)[0][2:, 1]) and output[1, 1].isnan().all()
    copied = x.requires_grad_()
    (grad,) = torch.autograd.grad(ours(copied, resets=resets)[0][:2, 1].sum(), copied)
    assert not grad[2:].any() and grad[:2, 1].all()


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_layouts(name, backend, device):
    """batch_first turns the mask with the input; without a batch it is (T,); the functions take it for their direction."""
    ours = layer(name, "tanh", device, backend, batch_first=True)
    x, reset_to = torch.randn(B, T, I, device=device), states(name, 1, B, H, device=device)
    each = reset_to if name == "LSTM" else (reset_to,)
    resets = MASK.to(device)
    exact, last, *_ = loops.module(ours, x.transpose(0, 1), None, resets=MASK, reset_to=each)
    found = ours(x, resets=resets.t(), reset_to=reset_to)
    close(flat(found), [exact.transpose(0, 1), *last])
    one = tuple(state[:, 0] for state in each)
    alone = ours(x[0], resets=resets[:, 0], reset_to=one if name == "LSTM" else one[0])
    close(flat(alone), [exact[:, 0], *(state[:, 0] for state in last)])
    start = tuple(state[0] for state in each)
    by_function = getattr(functional, name.lower())(
        x.transpose(0, 1), None, *ours.parameters(), resets=resets, reset_to=start if name == "LSTM" else start[0],
        backend=backend,
    )  # fmt: skip
    close(flat(by_function), [exact, *(state[0] for state in last)])


def test_no_reset_at_all(device):
    """A mask without a reset changes no bit."""
    ours = layer("LSTM", "tanh", device, bidirectional=True)
    x, hx = torch.randn(T, B, I, device=device), states("LSTM", 2, B, H, device=device)
    resets = torch.zeros(T, B, dtype=torch.bool, device=device)
    assert all(torch.equal(a, b) for a, b in zip(flat(ours(x, hx, resets=resets)), flat(ours(x, hx)), strict=True))


WRONG = {
    "shape": (lambda r, s: {"resets": r[:-1]}, RuntimeError, r"Expected resets of size \(4, 3\)"),
    "turned": (lambda r, s: {"resets": r.t()}, RuntimeError, r"Expected resets of size \(4, 3\)"),
    "1-D": (lambda r, s: {"resets": r[:, 0]}, RuntimeError, r"Expected resets of size \(4, 3\)"),
    "dtype": (lambda r, s: {"resets": r.float()}, ValueError, "resets must be bool, got torch.float32"),
    "integers": (lambda r, s: {"resets": r.long()}, ValueError, "resets must be bool, got torch.int64"),
    "list": (lambda r, s: {"resets": r.tolist()}, TypeError, "resets must be a tensor, got list"),
    "device": (lambda r, s: {"resets": r.to("meta")}, RuntimeError, "resets on meta"),
    "nothing to restart": (lambda r, s: {"reset_to": s}, ValueError, "give resets too"),
    "state shape": (lambda r, s: {"resets": r, "reset_to": each(s, lambda t: t[..., :-1])}, RuntimeError, "Expected reset_to"),
    "state dtype": (lambda r, s: {"resets": r, "reset_to": each(s, torch.Tensor.double)}, ValueError, "one dtype"),
    "state device": (lambda r, s: {"resets": r, "reset_to": each(s, lambda t: t.to("meta"))}, RuntimeError, "one device"),
    "no tensor": (lambda r, s: {"resets": r, "reset_to": each(s, lambda t: 0)}, TypeError, "must be a tensor, got int"),
    "states of none": (lambda r, s: {"resets": r, "reset_to": ()}, (TypeError, RuntimeError), "reset_to must"),
}


def each(states, change):
    return tuple(change(state) for state in states) if isinstance(states, tuple) else change(states)


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_wrong_resets(name, kind, backend, device, no_launch):
    """A clear error on every backend, by module and by function, before any launch."""
    change, error, text = WRONG[kind]
    ours, x = layer(name, "tanh", device, backend), torch.randn(T, B, I, device=device)
    options = change(MASK.to(device), states(name, 1, B, H, device=device))
    with pytest.raises(error, match=text):
        ours(x, **options)
    if "reset_to" in options:
        options["reset_to"] = each(options["reset_to"], lambda state: state if isinstance(state, int) else state[0])
    with pytest.raises(error, match=text):
        getattr(functional, name.lower())(x, None, *ours.parameters(), **options, backend=backend)
