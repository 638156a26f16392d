"""What `explain` says beside what runs: backends, transforms, options, devices, dtypes, packed rows and cells."""

import contextlib
import warnings

import pytest
import torch
from support.layers import B, H, I, T
from torch.autograd import forward_ad
from torch.nn.utils import _per_sample_grad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast import reference, torch_private
from rnnfast.nn import cells, sequence, stack

WORDS = {
    "kernels": ("step kernels", "forward: step kernels"),
    "equations": ("the equations in plain PyTorch",),
    "torch": ("PyTorch's own layer", "PyTorch's own cell"),
    "packed": ("PyTorch's own layer",),
}


@pytest.fixture
def ran(monkeypatch):
    """The runners that calls went to, in a list. The equations stand in for the kernels, for speed."""
    found = []

    def spy(name, inner):
        def call(*args, **kwargs):
            found.append(name or args[0])
            return inner(*args, **kwargs)

        return call

    monkeypatch.setattr(stack, "GROUPS", dict.fromkeys(stack.GROUPS, reference.group))
    monkeypatch.setattr(stack, "run", spy("", stack.run))
    monkeypatch.setattr(cells, "_run", spy("", cells._run))
    monkeypatch.setattr(stack, "by_packing", spy("packed", stack.by_packing))
    for cls in (torch.nn.LSTM, torch.nn.GRU, torch.nn.LSTMCell, torch.nn.GRUCell):
        monkeypatch.setattr(cls, "forward", spy("torch", cls.forward))
        monkeypatch.setitem(torch_private._FORWARDS, cls, cls.forward)  # else it would count as replaced, and run for that
    return found


def plain(call, x):
    call(x)


def vmap(call, x):
    torch.func.vmap(call)(x[None])


def grad(call, x):
    torch.func.grad(lambda x: call(x).sum())(x)


def vmap_of_grad(call, x):
    torch.func.vmap(torch.func.grad(lambda x: call(x).sum()))(x[None])


def jvp(call, x):
    torch.func.jvp(call, (x,), (x,))


def dual(call, x):
    with forward_ad.dual_level():
        call(x)


def functionalize(call, x):
    torch.func.functionalize(call)(x)


def no_grad(call, x):
    with torch.no_grad():
        call(x)


def autocast(call, x):
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        call(x)


TRANSFORMS = (plain, vmap, grad, vmap_of_grad, jvp, dual, functionalize, no_grad, autocast)
OPTIONS = {
    "none": {},
    "lengths": {"lengths": [1, 2, 0]},
    "resets": {"resets": True},
    "gates": {"return_gates": True},
    "all": {"lengths": [1, 2, 0], "resets": True, "return_all_states": True},
}


def agree(explained, ran):
    """`explained` was said of the one call that `ran` went to."""
    runner = "packed" if "packed" in ran else ran[0]
    said = next(name for name, words in WORDS.items() if explained.details.startswith(words))
    if "packed by their lengths" in explained.details:
        said = "packed"
    assert said == runner, f"{explained}\nbut {ran}"
    assert explained.backend == {"kernels": "triton", "packed": "torch"}.get(runner, explained.backend)


def check(layer, input, transform, ran, **options):
    """Explain inside of the transform, just before the call."""
    said = []
    whole = input.data if isinstance(input, PackedSequence) else input

    def call(data):
        given = data if whole is input else input._replace(data=data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rnnfast.FallbackWarning)
            said.append(rnnfast.explain(layer, given, **options))
            assert not ran
            output = layer(given, **options)
        output = output[0] if isinstance(output, tuple) else output
        return output if isinstance(output, torch.Tensor) else output.data

    try:
        transform(call, whole)
    except RuntimeError as error:  # PyTorch's own layer, on packed rows, has no rule for some: what ran is known all the same
        assert ran, error
    agree(said[0], ran)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", [None, "triton", "torch", "reference"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_layers(name, backend, options, transform, device, ran):
    for dtype in (torch.float32, torch.float64):
        layer = getattr(rnnfast, name)(I, H, device=device, dtype=dtype, backend=backend)
        given = dict(OPTIONS[options])
        if "resets" in given:
            given["resets"] = torch.zeros(T, B, dtype=torch.bool, device=device)
        check(layer, torch.randn(T, B, I, device=device, dtype=dtype), transform, ran, **given)
        ran.clear()


@pytest.mark.parametrize("transform", [plain, grad, no_grad], ids=lambda transform: transform.__name__)
@pytest.mark.parametrize("lengths", [[2, 1], [2, 2]], ids=str)
@pytest.mark.parametrize("backend", [None, "triton", "torch", "reference"])
def test_packed(backend, lengths, transform, device, ran):
    layer = rnnfast.GRU(I, H, device=device, backend=backend)
    check(layer, pack_padded_sequence(torch.randn(2, 2, I, device=device), lengths), transform, ran)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)
@pytest.mark.parametrize("backend", [None, "triton", "torch", "reference"])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_cells(name, backend, transform, device, ran):
    for dtype in (torch.float32, torch.float64):
        cell = getattr(rnnfast, name)(I, H, device=device, dtype=dtype, backend=backend)
        check(cell, torch.randn(B, I, device=device, dtype=dtype), transform, ran)
        ran.clear()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", [None, "triton", "torch", "reference"])
def test_meta(backend, options, ran):
    layer = rnnfast.LSTM(I, H, device="meta", backend=backend)
    given = dict(OPTIONS[options])
    if "resets" in given:
        given["resets"] = torch.zeros(T, B, dtype=torch.bool, device="meta")
    check(layer, torch.empty(T, B, I, device="meta"), plain, ran, **given)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_per_sample_weights(name, device, ran):
    """call_for_per_sample_grads: explained inside of it, by a layer that explains itself."""
    said = []

    class Explaining(getattr(rnnfast, name)):
        def forward(self, x):
            said.append(rnnfast.explain(self, x))
            return super().forward(x)[0]

    layer = Explaining(I, H, batch_first=True, device=device, backend="reference")
    layer.backend = None
    per_sample = _per_sample_grad.call_for_per_sample_grads
    x = torch.randn(B, T, I, device=device)
    with contextlib.suppress(RuntimeError, TypeError):  # of torch's own, where it knows no such rule
        per_sample(layer, batch_size=B)(x)
    agree(said[0], ran)


def test_words(device, monkeypatch):
    """Why the equations stand in for PyTorch's own layer, and what a call that no backend can run raises."""
    layer, x = rnnfast.GRU(I, H, device=device, backend="torch"), torch.randn(1, T, B, I, device=device)
    said = []
    torch.func.vmap(lambda x: said.append(rnnfast.explain(layer, x)) or layer(x)[0])(x)
    assert "no rule for vmap here" in said[0].details and said[0].backend == "torch"
    assert "has no return_gates" in rnnfast.explain(layer, x[0], return_gates=True).details

    class Mine(rnnfast.GRU):
        def permute_hidden(self, hx, permutation):
            return hx

    mine = Mine(I, H, device=device)
    assert rnnfast.explain(mine, x[0], return_gates=True).details.startswith(
        "the call raises: Mine.permute_hidden is not torch"
    )
    assert sequence.Sequence.forward is rnnfast.LSTM.forward
