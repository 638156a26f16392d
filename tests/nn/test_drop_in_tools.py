"""What drop-ins forget, tools: functional calls, fake tensors, counters, tracers, exporters and quantizers meet our layers as
they meet torch.nn's. All side by side."""

import io

import pytest
import torch
from support.layers import NAMES, B, H, I, T, close, equal, flat, outcome, pair
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from benchmarks import drop_in


class Model(nn.Module):
    """Takes a result apart as programs do."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(H, 2)

    def forward(self, x):
        output, last = self.layer(x)
        h_n = last[0] if isinstance(self.layer, nn.LSTM) else last
        return self.head(output), h_n


class First(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def models(name, device, backend=None, **options):
    torch.manual_seed(1)
    ours, theirs = (Model(layer).to(device) for layer in pair(name, device, backend, **options))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", NAMES)
def test_functional_call(name, device):
    """With some of the weights, or with tied ones; the module's own stay."""
    found = []
    for model in models(name, device):
        x, weight = torch.ones(T, B, I, device=device), torch.full_like(model.layer.weight_hh_l0, 0.1).requires_grad_()
        for tie in (False, True):
            given = {"layer.weight_hh_l0": weight} | ({"head.bias": weight[0, :2]} if tie else {})
            output, h_n = torch.func.functional_call(model, given, (x,))
            found.append([output, h_n, *torch.autograd.grad(output.square().sum(), weight)])
        assert model.layer.weight_hh_l0 is dict(model.named_parameters())["layer.weight_hh_l0"] is not weight
    close(found[0] + found[1], found[2] + found[3])


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors(name, device, no_launch):
    """Shapes, dtypes and the need for gradients without memory or launches, forward and backward."""
    with FakeTensorMode():
        found = []
        for space in (rnnfast, nn):
            layer = getattr(space, name)(I, H, num_layers=2, bidirectional=True, dtype=torch.float16, device=device)
            outputs = flat(layer(torch.zeros(T, B, I, dtype=torch.float16, device=device)))
            torch.autograd.backward(outputs, outputs)
            tensors = [*outputs, *(weight.grad for weight in layer.parameters())]
            found.append([(tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad) for tensor in tensors])
    assert found[0] == found[1]


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_mode_and_profiler(device):
    """A mode that watches operators sees ours by name, once a stack of one direction, or once a layer with both; so does the
    profiler."""
    x = torch.randn(T, B, I, device=device)
    for options, calls in (({"num_layers": 2}, 1), ({"num_layers": 2, "bidirectional": True}, 2)):
        ours, _ = pair("LSTM", device, **options)
        expected = flat(ours(x))
        with Counting() as mode:
            assert equal(flat(ours(x)), expected)
        assert mode.seen.count("rnnfast.forward.default") == calls
        with torch.profiler.profile() as profile:
            ours(x)[0].sum().backward()
        seen = {event.key: event.count for event in profile.key_averages()}
        assert seen["rnnfast::forward"] == seen["rnnfast::backward"] == calls


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_flop_counter(name, given, directions, device):
    """With our formulas FlopCounterMode counts forward and backward of the kernels as it counts the products of the equations,
    less the first step's where that begins from zeros."""
    from torch.utils.flop_counter import FlopCounterMode

    G, found = {"LSTM": 4, "GRU": 3, "RNN": 1}[name], []
    for backend in ("triton", "reference"):
        layer = getattr(rnnfast, name)(I, H, 2, bidirectional=directions == 2, device=device, backend=backend)
        x = torch.randn(T, B, I, device=device, requires_grad=True)
        hx = tuple(
            torch.randn(2 * directions, B, H, device=device, requires_grad=True) for _ in range(2 if name == "LSTM" else 1)
        )
        with FlopCounterMode(display=False, custom_mapping=rnnfast.FLOP_FORMULAS) as mode:
            outputs = flat(layer(x, (hx if name == "LSTM" else hx[0]) if given else None))
            sum(out.sum() for out in outputs).backward()
        found.append(mode.get_total_flops())
    first = 0 if given else 2 * (2 * directions) * 2 * B * G * H * H  # of forward and of the gradient of each W_hh
    assert found[0] > 0 and found[0] == found[1] - first


@pytest.mark.parametrize("name", NAMES)
def test_fx(name, device):
    """torch.fx keeps a layer whole, as it keeps torch.nn's, at the root's side too; the graph computes the same."""
    ours, theirs = models(name, device)
    x, traced = torch.randn(T, B, I, device=device), [torch.fx.symbolic_trace(model) for model in (ours, theirs)]
    nodes = [[(node.op, str(node.target)) for node in each.graph.nodes] for each in traced]
    assert nodes[0] == nodes[1] and ("call_module", "layer") in nodes[0]
    assert equal(traced[0](x), ours(x))
    assert type(traced[0].layer) is getattr(rnnfast, name)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", NAMES)
def test_torchscript(name, device):
    """A trace saves, loads and holds torch.nn's operators; scripting says how to do it, and that way works."""
    ours, theirs = models(name, device)
    x, file = torch.randn(T, B, I, device=device), io.BytesIO()
    torch.jit.save(torch.jit.trace(ours, (x,)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "rnnfast::" not in str(loaded.inlined_graph)
    close(loaded(torch.cat([x, x])), theirs(torch.cat([x, x])))
    for layer in (ours, getattr(rnnfast, f"{name}Cell")(I, H)):
        with pytest.raises(RuntimeError, match=r"script rnnfast.restore\(model, every=True\)"):
            torch.jit.script(layer)
    whole = nn.Sequential(First(ours.layer))
    scripted = torch.jit.script(rnnfast.restore(whole, inplace=False, every=True, report=None))
    assert type(ours.layer) is getattr(rnnfast, name)
    close([scripted(x)], [theirs.layer(x)[0]])


def _exported(model, x, **options):
    """An exported program after a trip through a file."""
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), **options), file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.layer._flat_weights")  # of torch.nn's own layers
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_export(name, strict, device):
    """torch.export, saved and loaded, strict or not, holds our operator, and runs for any T and B, as torch.nn's does not."""
    if strict and torch.__version__.startswith("2.9."):
        pytest.skip("PyTorch 2.9 refuses the strict export of its own layers")
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # the default: export refuses any other
    ours, theirs = models(name, device, num_layers=2, batch_first=True)
    sizes = {0: torch.export.Dim("B", min=2, max=9), 1: torch.export.Dim("T", min=2, max=99)}
    program = _exported(ours, torch.randn(3, 4, I, device=device), strict=strict, dynamic_shapes=({**sizes},))
    calls = [node for node in program.graph.nodes if "rnnfast.forward" in str(node.target)]
    assert len(calls) == 1  # a stack is one call
    for rows, steps in ((3, 4), (2, 5)):
        x = torch.randn(rows, steps, I, device=device)
        close(program.module()(x), theirs(x))
    with rnnfast.use_backend("torch"):
        plain = _exported(ours, x, strict=strict)
    assert "rnnfast" not in str(plain.graph) and "aten" in str(plain.graph)
    close(plain.module()(x), theirs(x))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # that quantizing this way is old
def test_quantize_dynamic():
    """Dynamic quantization asks for the exact class: restored, a model is quantized as torch.nn's; ours is left alone."""
    ours, theirs = models("LSTM", "cpu")
    quantize = torch.ao.quantization.quantize_dynamic
    assert type(quantize(ours, {nn.LSTM}).layer) is rnnfast.LSTM
    x, restored = torch.randn(T, B, I), rnnfast.restore(ours, every=True, report=None)
    found, expected = (quantize(model, {nn.LSTM, nn.Linear}) for model in (restored, theirs))
    assert type(found.layer) is torch.ao.nn.quantized.dynamic.LSTM
    assert equal(flat(found.layer(x)), flat(expected.layer(x)))


def test_names_in_messages(device):
    """str, a failing call inside a model and summary tools name the layer as torch.nn's."""
    ours, theirs = models("GRU", device)
    assert str(ours) == str(theirs)
    assert outcome(ours, torch.zeros(T, B, I + 1, device=device)) == outcome(theirs, torch.zeros(T, B, I + 1, device=device))
    assert [module._get_name() for module in ours.modules()] == [module._get_name() for module in theirs.modules()]


@pytest.mark.parametrize(
    "options, form, gives_way", [({}, "x, hx", False), ({"dtype": torch.float64}, "packed", True)], ids=str
)
def test_table(options, form, gives_way, device):
    """The table of options and call forms: an entry says its error and whether the kernels ran, or why not."""
    worst, reason, ran = drop_in.entry("GRU", options, form, device)
    assert worst <= 1 and ran is not gives_way and bool(reason) is gives_way
