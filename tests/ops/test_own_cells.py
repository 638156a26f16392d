"""Operators of cells that PyTorch does not have, beside the equations: what the built-in cells do not exercise."""

import pytest
import torch
from support.groups import Stack, running
from support.loops import everything, second
from torch import sigmoid, tanh

from rnnfast import numerics, ops, reference
from rnnfast.derive.definition import Noise, Row, cell, keep, row_norm
from rnnfast.derive.registry import fused

pytestmark = pytest.mark.numerical


@cell(gates="a b c d e", states="h c n")
def five(x, h, s, *, w, m: Row, u: Noise, v: Noise):
    """Five gates, the last two with sides of their own; two carried states, two held tiles, two of noise."""
    a, b, f = sigmoid(x.a + h.a), sigmoid(x.b + h.b + w * s.c), sigmoid(x.c + h.c)
    d, e = tanh(x.d + a * h.d), tanh(x.e + b * h.e)
    c = f * s.c + a * d * m
    n = torch.where(u < 0.3, s.n, 0.5 * s.n + e)
    return b * tanh(c + n * v) + 0.1 * s.h, c, n


@cell(gates="i f g o", states="h c")
def kept(x, h, s, *, w):
    """A tile that is saved in float32, and a learned vector that meets the new state."""
    i, f = keep(torch.exp(x.i + h.i), torch.float32), sigmoid(x.f + h.f)
    c = f * s.c + 0.2 * i * tanh(x.g + h.g)
    return sigmoid(x.o + h.o + w * c) * tanh(c), c


@cell(gates="a b", states="h")
def normed(x, h, s):
    a, b = row_norm(x.a + h.a, x.b + h.b)
    return sigmoid(a) * tanh(b) + 0.5 * s.h


@cell(gates="a b", states="h c", recurrent=False)
def diagonal(x, s, *, u):
    c = sigmoid(x.a + u * s.h) * s.c + x.b
    return tanh(c), c


CELLS = {"five": five, "kept": kept, "normed": normed, "diagonal": diagonal}
CASES = [
    ("five", {}),
    ("five", {"marked": True, "recompute": True}),
    ("five", {"layers": 3, "marked": True, "dropout": 0.5}),
    ("five", {"directions": 4, "marked": True, "recompute": True, "bias": False}),
    ("kept", {"marked": True, "directions": 2}),
    ("kept", {"layers": 2, "recompute": True, "states": False}),
    ("normed", {"marked": True, "recompute": True}),
    ("normed", {"directions": 2, "states": False}),
    ("diagonal", {"marked": True, "directions": 2}),
    ("diagonal", {"layers": 2, "recompute": True}),
]


@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_first_derivatives(name, options, device):
    stack = Stack(fused(CELLS[name]), **options)
    tensors = stack.tensors(device)
    with running(2):
        ours, theirs = (
            everything(stack.on_kernels, tensors, torch.float32),
            everything(stack.by_equations, tensors, torch.float32),
        )
    masks = stack.masks(tensors["x"])
    exact = lambda: everything(lambda given: stack.by_equations(given, masks), tensors, torch.float64)  # noqa: E731
    assert not numerics.fault(ours, theirs, exact, torch.float32)


@pytest.mark.parametrize("name", ["five", "kept", "diagonal"])
def test_second_derivatives(name, device):
    stack = Stack(fused(CELLS[name]), marked=True, T=3)
    tensors = stack.tensors(device)
    ours, theirs = (second(run, tensors, torch.float32) for run in (stack.on_kernels, stack.by_equations))
    assert not numerics.fault(ours, theirs, lambda: second(stack.by_equations, tensors, torch.float64), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    stack = Stack(fused(five), marked=True)
    tensors = stack.tensors(device, dtype)
    ours, theirs = (everything(run, tensors, dtype) for run in (stack.on_kernels, stack.by_equations))
    assert not numerics.fault(ours, theirs, lambda: everything(stack.by_equations, tensors, torch.float64), dtype)


def test_vmap_and_an_ensemble(device):
    """Rows of a batch that vmap maps over; with noise, which counts the rows, one call for each."""
    for name in ("kept", "five"):
        stack = Stack(fused(CELLS[name]), B=2)
        tensors = [stack.tensors(device) for _ in range(2)]
        stacked = {key: torch.stack([each[key] for each in tensors]) for key in tensors[0]}
        found = torch.func.vmap(stack.on_kernels)(stacked)
        for n, each in enumerate(tensors):
            for ours, alone in zip(found, stack.on_kernels(each), strict=True):
                torch.testing.assert_close(ours[n], alone, rtol=1e-5, atol=1e-6)


def test_an_unknown_cell_says_what_to_do():
    x = torch.zeros(1, 1, 1)
    with pytest.raises(RuntimeError, match=r"make an rnnfast\.Layer of it"):
        ops.forward("never_0000", x, None, None, x, x, None, None, None, 0, False)
    assert "never_0000" not in reference.CELLS
