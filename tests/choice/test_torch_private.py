"""The private names of PyTorch: that each still means, on the torch that is installed, what rnnfast takes it to mean."""

import os

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.utils import _per_sample_grad
from torch.nn.utils.rnn import pack_padded_sequence

from rnnfast import torch_private


def test_environment(monkeypatch):
    """The dict behind os.environ holds what is set, under encoded names, as it changes."""
    key = os.environ.encodekey("RNNFAST_TEST")
    assert key not in torch_private.environment
    monkeypatch.setenv("RNNFAST_TEST", "1")
    assert key in torch_private.environment
    monkeypatch.delenv("RNNFAST_TEST")
    assert key not in torch_private.environment


def test_tracing():
    """Dynamo's, AOTAutograd's and export's context is there while they trace, and not else."""
    found = []

    @torch_private.constant
    def ask():
        found.append((torch_private.tracing(), torch_private.thread.__dict__.get("tracing_context") is not None))
        return 0

    def program(x):
        return x + ask()

    assert not torch_private.tracing()
    torch.compile(program, backend="eager", fullgraph=True)(torch.ones(2))
    assert found == [(True, True)]  # once: the result is a constant of the graph
    assert not torch_private.tracing() and not torch_private.dynamo_refuses_layers()


def test_transforms():
    """torch.func's transforms and forward mode, the outermost first; the innermost one alone."""
    found = []

    def program(x):
        found.append((torch_private.inside(), torch_private.innermost_transform() is not None, torch_private.forward_level()))
        return x.sin().sum()

    x = torch.ones(2, 3)
    program(x)
    torch.func.vmap(torch.func.grad(program))(x)
    torch.func.jvp(program, (x,), (x,))
    torch.func.functionalize(program)(x)
    with forward_ad.dual_level():
        program(x)
    assert found == [
        ((), False, -1),
        (("vmap", "grad"), True, -1),
        (("forward", "jvp"), True, 0),
        (("functionalize",), True, -1),
        (("forward",), False, 0),
    ]


def test_wrapped_and_fake():
    x = torch.ones(2, 3)
    assert not torch_private.is_wrapped(x) and not torch_private.is_fake(x)
    torch.func.vmap(lambda row: torch.zeros(()) if torch_private.is_wrapped(row) else pytest.fail("is wrapped"))(x)
    assert torch_private.is_fake(x.to("meta"))
    with torch._subclasses.FakeTensorMode():
        assert torch_private.is_fake(torch.ones(2))


def test_expanded():
    found = []

    class Layer(torch.nn.Linear):
        def forward(self, x):
            found.append(torch_private.is_expanded(self))
            return super().forward(x)

    layer = Layer(3, 4)
    _per_sample_grad.call_for_per_sample_grads(layer, batch_size=2)(torch.ones(2, 3))
    layer(torch.ones(2, 3))
    assert found == [True, False]


def test_old_vmap():
    """What is mapped over by torch.autograd.grad(is_grads_batched=True) comes off, and on again."""
    found = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            found.append(torch_private.is_legacy_batched(grad))
            level = torch_private.batch_dim_level()
            whole = torch_private.remove_batch_dim(grad, level)
            found.append(tuple(whole.shape))
            return torch_private.add_batch_dim(2 * whole, level)

    x = torch.ones(3, requires_grad=True)
    upstream = torch.arange(6.0).view(2, 3)
    (grad,) = torch.autograd.grad(Twice.apply(x), x, upstream, is_grads_batched=True)
    assert torch.equal(grad, 2 * upstream) and found == [True, (2, 3)]
    assert not torch_private.is_legacy_batched(x)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_operators(name):
    """The operator behind each module gives what the module gives; there is none for another cell."""
    kind = name.split("_")[0].upper()
    layer = getattr(torch.nn, kind)(3, 4, **({"nonlinearity": name[4:]} if kind == "RNN" else {}))
    x, h = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    first = [h, h] if kind == "LSTM" else h
    y, *_ = torch_private.run_operator(name, x, first, layer._flat_weights, True, 1, 0.0, True, False, False)
    assert torch.equal(y, layer(x)[0]) and torch_private.has_operator(name)
    assert not torch_private.has_operator("mgu")


def test_packing():
    x = torch.randn(4, 3, 2)
    packed = pack_padded_sequence(x, [4, 2, 1])
    rows, lengths = torch_private.pad(packed.data, packed.batch_sizes, 4)
    assert lengths.tolist() == [4, 2, 1] and torch.equal(rows[:, 0], x[:, 0]) and not rows[2:, 1].any()
    assert torch.equal(torch_private.pack(rows, lengths), packed.data)


def test_weights():
    """The list that torch.nn's forward uses: by name where a weight was replaced, else as it stands."""
    layer = torch.nn.GRU(3, 4)
    assert all(a is b for a, b in zip(torch_private.current_weights(layer, False), layer.parameters(), strict=True))
    layer._flat_weights = [weight * 2 for weight in layer._flat_weights]
    assert torch_private.current_weights(layer, False) is layer._flat_weights
    layer._parameters["weight_hh_l0"] = torch.nn.Parameter(torch.zeros(12, 4))
    assert torch_private.current_weights(layer, False)[1] is layer.weight_hh_l0

    def inside(x):
        weights = torch_private.current_weights(layer, False)
        assert weights[1] is layer.weight_hh_l0
        return x.sum() + weights[1].sum()

    before = layer._flat_weights
    other = {"weight_hh_l0": torch.ones(12, 4)}
    call = lambda weights: torch.func.functional_call(Wrapped(layer, inside), weights, (torch.ones(2),))  # noqa: E731
    torch.func.grad(call)({f"layer.{name}": weight for name, weight in other.items()})
    assert layer._flat_weights is before  # left as it was inside a transform


class Wrapped(torch.nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(x)


def test_what_torch_nn_calls():
    """Each name is a method of the classes that have it, and RNNBase has no other that forward could call unnoticed."""
    named = set(torch_private.CALLED)
    for cls in (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN):
        calls = set(cls.forward.__code__.co_names) | set(cls.check_forward_args.__code__.co_names)
        methods = {name for name in calls if callable(getattr(torch.nn.RNNBase, name, None) or getattr(cls, name, None))}
        assert methods - {"size", "dim"} <= named, methods


def test_skipped_by_dynamo():
    """Code that Dynamo skips runs as it is when it is called by itself, and is inlined as a part of a trace."""
    seen = []

    def inner(x):
        seen.append(torch.compiler.is_compiling())
        return x + 1

    @torch_private.skipped_by_dynamo
    def outer(x):
        return inner(x)

    assert torch.equal(torch.compile(outer, backend="eager")(torch.zeros(1)), torch.ones(1)) and seen == [False]


@pytest.mark.parametrize("on", [True, False])
def test_cudnn_benchmark(on, monkeypatch, cudnn_benchmark):
    cudnn_benchmark(on)
    assert torch_private.cudnn_benchmark() is on is torch.backends.cudnn.benchmark


def test_in_backward():
    """Only while autograd runs backward in this thread."""
    found = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: found.append(torch_private.in_backward()))
    found.append(torch_private.in_backward())
    (x * 2).sum().backward()
    found.append(torch_private.in_backward())
    assert found == [False, True, False]


def test_uncompiled():
    """Compiled code runs as it was written, within the block alone."""
    torch._dynamo.reset()
    ran = []

    def backend(graph, inputs):
        return lambda *args: ran.append("compiled") or graph(*args)

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    x = torch.ones(2)
    compiled(x)
    with torch_private.uncompiled():
        compiled(x)
    compiled(x)
    assert ran == ["compiled"] * 2
    torch._dynamo.reset()
