"""What drop-ins forget, calls: constructor, inherited helpers, forms of input and state, streaming, dropout. All side by side
with torch.nn."""

import itertools

import numpy as np
import pytest
import torch
from support.layers import CELLS, NAMES, B, H, I, T, close, equal, flat, outcome, packed, pair, run, states
from torch import nn
from torch.nn.utils.rnn import pad_packed_sequence

import rnnfast

pytestmark = pytest.mark.numerical

SIZES = [((np.int64(3), 4), {}), ((3, np.int32(4)), {}), ((3, np.float64(4)), {}), ((3, True), {}), ((False, 4), {})]
SIZES += [((3, 4), {"num_layers": n}) for n in (True, np.int64(2), np.float32(1))]
SIZES += [((3, 4, 2), {"dropout": p}) for p in (np.float32(0.5), np.bool_(True), torch.tensor(0.5), 0, 1)]
SIZES += [((3, 4), {"bidirectional": b}) for b in (1, np.bool_(True))] + [
    ((3, 4), {"proj_size": n}) for n in (True, np.int64(2))
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("arguments", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_other_types(name, arguments):
    """numpy's numbers, booleans and floats as sizes and probabilities: torch.nn's error, or its module."""
    made = [outcome(getattr(space, name), *arguments[0], **arguments[1]) for space in (rnnfast, nn)]
    shapes = [m if isinstance(m, tuple) else (repr(m), [p.shape for p in m.parameters()]) for m in made]
    assert shapes[0] == shapes[1]


CHECKS = {
    "check_input": [(torch.zeros(T, B, I), None), (torch.zeros(T, B, I + 1), None), (torch.zeros(T), None)],
    "check_hidden_size": [(torch.zeros(2, B, H), (2, B, H)), (torch.zeros(1, B, H), (2, B, H), "said {} {}")],
    "get_expected_hidden_size": [(torch.zeros(T, B, I), None), (torch.zeros(T), torch.ones(2, dtype=torch.int64))],
    "get_expected_cell_size": [(torch.zeros(T, B, I), None)],
    "check_forward_args": [(torch.zeros(T, B, I), torch.zeros(2, B, H), None), (torch.zeros(T, B, I), torch.zeros(3), None)],
    "permute_hidden": [(torch.zeros(2, B, H), None), (torch.arange(6.0).view(1, 3, 2), torch.tensor([2, 0, 1]))],
    "flatten_parameters": [()],
    "_update_flat_weights": [()],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("helper", CHECKS)
def test_helpers(name, helper):
    """The methods that programs call on torch.nn's classes do what they do there."""
    ours, theirs = pair(name, "cpu", num_layers=2)
    for args in CHECKS[helper]:
        at = {"check_forward_args": 1, "permute_hidden": 0}.get(helper)  # the states, of which an LSTM has two
        args = tuple((arg, arg) if name == "LSTM" and n == at else arg for n, arg in enumerate(args))
        found, expected = (outcome(getattr(module, helper, str), *args) for module in (ours, theirs))
        assert type(found) is type(expected) and str(found) == str(expected)


@pytest.mark.parametrize("name", NAMES)
def test_weights_as_attributes(name, device):
    """all_weights and _flat_weights hold the Parameters themselves; there are no buffers or children; order is torch.nn's."""
    ours, theirs = pair(name, device, num_layers=2, bidirectional=True)
    mine = dict(ours.named_parameters())
    assert [*mine] == [n for n, _ in theirs.named_parameters()] == ours._flat_weights_names
    assert all(a is b for a, b in zip(ours._flat_weights, mine.values(), strict=True))
    assert all(a is b for a, b in zip(itertools.chain(*ours.all_weights), mine.values(), strict=True))
    assert not [*ours.buffers()] and not [*ours.children()]
    for layer in (ours, theirs):  # as initialisers are written
        torch.manual_seed(0)
        for module in layer.modules():
            if isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
                for key, weight in module.named_parameters():
                    nn.init.orthogonal_(weight) if "weight" in key else nn.init.zeros_(weight)
    assert equal([*ours.parameters()], [*theirs.parameters()])
    assert all(type(getattr(ours, key)) is type(getattr(theirs, key)) for key in vars(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_default_dtype_and_device(name):
    """The default dtype, the default device and a device block decide about new layers as in torch.nn."""
    before = torch.get_default_dtype()
    for dtype, where in ((torch.float64, None), (torch.float16, "meta")):
        torch.set_default_dtype(dtype)
        try:
            with torch.device(where or "cpu"):
                made = [[(p.dtype, p.device.type) for p in getattr(space, name)(I, H).parameters()] for space in (rnnfast, nn)]
        finally:
            torch.set_default_dtype(before)
        assert made[0] == made[1] and made[0][0] == (dtype, where or "cpu")


def overlapping(x):
    return torch.as_strided(torch.randn(T * B + I, device=x.device), (T, B, I), (B, 1, 1))


FORMS = {
    "keywords": lambda x: x,
    "expanded over time": lambda x: x[:1].expand(T, B, I),
    "expanded over rows": lambda x: x[:, :1].expand(T, B, I),
    "one number": lambda x: x.new_ones(()).expand(T, B, I),
    "overlapping": overlapping,
    "flipped and strided": lambda x: torch.cat([x, x], -1).flip(0)[..., ::2],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name, nonlinearity", CELLS)
def test_forms_of_input(name, nonlinearity, form, device):
    """Inputs that share memory with themselves, states that are one tensor twice or expanded: torch.nn's results; nothing is
    written, and without dropout no random number is drawn."""
    ours, theirs = pair(name, device, **({"nonlinearity": nonlinearity} if name == "RNN" else {}))
    x = FORMS[form](torch.randn(T, B, I, device=device))
    h = torch.randn(1, 1, H, device=device).expand(1, B, H)
    hx = (h, h) if name == "LSTM" else h
    kept, generator = (x.clone(), h.clone()), torch.get_rng_state()
    close(flat(ours(hx=hx, input=x)), flat(theirs(x, hx)))
    assert equal((x, h), kept) and torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("name", NAMES)
def test_containers(name, device):
    """States in a list are taken where torch.nn takes them; what comes back is a tuple, of the same types."""
    ours, theirs = pair(name, device)
    x, hx = torch.randn(1, B, I, device=device), states(name, 1, B, H, device=device)
    for given in (hx, list(hx) if name == "LSTM" else hx):
        found, expected = ours(x, given), theirs(x, given)
        assert type(found) is tuple and [type(part) for part in found] == [type(part) for part in expected]
        close(flat(found), flat(expected))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [5, 29])
def test_streaming(name, size, device):
    """One step and one row at a time with the state carried, under no_grad and in inference_mode: the whole sequence's
    outputs, at hidden sizes that fit nothing."""
    ours, theirs = pair(name, device, H=size)
    x = torch.randn(3, 1, I, device=device)
    expected = flat(theirs(x))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            hx, outputs = None, []
            for step in x:
                output, hx = ours(step[None], hx)
                outputs.append(output)
        close([torch.cat(outputs), *(hx if name == "LSTM" else (hx,))], [tensor.detach() for tensor in expected])


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_many_rows(name, device):
    """Hundreds of rows at H = 32."""
    ours, theirs = pair(name, device, H=32)
    x = torch.randn(2, 300, I, device=device)
    close(run(ours, x), run(theirs, x))


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_long(name, device):
    """3000 steps, forward and backward."""
    ours, theirs = pair(name, device, H=3)
    x = torch.randn(3000, 1, I, device=device)
    upstream = [
        torch.randn(3000, 1, 3, device=device) / 3000,
        *[torch.ones(1, 1, 3, device=device)] * (2 if name == "LSTM" else 1),
    ]
    close(run(ours, x, upstream=upstream), run(theirs, x, upstream=upstream))


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_dropout_of_each_row(form, device):
    """Between layers each step, row and feature has a mask of its own, packed too; after the last layer there is none."""
    module = rnnfast.RNN(H, H, 2, nonlinearity="relu", bias=False, dropout=0.5, device=device)
    with torch.no_grad():
        for key, weight in module.named_parameters():
            weight.copy_(torch.eye(H) if "ih" in key else torch.zeros(H, H))
    x = torch.ones(3, 16, H, device=device)
    output, _ = module(packed(x, [3] * 16) if form == "packed" else x)
    mask = pad_packed_sequence(output)[0] if form == "packed" else output
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert all(mask.std(axis).max() > 0 for axis in range(3))
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_ih_l1.zero_()
        module.bias = False
    assert not module(x)[0].any()


def test_dropout_with_one_layer():
    """It warns as in torch.nn, once, in the same words."""
    said = []
    for space in (rnnfast, nn):
        with pytest.warns(UserWarning) as caught:
            space.LSTM(I, H, dropout=0.5)
        said.append([str(warning.message) for warning in caught])
    assert said[0] == said[1] and len(said[0]) == 1
