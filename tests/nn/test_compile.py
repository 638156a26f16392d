"""torch.compile: after rnnfast.enable_compile() no graph break, the same results, and no recompile for T or B."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import rnnfast

I, H = 3, 4
SENTENCE = "to compile rnnfast layers, call rnnfast.enable_compile() once before"


@pytest.fixture(autouse=True)
def _fresh():
    """Each test starts without compiled code and leaves Dynamo's switch as it was."""
    before = torch._dynamo.config.allow_rnn
    torch._dynamo.reset()
    yield
    torch._dynamo.config.allow_rnn = before
    torch._dynamo.reset()


def model(name, device, **options):
    layer = getattr(rnnfast, name)(I, H, device=device, backend="triton", **options)
    return torch.nn.Sequential(torch.nn.Linear(I, I, device=device), layer)


def run(module, parameters, x, vary=False, **given):
    """Outputs and gradients of everything, with the same random numbers each time. `vary`: T and B are marked as dynamic."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    for tensor in (x, *given.values()) if vary else ():
        torch._dynamo.mark_dynamic(tensor, tuple(range(min(tensor.dim(), 2))))
    output, last = module(x, **given)
    outputs = (output, *last) if isinstance(last, tuple) else (output, last)
    loss = sum((out * torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)).sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *parameters])]


@pytest.mark.parametrize(
    "name, backend, options",
    [
        ("LSTM", "aot_eager", {"batch_first": True}),
        ("GRU", "eager", {"num_layers": 2}),
    ],
)
def test_one_graph(name, backend, options, device):
    """Compiled whole, the outputs and all gradients are bitwise the eager ones; a second T and B makes the graph dynamic,
    and no further T or B compiles anything."""
    rnnfast.enable_compile()
    counter, eager = CompileCounterWithBackend(backend), model(name, device, **options)
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for number, (T, B) in enumerate(((3, 2), (4, 3), (5, 4)), 1):
        x = torch.randn(B, T, I, device=device) if options.get("batch_first") else torch.randn(T, B, I, device=device)
        found, expected = (run(module, eager.parameters(), x) for module in (compiled, eager))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert counter.frame_count <= min(number, 2)
    graph = counter.graphs[0]
    calls = [node for node in graph.graph.nodes if "rnnfast.forward" in str(node.target)]
    assert len(calls) == 1, graph.graph  # a stack is one call
    with torch.no_grad(), rnnfast.use_backend("triton"):
        assert torch.equal(compiled(x)[0], eager(x)[0])


@pytest.mark.parametrize(
    "name, options, given",
    [
        ("GRU", {"num_layers": 2, "dropout": 0.5, "recompute": True}, ()),
        ("LSTM", {"recompute": True}, ("lengths", "resets")),
        ("LSTM", {}, ("lengths", "resets")),
    ],
    ids=str,
)
def test_one_compilation(name, options, given, device):
    """Three lengths and batches, marked as sizes that vary: compiled once, with eager's bits, dropout's masks among them."""
    rnnfast.enable_compile()
    counter, eager = CompileCounterWithBackend("aot_eager"), model(name, device, **options)[1]
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for T, B in ((3, 2), (5, 4), (4, 3)):
        whole = {"lengths": torch.randint(T + 1, (B,)), "resets": torch.rand(T, B) < 0.3}
        call = {key: value.to(device) for key, value in whole.items() if key in given}
        x = torch.randn(T, B, I, device=device)
        found, expected = (run(module, eager.parameters(), x, vary=True, **call) for module in (compiled, eager))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert counter.frame_count == 1


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_inductor(name, device):
    """The default compiler: no graph break, and results equal to eager's up to the order of additions."""
    rnnfast.enable_compile()
    eager = model(name, device, num_layers=2, bidirectional=True)
    compiled = torch.compile(eager, fullgraph=True)
    for T, B in ((3, 4), (4, 3)):
        x = torch.randn(T, B, I, device=device)
        for a, b in zip(*(run(module, eager.parameters(), x) for module in (compiled, eager)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2 if device == "cuda" else 1e-5, atol=1e-2 if device == "cuda" else 1e-5)


def test_weights_and_grad_mode(device):
    """Compiled code sees changed weights, and calls with and without gradients each get what they need."""
    rnnfast.enable_compile()
    eager, x = model("GRU", device), torch.randn(2, 3, I, device=device)
    compiled = torch.compile(eager, fullgraph=True, backend="eager")
    assert compiled(x)[0].requires_grad
    with torch.no_grad():
        before = compiled(x)[0]
        for weight in eager.parameters():
            weight.mul_(2)
        after = compiled(x)[0]
        assert not after.requires_grad and not torch.equal(before, after)
        assert torch.equal(after, eager(x)[0])
    assert torch.equal(compiled(x)[0], after) and compiled(x)[0].requires_grad


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_without_enable_compile(name, device):
    """Without the switch, which importing rnnfast leaves off, a whole graph is refused with the sentence that says what to
    call, and code in pieces runs, with eager's results."""
    assert not torch._dynamo.config.allow_rnn
    eager, x = model(name, device), torch.randn(2, 3, I, device=device)
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(eager, fullgraph=True, backend="eager")(x)
    assert f"{eager[1].extra_repr()}; {SENTENCE}" in str(caught.value)
    assert SENTENCE not in repr(eager)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(eager, backend="eager")(x)[0], eager(x)[0])


def test_enable_compile():
    """The switch is turned on for the process, and may be turned on twice."""
    torch._dynamo.config.allow_rnn = False
    rnnfast.enable_compile()
    rnnfast.enable_compile()
    assert torch._dynamo.config.allow_rnn


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends(backend, device):
    """A layer that runs elsewhere than on the kernels compiles whole too, to its eager results."""
    rnnfast.enable_compile()
    eager, x = rnnfast.GRU(I, H, device=device, backend=backend), torch.randn(2, 3, I, device=device)
    compiled = torch.compile(eager, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], eager(x)[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_training_on_torch(recompute, device):
    """An LSTM that the kernels do not run is trained in compiled code; of torch.nn.LSTM on a CPU AOTAutograd has no gradients.
    An export, which needs none, holds PyTorch's own operators all the same: see test_drop_in_tools.py."""
    rnnfast.enable_compile()
    eager, x = rnnfast.LSTM(I, H, device=device, backend="torch", recompute=recompute), torch.randn(2, 3, I, device=device)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(run(module, eager.parameters(), x) for module in (compiled, eager)), strict=True):
        torch.testing.assert_close(a, b)
    w_ih, w_hh = eager.weight_ih_l0, eager.weight_hh_l0
    function = lambda x: rnnfast.functional.lstm(x, None, w_ih, w_hh, backend="torch", recompute=recompute)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(run(each, [w_ih, w_hh], x) for each in (compiled, function)), strict=True):
        torch.testing.assert_close(a, b)


def test_fallback(device):
    """What the kernels do not take falls back in compiled code as it does outside: whole graph, warning and results."""
    rnnfast.enable_compile()
    eager = rnnfast.GRU(I, H, device=device, dtype=torch.float64, backend="triton")
    x = torch.randn(2, 3, I, device=device, dtype=torch.float64)
    with pytest.warns(rnnfast.FallbackWarning, match="the dtype is torch.float64"):
        found = torch.compile(eager, fullgraph=True, backend="eager")(x)[0]
    with rnnfast.use_backend("torch"):
        torch.testing.assert_close(found, eager(x)[0])
