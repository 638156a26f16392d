"""What users reported of recurrent layers, kind by kind: default devices, fx, attributes of their own, weights from outside,
overridden methods, patched forwards, kinds of lengths, traces, exports. Side by side with torch.nn."""

import copy
import dataclasses
import functools
import types
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from support.layers import NAMES, B, H, I, T, close, equal, flat, pair
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import rnnfast
from rnnfast import functional

CELLS = [f"{name}Cell" for name in NAMES]
BACKENDS = rnnfast.BACKENDS


def layers(name, device, backend="triton", **options):
    """As `pair`, for cells too."""
    theirs, ours = (
        getattr(nn, name)(I, H, device=device, **options),
        getattr(rnnfast, name)(I, H, device=device, backend=backend),
    )
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def dynamo():
    """Dynamo, without compiled code before and after, and its switch left as it was."""
    import torch._dynamo

    before = torch._dynamo.config.allow_rnn
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.config.allow_rnn = before
    torch._dynamo.reset()


# Tensors made without a device


@pytest.mark.parametrize(("name", "lengths"), [("LSTM", [3, 1]), ("LSTM", [1, 3]), ("GRU", [2, 2])], ids=str)
def test_default_device(name, lengths, device):
    """Another default device changes nothing: packed rows, lengths of any kind, resets, all steps' states, torch.func."""
    ours, theirs = pair(name, device, num_layers=2, bidirectional=True)
    x, sizes = torch.randn(3, 2, I, device=device), torch.tensor(lengths)
    resets = torch.rand(3, 2, device=device) < 0.5
    calls = [
        lambda module: module(pack_padded_sequence(x, sizes, enforce_sorted=False))[0].data,
        lambda _: ours(x, lengths=lengths)[0],
        lambda _: ours(x, lengths=sizes, resets=resets, return_all_states=True, return_gates=True)[0],
    ]
    expected = [call(theirs) for call in calls[:1]] + [call(ours) for call in calls[1:]]
    with torch.device("meta"):
        found = [call(ours) for call in calls]
    close(found, expected)
    packed = pack_padded_sequence(x, sizes, enforce_sorted=False)
    with torch.device("meta"):
        grad = torch.func.grad(lambda data: ours(packed._replace(data=data))[0].data.sum())(packed.data)
    assert grad.device == x.device and grad.isfinite().all()


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("options", [{}, {"lengths": [1, 2, 0]}, {"resets": True}, {"return_all_states": True}], ids=str)
def test_meta(options, backend):
    """A layer on the meta device computes shapes, with options too, whatever backend is asked for."""
    layer = rnnfast.LSTM(I, H, 2, bidirectional=True, device="meta", backend=backend)
    options = {**options, "resets": torch.zeros(T, B, dtype=torch.bool, device="meta")} if "resets" in options else options
    output = layer(torch.empty(T, B, I, device="meta"), **options)[0]
    assert output.is_meta and output.shape == (T, B, 2 * H)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_fake_tensors(kind, backend):
    """FakeTensors have no numbers to pack by or to check."""
    with torch._subclasses.FakeTensorMode():
        layer, x = rnnfast.GRU(I, H, backend=backend), torch.randn(T, B, I)
        lengths = [1, 2, 0] if kind == "list" else torch.tensor([1, 2, 0])
        assert layer(x, lengths=lengths)[0].shape == (T, B, H)


# torch.fx


class Loop(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        h = None
        for t in range(2):
            h = self.cell(x[t], h)
        return h


@pytest.mark.parametrize("name", CELLS)
def test_fx_of_cells(name, device):
    """Cells stay whole, with None and with states that are themselves traced, as torch.nn's do."""
    found = []
    for cell in layers(name, device):
        model = Loop(cell)
        graph = torch.fx.symbolic_trace(model)
        x = torch.ones(2, B, I, device=device)
        found.append(([node.op for node in graph.graph.nodes], graph(x)))
        assert type(graph.cell) is type(cell)
    assert found[0][0] == found[1][0]
    states = [each if isinstance(each, tuple) else (each,) for _, each in found]
    close(*states)


class WithOptions(nn.Module):
    def __init__(self, layer, *names, more=()):
        super().__init__()
        self.layer, self.names, self.more = layer, names, dict.fromkeys(more, True)

    def forward(self, x, *given):
        return self.layer(x, **dict(zip(self.names, given, strict=True)), **self.more)[0]


@pytest.mark.parametrize("option", ["lengths", "resets"])
def test_fx_of_options(option, device):
    """A call with options is kept whole, with its keywords."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = rnnfast.GRU(I, H, device=device)

        def forward(self, x, given):
            return self.layer(x, **{option: given}, return_all_states=True)[2][0][0]

    model, x = Model(), torch.randn(T, B, I, device=device)
    given = torch.tensor([1, 2, 0]) if option == "lengths" else torch.rand(T, B, device=device) < 0.5
    graph = torch.fx.symbolic_trace(model)
    (node,) = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert set(node.kwargs) == {option, "return_all_states"}
    assert torch.equal(graph(x, given), model(x, given))


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_fx_of_a_subclass(name, device):
    """A subclass that changes the input is not traced to a graph that changes it twice: torch.fx refuses it, as torch.nn's."""
    for base in (getattr(nn, name), getattr(rnnfast, name)):

        class Mine(base):
            def forward(self, x, hx=None):
                return super().forward(2 * x, hx)

        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(nn.Sequential(Mine(I, H)))
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(base(I, H))


@pytest.mark.parametrize("name", CELLS)
def test_scripted_cells(name, device):
    """The way that the error of torch.jit.script names works for cells too, and accelerate's reports name them."""
    ours, _ = layers(name, device, backend=None)
    model, x, reports = nn.Sequential(ours), torch.randn(B, I, device=device), []
    expected = model(x)
    rnnfast.accelerate(model, report=reports.append)
    rnnfast.restore(model, report=reports.append)
    assert [left[0][1] for left in (report.left for report in reports)] == [
        f"it is rnnfast.nn.{name} already",
        f"it was built as rnnfast.nn.{name}: every=True takes it too",
    ]
    rnnfast.restore(model, every=True, report=reports.append)
    assert type(model[0]) is getattr(nn, name) and len(reports[-1].changed) == 1
    found = torch.jit.script(model)(x)
    close(found if isinstance(found, tuple) else (found,), expected if isinstance(expected, tuple) else (expected,))


# Attributes of the user's


VALUES = {
    "none": lambda: None,
    "text": lambda: "cuda-pool",
    "number": lambda: 3,
    "module": lambda: nn.Linear(2, 2),
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    "tensor": lambda: torch.ones(2),
}
ATTRIBUTES = (
    "backend",
    "recompute",
    "_states",
    "_weights",
    "_run",
    "_dispatch",
    "_obstacles",
    "_read",
    "_shape",
    "_accelerated",
)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("attribute", [*ATTRIBUTES, "cell", "options"])
def test_attributes(attribute, kind, device):
    """An attribute of a subclass or of an accelerated layer is the user's: it is kept, and changes nothing."""
    value = VALUES[kind]()
    for name in ("GRU", "GRUCell"):
        x = torch.randn(B, I, device=device) if name == "GRUCell" else torch.randn(1, B, I, device=device)

        class Mine(getattr(rnnfast, name)):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                setattr(self, attribute, None)
                setattr(self, attribute, value)

        plain = getattr(nn, name)(I, H, device=device)
        setattr(plain, attribute, value)
        expected = plain(x)[0]
        mine = Mine(I, H, device=device)
        mine.load_state_dict(plain.state_dict())
        for layer in (mine, *([rnnfast.accelerate(plain, report=None)] if name == "GRU" else [])):
            assert rnnfast.explain(layer, x).backend == "triton" and "backend" not in repr(layer).split("\n")[0]
            close([layer(x)[0]], [expected])
            assert getattr(layer, attribute) is value
            copied = copy.deepcopy(layer)
            assert type(getattr(copied, attribute)) is type(value)


@pytest.mark.parametrize("attribute", ["backend", "recompute"])
def test_registered_names(attribute, device):
    """The names of options can be registered as anything, a property, or be an attribute of the class."""
    one = torch.ones(1, device=device)
    for register in (
        lambda layer: layer.register_buffer(attribute, one),
        lambda layer: layer.register_parameter(attribute, nn.Parameter(one)),
        lambda layer: layer.add_module(attribute, nn.Linear(2, 2)),
    ):
        layer = rnnfast.GRU(I, H, device=device)
        register(layer)
        layer(torch.randn(T, B, I, device=device))
        assert getattr(layer, attribute) is not None and any(key.startswith(attribute) for key in layer.state_dict())
        with pytest.raises(KeyError, match="already exists"):
            layer.register_buffer("weight_hh_l0", one)

    class Mine(rnnfast.GRU):
        pass

    for value in ("mine", property(lambda self: "mine")):
        setattr(Mine, attribute, value)
        layer = Mine(I, H, device=device, backend="reference")
        assert getattr(layer, attribute) == "mine"
        assert rnnfast.explain(layer, torch.zeros(T, B, I, device=device)).backend == "reference"


def test_options_are_attributes(device):
    """They read back, are set at any time, deleted, pickled, and follow a layer that is exchanged; old pickles keep theirs."""
    layer = rnnfast.GRU(I, H, device=device)
    assert layer.backend is None and layer.recompute is False
    layer.backend, layer.recompute = "reference", True
    assert repr(layer) == f"GRU({I}, {H}, backend='reference', recompute=True)"
    assert copy.deepcopy(layer).backend == "reference" and copy.deepcopy(layer).recompute
    layer.backend = "cuda-pool"  # no backend of ours: the user's own
    assert layer.backend == "cuda-pool" and rnnfast.explain(layer, torch.zeros(T, B, I, device=device)).backend == "triton"
    del layer.backend
    assert layer.backend is None
    with pytest.raises(AttributeError):
        del layer.backend
    state = {key: value for key, value in layer.__getstate__().items() if not key.startswith("_rnnfast")}
    old = object.__new__(rnnfast.GRU)
    old.__setstate__(state | {"backend": "torch", "recompute": True})
    assert old.backend == "torch" and old.recompute and "backend='torch', recompute=True" in repr(old)


def test_mode_is_the_users(device):
    """A subclass may have a ``mode`` of its own, which torch.nn.LSTM never reads."""
    ours, theirs = pair("LSTM", device)
    cell, cells = layers("GRUCell", device)
    for module in (ours, theirs, cell, cells):
        module.mode = "train"
    x = torch.randn(T, B, I, device=device)
    close(flat(ours(x)), flat(theirs(x)))
    close([cell(x[0])], [cells(x[0])])


# Weights from outside


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_flat_weights(name, backend, device):
    """Weights that another network put into ``_flat_weights`` run and get gradients, all of them or one."""
    found = []
    for layer in pair(name, device, backend, num_layers=2, bidirectional=True):
        scale, x = torch.tensor(2.0, requires_grad=True, device=device), torch.ones(T, B, I, device=device)
        kept = layer._flat_weights
        layer._flat_weights = [weight * scale for weight in kept]
        outputs = flat(layer(x))
        found.append([*outputs, *torch.autograd.grad(outputs[0].sum(), scale)])
        layer._flat_weights = kept
        layer._flat_weights[1] = torch.zeros_like(kept[1])
        found[-1] += flat(layer(x))
        layer._parameters["weight_hh_l0"] = nn.Parameter(layer.weight_hh_l0.detach() * 2)
        found[-1] += flat(layer(x))
        assert layer._flat_weights[1] is layer.weight_hh_l0
        layer._flat_weights = [weight * scale for weight in layer._flat_weights]
        found[-1] += flat(layer(x))
        layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 2)
        found[-1] += flat(layer(x))
    close(*found)


# What torch.nn's forward calls


HELPERS = {
    "check_forward_args": lambda self, *args: torch.zeros(()),
    "check_input": lambda self, *args: None,
    "check_hidden_size": lambda self, *args: None,
    "permute_hidden": lambda self, hx, order: tuple(2 * h for h in hx) if isinstance(hx, tuple) else 2 * hx,
    "get_expected_hidden_size": lambda self, input, sizes: (1, B, H),
}


@pytest.mark.parametrize("where", ["subclass", "instance", "torch.nn"])
@pytest.mark.parametrize("helper", HELPERS)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_overridden_helpers(name, helper, where, device, monkeypatch):
    """A method that torch.nn's forward calls is called, wherever it was overridden, and explain says so."""
    ours, theirs = pair(name, device, backend=None)
    calls, x = [], torch.randn(T, B, I, device=device)
    hx = tuple(torch.ones(1, B, H, device=device) for _ in range(2 if name == "LSTM" else 1))

    def method(self, *args):
        calls.append(helper)
        return HELPERS[helper](self, *args)

    if where == "torch.nn":
        monkeypatch.setattr(getattr(nn, name), helper, method)
    for layer in (ours, theirs):
        if where == "subclass":
            layer.__class__ = type("Mine", (type(layer),), {helper: method})
        elif where == "instance":
            setattr(layer, helper, types.MethodType(method, layer))
    found, expected = (flat(layer(x, hx if name == "LSTM" else hx[0])) for layer in (ours, theirs))
    assert equal(found, expected) and len(calls) % 2 == 0 and calls
    explained = rnnfast.explain(ours, x)
    assert explained.backend == "torch" and any(helper in obstacle for obstacle in explained.obstacles)
    with pytest.raises(RuntimeError, match="has no return_gates"):
        ours(x, return_gates=True)
    ours.backend = "triton"
    with pytest.warns(rnnfast.FallbackWarning, match=helper):
        ours(x)


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_patched_forward(name, device, monkeypatch):
    """A forward that was put in the place of torch.nn's runs: patched on torch.nn's class, or of a class between."""
    base = getattr(nn, name)
    x = torch.randn(B, I, device=device) if name == "GRUCell" else torch.randn(T, B, I, device=device)

    class Between(base):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    class Mine(getattr(rnnfast, name), Between):
        pass

    mine, plain = Mine(I, H, device=device), Between(I, H, device=device)
    mine.load_state_dict(plain.state_dict())
    assert torch.equal(mine(x)[0], plain(x)[0])
    assert any("Between.forward was replaced" in obstacle for obstacle in rnnfast.explain(mine, x).obstacles)
    ours = getattr(rnnfast, name)(I, H, device=device)
    monkeypatch.setattr(base, "forward", lambda self, input, hx=None: "patched")
    assert ours(x) == "patched"


# Lengths


KINDS = {
    "tuple": tuple,
    "array": np.array,
    "int16 array": lambda lengths: np.array(lengths, dtype=np.int16),
    "NumPy's integers": lambda lengths: list(np.array(lengths)),
    "tensors": lambda lengths: [torch.tensor(length) for length in lengths],
    "int32 tensors": lambda lengths: [torch.tensor(length, dtype=torch.int32) for length in lengths],
    "mixed": lambda lengths: [torch.tensor(lengths[0]), np.int64(lengths[1]), *lengths[2:]],
    "Size": torch.Size,
    "iterator": lambda lengths: map(int, lengths),
    "uint16": lambda lengths: torch.tensor(lengths, dtype=torch.uint16),
    "uint64": lambda lengths: torch.tensor(lengths, dtype=torch.uint64),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_lengths(kind, backend, device):
    """lengths= takes what packing takes, and more, by module and function."""
    ours, _ = pair("GRU", device, backend)
    x, lengths = torch.randn(3, 2, I, device=device), [3, 1]
    expected = ours(x, lengths=lengths)[0]
    assert torch.equal(ours(x, lengths=KINDS[kind](lengths))[0], expected)
    y, _ = functional.gru(x, None, *ours.parameters(), lengths=KINDS[kind](lengths), backend=backend)
    close([y], [expected])


BAD = {
    "floats": [1.0, 2.0],
    "array of floats": np.array([1.0, 2.0]),
    "bools": [True, False],
    "bool tensors": [torch.tensor(True), torch.tensor(False)],
    "nested": [[1], [2]],
    "rows": np.array([[1, 2]]),
    "text": ["1", "2"],
    "None": [1, None],
    "dictionary": {"a": 1, "b": 2},
}


@pytest.mark.parametrize("kind", BAD)
def test_wrong_kinds_of_lengths(kind, device, no_launch):
    with pytest.raises(TypeError, match="lengths must be a tensor or a list of integers"):
        rnnfast.GRU(I, H, device=device)(torch.randn(3, 2, I, device=device), lengths=BAD[kind])


# Copies, and no trace


Point = namedtuple("Point", "h c")


@dataclasses.dataclass
class State:
    h: torch.Tensor
    more: dict


class Slots:
    __slots__ = ("h",)

    def __init__(self, h):
        self.h = h


KEEPS = {
    "tuple": lambda h: (h, h),
    "list": lambda h: [[h]],
    "dict": lambda h: {"h": {"deep": (h,)}},
    "ordered": lambda h: OrderedDict(h=h),
    "named tuple": lambda h: Point(h, 1),
    "dataclass": lambda h: State(h, {"c": [h]}),
    "slots": Slots,
    "namespace": lambda h: types.SimpleNamespace(h=h),
    "partial": lambda h: functools.partial(print, h),
    "key": lambda h: {h: 1},
}


def kept(value, found):
    """All tensors in what KEEPS makes."""
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, dict):
        [kept(part, found) for pair in value.items() for part in pair]
    elif isinstance(value, (tuple, list)):
        [kept(part, found) for part in value]
    elif isinstance(value, functools.partial):
        kept(value.args, found)
    elif isinstance(value, Slots):
        kept(value.h, found)
    elif hasattr(value, "__dict__"):
        kept(vars(value), found)
    return found


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("form", KEEPS)
def test_copy_keeps_tensors(form, detached, device):
    """accelerate(inplace=False) shares every tensor with the model, in whatever it is kept, with its graph or without."""
    model = nn.Sequential(nn.GRU(I, H, device=device), nn.Linear(H, 1, device=device))
    h = model[0](torch.randn(1, B, I, device=device))[1]
    model.state = KEEPS[form](h.detach() if detached else h)
    copied = rnnfast.accelerate(model, inplace=False, report=None)
    ours, theirs = kept(copied.state, []), kept(model.state, [])
    assert ours and all(a is b for a, b in zip(ours, theirs, strict=True))
    assert [*map(id, copied.parameters())] == [*map(id, model.parameters())]
    assert type(copied[0]) is rnnfast.GRU and type(model[0]) is nn.GRU


def test_as_default_leaves_no_trace():
    """torch.nn's classes are as they were, during a block for a class with a __new__ of its own too, after an error, and after
    the last of blocks that overlap."""
    made = []

    class Registered:
        def __new__(cls, *args, **kwargs):
            made.append(cls.__name__)
            return super().__new__(cls)

    class Tagger(nn.LSTM, Registered):
        pass

    before = [dict(vars(cls)) for cls in (nn.LSTM, nn.GRU, nn.RNN)]
    outer, inner = rnnfast.as_default(), rnnfast.as_default()
    outer.__enter__()
    inner.__enter__()
    assert type(Tagger(I, H)) is Tagger and made == ["Tagger"]
    assert type(nn.LSTM(I, H, backend="torch")) is rnnfast.LSTM
    inner.__exit__(None, None, None)
    assert type(nn.GRU(I, H)) is rnnfast.GRU
    outer.__exit__(None, None, None)
    assert [dict(vars(cls)) for cls in (nn.LSTM, nn.GRU, nn.RNN)] == before
    Tagger(I, H)
    assert made == ["Tagger"] * 2 and type(nn.LSTM(I, H)) is nn.LSTM


# Traces, exports, compilers


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("options", [("lengths",), ("resets",), ("lengths", "resets")], ids=str)
def test_export_of_options(options, backend, device):
    """torch.export of a call with options holds on every backend, for other lengths and resets."""
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # the default: export refuses any other
    model = WithOptions(rnnfast.GRU(I, H, device=device), *options)
    given = lambda lengths: [  # noqa: E731
        torch.tensor(lengths, device=device) if option == "lengths" else torch.rand(3, 2, device=device) < 0.5
        for option in options
    ]
    x = torch.randn(3, 2, I, device=device)
    with rnnfast.use_backend(backend):
        program = torch.export.export(model, (x, *given([3, 1])))
    again = given([0, 2])
    close([program.module()(x, *again)], [model(x, *again)])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("options", [("resets",), ("states",), ("lengths", "resets")], ids=str)
def test_trace_of_options(options, backend, name, device):
    """A trace of the equations holds the steps it saw. On as many it is right; on another number it raises."""
    names = [option for option in options if option != "states"]
    layer = getattr(rnnfast, name)(I, H, device=device, backend=backend)
    model = WithOptions(layer, *names, more=["return_all_states"] if "states" in options else [])

    def given(steps):
        made = {"lengths": torch.tensor([1, steps], device=device), "resets": torch.rand(steps, 2, device=device) < 0.5}
        return torch.randn(steps, 2, I, device=device), *(made[each] for each in names)

    traced = torch.jit.trace(model, given(3), check_trace=False)
    again = given(3)
    close([traced(*again)], [model(*again)])
    for steps in (1, 2, 5):
        with pytest.raises(RuntimeError):
            traced(*given(steps))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_of_the_reference(device):
    """Asked for by name, the equations give way in a trace, whose steps they would fix."""
    layer = rnnfast.GRU(I, H, device=device, backend="reference")
    with pytest.warns(rnnfast.FallbackWarning, match="keep the number of steps"):
        traced = torch.jit.trace(layer, (torch.randn(3, 2, I, device=device),), check_trace=False)
    x = torch.randn(5, 2, I, device=device)
    close(flat(traced(x)), flat(layer(x)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_of_lengths(device):
    """A trace of lengths alone packs the rows: right for any number of steps."""
    model = WithOptions(rnnfast.GRU(I, H, device=device), "lengths")
    traced = torch.jit.trace(model, (torch.randn(3, 2, I, device=device), torch.tensor([3, 1])), check_trace=False)
    x = torch.randn(5, 2, I, device=device)
    close([traced(x, torch.tensor([2, 5]))], [model(x, lengths) for lengths in [torch.tensor([2, 5])]])


@pytest.mark.parametrize("lengths", [[3, 1], [1, 3]], ids=str)
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_compiled_around_packed(name, enabled, lengths, device, dynamo):
    """A compiled function around packed input breaks its graph there, with the switch and without, as around torch.nn's."""
    dynamo.config.allow_rnn = enabled
    ours, theirs = pair(name, device)
    x = torch.randn(3, 2, I, device=device)

    def program(x):
        packed = pack_padded_sequence(x + 1, lengths, enforce_sorted=False)
        output = ours(packed)[0].data * 2
        return output if enabled else pad_packed_sequence(packed._replace(data=output))[0]  # torch 2.11 cannot, with the switch

    found = torch.compile(program, backend="aot_eager")(x)
    output = theirs(pack_padded_sequence(x + 1, lengths, enforce_sorted=False))[0]
    expected = (output.data if enabled else pad_packed_sequence(output)[0]) * 2
    close([found], [expected])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, device, no_launch):
    """No row: what torch.nn gives, and with options an error that says so, on every backend."""
    ours, theirs = pair("GRU", device, backend)
    x = torch.randn(T, 0, I, device=device)
    assert equal(flat(ours(x)), flat(theirs(x)))
    for options in ({"lengths": []}, {"resets": torch.zeros(T, 0, dtype=torch.bool)}, {"return_all_states": True}):
        with pytest.raises(RuntimeError, match="need an input that is not empty"):
            ours(x, **options)


def test_packed_of_lists(device):
    """pack_sequence of rows in any order, under a default device."""
    ours, theirs = pair("GRU", device)
    rows = [torch.randn(length, I, device=device) for length in (1, 3, 2)]
    packed = pack_sequence(rows, enforce_sorted=False)
    with torch.device("meta"):
        found = ours(packed)
    close([found[0].data, found[1]], [theirs(packed)[0].data, theirs(packed)[1]])
