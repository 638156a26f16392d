"""Derivatives of derivatives through the kernels, and of the equations that stand in: values, and what stays on the kernels."""

import gc
import weakref

import pytest
import torch
from support import loops
from support.layers import CELLS, NAMES, H, I, close, equal, flat, pair, states
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import numerics, ops, reference

pytestmark = pytest.mark.numerical

T, B = 2, 3
STACKED = {"num_layers": 2, "bidirectional": True}


def by_packed(layer, lengths):
    """A call for `loops.everything`, on packed rows."""

    def call(tensors):
        x, hx, _, weights = loops._arguments(layer, tensors)
        output, last = torch.func.functional_call(layer, weights, (pack_padded_sequence(x, lengths, enforce_sorted=False), hx))
        return [pad_packed_sequence(output, total_length=T)[0], *(last if layer.mode == "LSTM" else [last])]

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, nonlinearity", CELLS)
def test_equals_torch_nn(name, nonlinearity, dtype, device):
    """First and second derivatives with respect to everything, within the contract of torch.nn's; of an LSTM packed."""
    options = {"nonlinearity": nonlinearity} if name == "RNN" else {}
    stacked = {"LSTM": {"num_layers": 2}, "GRU": {"bidirectional": True}}
    options |= stacked.get(name, {}) if dtype == torch.float32 else {}
    ours, theirs = pair(name, device, **options, dtype=dtype)
    tensors, call = loops.arguments(ours, T, B), by_packed if name == "LSTM" else lambda layer, _: loops.by_module(layer, {})
    found, common = (loops.second(call(layer, [1, 2, 1]), tensors, dtype) for layer in (ours, theirs))
    exact = call(theirs.double(), [1, 2, 1])
    assert not numerics.fault(found, common, lambda: loops.second(exact, tensors, torch.float64), dtype)


OPTIONS = [
    ("LSTM", {}),
    ("LSTM", {"proj_size": 2, "recompute": True}),
    ("GRU", {}),
    ("GRU", {"recompute": True}),
    ("RNN", {"bias": False}),
]


@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_marks_and_states(name, options, device):
    """With lengths, an empty row among them, resets, given states for both, and every c_t in the loss: as row after row."""
    ours = getattr(rnnfast, name)(I, H, bidirectional=name != "LSTM", **options, device=device, backend="triton")
    given = {"lengths": [2, 0, 1], "resets": torch.tensor([[0, 0, 1], [1, 0, 0]], device=device).bool()}
    given["return_all_states"] = True
    tensors = loops.arguments(ours, T, B, reset_to=True)
    found = loops.second(loops.by_module(ours, given), tensors, torch.float32)
    exact = loops.second(loops.by_loop(ours, given), tensors, torch.float64)
    close(found.values(), [tensor.float() for tensor in exact.values()])


@pytest.mark.parametrize("name", NAMES)
def test_first_order_is_the_kernels(name, device, saved):
    """create_graph=True changes no bit of the first derivatives, and runs no forward again; of a GRU with ``recompute``."""
    ours, _ = pair(name, device)
    ours.recompute = name == "GRU"
    x, hx = torch.randn(T, B, I, device=device, requires_grad=True), states(name, 1, B, H, device=device, requires_grad=True)
    inputs, outputs = [x, *(hx if name == "LSTM" else (hx,)), *ours.parameters()], flat(ours(x, hx))
    upstream = [torch.randn_like(out, requires_grad=True) for out in outputs]
    plain, differentiable = (
        torch.autograd.grad(outputs, inputs, upstream, retain_graph=True, create_graph=create) for create in (False, True)
    )
    assert equal(plain, differentiable) and len(saved) == 1
    assert not any(grad.requires_grad for grad in plain) and all(grad.requires_grad for grad in differentiable)
    found = torch.autograd.grad(sum(grad.sum() for grad in differentiable), [*inputs, *upstream])
    assert all(grad.any() for grad in found)


def test_third_order(device):
    """A second derivative with a graph of its own has derivatives too."""
    found = []
    for module in pair("GRU", device):
        torch.manual_seed(1)
        x = torch.randn(T, B, I, device=device, requires_grad=True)
        value = module(x)[0].square().sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.square().sum()
        found.append(torch.autograd.grad(value, [x, *module.parameters()][:4]))
    close(*found)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradient_penalty_with_dropout(bidirectional, device):
    """As people write it, with dropout between the layers: the mask of the first derivative is that of the second."""
    ours, _ = pair("LSTM", device, num_layers=2, dropout=0.5, batch_first=True, bidirectional=bidirectional)
    x, D = torch.randn(B, T, I, device=device), 1 + bidirectional

    def penalty(run, x, weights):
        x = x.requires_grad_()
        scores = run(x).sum((1, 2))
        (grad,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)
        loss = scores.mean() + 10 * (grad.flatten(1).norm(dim=1) - 1).square().mean()
        return torch.autograd.grad(loss, [x, *weights])

    torch.manual_seed(1)
    found = penalty(lambda x: ours(x)[0], x.clone(), ours.parameters())
    torch.manual_seed(1)
    mask = ops.dropout.dropout(torch.ones(T, B, D * H, device=device), 0.5).double().transpose(0, 1)
    options = {"batch_first": True, "bidirectional": bidirectional, "backend": "reference", "device": device}
    parts = [rnnfast.LSTM(size, H, **options, dtype=torch.float64) for size in (I, D * H)]
    values = [weight.detach().double() for weight in ours.parameters()]
    weights = [weight for part in parts for weight in part.parameters()]
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
    exact = penalty(lambda x: parts[1](parts[0](x)[0] * mask)[0], x.double(), weights)
    close([tensor.double() for tensor in found], exact)


def test_only_some_weights(device):
    """A second derivative where only some tensors require gradients, and one tensor stands in two places."""
    found = []
    for module in pair("LSTM", device):
        module.requires_grad_(False)
        weight = module.weight_hh_l0.requires_grad_()
        state = torch.linspace(-1, 1, B * H, device=device).view(1, B, H).requires_grad_()
        output = module(torch.ones(T, B, I, device=device), (state, state))[0]
        grads = torch.autograd.grad(output.square().sum(), [state, weight], create_graph=True)
        found.append([*grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), [state, weight])])
    close(*found)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_recompute_elsewhere(backend, device):
    """recompute=True on the other backends, by PyTorch's checkpoint, has second derivatives; inside torch.func all is kept."""
    x, found = torch.randn(T, B, I, device=device, dtype=torch.float64, requires_grad=True), []
    module = rnnfast.GRU(I, H, backend=backend, device=device, dtype=torch.float64)
    for recompute in (False, True):
        module.recompute = recompute
        loss = lambda x: module(x)[0].square().sum()  # noqa: E731
        (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
        found.append(
            [*torch.autograd.grad(grad.square().sum(), [x, *module.parameters()][:3]), torch.func.grad(loss)(x.detach())]
        )
    close(*found)


def test_under_autocast(device):
    """Derivatives taken inside autocast are those taken outside: the equations run in float32 either way."""
    low = torch.bfloat16
    tensors = [torch.randn(*shape, device=device, dtype=low) for shape in ((T, B, I), (3 * H, I), (3 * H, H))]
    found = []
    for autocast in (False, True):
        x, w_ih, w_hh = (tensor.clone().requires_grad_() for tensor in tensors)
        y = ops.layer("gru", x, None, w_ih, w_hh)[0]
        with torch.autocast(device, dtype=low, enabled=autocast):
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
            found.append(torch.autograd.grad(grad, w_hh, torch.ones_like(grad)))
    assert equal(*found)


def test_the_operator_of_backward(device):
    """rnnfast::backward, called by itself, has no derivative and says so."""
    y = torch.randn(T, B, H, device=device)
    upstream, w_hh = torch.ones_like(y, requires_grad=True), torch.randn(1, H, H, device=device)
    arguments = ("rnn_tanh", upstream, None, None, y, y.new_empty(0), y.new_empty(0), None, None, w_hh, None, 0, False)
    with pytest.raises(RuntimeError, match="has no derivative of its own"):
        ops.backward(*arguments)[0].sum().backward()


@pytest.mark.parametrize("cell", list(reference.GATES))
def test_equations(cell):
    """gradcheck and gradgradcheck of the equations in float64: reverse, forward, forward over reverse, and batched."""
    rows, resets = reference.GATES[cell] * H, torch.tensor([[0, 0, 1], [1, 0, 0]]).bool()
    count = 2 if cell == "lstm" else 1
    shapes = ((T, B, I), (rows, I), (rows, H), (rows,), (rows,), *[(B, H)] * 2 * count)
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(x, *rest):
        weights, given = rest[:4], rest[4:]
        y, last = reference.layer(
            cell, x, given[:count], *weights, lengths=torch.tensor([2, 0, 1]), resets=resets, reset_to=given[count:]
        )
        return y, *last

    batched = cell == "gru"
    modes = {"check_batched_grad": batched, "check_batched_forward_grad": batched}
    assert gradcheck(run, tensors, fast_mode=True, check_forward_ad=True, **modes)
    assert gradgradcheck(run, tensors, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=batched)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LSTM", STACKED),
        *((name, options) for name in NAMES for options in ({}, {"batch_first": True})),
        *(pytest.param(name, STACKED, marks=pytest.mark.sweep) for name in NAMES if name != "LSTM"),
    ],
    ids=str,
)
def test_float64(name, options):
    """float64, which PyTorch's own layer runs: gradgradcheck, and forward mode by the equations."""
    module, x = getattr(rnnfast, name)(I, H, **options, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64)
    weights = dict(module.named_parameters())

    def run(x, *values):
        return flat(torch.func.functional_call(module, dict(zip(weights, values, strict=True)), (x,)))

    given = (x.requires_grad_(), *weights.values())
    assert gradcheck(run, given, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(run, given, fast_mode=True, check_fwd_over_rev=True)


def test_no_reference_cycles(device):
    """A graph of second derivatives is freed with what hangs on it, at once, without the garbage collector."""
    ours, _ = pair("GRU", device)
    ours(torch.zeros(T, B, I, device=device))  # the first call imports Triton, and leaves frames to the collector
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(T, B, I, device=device, requires_grad=True) * 1
        output = ours(x)[0]
        (dx,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(dx.square().sum(), x)
        watched = [weakref.ref(tensor) for tensor in (x, output, dx, second)]
        del x, output, dx, second
        assert [ref() for ref in watched] == [None] * 4
    finally:
        gc.enable()
