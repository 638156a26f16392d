"""The functions of one layer and one direction: results, errors, backends."""

import dataclasses
import inspect
from functools import partial

import pytest
import torch
from support.layers import B, H, I, T, close, equal, flat, pair, run, states

import rnnfast
from rnnfast import functional, reference, torch_private
from rnnfast.nn.options import CallOptions
from rnnfast.nn.sequence import Sequence

pytestmark = pytest.mark.numerical

RNN = {f"rnn_{name}": partial(functional.rnn, nonlinearity=name) for name in ("tanh", "relu")}
FUNCTIONS = {cell: RNN.get(cell) or getattr(functional, cell) for cell in reference.CELLS}
WITH_A_MODULE = [cell for cell in FUNCTIONS if torch_private.has_operator(cell)]


def arguments(cell, device, given=True, bias=True):
    G = reference.GATES[cell]
    new = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    hx = None if not given else (new(B, H), new(B, H)) if reference.STATES[cell] > 1 else new(B, H)
    return [new(T, B, I), hx, new(G * H, I), new(G * H, H), *([new(G * H), new(G * H)] if bias else [])]


@pytest.mark.parametrize("call", [Sequence.forward, functional.lstm, functional.gru, functional.rnn])
def test_every_call_takes_every_option(call):
    """By name, with the default of `CallOptions`; no two calls differ in them."""
    options = {option.name: option.default for option in dataclasses.fields(CallOptions)}
    parameters = list(inspect.signature(call).parameters.values())[-len(options) :]
    assert all(parameter.kind == parameter.KEYWORD_ONLY for parameter in parameters)
    assert {parameter.name: parameter.default for parameter in parameters} == options


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("cell", WITH_A_MODULE)
def test_function_equals_module(cell, backend, device):
    """A function with a module's weights gives the module's outputs, and torch.nn's gradients, on every backend."""
    name = cell.split("_")[0].upper()
    options = {"nonlinearity": cell.split("_")[1]} if name == "RNN" else {}
    ours, theirs = pair(name, device, backend=backend, **options)
    x, hx = torch.randn(T, B, I, device=device), states(name, 1, B, H, device=device)

    def function(x, hx=None):
        start = None if hx is None else tuple(h[0] for h in hx) if name == "LSTM" else hx[0]
        y, last = FUNCTIONS[cell](x, start, *ours.parameters(), backend=backend)
        return y, tuple(h[None] for h in last) if name == "LSTM" else last[None]

    function.parameters = ours.parameters
    for start in (None, hx):
        by_function, by_module = run(function, x, start), run(ours, x, start)
        assert equal(by_function, by_module)
        close(by_function, run(theirs, x, start))


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("cell", FUNCTIONS)
def test_reverse_is_a_flip(cell, backend, device):
    """reverse=True gives what flipping input and output in time gives, on every backend."""
    x, hx, *weights = arguments(cell, device, bias=False)
    y, last = FUNCTIONS[cell](x, hx, *weights, reverse=True, backend=backend)
    flipped, flipped_last = FUNCTIONS[cell](x.flip(0), hx, *weights, backend=backend)
    close(flat((y, last)), flat((flipped.flip(0), flipped_last)))
    assert torch.equal(y[0], flat((y, last))[1])


def swapped(n, make):
    """A change of the n-th argument."""
    return lambda args: [make(arg) if k == n else arg for k, arg in enumerate(args)]


def each(n, make):
    """A change of the n-th argument, of both if it is a pair."""
    return swapped(n, lambda arg: tuple(make(part) for part in arg) if isinstance(arg, tuple) else make(arg))


WRONG = {
    "x 2-D": (swapped(0, lambda x: x[0]), RuntimeError, "x must have 3 dimensions, got 2"),
    "x 4-D": (swapped(0, lambda x: x[None]), RuntimeError, "x must have 3 dimensions, got 4"),
    "no steps": (swapped(0, lambda x: x[:0]), RuntimeError, "sequence length to be larger than 0"),
    "no batch": (swapped(0, lambda x: x[:, :0]), RuntimeError, "x must not be empty"),
    "no features": (swapped(0, lambda x: x[..., :0]), RuntimeError, "x must not be empty"),
    "features": (swapped(0, lambda x: x[..., :-1]), RuntimeError, "Expected w_ih of size"),
    "w_ih": (swapped(2, lambda w: w[:-1]), RuntimeError, "Expected w_ih of size"),
    "w_hh": (swapped(3, lambda w: w[:-1]), RuntimeError, r"w_hh must be \(G\*H, H\)"),
    "w_hh 1-D": (swapped(3, lambda w: w[0]), RuntimeError, r"w_hh must be \(G\*H, H\)"),
    "b_ih": (swapped(4, lambda b: b[:-1]), RuntimeError, "Expected b_ih of size"),
    "b_hh": (swapped(5, lambda b: b[None]), RuntimeError, "Expected b_hh of size"),
    "one bias": (swapped(5, lambda b: None), RuntimeError, "both or neither"),
    "other bias": (swapped(4, lambda b: None), RuntimeError, "both or neither"),
    "hx batch": (each(1, lambda h: h[:-1]), RuntimeError, r"Expected hx\[0\] of size"),
    "hx 3-D": (each(1, lambda h: h[None]), RuntimeError, r"Expected hx\[0\] of size"),
    "x dtype": (swapped(0, lambda x: x.double()), ValueError, "all tensors must have one dtype"),
    "w_hh dtype": (swapped(3, lambda w: w.half()), ValueError, "all tensors must have one dtype"),
    "hx dtype": (each(1, lambda h: h.double()), ValueError, r"hx\[0\] has torch.float64"),
    "w_ih device": (swapped(2, lambda w: w.to("meta")), RuntimeError, "all tensors must be on one device"),
    "hx device": (each(1, lambda h: h.to("meta")), RuntimeError, "all tensors must be on one device"),
}


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("cell", FUNCTIONS)
def test_function_errors(cell, kind, backend, device, no_launch):
    """Wrong arguments of a function: a clear error, the same on every backend, before any launch."""
    change, error, text = WRONG[kind]
    with pytest.raises(error, match=text):
        FUNCTIONS[cell](*change(arguments(cell, device)), backend=backend)


WRONG_TYPES = {
    "x": swapped(0, lambda x: x.tolist()),
    "w_ih": swapped(2, lambda w: None),
    "w_hh": swapped(3, lambda w: w.tolist()),
    "b_ih": swapped(4, lambda b: 0.0),
    "hx number": swapped(1, lambda hx: 5),
    "hx of None": swapped(1, lambda hx: (None, None)),
    "hx of another cell": swapped(1, lambda hx: torch.stack(hx) if isinstance(hx, tuple) else (hx,)),
    "empty hx": swapped(1, lambda hx: ()),
}


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("kind", WRONG_TYPES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_function_types(cell, kind, backend, device, no_launch):
    """An argument that is no tensor, or states of another cell's form: an error that names the argument, on every backend."""
    with pytest.raises((TypeError, RuntimeError), match=rf"\b{kind.split()[-1] if 'empty' in kind else kind.split()[0]}\b"):
        FUNCTIONS[cell](*WRONG_TYPES[kind](arguments(cell, device)), backend=backend)


def test_function_choices(device):
    """An unknown nonlinearity or backend names the choices; float64 runs, on PyTorch's own layer."""
    args = arguments("rnn_tanh", device)
    with pytest.raises(ValueError, match=r"Unknown nonlinearity 'gelu'\. Select from 'tanh' or 'relu'"):
        functional.rnn(*args, nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"'triton', 'torch', 'reference' or 'auto', got 'cudnn'"):
        functional.rnn(*args, backend="cudnn")
    doubles = [arg.double() for arg in args]
    close(functional.rnn(*doubles), functional.rnn(*doubles, backend="reference"))


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
def test_function_gradients_on_every_backend(backend, device):
    """Backward of a function runs on every backend, without a module whose training flag could forbid it."""
    x, hx, *weights = arguments("lstm", device)
    tensors = [tensor.requires_grad_() for tensor in (x, *hx, *weights)]
    y, (h_n, c_n) = functional.lstm(x, hx, *weights, backend=backend)
    grads = torch.autograd.grad(y.sum() + h_n.sum() + c_n.sum(), tensors)
    assert all(grad.isfinite().all() and grad.any() for grad in grads)
