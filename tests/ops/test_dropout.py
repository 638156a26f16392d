"""Dropout between layers on the kernels: the documented generator, its seed, gradients, and calls with NaNs and p = 1."""

import contextlib

import pytest
import torch
from support.groups import running

import rnnfast
from rnnfast import ops
from rnnfast.kernels import dropout as kernel
from rnnfast.kernels import recompute, step
from rnnfast.ops import recurrence

pytestmark = pytest.mark.numerical

MASK = 0xFFFFFFFF


def philox(seed: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 as Salmon et al. wrote it down in 2011, one counter at a time."""
    c, k = list(counter), [seed & MASK, seed >> 32 & MASK]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & MASK, (first >> 32) ^ c[3] ^ k[1], first & MASK]
        k = [k[0] + 0x9E3779B9 & MASK, k[1] + 0xBB67AE85 & MASK]
    return c


def test_philox():
    """The one above gives the known answers that its authors published with it."""
    assert philox(0, (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(MASK << 32 | MASK, (MASK,) * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("W", [7, 14])
@pytest.mark.parametrize("seed", [5, -1, 1 << 40 | 3])
def test_documented_mask(seed, W, device):
    """What stays is what the generator says, whatever the width; twice the same."""
    T, B, p = 2, 3, 0.3
    x, given = torch.ones(T, B, W, device=device), torch.tensor([seed], device=device)
    found = ops.dropout.dropped(x, given, p)
    assert torch.equal(found, ops.dropout.dropped(x, given, p))
    expected = [[philox(seed, (j // 4, row, 0, 0))[j % 4] >= round(p * 2**32) for j in range(W)] for row in range(T * B)]
    scaled = torch.tensor(expected, device=device).view(found.shape) * torch.tensor(1 / (1 - p))
    torch.testing.assert_close(found, scaled, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("W", [700, 1400])
def test_gradients(W, dtype, device):
    """The mask of forward in backward, and again in its derivative; wider than a tile, strided inputs and gradients."""
    T, B, p = 2, 2, 0.5
    seed = torch.tensor([7], device=device)
    x = torch.randn(B, T, W, device=device, dtype=dtype).transpose(0, 1).requires_grad_()
    mask, out = ops.dropout.mask(x, seed, p), ops.dropout.dropped(x, seed, p)
    assert torch.equal(out, x * mask)
    upstream = torch.randn(B, T, W, device=device, dtype=dtype, requires_grad=True).transpose(0, 1)
    (grad,) = torch.autograd.grad(out, x, upstream, create_graph=True)
    assert torch.equal(grad, upstream * mask)
    (again,) = torch.autograd.grad(grad, upstream, torch.ones_like(grad))
    assert torch.equal(again, mask)


def test_opcheck(device):
    x, seed = torch.randn(2, 3, 5, device=device, requires_grad=True), torch.tensor([1], device=device)
    torch.library.opcheck(ops.dropout.dropped, (x, seed, 0.4))


def test_launches_are_on_the_tensors_device(device, monkeypatch):
    """Triton launches on the current device, which with several GPUs may be another: every launch of a layer is inside
    `recurrence.on_device`."""
    inside, launches, guard = [], [], recurrence.on_device

    @contextlib.contextmanager
    def on_device(tensor):
        inside.append(tensor)
        with guard(tensor):
            yield
        inside.pop()

    def watched(name, function):
        def launch(*args, **options):
            assert inside, name
            launches.append(name)
            return function(*args, **options)

        return launch

    monkeypatch.setattr(recurrence, "on_device", on_device)
    for module, name in ((step, "forward"), (step, "backward"), (recompute, "compute"), (kernel, "apply")):
        monkeypatch.setattr(module, name, watched(f"{module.__name__}.{name}", getattr(module, name)))
    layer = rnnfast.GRU(5, 4, 2, dropout=0.5, recompute=True, device=device, backend="triton")
    for members in (1, 2):
        launches.clear()
        with running(3, members):
            layer(torch.randn(3, 2, 5, device=device))[0].sum().backward()
        # of what the second layer reads: forward, recomputed gates, weights; and of the gradient
        assert len(set(launches)) == 4 and launches.count("rnnfast.kernels.dropout.apply") == 4


def test_share_and_seed(device):
    """About p is dropped, another mask for each layer call, the same after the same seed; only the seed is kept."""
    x = torch.ones(4, 4, 4096, device=device)
    torch.manual_seed(3)
    first, second = (ops.dropout.dropout(x, 0.25) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(ops.dropout.dropout(x, 0.25), first) and not torch.equal(first, second)
    share = (first == 0).double().mean().item()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / first.numel()) ** 0.5
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.dropout.dropout(x.clone().requires_grad_(), 0.25)
    assert sum(t.nbytes for t in kept) == 8


def test_edges(device):
    """p = 1 gives zeros, p = 0 the input; a NaN that is dropped is gone; a wrong p is torch.dropout's error."""
    x = torch.full((1, 1, 64), float("nan"), device=device)
    assert torch.equal(ops.dropout.dropout(x, 1.0), torch.zeros_like(x))
    dropped = ops.dropout.dropout(x, 0.5)
    assert 0 < int((dropped == 0).sum()) < 64 and int(dropped.isnan().sum()) == 64 - int((dropped == 0).sum())
    x = torch.randn(1, 1, 64, device=device)
    assert torch.equal(ops.dropout.dropout(x, 0.0), x)
    with pytest.raises(RuntimeError, match="dropout probability has to be between 0 and 1"):
        ops.dropout.dropout(x, 1.5)


def test_stack_matches_its_layers(device):
    """A bidirectional stack is its layers with that mask between them, all outputs and gradients."""
    torch.manual_seed(0)
    stack = rnnfast.GRU(5, 4, 2, bidirectional=True, dropout=0.5, device=device, backend="triton")
    layers = [rnnfast.GRU(n, 4, bidirectional=True, device=device, backend="triton") for n in (5, 8)]
    for index, layer in enumerate(layers):
        names = [name for name, _ in layer.named_parameters()]
        layer.load_state_dict({name: stack.get_parameter(name.replace("_l0", f"_l{index}")) for name in names})
    x = torch.randn(3, 2, 5, device=device)
    torch.manual_seed(1)
    y, _ = stack(x)
    torch.manual_seed(1)
    inner, _ = layers[0](x)
    expected, _ = layers[1](ops.dropout.dropout(inner, 0.5))
    assert torch.equal(y, expected)
    theirs = torch.autograd.grad(expected.square().sum(), [p for layer in layers for p in layer.parameters()])
    ours = torch.autograd.grad(y.square().sum(), list(stack.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
