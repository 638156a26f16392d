"""The modules and the functions beside torch.nn's own: results, errors, state, and everything a drop-in must not disturb."""

import copy
import inspect
import io
import itertools
import pickle
import warnings
from collections import namedtuple

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import functional, reference
from rnnfast.check import Case, compare
from rnnfast.kernels import step

CELLS = [("LSTM", "tanh"), ("GRU", "tanh"), ("RNN", "tanh"), ("RNN", "relu")]
NAMES = ["LSTM", "GRU", "RNN"]
T, B, I, H = 2, 3, 5, 4

pytestmark = [  # PyTorch's own
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


def pair(name, device, backend="triton", I=I, H=H, **options):
    """Ours and torch.nn's, with the same weights."""
    theirs = getattr(torch.nn, name)(I, H, **options, device=device)
    ours = getattr(rnnfast, name)(I, H, **options, device=device, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states(name, *shape, device, **options):
    """hx of random numbers."""
    made = tuple(torch.randn(*shape, device=device, **options) for _ in range(2 if name == "LSTM" else 1))
    return made if name == "LSTM" else made[0]


def flat(result):
    """output, h_n and, of an LSTM, c_n."""
    output, last = result
    return (output, *last) if isinstance(last, tuple) else (output, last)


def run(module, x, hx=None, upstream=None):
    """Outputs and the gradients of input, states and parameters, as one list. `upstream`: gradients of the outputs."""
    x = x.detach().clone().requires_grad_()
    each = hx if isinstance(hx, tuple) else () if hx is None else (hx,)
    each = tuple(state.detach().clone().requires_grad_() for state in each)
    outputs = flat(module(x, None if hx is None else each if isinstance(hx, tuple) else each[0]))
    upstream = upstream or [torch.linspace(-1, 1, out.numel()).to(out).view(out.shape) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x, *each, *module.parameters()], upstream)]


def equal(ours, theirs):
    """The same number of tensors, the same types, shapes and bits."""
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def close(ours, theirs):
    """Equal to rounding; on a GPU, where a float32 product may be TF32, to that. The contract is `compare`'s business."""
    for a, b in zip(ours, theirs, strict=True):
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if a.is_cuda else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture
def no_launch(monkeypatch):
    """A launch fails the test."""

    def forward(*args, **kwargs):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(step, "forward", forward)


@pytest.fixture
def saved(monkeypatch):
    """What each forward recurrence was given to keep activations in, as they run."""
    found, signature, inner = [], inspect.signature(step.forward), step.forward

    def forward(*args, **kwargs):
        found.append(signature.bind(*args, **kwargs).arguments["saved"])
        return inner(*args, **kwargs)

    monkeypatch.setattr(step, "forward", forward)
    return found


# Results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_stacked_bidirectional_batch_first(name, dtype, device):
    """Two layers, both directions, batch first: outputs and all gradients within the contract of torch.nn's."""
    case = Case(name, 2, 5, 7, 15, dtype, layers=2, bidirectional=True, batch_first=True)
    results = compare(case, device)
    assert len(results) == (3 if name == "LSTM" else 2) + (3 if name == "LSTM" else 2) + 16
    assert all(result.ok for result in results), [result for result in results if not result.ok]


@pytest.mark.parametrize(
    "options",
    [{"bias": False, "batch_first": True}, {"bidirectional": True, "states": False}, {"layers": 2}],
    ids=str,
)
@pytest.mark.parametrize("name, nonlinearity", CELLS)
def test_options(name, nonlinearity, options, device):
    """Each option, for every cell, within the contract."""
    results = compare(Case(name, 2, 5, 7, 15, torch.float32, nonlinearity=nonlinearity, **options), device)
    assert all(result.ok for result in results), [result for result in results if not result.ok]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, nonlinearity", CELLS)
def test_half_precision(name, nonlinearity, dtype, device):
    """One layer of every cell in half precision, within the contract."""
    results = compare(Case(name, 3, 5, 7, 15, dtype, nonlinearity=nonlinearity), device)
    assert all(result.ok for result in results), [result for result in results if not result.ok]


@pytest.mark.parametrize("given, batch_first", [(False, False), (True, True)])
@pytest.mark.parametrize("name", NAMES)
def test_unbatched(name, given, batch_first, device):
    """(T, I) is a batch of one, whatever batch_first says; shapes are torch.nn's."""
    ours, theirs = pair(name, device, bidirectional=True, batch_first=batch_first)
    x, hx = torch.randn(T, I, device=device), states(name, 2, H, device=device) if given else None
    close(run(ours, x, hx), run(theirs, x, hx))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_layout_of_outputs(bidirectional, device):
    """h_n and c_n hold layers, then directions, and are not views of the output; the reverse direction ends at step 0."""
    ours, _ = pair("LSTM", device, num_layers=2, bidirectional=bidirectional)
    output, (h_n, _) = ours(torch.randn(T, B, I, device=device))
    D = 2 if bidirectional else 1
    assert torch.equal(output[-1, :, :H], h_n[-D])
    assert torch.equal(output[0, :, -H:], h_n[-1]) if bidirectional else torch.equal(output[-1], h_n[-1])
    h_n.zero_()
    assert output.abs().min() > 0


def packed(x, lengths):
    return pack_padded_sequence(x, lengths, enforce_sorted=lengths == sorted(lengths, reverse=True))


@pytest.mark.parametrize("lengths", [[3, 2, 2], [1, 3, 2]], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_packed(name, given, lengths, device, no_launch):
    """A PackedSequence goes to PyTorch's own layer: outputs and gradients are bitwise torch.nn's."""
    ours, theirs = pair(name, device, backend=None, num_layers=2, bidirectional=True)
    x, hx = torch.randn(3, 3, I, device=device), states(name, 4, 3, H, device=device) if given else None
    found = []
    for module in (ours, theirs):
        copied = x.clone().requires_grad_()
        output, last = module(packed(copied, lengths), hx)
        assert isinstance(output, PackedSequence)
        tensors = flat((pad_packed_sequence(output)[0], last))
        grads = torch.autograd.grad(sum(tensor.square().sum() for tensor in tensors), [copied, *module.parameters()])
        found.append((*tensors, *grads))
    assert equal(*found)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {"dtype": torch.float64}) for name in NAMES),
        ("LSTM", {"proj_size": 2}),
        ("LSTM", {"proj_size": 2, "bias": False}),
    ],
)
def test_what_the_kernels_do_not_take(name, options, given, device, no_launch):
    """float64 and proj_size run on PyTorch's own layer: outputs and gradients are bitwise torch.nn's."""
    dtype = options.get("dtype", torch.float32)
    torch.manual_seed(1)
    ours = getattr(rnnfast, name)(I, H, num_layers=2, bidirectional=True, device=device, **options)
    torch.manual_seed(1)
    theirs = getattr(torch.nn, name)(I, H, num_layers=2, bidirectional=True, device=device, **options)
    hx = states(name, 4, B, H, device=device, dtype=dtype) if given else None
    if given and "proj_size" in options:
        hx = (hx[0][..., :2], hx[1])
    x = torch.randn(T, B, I, device=device, dtype=dtype)
    assert equal(run(ours, x, hx), run(theirs, x, hx))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name, nonlinearity", CELLS)
def test_nan_and_inf(name, nonlinearity, bad, device):
    """A bad element of one sequence, in the input or in the state, spoils that sequence alone, and where torch.nn's does."""
    options = {"nonlinearity": nonlinearity} if name == "RNN" else {}
    ours, theirs = pair(name, device, bidirectional=True, **options)
    x, hx = torch.randn(T, B, I, device=device), states(name, 2, B, H, device=device)
    x[1, 1, 0] = bad
    (hx[1] if name == "LSTM" else hx)[0, 2, 1] = bad
    with torch.no_grad():
        for a, b in zip(flat(ours(x, hx)), flat(theirs(x, hx)), strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
            assert a[:, 0].isfinite().all()


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_large_values(name, device):
    """Inputs of +-1e4 saturate every gate: outputs and gradients are finite, and the outputs torch.nn's."""
    ours, theirs = pair(name, device, bidirectional=True)
    x = torch.randn(T, B, I, device=device).sign() * 1e4
    found, expected = run(ours, x), run(theirs, x)
    assert all(tensor.isfinite().all() for tensor in found)
    n = 3 if name == "LSTM" else 2
    close(found[:n], expected[:n])


# Dropout


def passing(device, **options):
    """Two layers that give their input back if it is positive, so that what lies between them can be seen."""
    module = rnnfast.RNN(H, H, 2, nonlinearity="relu", bias=False, device=device, backend="triton", **options)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.copy_(torch.eye(H) if "ih" in name else torch.zeros(H, H))
    return module


def test_dropout_between_layers(device):
    """In train, elements between the layers are zeroed at the rate p and the rest scaled, once; in eval nothing is."""
    module, p = passing(device, dropout=0.25), 0.25
    x = (torch.rand(2, 64, H, device=device) + 0.5).requires_grad_()
    output, h_n = module(x)
    kept = output != 0
    torch.testing.assert_close(output, torch.where(kept, x / (1 - p), 0))
    torch.testing.assert_close(h_n[0], x[-1])  # the first layer's own state comes before the mask
    assert abs(kept.float().mean().item() - (1 - p)) < 0.1  # 512 draws: 5 standard deviations
    (grad,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(grad, kept / (1 - p))
    assert torch.equal(module.eval()(x)[0], x)


@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_draws(batch_first, device):
    """The mask follows manual_seed, differs between calls and elements, and one layer has none."""
    module, x = passing(device, dropout=0.5, batch_first=batch_first), torch.ones(2, 8, H, device=device)
    x = x.transpose(0, 1) if batch_first else x
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks += [module(x)[0], module(x)[0]]
    assert equal(masks[:2], masks[2:4])
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[4])
    assert all(masks[0].std(axis).max() > 0 for axis in range(3))
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        single = rnnfast.GRU(I, H, dropout=0.5, device=device, backend="triton")
    x = torch.randn(T, B, I, device=device)
    assert torch.equal(single(x)[0], single.eval()(x)[0])


def test_dropout_is_read_at_each_call(device):
    """``m.dropout = p`` takes effect at the next call, as in torch.nn; a wrong p gives torch.nn's error, in train only."""
    module, x = passing(device), torch.ones(1, 16, H, device=device)
    assert torch.equal(module(x)[0], x)
    module.dropout = 0.5
    assert set(module(x)[0].unique().tolist()) == {0.0, 2.0}
    module.dropout = 1
    assert not module(x)[0].any()
    ours, theirs = pair("GRU", device, num_layers=2)
    ours.dropout = theirs.dropout = 1.5
    x = torch.randn(1, B, I, device=device)
    if device == "cpu":  # cuDNN words it otherwise
        assert outcome(ours, x) == outcome(theirs, x)
    with pytest.raises(RuntimeError):
        ours(x)
    close(flat(ours.eval()(x)), flat(theirs.eval()(x)))


# State

VARIANTS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5},
    {"bias": False, "dtype": torch.float16},
    {"dtype": torch.float64, "num_layers": 3},
]


@pytest.mark.parametrize(
    "name, options",
    [*itertools.product(NAMES, VARIANTS), ("LSTM", {"proj_size": 2}), ("RNN", {"nonlinearity": "relu"})],
    ids=str,
)
def test_construction(name, options, device):
    """One seed gives torch.nn's weights, in its order and number, and leaves the generator where torch.nn leaves it."""
    made = []
    for namespace in (rnnfast, torch.nn):
        torch.manual_seed(5)
        made.append((getattr(namespace, name)(I, H, **options, device=device), torch.rand(3), torch.rand(3, device=device)))
    (ours, *our_draws), (theirs, *their_draws) = made
    assert equal(our_draws, their_draws)
    assert [*ours.state_dict()] == [*theirs.state_dict()] and [n for n, _ in ours.named_parameters()] == [*ours.state_dict()]
    assert equal([*ours.state_dict().values()], [*theirs.state_dict().values()])
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, getattr(torch.nn, name)) and isinstance(ours, torch.nn.RNNBase)
    torch.manual_seed(6)
    theirs.reset_parameters()
    assert ours.load_state_dict(theirs.state_dict(), strict=True) == theirs.load_state_dict(ours.state_dict(), strict=True)
    assert equal([*ours.state_dict().values()], [*theirs.state_dict().values()])
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


def test_backend_in_repr():
    """A backend that was chosen is shown; the default leaves the repr as torch.nn's."""
    assert repr(rnnfast.GRU(I, H, backend="reference")) == "GRU(5, 4, backend='reference')"
    assert repr(rnnfast.GRU(I, H, backend="auto")) == "GRU(5, 4)"


def through_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module)), "torch.save": through_file}


@pytest.mark.parametrize("how", COPIES)
def test_copies(how, device):
    """A copy has the same class, options, backend and results, and weights of its own."""
    ours, _ = pair("LSTM", device, num_layers=2)
    x = torch.randn(1, B, I, device=device)
    copied = COPIES[how](ours)
    assert type(copied) is rnnfast.LSTM and repr(copied) == repr(ours) and copied.backend == "triton"
    before = flat(ours(x))
    assert equal(flat(copied(x)), before)
    with torch.no_grad():
        copied.weight_hh_l1.zero_()
        copied.weight_ih_l0.zero_()
    assert equal(flat(ours(x)), before) and not equal(flat(copied(x)), before)


@pytest.mark.parametrize("name", NAMES)
def test_state_of_a_torch_nn_module(name, device):
    """A module that torch.nn pickled, or whose class is exchanged in place, becomes ours and chooses its backend freely."""
    _, theirs = pair(name, device, num_layers=2)
    x = torch.randn(1, B, I, device=device)
    ours = getattr(rnnfast, name).__new__(getattr(rnnfast, name))
    ours.__setstate__(pickle.loads(pickle.dumps(theirs.__getstate__())))
    swapped = copy.deepcopy(theirs)
    swapped.__class__ = getattr(rnnfast, name)
    for module in (ours, swapped):
        assert module.backend is None and repr(module) == repr(theirs)
        assert rnnfast.explain(module, x).backend == "triton"
        close(flat(module(x)), flat(theirs(x)))


def _replace(module):
    module.weight_hh_l0 = torch.nn.Parameter(module.weight_hh_l0.detach() * 2)


def _data(module):
    module.weight_hh_l0.data = module.weight_hh_l0.detach() * 2


def _load(module, **options):
    module.load_state_dict({name: tensor * 2 for name, tensor in module.state_dict().items()}, **options)


def _optimise(module):
    for weight in module.parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def _parametrise(module):
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)


def _prune(module):
    del module.weight_hh_l0
    module.weight_hh_l0 = torch.ones(4 * H, H, device=module.weight_ih_l0.device)


CHANGES = {
    "setattr": _replace,
    ".data": _data,
    "load_state_dict": _load,
    "load_state_dict assign": lambda module: _load(module, assign=True),
    "optimizer": _optimise,
    "parametrization": _parametrise,
    "plain tensor": _prune,
    "to dtype": lambda module: module.to(torch.float64).to(torch.float32).requires_grad_(False).weight_ih_l0.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change, device):
    """However a weight is replaced between two calls, the next call uses the new one, as in torch.nn."""
    ours, theirs = pair("LSTM", device)
    x, hx = torch.randn(1, B, I, device=device), states("LSTM", 1, B, H, device=device)
    before = flat(ours(x, hx))
    for module in (ours, theirs):
        CHANGES[change](module)
    after = flat(ours(x, hx))
    assert (after[0] - before[0]).abs().max() > 1e-2
    close(after, flat(theirs(x, hx)))


def test_functional_call(device):
    """torch.func.functional_call runs on the weights it is given, with gradients, and leaves the module's own alone."""
    ours, theirs = pair("GRU", device)
    x, other = torch.randn(T, B, I, device=device), {}
    before = flat(ours(x))
    for name, weight in ours.named_parameters():
        other[name] = torch.randn_like(weight).requires_grad_()
    found = []
    for module in (ours, theirs):
        output, h_n = torch.func.functional_call(module, other, (x,))
        found.append((output, h_n, *torch.autograd.grad(output.sum(), list(other.values()))))
    close(*found)
    assert equal(flat(ours(x)), before)


# Bad input


def outcome(call, *args, **kwargs):
    """What a call did: the type and text of its error, or what it returned."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


def same(ours, theirs, *args):
    """Whether both modules raise the same, or return the same."""
    found, expected = outcome(ours, *args), outcome(theirs, *args)
    if isinstance(expected[0], type):
        assert found == expected
    else:
        assert not isinstance(found[0], type), found
        assert all(a.device == b.device for a, b in zip(flat(found), flat(expected), strict=True))
        found, expected = ([t.new_zeros(t.shape, device="cpu") if t.is_meta else t for t in flat(r)] for r in (found, expected))
        assert equal(found, expected)


INPUTS = {
    "0-D": lambda x: x[0, 0, 0],
    "1-D": lambda x: x[0, 0],
    "4-D": lambda x: x[None],
    "few features": lambda x: x[..., :-1],
    "many features": lambda x: torch.cat([x, x], -1),
    "no features": lambda x: x[..., :0],
    "no batch": lambda x: x[:, :0],
    "no steps": lambda x: x[:0],
    "neither": lambda x: x[:0, :0],
    "unbatched, few features": lambda x: x[0, :, :-1],
    "unbatched, no steps": lambda x: x[0, :0],
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "int64": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex64": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "None": lambda x: None,
    "text": lambda x: "x",
    "number": lambda x: 1.0,
    "list": lambda x: x.tolist(),
    "tuple": lambda x: (x,),
    "numpy": lambda x: x.cpu().numpy(),
}
STATES = {
    "few layers": lambda h: h[:-1],
    "many layers": lambda h: torch.cat([h, h]),
    "few rows": lambda h: h[:, :-1],
    "no rows": lambda h: h[:, :0],
    "few units": lambda h: h[..., :-1],
    "many units": lambda h: torch.cat([h, h], -1),
    "1-D": lambda h: h[0, 0],
    "2-D": lambda h: h[0],
    "4-D": lambda h: h[None],
    "batch first": lambda h: h.transpose(0, 1),
    "float64": lambda h: h.double(),
    "float16": lambda h: h.half(),
    "int64": lambda h: h.long(),
    "meta": lambda h: h.to("meta"),
    "list": lambda h: h.tolist(),
    "None": lambda h: None,
    "number": lambda h: 1.0,
}
CONTAINERS = {
    "a tensor": lambda h: h,
    "both in a tensor": lambda h: torch.stack([h, h]),
    "one in a tuple": lambda h: (h,),
    "two in a tuple": lambda h: (h, h),
    "three in a tuple": lambda h: (h, h, h),
    "nested": lambda h: ((h, h),),
    "empty tuple": lambda h: (),
    "empty list": lambda h: [],
    "dict": lambda h: {"h": h, "c": h},
    "number": lambda h: 0,
    "text": lambda h: "hx",
    "False": lambda h: False,
}
STACKED = {"num_layers": 2, "bidirectional": True, "batch_first": True}


@pytest.mark.parametrize("options", [{}, STACKED], ids=["plain", "stacked"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name, kind, given, options, device, no_launch):
    """A wrong input gives torch.nn's error, type and text, or torch.nn's result where it takes it, without a launch."""
    ours, theirs = pair(name, device, backend=None, **options)
    hx = states(name, 4 if options else 1, T if options else B, H, device=device) if given else None
    same(ours, theirs, INPUTS[kind](torch.randn(T, B, I, device=device)), hx)


@pytest.mark.parametrize(
    "name, kind",
    [case for case in itertools.product(NAMES, STATES) if case != ("LSTM", "meta")],  # which crashes torch.nn.LSTM itself
)
def test_bad_states(name, kind, device, no_launch):
    """A wrong state, also if only one of an LSTM's two is wrong or the input has no batch: torch.nn's error or result."""
    ours, theirs = pair(name, device, backend=None, num_layers=2)
    x, good = torch.randn(3, B, I, device=device), torch.randn(2, B, H, device=device)
    bad = STATES[kind](good)
    for hx in [(bad, good), (good, bad), (bad, bad)] if name == "LSTM" else [bad] if bad is not None else []:
        same(ours, theirs, x, hx)
        same(ours, theirs, x[:, 0], hx)
        if name != "LSTM":  # torch.nn.LSTM itself does not check the states of a packed call, and crashes
            same(ours, theirs, packed(x, [3, 2, 1]), hx)


@pytest.mark.parametrize(
    "name, kind",
    [
        (name, kind)
        for name, kind in itertools.product(NAMES, CONTAINERS)
        if kind != ("two in a tuple" if name == "LSTM" else "a tensor")  # the right one
    ],
)
def test_bad_containers(name, kind, device, no_launch):
    """States packed otherwise than this cell takes them: torch.nn's error, type and text."""
    ours, theirs = pair(name, device, backend=None)
    same(ours, theirs, torch.randn(T, B, I, device=device), CONTAINERS[kind](torch.randn(1, B, H, device=device)))
    same(ours, theirs, torch.randn(T, I, device=device), CONTAINERS[kind](torch.randn(1, H, device=device)))


@pytest.mark.parametrize("where", ["input", "weights", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_meta(name, where, device, no_launch):
    """On the meta device shapes are worked out as torch.nn does, and a mixture of devices is refused as there."""
    ours, theirs = pair(name, device, backend=None)
    x = torch.randn(T, B, I, device=device)
    if where != "input":
        ours, theirs = ours.to("meta"), theirs.to("meta")
    same(ours, theirs, x.to("meta") if where != "weights" else x)


BROKEN = {
    "shape": lambda w: torch.nn.Parameter(w.detach()[:-1]),
    "rank": lambda w: torch.nn.Parameter(w.detach()[None]),
    "dtype": lambda w: torch.nn.Parameter(w.detach().double()),
    "meta": lambda w: torch.nn.Parameter(w.detach().to("meta")),
    "None": lambda w: None,
}


@pytest.mark.parametrize("weight", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_broken_weights(name, kind, weight, device, no_launch):
    """A weight of the wrong shape, dtype or device never reaches a kernel: torch.nn refuses it in its own words."""
    ours, theirs = pair(name, device, backend=None)
    for module in (ours, theirs):
        setattr(module, weight, BROKEN[kind](getattr(module, weight)))
    same(ours, theirs, torch.randn(T, B, I, device=device))


ARGUMENTS = [
    *[((), {}), ((3,), {}), ((0, 4), {}), ((-1, 4), {}), ((3, 0), {}), (("3", 4), {}), ((3.0, 4), {}), ((3, "4"), {})],
    *[((3, 4.0), {}), ((None, 4), {}), ((3, 4, 0), {}), ((3, 4), {"num_layers": -1}), ((3, 4), {"num_layers": "2"})],
    *[((3, 4), {"num_layers": n}) for n in (1.5, None)],
    *[((3, 4), {"bias": bias}) for bias in (None, 1, "no")],
    *[((3, 4), {"batch_first": flag}) for flag in (None, 0)],
    *[((3, 4, 2), {"dropout": p}) for p in (-0.1, 1.1, True, "a", None, float("nan"))],
    *[((3, 4), {"dropout": 0.5}), ((3, 4), {"bidirectional": "yes"}), ((3, 4), {"bidirectional": None})],
    *[((3, 4), {"proj_size": n}) for n in (-1, 2, 4, 5, "2")],
    *[((3, 4), {"device": "nowhere"}), ((3, 4), {"dtype": torch.int64}), ((3, 4), {"dtype": "float32"})],
    *[((3, 4), {"unknown": 1}), ((3, 4), {"input_size": 3}), ((3, 4), {"nonlinearity": "relu"})],
    *[((3, 4), {"nonlinearity": "gelu"}), ((3, 4), {"mode": "LSTM"}), ((3, 4, 1, "relu"), {}), ((3, 4, 1, "gelu"), {})],
    *[((3, 4, 1, True, False, 0.0, False, 0, None, None, 1), {}), ((True, 4), {})],
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_constructor_arguments(name, arguments):
    """Constructor arguments of every kind: torch.nn's error or warning, type and text, or a module that looks the same."""
    found = []
    for namespace in (rnnfast, torch.nn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = outcome(getattr(namespace, name), *arguments[0], **arguments[1])
        made = made if isinstance(made, tuple) else (repr(made), [tuple(p.shape) for p in made.parameters()])
        found.append((made, [(w.category, str(w.message)) for w in caught]))
    assert found[0] == found[1]


def test_accepted_containers(device):
    """A list or a named tuple of the LSTM's two states is taken as torch.nn takes it."""
    ours, theirs = pair("LSTM", device)
    x, hx = torch.randn(1, B, I, device=device), states("LSTM", 1, B, H, device=device)
    expected = flat(ours(x, hx))
    close(expected, flat(theirs(x, hx)))
    for other in (list(hx), namedtuple("States", "h c")(*hx)):
        assert equal(flat(ours(x, other)), expected)
    assert equal(flat(ours(hx=hx, input=x)), expected)


# Gradients and modes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_saves_nothing(name, mode, device, saved):
    """Without gradients nothing is kept for backward, and the numbers are those of training."""
    ours, _ = pair(name, device, num_layers=2)
    x, hx = torch.randn(T, B, I, device=device), states(name, 2, B, H, device=device)
    trained = flat(ours(x, hx))
    assert len(saved) == 2 and all(kept is not None for kept in saved)
    saved.clear()
    with mode():
        result = flat(ours(x, hx))
    ours.requires_grad_(False)
    frozen = flat(ours(x, hx))
    assert saved == [None] * 4
    assert not any(tensor.requires_grad for tensor in (*result, *frozen))
    assert equal(result, trained) and equal(frozen, trained)
    assert result[0].is_inference() == (mode is torch.inference_mode)


@pytest.mark.parametrize("name", NAMES)
def test_eval_mode(name, device):
    """eval() changes nothing without dropout, and backward runs in it (where cuDNN's refuses)."""
    ours, _ = pair(name, device, num_layers=2)
    x = torch.randn(T, B, I, device=device)
    assert equal(run(ours.train(), x), run(ours.eval(), x))


@pytest.mark.parametrize("name", NAMES)
def test_backward_twice(name, device):
    """A retained graph gives bitwise the same gradients again; a freed one gives PyTorch's error."""
    ours, _ = pair(name, device, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, device=device, requires_grad=True)
    loss = sum(out.square().sum() for out in flat(ours(x)))
    first, second = (torch.autograd.grad(loss, [x, *ours.parameters()], retain_graph=keep) for keep in (True, False))
    assert equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_every_frozen_subset(device):
    """Whichever weights are frozen, those get no gradient and the others bitwise the gradient they get with none frozen."""
    ours, _ = pair("LSTM", device)
    x, hx = torch.randn(2, B, I, device=device), states("LSTM", 1, B, H, device=device)
    full = {}
    for trained in sorted(itertools.product([True, False], repeat=4), reverse=True):
        for weight, flag in zip(ours.parameters(), trained, strict=True):
            weight.requires_grad_(flag)
            weight.grad = None
        loss = sum(out.square().sum() for out in flat(ours(x, hx)))
        assert loss.requires_grad == any(trained)
        if any(trained):
            loss.backward()
        for (name, weight), flag in zip(ours.named_parameters(), trained, strict=True):
            assert (weight.grad is not None) == flag, name
            if flag:
                assert torch.equal(weight.grad, full.setdefault(name, weight.grad)), name


@pytest.mark.parametrize("name", NAMES)
def test_requires_grad(name, device):
    """Outputs require gradients exactly when torch.nn's do, for each combination of input, states and weights; dtypes too."""
    ours, theirs = pair(name, device)
    for x_grad, hx_grad, w_grad in itertools.product([True, False], repeat=3):
        x = torch.randn(1, B, I, device=device, requires_grad=x_grad)
        hx = states(name, 1, B, H, device=device, requires_grad=hx_grad)
        found = []
        for module in (ours, theirs):
            module.requires_grad_(w_grad)
            outputs = flat(module(x, hx))
            assert all(out.requires_grad == (out.grad_fn is not None) for out in outputs)
            found.append([out.requires_grad for out in outputs])
        assert found[0] == found[1]


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_each_output_alone(name, device):
    """A loss of the output alone, of h_n alone or of c_n alone gives every gradient that torch.nn gives."""
    ours, theirs = pair(name, device, num_layers=2)
    x, hx = torch.randn(2, B, I, device=device), states(name, 2, B, H, device=device)
    for n in range(3 if name == "LSTM" else 2):
        found = []
        for module in (ours, theirs):
            copied = x.clone().requires_grad_()
            start = tuple(h.clone().requires_grad_() for h in (hx if name == "LSTM" else (hx,)))
            out = flat(module(copied, start if name == "LSTM" else start[0]))[n]
            found.append(torch.autograd.grad(out.square().sum(), [copied, *start, *module.parameters()]))
        close(*found)


@pytest.mark.parametrize("edited", ["input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "output"])
def test_edit_in_place_after_forward(edited, device):
    """What backward still needs cannot be overwritten unnoticed between forward and backward."""
    ours, _ = pair("LSTM", device, batch_first=True)
    x = torch.randn(B, 2, I, device=device, requires_grad=True)
    h_0, c_0 = (state.requires_grad_() for state in states("LSTM", 1, B, H, device=device))
    output, (h_n, c_n) = ours(x, (h_0, c_0))
    loss = output.square().sum() + h_n.sum() + c_n.sum() if edited != "output" else output.sum()
    with torch.no_grad():
        {"input": x, "h_0": h_0, "c_0": c_0, "output": output, **dict(ours.named_parameters())}[edited].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_layouts(name, device):
    """Transposed, strided and expanded inputs, states and upstream gradients give what dense ones give; none is written."""
    ours, _ = pair(name, device, bidirectional=True)
    wide, other = torch.randn(B, 2 * T, 2 * I, device=device), torch.randn(B, 2, H, device=device)
    turned = {"x": wide.transpose(0, 1)[::2, :, ::2], "h": other.transpose(0, 1)}
    single = {"x": wide[:1, :1, :I].expand(T, B, I), "h": other[:1, :1].expand(2, B, H)}
    for x, h in (tuple(views.values()) for views in (turned, single)):
        copies, found = (x.clone(), h.clone()), []
        for dense in (False, True):
            start = h.contiguous() if dense else h
            upstream = [x.new_ones(()).expand(T, B, 2 * H), *[x.new_ones(()).expand(2, B, H)] * (2 if name == "LSTM" else 1)]
            upstream = [grad.contiguous() if dense else grad for grad in upstream]
            outputs = flat(ours(x.contiguous() if dense else x, (start, start) if name == "LSTM" else start))
            found.append((*outputs, *torch.autograd.grad(outputs, list(ours.parameters()), upstream)))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
        assert equal((x, h), copies)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_written(training, device):
    """Input, states, weights and upstream gradients are, after forward and backward, what they were."""
    ours, _ = pair("LSTM", device, num_layers=2)
    x, hx = torch.randn(2, B, I, device=device), states("LSTM", 2, B, H, device=device)
    upstream = [torch.randn(2, B, H, device=device) for _ in range(3)]
    given = [x, *hx, *ours.parameters(), *upstream]
    copies, versions = [tensor.detach().clone() for tensor in given], [tensor._version for tensor in given]
    outputs = flat(ours.train(training)(x, hx))
    torch.autograd.grad(outputs, list(ours.parameters()), upstream)
    assert equal([tensor.detach() for tensor in given], copies) and [tensor._version for tensor in given] == versions


def test_accumulation(device):
    """backward() adds to .grad, as everywhere in PyTorch, and one module may run twice in one graph."""
    ours, _ = pair("GRU", device)
    x = torch.randn(2, B, I, device=device)
    output, _ = ours(x)
    output.sum().backward()
    once = [weight.grad.clone() for weight in ours.parameters()]
    ours(x)[0].sum().backward()
    assert equal([weight.grad for weight in ours.parameters()], [2 * grad for grad in once])
    whole = run(ours, torch.cat([x, x]))
    first = ours(x)
    second = ours(x, first[1])
    close([torch.cat([first[0], second[0]]), second[1]], whole[:2])


def test_checkpoint(device):
    """torch.utils.checkpoint recomputes the layer, with the same dropout mask, to the same gradients."""
    ours, _ = pair("LSTM", device, num_layers=2, dropout=0.5)
    x = torch.randn(2, B, I, device=device, requires_grad=True)
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        output, _ = checkpoint(ours, x, use_reentrant=False) if again else ours(x)
        found.append((output, *torch.autograd.grad(output.sum(), [x, *ours.parameters()])))
    assert equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, dtype, device):
    """Under autocast, outputs and gradients have the dtypes that torch.nn gives them, or its error; on a CPU, its numbers."""
    ours, theirs = pair(name, device, backend=None)
    for x in (torch.randn(T, B, I, device=device), torch.randn(T, B, I, device=device).to(dtype)):
        found = []
        for module in (ours, theirs):
            with torch.autocast(device, dtype=dtype):
                found.append(outcome(run, module, x))
        assert [str(item) if isinstance(item, type | str) else item.dtype for item in found[0]] == [
            str(item) if isinstance(item, type | str) else item.dtype for item in found[1]
        ]
        if device == "cpu" and isinstance(found[1], list):
            assert equal(*found)


# Functions

FUNCTIONS = {
    "lstm": functional.lstm,
    "gru": functional.gru,
    "rnn_tanh": functional.rnn,
    "rnn_relu": lambda *args, **kwargs: functional.rnn(*args, nonlinearity="relu", **kwargs),
}


def arguments(cell, device, given=True, bias=True):
    G = reference.GATES[cell]
    new = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    hx = None if not given else (new(B, H), new(B, H)) if cell == "lstm" else new(B, H)
    return [new(T, B, I), hx, new(G * H, I), new(G * H, H), *([new(G * H), new(G * H)] if bias else [])]


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("cell", FUNCTIONS)
def test_function_equals_module(cell, backend, device):
    """A function with a module's weights gives the module's outputs, and torch.nn's gradients, on every backend."""
    name = cell.split("_")[0].upper()
    options = {"nonlinearity": cell.split("_")[1]} if name == "RNN" else {}
    ours, theirs = pair(name, device, backend=backend, **options)
    x, hx = torch.randn(T, B, I, device=device), states(name, 1, B, H, device=device)

    def function(x, hx=None):
        start = None if hx is None else tuple(h[0] for h in hx) if name == "LSTM" else hx[0]
        y, last = FUNCTIONS[cell](x, start, *ours.parameters(), backend=backend)
        return y, tuple(h[None] for h in last) if name == "LSTM" else last[None]

    function.parameters = ours.parameters
    for start in (None, hx):
        by_function, by_module = run(function, x, start), run(ours, x, start)
        assert equal(by_function, by_module)
        close(by_function, run(theirs, x, start))


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("cell", FUNCTIONS)
def test_reverse_is_a_flip(cell, backend, device):
    """reverse=True gives what flipping input and output in time gives, on every backend."""
    x, hx, *weights = arguments(cell, device, bias=False)
    y, last = FUNCTIONS[cell](x, hx, *weights, reverse=True, backend=backend)
    flipped, flipped_last = FUNCTIONS[cell](x.flip(0), hx, *weights, backend=backend)
    close(flat((y, last)), flat((flipped.flip(0), flipped_last)))
    assert torch.equal(y[0], flat((y, last))[1])


def swapped(n, make):
    """A change of the n-th argument."""
    return lambda args: [make(arg) if k == n else arg for k, arg in enumerate(args)]


def each(n, make):
    """A change of the n-th argument, of both if it is a pair."""
    return swapped(n, lambda arg: tuple(make(part) for part in arg) if isinstance(arg, tuple) else make(arg))


WRONG = {
    "x 2-D": (swapped(0, lambda x: x[0]), RuntimeError, "x must have 3 dimensions, got 2"),
    "x 4-D": (swapped(0, lambda x: x[None]), RuntimeError, "x must have 3 dimensions, got 4"),
    "no steps": (swapped(0, lambda x: x[:0]), RuntimeError, "sequence length to be larger than 0"),
    "no batch": (swapped(0, lambda x: x[:, :0]), RuntimeError, "x must not be empty"),
    "no features": (swapped(0, lambda x: x[..., :0]), RuntimeError, "x must not be empty"),
    "features": (swapped(0, lambda x: x[..., :-1]), RuntimeError, "Expected w_ih of size"),
    "w_ih": (swapped(2, lambda w: w[:-1]), RuntimeError, "Expected w_ih of size"),
    "w_hh": (swapped(3, lambda w: w[:-1]), RuntimeError, r"w_hh must be \(G\*H, H\)"),
    "w_hh 1-D": (swapped(3, lambda w: w[0]), RuntimeError, r"w_hh must be \(G\*H, H\)"),
    "b_ih": (swapped(4, lambda b: b[:-1]), RuntimeError, "Expected b_ih of size"),
    "b_hh": (swapped(5, lambda b: b[None]), RuntimeError, "Expected b_hh of size"),
    "one bias": (swapped(5, lambda b: None), RuntimeError, "both or neither"),
    "other bias": (swapped(4, lambda b: None), RuntimeError, "both or neither"),
    "hx batch": (each(1, lambda h: h[:-1]), RuntimeError, r"Expected hx\[0\] of size"),
    "hx 3-D": (each(1, lambda h: h[None]), RuntimeError, r"Expected hx\[0\] of size"),
    "x dtype": (swapped(0, lambda x: x.double()), ValueError, "all tensors must have one dtype"),
    "w_hh dtype": (swapped(3, lambda w: w.half()), ValueError, "all tensors must have one dtype"),
    "hx dtype": (each(1, lambda h: h.double()), ValueError, r"hx\[0\] has torch.float64"),
    "w_ih device": (swapped(2, lambda w: w.to("meta")), RuntimeError, "all tensors must be on one device"),
    "hx device": (each(1, lambda h: h.to("meta")), RuntimeError, "all tensors must be on one device"),
}


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("cell", FUNCTIONS)
def test_function_errors(cell, kind, backend, device, no_launch):
    """Wrong arguments of a function: a clear error, the same on every backend, before any launch."""
    change, error, text = WRONG[kind]
    with pytest.raises(error, match=text):
        FUNCTIONS[cell](*change(arguments(cell, device)), backend=backend)


WRONG_TYPES = {
    "x": swapped(0, lambda x: x.tolist()),
    "w_ih": swapped(2, lambda w: None),
    "w_hh": swapped(3, lambda w: w.tolist()),
    "b_ih": swapped(4, lambda b: 0.0),
    "hx number": swapped(1, lambda hx: 5),
    "hx of None": swapped(1, lambda hx: (None, None)),
    "hx of another cell": swapped(1, lambda hx: torch.stack(hx) if isinstance(hx, tuple) else (hx,)),
    "empty hx": swapped(1, lambda hx: ()),
}


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("kind", WRONG_TYPES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_function_types(cell, kind, backend, device, no_launch):
    """An argument that is no tensor, or states of another cell's form: an error that names the argument, on every backend."""
    with pytest.raises((TypeError, RuntimeError), match=rf"\b{kind.split()[-1] if 'empty' in kind else kind.split()[0]}\b"):
        FUNCTIONS[cell](*WRONG_TYPES[kind](arguments(cell, device)), backend=backend)


def test_function_choices(device):
    """An unknown nonlinearity or backend names the choices; float64 runs, on PyTorch's own layer."""
    args = arguments("rnn_tanh", device)
    with pytest.raises(ValueError, match=r"Unknown nonlinearity 'gelu'\. Select from 'tanh' or 'relu'"):
        functional.rnn(*args, nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"'triton', 'torch', 'reference' or 'auto', got 'cudnn'"):
        functional.rnn(*args, backend="cudnn")
    doubles = [arg.double() for arg in args]
    close(functional.rnn(*doubles), functional.rnn(*doubles, backend="reference"))


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
def test_function_gradients_on_every_backend(backend, device):
    """Backward of a function runs on every backend, without a module whose training flag could forbid it."""
    x, hx, *weights = arguments("lstm", device)
    tensors = [tensor.requires_grad_() for tensor in (x, *hx, *weights)]
    y, (h_n, c_n) = functional.lstm(x, hx, *weights, backend=backend)
    grads = torch.autograd.grad(y.sum() + h_n.sum() + c_n.sum(), tensors)
    assert all(grad.isfinite().all() and grad.any() for grad in grads)
