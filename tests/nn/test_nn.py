"""The modules beside torch.nn's own: results, dropout, and state."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from support import loops
from support.layers import CELLS, NAMES, B, H, I, T, close, equal, flat, outcome, pair, run, states

import rnnfast
from rnnfast import numerics
from rnnfast.check import Case, compare

pytestmark = pytest.mark.numerical


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


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_projection(dtype, given, device):
    """proj_size, two layers, both directions: outputs and all gradients within the contract of torch.nn's."""
    options = {"num_layers": 2, "bidirectional": True, "proj_size": 6, "bias": given}
    ours = rnnfast.LSTM(7, 15, **options, device=device, dtype=dtype, backend="triton")
    theirs = torch.nn.LSTM(7, 15, **options, device=device, dtype=dtype)
    tensors = loops.arguments(ours, 3, 5, hx=given)
    found, common = (loops.everything(loops.by_module(layer, {}), tensors, dtype) for layer in (ours, theirs))
    exact = loops.by_module(theirs.double(), {})
    assert not numerics.fault(found, common, lambda: loops.everything(exact, tensors, torch.float64), dtype)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_kernels_do_not_take(name, given, device, no_launch):
    """float64 runs on PyTorch's own layer: outputs and gradients are bitwise torch.nn's."""
    torch.manual_seed(1)
    ours = getattr(rnnfast, name)(I, H, num_layers=2, bidirectional=True, device=device, dtype=torch.float64)
    torch.manual_seed(1)
    theirs = getattr(torch.nn, name)(I, H, num_layers=2, bidirectional=True, device=device, dtype=torch.float64)
    hx = states(name, 4, B, H, device=device, dtype=torch.float64) if given else None
    x = torch.randn(T, B, I, device=device, dtype=torch.float64)
    assert equal(run(ours, x, hx), run(theirs, x, hx))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name, nonlinearity", CELLS)
def test_nan_and_inf(name, nonlinearity, bad, device):
    """A bad element of one sequence, in the input or in the state, spoils that sequence alone, and where torch.nn's does."""
    options = {"nonlinearity": nonlinearity} if name == "RNN" else {}
    ours, theirs = pair(name, device, bidirectional=True, **options)
    if device == "cuda":  # cuDNN's relu may turn a NaN into 0
        theirs, _ = pair(name, device, "reference", bidirectional=True, **options)
        theirs.load_state_dict(ours.state_dict())
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
