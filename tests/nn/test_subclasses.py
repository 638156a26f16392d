"""accelerate(subclasses=True): a user's class keeps its code, its type and its files, and its super().forward is rnnfast's."""

import abc
import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from support.layers import close, flat
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast

pytestmark = pytest.mark.numerical

I, H = 3, 4


def parts(result):
    return [result] if isinstance(result, torch.Tensor) else flat(result)


def taken(model, function=rnnfast.accelerate, **options):
    """The report of `accelerate` with subclasses, or of `restore`."""
    reports = []
    options = {"subclasses": True, **options} if function is rnnfast.accelerate else options
    function(model, report=reports.append, **options)
    return reports[0]


class Doubling(nn.LSTM):
    """Another signature, another result, and a method that calls super()."""

    def forward(self, input, hx=None, *, factor=2.0):
        return self._run(factor * input, hx)[0]

    def _run(self, input, hx):
        return super().forward(input, hx)


class Base(abc.ABC, nn.RNNBase):
    """As in pytorch-forecasting: the user's forward stands in an abstract base before torch.nn's class."""

    @abc.abstractmethod
    def start(self, x): ...

    def forward(self, x, hx=None, lengths=None):
        if lengths is None:
            return super().forward(x, hx=self.start(x) if hx is None else hx)
        return super().forward(pack_padded_sequence(x, lengths, enforce_sorted=False), hx=hx)


class WithStart(Base, nn.GRU):
    def start(self, x):
        return torch.ones(self.num_layers, x.shape[1], self.hidden_size, device=x.device)


class Configured(nn.RNN):
    """Without a forward; with slots, a property called backend, and a __setattr__ that does not know __class__."""

    __slots__ = ("note",)

    def __setattr__(self, name, value):
        assert name != "__class__"
        super().__setattr__(name, value)

    @property
    def backend(self):
        return "the user's own"


class Deeper(Doubling):
    @torch.enable_grad()
    def forward(self, input, **options):
        return super().forward(input, **options) + 1


@pytest.mark.parametrize("cls", [Doubling, WithStart, Configured, Deeper])
def test_the_same_class_and_numbers(cls, device):
    """The user's code runs, on rnnfast's forward; type, repr, state_dict, parameters and gradients stay; restored, all is as
    before."""
    layer = cls(I, H, device=device)
    x, parameters, state = torch.randn(5, 2, I, device=device), [*layer.parameters()], layer.state_dict()
    expected, text = layer(x), repr(layer)
    grads = torch.autograd.grad(parts(expected)[0].square().sum(), parameters)
    report = taken(layer)
    assert report.changed == (("", f"{text}, a subclass: {__name__}.{cls.__name__}"),) and not report.left
    assert isinstance(layer, cls) and isinstance(layer, rnnfast.nn.sequence.Sequence) and repr(layer) == text
    assert [*map(id, layer.parameters())] == [*map(id, parameters)] and layer.state_dict().keys() == state.keys()
    assert rnnfast.explain(layer, x).backend == "triton"
    found = layer(x)
    close(parts(found), parts(expected))
    close(torch.autograd.grad(parts(found)[0].square().sum(), parameters), grads)
    with rnnfast.use_backend("torch"):
        assert torch.equal(parts(layer(x))[0], parts(expected)[0])
    assert taken(layer).left == (("", f"{__name__}.{cls.__name__} is derived from rnnfast's layer already"),)
    assert len(taken(layer, rnnfast.restore).changed) == 1 and type(layer) is cls
    assert torch.equal(parts(layer(x))[0], parts(expected)[0]) and "_rnnfast_accelerated" not in vars(layer)


def test_packed_inside(device):
    layer, x = WithStart(I, H, device=device), torch.randn(5, 2, I, device=device)
    expected = layer(x, lengths=torch.tensor([3, 5]))
    taken(layer)
    found = layer(x, lengths=torch.tensor([3, 5]))
    assert isinstance(found[0], PackedSequence)
    close(parts(found), parts(expected))


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda layer, n=n: pickle.loads(pickle.dumps(layer, n)) for n in (0, 2, pickle.HIGHEST_PROTOCOL)),
        lambda layer: torch.load(io.BytesIO(saved(layer)), weights_only=False),
    ],
)
def test_copies_and_files(copied):
    """A copy and what a file has are of the same class, still exchanged; slots fare as they do in PyTorch's own."""
    model = nn.ModuleList([Doubling(I, H), Configured(I, H)])
    model[1].note = "mine"
    plain = copied(model)
    taken(model)
    again = copied(model)
    assert [type(layer) for layer in again] == [type(layer) for layer in model]
    assert hasattr(again[1], "note") == hasattr(plain[1], "note")
    assert len(taken(again, rnnfast.restore).changed) == 2 and type(again[0]) is Doubling


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    return file.getvalue()


class Rebuilt(nn.GRU):
    def __reduce__(self):
        return type(self), (self.input_size, self.hidden_size), self.__getstate__()


def test_a_reduce_of_its_own():
    layer = Rebuilt(I, H)
    taken(layer)
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer) and torch.equal(again.weight_hh_l0, layer.weight_hh_l0)


def test_one_class_each_and_none_kept():
    """Two layers of a class get the same made class, and a class that nobody holds is freed with the class made of it."""

    class Local(nn.GRU):
        pass

    layers = [Local(I, H), Local(I, H)]
    for layer in layers:
        taken(layer)
    assert type(layers[0]) is type(layers[1]) and type(layers[0]) is not Local
    made = weakref.ref(type(layers[0]))
    del layers, layer, Local
    gc.collect()
    assert made() is None


@pytest.mark.parametrize("inplace", [True, False])
def test_parametrized(inplace):
    """PyTorch derives a class of a parametrized layer from the user's; without the parametrization it is still exchanged."""
    model = nn.Sequential(Deeper(I, H))
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    x, cls = torch.randn(5, 2, I), type(model[0])
    expected = model(x)
    accelerated = rnnfast.accelerate(model, subclasses=True, inplace=inplace, report=None)
    assert isinstance(accelerated[0], rnnfast.LSTM) and isinstance(accelerated[0], Deeper)
    assert inplace or type(model[0]) is cls
    close([accelerated(x)], [expected])
    nn.utils.parametrize.remove_parametrizations(accelerated[0], "weight_hh_l0")
    assert isinstance(accelerated[0], rnnfast.LSTM)
    rnnfast.restore(accelerated, report=None)
    assert type(accelerated[0]) is Deeper


class Explicit(nn.LSTM):
    def forward(self, input, hx=None):
        return nn.LSTM.forward(self, input, hx)

    def reset_parameters(self):
        super().reset_parameters()


class Internal(nn.RNN):
    def permute_hidden(self, hx, permutation):
        return hx


class OfTheBase(nn.RNNBase):
    pass


class Closed(type):
    def __new__(cls, name, bases, namespace):
        if len(bases) > 1:
            raise ValueError("one base only")
        return super().__new__(cls, name, bases, namespace)


class Guarded(nn.GRU, metaclass=Closed):
    pass


class Tagged(nn.GRU):
    def __init_subclass__(cls, *, tag):
        pass


class Own(rnnfast.LSTM):
    pass


def test_what_is_left():
    """Classes in which rnnfast's forward or its kernels would never run stay, with the reason; without the option, all stay."""
    layers = [Doubling(I, H), Explicit(I, H), Internal(I, H), OfTheBase("LSTM", I, H), Guarded(I, H), Tagged(I, H), Own(I, H)]
    model = nn.ModuleList(layers)
    before = [type(layer) for layer in layers]
    for left in (taken(model, subclasses=False).left, taken(model, rnnfast.restore).left):
        assert [name for name, _ in left] == list("0123456") and [type(layer) for layer in layers] == before
        assert all("is a class of its own" in reason for _, reason in left[:-1])
    assert "subclasses=True" in dict(taken(model, subclasses=False).left)["0"]
    report = taken(model)
    assert [name for name, _ in report.changed] == ["0"] and [type(layer) for layer in layers[1:]] == before[1:]
    reasons = [
        "Explicit.forward does not call super().forward",
        "Internal.permute_hidden is not torch.nn's",
        "derived from none of torch.nn.LSTM, GRU and RNN",
        "no class can be made of it and rnnfast.GRU (one base only)",
        "missing 1 required keyword-only argument: 'tag'",
        "derived from rnnfast's layer already",
    ]
    assert all(reason in found for (_, found), reason in zip(report.left, reasons, strict=True))


class MyGRU(nn.Module):
    """Recurrent by its name."""


class CRNN(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


def test_why_nothing_was_exchanged():
    """Modules with recurrent names are named, the innermost only; a model that has such a name because of its layers is not."""
    report = taken(CRNN(nn.Linear(I, H), MyGRU()))
    assert [name for name, _ in report.left] == ["layers.1"] and "rnnfast.Layer" in report.left[0][1]
    assert "layers.1" in str(report) and str(report).startswith("0 layers exchanged")
    assert not taken(CRNN(nn.LSTM(I, H), nn.Linear(I, H))).left
    assert [name for name, _ in taken(CRNN()).left] == [""]
    Keras = type("Sequential", (nn.Module,), {"__module__": "keras.src.models.sequential"})
    inner = type("LSTM", (nn.Module,), {"__module__": "keras.src.layers.rnn.lstm"})
    model = Keras()
    model.add_module("rnn", inner())
    ((name, reason),) = taken(model).left
    assert name == "" and "rnnfast.keras.enable()" in reason
