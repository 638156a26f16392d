"""Which calls `torch.backends.cudnn.benchmark = True` has measured, and which it has not."""

import os
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rnnfast
from rnnfast import functional
from rnnfast.choice import calls, kernel_plan, tuned
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.kernels.persistent.plan import GPUS

pytestmark = [
    pytest.mark.same_everywhere,
    pytest.mark.skipif(torch.cuda.is_available(), reason="takes CPU tensors, in the interpreter"),
]

H100 = GPUS["H100"]
SHAPE = Shape("gru", "float32", "ieee", 3, 2, 4, 8, 1, 1, training=False)


@pytest.fixture
def measured(monkeypatch, cudnn_benchmark):
    """CPU tensors pass for an H100's, and the switch is on: the shapes that were to be measured. PyTorch's own layer wins."""
    found = []

    def measure(shape, device):
        assert device == torch.device("cpu")
        found.append(shape)
        return Entry(shape, "torch")

    monkeypatch.setattr(calls, "measure", measure)
    cudnn_benchmark(True)
    with kernel_plan.pretend_gpu(H100):
        yield found


def layer_and_input(**options):
    return rnnfast.GRU(4, 8, **options), torch.randn(3, 2, 4)


def test_once_a_shape(measured):
    """In inference and in training, for each batch size; lengths count by powers of two."""
    layer, x = layer_and_input()
    with torch.no_grad():
        for _ in range(2):
            layer(x)
            layer(x[:2])
            layer(x[:, :1])
            layer(torch.randn(8, 2, 4))
    layer(x)
    expected = [SHAPE, replace(SHAPE, B=1), replace(SHAPE, T=8), replace(SHAPE, training=True)]
    assert measured == expected
    assert tuned.table(H100).own == set(expected)


def test_functions(measured):
    x, weights = torch.randn(3, 2, 4), (torch.randn(24, 4), torch.randn(24, 8))
    for _ in range(2):
        functional.gru(x, None, *weights)
    assert measured == [SHAPE]


def test_what_gave_nothing_is_not_tried_again(measured, monkeypatch):
    monkeypatch.setattr(calls, "measure", lambda shape, device: measured.append(shape))
    layer, x = layer_and_input()
    with torch.no_grad():
        layer(x)
        layer(x)
    assert measured == [SHAPE] and not tuned.table(H100).entries


def test_off(measured, monkeypatch, cudnn_benchmark):
    """The default of PyTorch."""
    cudnn_benchmark(False)
    layer, x = layer_and_input()
    layer(x)
    assert not measured


def test_explain_measures_nothing(measured):
    rnnfast.explain(*layer_and_input())
    assert not measured


@pytest.mark.parametrize(
    "name, value",
    [
        ("RNNFAST_KERNELS", "step"),
        ("RNNFAST_BACKEND", "triton"),
        ("RNNFAST_BACKEND", "torch"),
        ("backend=", "triton"),
        ("backend=", "reference"),
        ("use_backend", "triton"),
    ],
)
def test_not_when_something_is_asked_for(name, value, measured, monkeypatch):
    layer, x = layer_and_input()
    weights = torch.randn(24, 4), torch.randn(24, 8)
    if name == "backend=":
        layer.backend = value
        functional.gru(x, None, *weights, backend=value)
        layer(x)
    elif name == "use_backend":
        with rnnfast.use_backend(value):
            layer(x)
            functional.gru(x, None, *weights)
    else:
        monkeypatch.setenv(name, value)
        layer(x)
        functional.gru(x, None, *weights)
    assert not measured


@pytest.mark.parametrize("kind", ["lengths", "packed", "projection", "float64"])
def test_not_for_calls_of_another_kind(kind, measured):
    """As `Shape` does not describe them."""
    layer, x = layer_and_input()
    if kind == "lengths":
        layer(x, lengths=[3, 2])
    elif kind == "packed":
        layer(torch.nn.utils.rnn.pack_padded_sequence(x, [3, 2]))
    elif kind == "projection":
        rnnfast.LSTM(4, 8, proj_size=4)(x)
    else:
        layer.double()(x.double())
    assert not measured


def test_not_for_wrong_calls(measured):
    """torch.nn's error comes first."""
    layer, x = layer_and_input()
    with pytest.raises(RuntimeError, match="input_size"):
        layer(x[..., :3])
    assert not measured


def test_not_while_compiling(measured):
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # the default: export refuses any other
    before = torch._dynamo.config.allow_rnn
    rnnfast.enable_compile()
    torch._dynamo.reset()
    try:
        layer, x = layer_and_input()
        weights = torch.randn(24, 4), torch.randn(24, 8)
        torch.compile(layer, fullgraph=True, backend="eager")(x)
        torch.compile(lambda x: functional.gru(x, None, *weights)[0], fullgraph=True, backend="aot_eager")(x)
        torch.export.export(torch.nn.Sequential(layer), (x,))
    finally:
        torch._dynamo.config.allow_rnn = before
        torch._dynamo.reset()
    assert not measured


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # PyTorch's own, of jvp
def test_not_inside_transforms(measured):
    layer, x = layer_and_input()
    torch.func.vmap(lambda x: layer(x)[0], randomness="different")(x[None])
    torch.func.grad(lambda x: layer(x)[0].sum())(x)
    torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))
    assert not measured


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_not_while_tracing(measured):
    layer, x = layer_and_input()
    with torch.no_grad():
        torch.jit.trace(layer, (x,), check_trace=False)
    with FakeTensorMode():
        fake, x = layer_and_input()
        fake(x)
    assert not measured


def test_not_in_backward(measured):
    """A checkpoint that runs the layer again: the thread of autograd must not wait for a backward of another thread."""
    layer, x = layer_and_input()
    x.requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], x, use_reentrant=True).sum().backward()
    assert measured == [SHAPE]  # the forward, without gradients; not the one with, in backward


def test_not_while_a_graph_is_captured(measured, monkeypatch):
    """Nor is PyTorch asked whether one is, of CPU tensors."""
    _, x = layer_and_input()
    chosen = rnnfast.choice.decide.decide(None, "cpu", None, torch.float32)
    assert calls._may_measure(chosen, x)

    class OnGpu:
        is_cuda, is_meta = True, False

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert calls._may_measure(chosen, OnGpu())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not calls._may_measure(chosen, OnGpu())


def test_a_process_without_a_gpu_asks_nothing(monkeypatch, cudnn_benchmark):
    """The switch is on in many programs that also run on CPUs."""
    monkeypatch.setattr(calls, "measure", None)
    cudnn_benchmark(True)
    layer, x = layer_and_input()
    layer(x)
    assert os.environ["TRITON_INTERPRET"] == "1"  # where these calls are looked at as a whole
