"""accelerate, restore and as_default: what is exchanged, what stays, and that nothing else about a model changes."""

import copy
import pickle
import threading
import types

import pytest
import torch
from support.layers import NAMES, close, equal, flat
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnfast

I, H = 3, 4


def quiet(function, model, **options):
    """The model and the report."""
    reports = []
    model = function(model, report=reports.append, **options)
    (report,) = reports
    return model, report


class Tagger(nn.Module):
    """As third-party models are: layers in containers, one of them twice, one shared by name."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, I)
        self.stack = nn.ModuleList([nn.LSTM(I, H), nn.ModuleDict({"gru": nn.GRU(H, I, batch_first=True)})])
        self.again = self.stack[1]["gru"]
        self.rnn = nn.RNN(I, H, nonlinearity="relu", bidirectional=True)

    def forward(self, tokens):
        output, _ = self.stack[0](self.embedding(tokens))
        return self.rnn(self.again(output.transpose(0, 1))[0].transpose(0, 1))[0]


@pytest.mark.parametrize("inplace", [True, False])
def test_whole_model(inplace, device):
    """Every layer wherever it stands; the very same parameters; the same outputs and gradients; restored, it is as before."""
    model = Tagger().to(device).eval()
    tokens, before = torch.randint(7, (3, 2), device=device), {name: type(m) for name, m in model.named_modules()}
    expected = model(tokens)
    accelerated, report = quiet(rnnfast.accelerate, model, inplace=inplace)
    assert (accelerated is model) == inplace
    assert [name for name, _ in report.changed] == ["stack.0", "stack.1.gru", "rnn"] and not report.left
    assert isinstance(accelerated.stack[0], rnnfast.LSTM) and accelerated.again is accelerated.stack[1]["gru"]
    assert [*map(id, accelerated.parameters())] == [*map(id, model.parameters())] and not accelerated.rnn.training
    assert rnnfast.explain(accelerated.rnn, torch.zeros(2, 2, I, device=device)).backend == "triton"
    if not inplace:
        assert {name: type(m) for name, m in model.named_modules()} == before
    found = accelerated(tokens)
    grads = (torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (found, expected))
    close([found, *next(grads)], [expected, *next(grads)])
    restored, report = quiet(rnnfast.restore, accelerated, inplace=inplace)
    assert {name: type(m) for name, m in restored.named_modules()} == before and len(report.changed) == 3
    assert [*map(id, restored.parameters())] == [*map(id, model.parameters())]
    assert torch.equal(restored(tokens), expected) and vars(restored.rnn).keys() == vars(Tagger().rnn).keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_model_itself(name):
    """The root is exchanged too, stays the same object for whoever holds it, and is exchanged once however often asked."""
    model = getattr(nn, name)(I, H)
    again, report = quiet(rnnfast.accelerate, model)
    assert again is model and type(model) is getattr(rnnfast, name) and isinstance(model, getattr(nn, name))
    assert str(report) == f"1 layer exchanged for rnnfast's\n  (the model itself): {name}(3, 4)"
    _, report = quiet(rnnfast.accelerate, model)
    assert not report.changed and report.left == (("", f"it is rnnfast.nn.{name} already"),)
    assert quiet(rnnfast.restore, model)[1].changed == (("", f"{name}(3, 4)"),)
    assert type(model) is getattr(nn, name)
    assert quiet(rnnfast.restore, model)[1].left == (("", f"it is torch.nn.modules.rnn.{name} already"),)


def test_report_is_printed(capsys):
    rnnfast.accelerate(nn.Sequential(nn.Linear(2, 2)))
    rnnfast.accelerate(nn.GRU(I, H), report=None)
    nothing = "no module of the model is a torch.nn.LSTM, GRU or RNN, or has such a name"
    assert capsys.readouterr().out == f"0 layers exchanged for rnnfast's\n  {nothing}\n"
    with pytest.raises(TypeError, match=r"model should be a torch.nn.Module, got list"):
        rnnfast.accelerate([nn.GRU(I, H)])


class Mine(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # that scripting and quantizing are old
def test_what_is_left():
    """A user's class, a replaced forward, cells, TorchScript and quantized layers stay as they are and are named, with why."""
    patched = nn.GRU(I, H)
    patched.forward = types.MethodType(lambda self, x: x, patched)
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(I, H)), {nn.LSTM})
    layers = {"mine": Mine(I, H), "patched": patched, "cell": nn.LSTMCell(I, H), "script": torch.jit.script(nn.GRU(I, H))}
    model = nn.ModuleDict({**layers, "quantized": quantized, "ours": rnnfast.RNN(I, H), "linear": nn.Linear(2, 2)})
    before = [type(module) for module in model.modules()]
    for function in (rnnfast.accelerate, rnnfast.restore):
        left = dict(quiet(function, model)[1].left)
        assert [type(module) for module in model.modules()] == before
        assert {name.partition(".")[0] for name in left} == {*layers, "quantized", "ours"}
    assert "class of its own" in left["mine"] and "TorchScript" in left["script"] and "LSTMCell" in left["cell"]
    assert "quantized" in left["quantized.0"] and "every=True" in left["ours"]
    assert "forward was replaced" in dict(quiet(rnnfast.accelerate, model)[1].left)["patched"]
    quiet(rnnfast.restore, model, every=True)
    assert type(model["ours"]) is nn.RNN


def weight_norm(layer):
    parametrizations.weight_norm(layer, "weight_hh_l0")


def old_weight_norm(layer):
    nn.utils.weight_norm(layer, "weight_hh_l0")


def spectral_norm(layer):
    nn.utils.spectral_norm(layer, "weight_hh_l0")


def pruned(layer):
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("change", [weight_norm, old_weight_norm, spectral_norm, pruned])
def test_reparametrized(change, inplace, device):
    """A layer whose recurrent weight is computed stays so, with the same outputs and gradients; a copy leaves the model."""
    model = nn.Sequential(nn.GRU(I, H, device=device))
    change(model[0])
    model.eval()
    x, cls = torch.randn(2, 2, I, device=device), type(model[0])
    expected = model(x)[0]
    accelerated, report = quiet(rnnfast.accelerate, model, inplace=inplace)
    assert len(report.changed) == 1 and isinstance(accelerated[0], rnnfast.GRU)
    assert inplace or type(model[0]) is cls
    found = accelerated(x)[0]
    names, weights = zip(*model.named_parameters(), strict=True)
    assert [name for name, _ in accelerated.named_parameters()] == [*names]
    grads = [torch.autograd.grad(output.square().sum(), weights) for output in (found, expected)]
    close([found, *grads[0]], [expected, *grads[1]])
    restored, _ = quiet(rnnfast.restore, accelerated, inplace=inplace)
    assert type(restored[0]).__mro__[-4:] == nn.GRU.__mro__[-4:] and not isinstance(restored[0], rnnfast.GRU)
    close([restored(x)[0]], [expected])


def test_parametrizations_come_off():
    """Exchanged while parametrized, a layer without its parametrization is rnnfast's still; exchanged back, torch.nn's."""
    layer = nn.LSTM(I, H)
    weight_norm(layer)
    copied = copy.deepcopy(layer)
    quiet(rnnfast.accelerate, layer)
    weight_norm_too = copy.deepcopy(layer)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is rnnfast.LSTM and type(copied).__bases__ == (nn.LSTM,)
    parametrizations.orthogonal(layer, "weight_hh_l0")
    quiet(rnnfast.restore, layer)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is nn.LSTM
    assert isinstance(weight_norm_too, rnnfast.LSTM) and parametrize.is_parametrized(weight_norm_too)


@pytest.mark.parametrize("inplace", [True, False])
def test_hooks_and_attributes(inplace, device):
    """Hooks of every kind go on, each once a call; attributes stay; an optimizer that holds the parameters goes on."""
    layer, calls = nn.GRU(I, H, device=device), []
    layer.note = "mine"
    layer.register_buffer("kept", torch.ones(2))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.register_full_backward_pre_hook(lambda *_: calls.append("backward pre"))
    layer.register_state_dict_post_hook(lambda *_: calls.append("state"))
    layer.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    layer.weight_hh_l0.register_post_accumulate_grad_hook(lambda _: calls.append("accumulate"))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer, _ = quiet(rnnfast.accelerate, layer, inplace=inplace)
    layer(torch.randn(2, 2, I, device=device, requires_grad=True))[0].sum().backward()
    before = layer.weight_hh_l0.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight_hh_l0, before)
    layer.load_state_dict(layer.state_dict())
    assert sorted(calls) == sorted(["pre", "forward", "backward", "backward pre", "accumulate", "state", "load"])
    assert layer.note == "mine" and "kept" in dict(layer.named_buffers())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped(wrap):
    """Layers inside wrappers that hold a model are found."""
    model = wrap(nn.Sequential(nn.GRU(I, H)))
    assert len(quiet(rnnfast.accelerate, model)[1].changed) == 1


def test_pickle():
    """A whole accelerated model pickles, and what is read is restored."""
    model = pickle.loads(pickle.dumps(quiet(rnnfast.accelerate, Tagger())[0]))
    assert type(model.rnn) is rnnfast.RNN and len(quiet(rnnfast.restore, model)[1].changed) == 3


def test_as_default(device):
    """In the block torch.nn's names build ours, early imports too; subclasses, copies and isinstance are untouched; it nests,
    ends with its block after an exception, and holds in one thread."""
    from torch.nn import GRU as early

    old, elsewhere = nn.LSTM(I, H, device=device), []
    with pytest.raises(ZeroDivisionError), rnnfast.as_default():
        with rnnfast.as_default():
            model = Tagger()
        made = [early(I, H), nn.LSTM(I, H, device=device), nn.modules.rnn.RNN(I, H, nonlinearity="relu")]
        assert [type(layer) for layer in made] == [rnnfast.GRU, rnnfast.LSTM, rnnfast.RNN]
        assert type(model.stack[0]) is rnnfast.LSTM and type(model.again) is rnnfast.GRU
        assert isinstance(old, nn.LSTM) and isinstance(made[1], nn.LSTM) and not isinstance(old, rnnfast.LSTM)
        assert type(Mine(I, H)) is Mine and type(copy.deepcopy(old)) is nn.LSTM
        assert type(pickle.loads(pickle.dumps(old))) is type(old._replicate_for_data_parallel()) is nn.LSTM
        thread = threading.Thread(target=lambda: elsewhere.append(type(nn.LSTM(I, H))))
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match="num_layers must be greater than zero"):
            nn.LSTM(I, H, 0)
        _ = 1 / 0
    assert elsewhere == [nn.LSTM] and type(nn.LSTM(I, H)) is nn.LSTM and type(early(I, H)) is nn.GRU
    torch.manual_seed(1)
    theirs = nn.LSTM(I, H, device=device)
    torch.manual_seed(1)
    ours = rnnfast.as_default()(lambda: nn.LSTM(I, H, device=device))()
    assert equal([*ours.parameters()], [*theirs.parameters()]) and repr(ours) == repr(theirs)
    x = torch.randn(2, 2, I, device=device)
    close(flat(ours(x)), flat(theirs(x)))
