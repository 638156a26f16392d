"""Groups as operators: PyTorch's checks, vmap, second derivatives, torch.func, compilers, FLOPs, edits in place."""

import pytest
import torch
from support.groups import Stack, running
from support.layers import close, equal
from support.loops import everything, second
from test_schema import everything as arguments
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
from rnnfast import numerics, ops, torch_private
from rnnfast.ops import operators

pytestmark = pytest.mark.numerical

T, B, I, H = 3, 2, 3, 4
KINDS = [("lstm", 3, 1), ("gru", 1, 2)]
kinds = pytest.mark.parametrize("cell, layers, directions", KINDS)


@pytest.fixture(autouse=True)
def chunks():
    """A pipeline of two steps a chunk: the last chunk is cut short."""
    with running(2):
        yield


def upstream_of(call, results):
    """The arguments of `rnnfast::backward` after a call of `rnnfast::forward`."""
    found = call._asdict() | results._asdict()
    found |= {"h": results.y} if call.w_up is None else {}
    found |= {"dy": torch.randn_like(results.y), "dh_n": torch.randn_like(results.h_n), "dc_n": None, "need_starts": True}
    found |= {} if call.recompute else dict.fromkeys(("x", "w_ih", "b_ih", "b_hh"))
    found["dcs"] = torch.randn_like(results.c) if results.c.numel() else None
    return operators.Backward(**{name: found[name] for name in operators.Backward._fields})


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.sweep)])
@kinds
def test_opcheck(cell, layers, directions, recompute, device):
    """Schema, autograd registration, fake kernels and AOT dispatch of both operators, with marks, states and dropout."""
    call = arguments(cell, layers, directions, device, recompute=recompute)
    training = call._replace(**{name: getattr(call, name).requires_grad_() for name in ("x", "w_ih", "w_hh", "b_hh")})
    torch.library.opcheck(ops.forward, tuple(training))
    with torch.no_grad():
        results = operators.Results(*ops.forward(*training))
        backward = upstream_of(training, results)
        detached = (value.detach() if isinstance(value, torch.Tensor) else value for value in backward)
        torch.library.opcheck(ops.backward, tuple(detached))


class Function:
    """A group as a function of its tensors, with dropout's masks fixed, and the same by the equations."""

    def __init__(self, stack, device):
        self.stack = stack
        self.tensors = {name: tensor.detach() for name, tensor in stack.tensors(device).items()}
        self.masks = stack.masks(self.tensors["x"])

    def kernels(self, tensors):
        return self.stack.on_kernels(tensors)

    def equations(self, tensors):
        return self.stack.by_equations(tensors, self.masks)

    def loss(self, tensors):
        return sum(out.square().sum() for out in self.kernels(tensors))

    def exact_loss(self, tensors):
        return sum(out.square().sum() for out in self.equations(tensors))


def function(cell, layers, directions, device, **options):
    return Function(Stack(cell, layers, directions, T, B, I, H, **options), device)


@pytest.mark.parametrize("recompute", [True, pytest.param(False, marks=pytest.mark.sweep)])
@kinds
def test_second_derivatives(cell, layers, directions, recompute, device):
    """By all tensors, with marks, within the contract. Outside of transforms, so that a stack keeps its dropout."""
    f = function(cell, layers, directions, device, marked=True, recompute=recompute, dropout=0.5 if layers > 1 else 0.0)
    found, theirs = (second(run, f.tensors, torch.float32) for run in (f.kernels, f.equations))
    exact = lambda: second(f.equations, f.tensors, torch.float64)  # noqa: E731
    assert not numerics.fault(found, theirs, exact, torch.float32)


@kinds
def test_batched_gradients(cell, layers, directions, device):
    """is_grads_batched=True, with and without create_graph: as one gradient after another."""
    f = function(cell, layers, directions, device, marked=True, dropout=0.5 if layers > 1 else 0.0)
    tensors = {name: tensor.requires_grad_() for name, tensor in f.tensors.items()}
    outputs, inputs = f.kernels(tensors), list(tensors.values())
    upstream = [torch.randn(3, *out.shape, device=device) for out in outputs]
    each = [torch.autograd.grad(outputs, inputs, [up[n] for up in upstream], retain_graph=True) for n in range(3)]
    for create in (False, True):
        found = torch.autograd.grad(outputs, inputs, upstream, is_grads_batched=True, create_graph=create, retain_graph=True)
        close([part.detach() for part in found], [torch.stack(grads) for grads in zip(*each, strict=True)])


@kinds
def test_func(cell, layers, directions, device):
    """grad, jacrev and jacrev of jacrev, with marks and the same masks of dropout."""
    f = function(cell, layers, directions, device, marked=True, dropout=0.5 if layers > 1 else 0.0)
    found = grad(f.loss)(f.tensors)
    exact = grad(f.exact_loss)({name: tensor.double() for name, tensor in f.tensors.items()})
    close([found[name].double() for name in exact], exact.values())
    bias = f.tensors["b_hh0"]

    def of_bias(run, dtype):
        return lambda bias: run({name: tensor.to(dtype) for name, tensor in f.tensors.items()} | {"b_hh0": bias})

    jacobian = jacrev(of_bias(lambda given: f.kernels(given)[0], torch.float32))(bias)
    exact = jacrev(of_bias(lambda given: f.equations(given)[0], torch.float64))(bias.double())
    close([jacobian.double()], [exact])
    found = jacrev(jacrev(of_bias(f.loss, torch.float32)))(bias)
    close([found.double()], [hessian(of_bias(f.exact_loss, torch.float64))(bias.double())])


@kinds
def test_vmap(cell, layers, directions, device, saved):
    """Over inputs, one run of the kernels for all; over weights, an ensemble, one for each; over gradients of either."""
    f = function(cell, layers, directions, device)
    xs = torch.stack([f.tensors["x"], -f.tensors["x"], 2 * f.tensors["x"]])
    one = lambda x: f.kernels(f.tensors | {"x": x})  # noqa: E731
    with torch.no_grad():
        expected = [one(x) for x in xs]
        saved.clear()
        close(vmap(one)(xs), [torch.stack(each) for each in zip(*expected, strict=True)])
    assert len(saved) == 1
    gradient = lambda x: grad(f.loss)(f.tensors | {"x": x})  # noqa: E731
    saved.clear()
    found = vmap(gradient)(xs)
    assert len(saved) == 1
    expected = [gradient(x) for x in xs]
    close(found.values(), [torch.stack([each[name] for each in expected]) for name in found])
    weights = {name: torch.stack([t, 2 * t]) for name, t in f.tensors.items() if name.startswith(("w", "b_"))}
    ensemble = lambda weights: f.kernels(f.tensors | weights)  # noqa: E731
    expected = [ensemble({name: t[n] for name, t in weights.items()}) for n in range(2)]
    saved.clear()
    close(vmap(ensemble)(weights), [torch.stack(each) for each in zip(*expected, strict=True)])
    assert len(saved) == 2


def test_per_sample_gradients_of_a_module(device, saved):
    """vmap of grad over a stack's module: one forward of the pipeline for all samples."""
    module = rnnfast.LSTM(I, H, 3, device=device, backend="triton")
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    rows = torch.randn(3, T, 1, I, device=device)
    gradient = grad(lambda weights, x: functional_call(module, weights, (x,))[0].square().sum())
    found = vmap(gradient, (None, 0))(weights, rows)
    assert len(saved) == 1
    each = [gradient(weights, row) for row in rows]
    close(found.values(), [torch.stack([grads[name] for grads in each]) for name in found])


def test_export(device):
    """A stack of three layers is one rnnfast::forward in the graph, and gives what it gives unexported."""
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # the default: export refuses any other
    module = rnnfast.GRU(I, H, 3, device=device, backend="triton").eval()
    x = torch.randn(T, B, I, device=device)
    program = torch.export.export(module, (x,))
    assert sum("rnnfast.forward" in str(node.target) for node in program.graph.nodes) == 1
    assert equal(program.module()(x), module(x))


def test_flops(device):
    """By hand, for a stack and for two directions: forward, and backward with the large products, also with `recompute`."""
    rows = 4 * H
    for layers, directions, states, recompute in ((3, 1, True, False), (3, 1, False, True), (1, 2, True, False)):
        stack = Stack("lstm", layers, directions, T, B, I, H, states=states, recompute=recompute)
        tensors, M = stack.tensors(device), layers * directions
        columns = directions * I + (M - directions) * H  # of all input weights together
        with FlopCounterMode(display=False, custom_mapping=ops.FLOP_FORMULAS) as counter:
            y, *_ = stack.on_kernels(tensors)
        assert counter.get_total_flops() == 2 * B * rows * (T * columns + M * (T - (not states)) * H)
        with FlopCounterMode(display=False, custom_mapping=ops.FLOP_FORMULAS) as counter:
            torch.autograd.grad(y.sum(), list(tensors.values()))
        steps = T - 1 + states  # those that a state entered
        recurrence = M * H * steps + (layers - 1) * H * T + recompute * T * (columns + M * H)
        outside = T * directions * I + T * columns + steps * M * H  # the gradients of x, of the input weights, of W_hh
        assert counter.get_total_flops() == 2 * B * rows * (recurrence + outside)


needs = pytest.mark.skipif(not torch_private.unpacks_one_by_one, reason="this PyTorch unpacks all saved tensors at once")


def edited(stack, wanted, name, device):
    """The gradients of `wanted` where the tensor `name`, or "y", is edited between forward and backward; None if PyTorch
    refuses."""
    torch.manual_seed(1)
    tensors = stack.tensors(device)
    for each, tensor in tensors.items():
        tensor.requires_grad_(each in wanted)
    y, *_ = stack.on_kernels(tensors)
    loss = (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum()
    if name is not None:
        with torch.no_grad():
            (tensors | {"y": y})[name].mul_(2).add_(1)
    try:
        return torch.autograd.grad(loss, [tensors[each] for each in wanted])
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return None


@needs
@pytest.mark.parametrize("cell", ["gru", pytest.param("rnn_tanh", marks=pytest.mark.sweep)])
def test_edits_of_a_stack(cell, device):
    """Refused is an edit of what backward reads: recurrent weights and, between the layers, input weights. Any other changes no
    bit. The output is a copy of what backward reads, so that it may be edited."""
    stack = Stack(cell, 2, T=T, B=1, I=I, H=2)
    names = ["x", "start0", "w_ih0", "w_hh0", "b_ih0", "b_hh0", "w_ih1", "w_hh1", "b_ih1", "b_hh1", "y"]
    read = {"w_hh0", "w_hh1", "w_ih1"} | ({"start0"} if cell == "gru" else set())
    for wanted, more in ((["x", "b_ih1"], {"w_ih0"}), (["w_ih0"], {"x"}), (["w_ih1"], set()), (["w_hh0"], {"start0"})):
        expected = edited(stack, wanted, None, device)
        for name in names:
            found = edited(stack, wanted, name, device)
            assert (found is None) == (name in read | more), (wanted, name)
            assert found is None or equal(found, expected), (wanted, name)


@needs
@pytest.mark.parametrize("cell", ["gru", pytest.param("rnn_tanh", marks=pytest.mark.sweep)])
def test_edits_of_directions(cell, device):
    """As of one direction: the output is what backward reads, and an edit of it has forward run again."""
    stack = Stack(cell, directions=2, T=T, B=1, I=I, H=2)
    for wanted, more in ((["x", "b_ih1"], {"w_ih0", "w_ih1"}), (["w_ih0"], {"x"}), (["w_hh0", "w_hh1"], {"start0"})):
        read = {"w_hh0", "w_hh1"} | ({"start0"} if cell == "gru" else set()) | more
        expected = edited(stack, wanted, None, device)
        for name in ("x", "start0", "w_ih0", "w_hh0", "b_ih0", "w_ih1", "w_hh1", "b_hh1"):
            found = edited(stack, wanted, name, device)
            assert (found is None) == (name in read), (wanted, name)
            assert found is None or equal(found, expected), (wanted, name)
        if read.isdisjoint({"x", "w_ih0"}) or wanted == ["x", "b_ih1"]:
            found = edited(stack, wanted, "y", device)
            assert found is None or equal(found, expected)


@pytest.mark.parametrize("frozen, stacks", [(0, [3]), (1, [1, 2]), (2, [2, 1]), (3, [3])])
def test_frozen_layers_below(frozen, stacks, device, monkeypatch):
    """Layers below the first that trains run apart, save nothing and have no backward; the gradients are those of a whole."""
    module = rnnfast.GRU(I, H, 3, device=device, backend="triton")
    x, calls = torch.randn(T, B, I, device=device), []
    whole = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    for name, weight in module.named_parameters():
        weight.requires_grad_(int(name[-1]) >= frozen)
    for name in ("forward", "backward"):
        inner = getattr(ops.recurrence, name)

        def counted(*args, inner=inner, name=name, **given):
            found = (operators.Forward if name == "forward" else operators.Backward)(*args, **given)
            calls.append((name, len(found.w_hh), getattr(found, "save", None)))
            return inner(*args, **given)

        monkeypatch.setattr(ops.recurrence, name, counted)
    loss = module(x)[0].square().sum()
    trains = [not frozen or (len(stacks) == 2 and n == 1) for n in range(len(stacks))]
    assert calls == [("forward", count, train) for count, train in zip(stacks, trains, strict=True)]
    if frozen < 3:
        calls.clear()
        grads = torch.autograd.grad(loss, [weight for weight in module.parameters() if weight.requires_grad])
        assert calls == [("backward", stacks[-1], None)]
        close(grads, whole[-len(grads) :])
    else:
        assert not loss.requires_grad


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_everything_with_only_some_outputs(dropout, device):
    """A loss of y alone, of h_n alone, of c_n alone: absent upstream gradients count as zero in a pipeline."""
    f = function("lstm", 3, 1, device, dropout=dropout)
    for n in range(3):
        found = everything(lambda tensors, n=n: f.kernels(tensors)[n : n + 1], f.tensors, torch.float32)
        exact = everything(lambda tensors, n=n: f.equations(tensors)[n : n + 1], f.tensors, torch.float64)
        close([found[name].double() for name in exact], exact.values())
