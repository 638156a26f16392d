"""Groups: both directions of a layer, and stacks as pipelines, beside the equations and beside members one after another."""

import itertools

import pytest
import torch
from support.groups import Stack, running
from support.layers import equal
from support.loops import everything

from rnnfast import numerics
from rnnfast.ops import gradients, products, rounds

pytestmark = pytest.mark.numerical

# cell, layers, chunk of time steps (sequences have 5), members at once, options
STACKS = [
    ("lstm", 2, 1, None, {}),
    ("lstm", 3, 3, None, {"marked": True}),
    ("lstm", 3, 2, 2, {"dropout": 0.5, "recompute": True}),
    ("lstm", 6, 5, None, {"states": False}),
    ("lstm", 3, 9, None, {"bias": False, "dropout": 0.5}),
    ("gru", 2, 3, None, {"dropout": 0.5}),
    ("gru", 3, 1, None, {"recompute": True, "marked": True, "dropout": 0.5}),
    ("gru", 3, 2, 1, {"marked": True, "dropout": 0.5}),
    ("gru", 6, 3, 4, {"states": False, "bias": False}),
    ("gru", 3, 2, 2, {"recompute": True, "marked": True}),
    ("rnn_tanh", 6, 1, None, {"states": False}),
    ("rnn_relu", 3, 3, 2, {"marked": True}),
]
DIRECTIONS = [
    ("lstm", None, {}),
    ("lstm", 1, {"marked": True, "recompute": True}),
    ("gru", None, {"marked": True, "recompute": True}),
    ("gru", 1, {"states": False}),
    ("rnn_tanh", None, {"bias": False, "states": False}),
    ("rnn_relu", 1, {"marked": True}),
]


def check(stack, device, dtype=torch.float32):
    """Outputs and all gradients by the contract; the yardstick is the equations in `dtype`."""
    tensors = stack.tensors(device, dtype)
    masks = stack.masks(tensors["x"])
    ours = everything(stack.on_kernels, tensors, dtype)
    run = lambda given: stack.by_equations(given, masks)  # noqa: E731
    theirs = everything(run, tensors, dtype)
    assert not numerics.fault(ours, theirs, lambda: everything(run, tensors, torch.float64), dtype)


@pytest.mark.parametrize("cell, layers, chunk, members, options", STACKS, ids=str)
def test_stacks(cell, layers, chunk, members, options, device):
    """Pipelines: chunks of one step, of some, of all steps and of more than there are; whole, and in parts."""
    with running(chunk, members):
        check(Stack(cell, layers, **options), device)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.sweep)], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_half_precision(cell, dtype, device):
    """A stack and two directions."""
    with running(3):
        check(Stack(cell, 3, marked=True, recompute=cell == "gru", dropout=0.5), device, dtype)
        check(Stack(cell, directions=2, marked=True, recompute=cell == "gru"), device, dtype)


@pytest.mark.parametrize("cell, members, options", DIRECTIONS, ids=str)
def test_directions(cell, members, options, device):
    """Both at once, and one after the other."""
    with running(members=members):
        check(Stack(cell, directions=2, **options), device)


@pytest.mark.sweep
@pytest.mark.parametrize("layers, chunk", list(itertools.product((2, 3, 6), (1, 3, 5, 9))))
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_every_stack(cell, layers, chunk, device):
    """Every option with every number of layers and chunk, in parts of one, two and all."""
    for members, states, bias, marked, recompute in itertools.product((1, 2, None), *[(False, True)] * 4):
        with running(chunk, members):
            options = {"states": states, "bias": bias, "marked": marked, "recompute": recompute}
            check(Stack(cell, layers, dropout=0.5 * (members != 1), **options), device)


@pytest.mark.sweep
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_every_layer_of_two_directions(cell, device):
    """Every option, both directions at once and one after the other."""
    for members, states, bias, marked, recompute in itertools.product((1, None), *[(False, True)] * 4):
        with running(members=members):
            check(Stack(cell, directions=2, states=states, bias=bias, marked=marked, recompute=recompute), device)


def multiplied(a, b, out=None):
    """``a @ b`` in float32, term after term, so that the bits of a row do not depend on the other rows, as BLAS's may."""
    terms = [a[..., k, None].float() * b[..., k, None, :].float() for k in range(a.shape[-1])]
    found = torch.zeros_like(terms[0])
    for term in terms:
        found = found + term
    return found if out is None else out.copy_(found)


@pytest.fixture
def exact_rows(monkeypatch):
    """Products outside of the kernels whose bits do not depend on how many rows or members they have."""
    narrow = lambda a, b, out=None: multiplied(a, b, out).to(a.dtype)  # noqa: E731
    for module in (rounds, gradients, products):
        monkeypatch.setattr(module, "product", narrow)
    monkeypatch.setattr(rounds, "wide_product", multiplied)


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.sweep), 3, pytest.param(5, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("cell, options", [("lstm", {"marked": True}), ("gru", {"recompute": True}), ("rnn_tanh", {})], ids=str)
def test_bits_of_a_pipeline(cell, options, chunk, device, exact_rows):
    """With such products a pipeline gives every bit that its layers give one after another: outputs, states, all gradients."""
    stack = Stack(cell, 3, dropout=0.5, **options)
    tensors, found = stack.tensors(device), []
    for members in (1, 2, 3):
        with running(chunk, members):
            found.append(list(everything(stack.on_kernels, tensors, torch.float32).values()))
    assert equal(found[0], found[1]) and equal(found[0], found[2])


@pytest.mark.parametrize("cell, options", [("lstm", {"marked": True}), ("gru", {"recompute": True}), ("rnn_tanh", {})], ids=str)
def test_bits_of_directions(cell, options, device, exact_rows):
    """As of a pipeline."""
    stack = Stack(cell, directions=2, **options)
    tensors, found = stack.tensors(device), []
    for members in (1, 2):
        with running(members=members):
            found.append(list(everything(stack.on_kernels, tensors, torch.float32).values()))
    assert equal(*found)
