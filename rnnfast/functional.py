"""One layer, one direction, with explicit weights.

    x      (T, B, I)   T, B >= 1; float16, bfloat16, float32 or float64, as every other tensor
    hx     states before the first step, each (B, H), or None for zeros
    w_ih   (G*H, I), w_hh (G*H, H); b_ih, b_hh (G*H,), or None

G gates in PyTorch's order; the equations are in `rnnfast.reference`. Every function returns ``(y, states)``: y (T, B, H), the
hidden state of each step, and the state or states after the last step taken, (B, H). All outputs are differentiable with
respect to every tensor given. ``reverse`` runs from the last step to the first; ``y[t]`` belongs to ``x[t]`` all the same.
``backend`` and ``recompute`` are as on the modules. So are ``lengths`` (B,), ``resets`` (T, B), ``reset_to`` like hx,
``return_all_states`` and ``return_gates``; what the last two ask for follows: a tuple of the states of every step, (T, B, H)
each, and the gate activations (T, B, G, H), without gradient. On "torch" a call with any of these runs on the equations.

Errors, of the types torch.nn raises: `RuntimeError` for a wrong rank or size, `ValueError` for a wrong dtype or an unknown
backend, `TypeError` for a ``recompute`` that is no bool.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnnfast import backends, ops, reference, sequences, transforms
from rnnfast.choice import kernel_plan
from rnnfast.dispatch import computed_again

__all__ = ["gru", "lstm", "rnn"]

_States = tuple[Tensor, ...]


def lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
    recompute: bool = False,
    lengths: Tensor | list[int] | None = None,
    resets: Tensor | None = None,
    reset_to: tuple[Tensor, Tensor] | None = None,
    return_all_states: bool = False,
    return_gates: bool = False,
) -> Any:
    """LSTM layer: i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c'). Gate order i, f, g, o.

    Args, shapes, dtypes and errors: as the module says. ``hx`` is (h_0, c_0); returns ``y, (h_n, c_n)``.

    Example:
        >>> x, w_ih, w_hh = torch.randn(7, 2, 3), torch.randn(20, 3), torch.randn(20, 5)
        >>> y, (h_n, c_n) = rnnfast.functional.lstm(x, None, w_ih, w_hh)
        >>> y.shape, torch.equal(y[-1], h_n)
        (torch.Size([7, 2, 5]), True)
    """
    options = (lengths, resets, reset_to, return_all_states, return_gates)
    y, states, *details = _layer("lstm", x, hx, w_ih, w_hh, b_ih, b_hh, reverse, backend, recompute, options)
    return y, (states[0], states[1]), *details


def gru(
    x: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
    recompute: bool = False,
    lengths: Tensor | list[int] | None = None,
    resets: Tensor | None = None,
    reset_to: Tensor | None = None,
    return_all_states: bool = False,
    return_gates: bool = False,
) -> Any:
    """GRU layer: r, z = sigmoid(.); n = tanh(x_n + r h_n); h' = (1 - z) n + z h. Gate order r, z, n.

    Args, shapes, dtypes and errors: as the module says. ``hx`` is h_0; returns ``y, h_n``.

    Example:
        >>> y, h_n = rnnfast.functional.gru(torch.randn(7, 2, 3), None, torch.randn(15, 3), torch.randn(15, 5))
        >>> y.shape
        torch.Size([7, 2, 5])
    """
    options = (lengths, resets, reset_to, return_all_states, return_gates)
    start = None if hx is None else (hx,)
    y, states, *details = _layer("gru", x, start, w_ih, w_hh, b_ih, b_hh, reverse, backend, recompute, options)
    return y, states[0], *details


def rnn(
    x: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    backend: str | None = None,
    recompute: bool = False,
    lengths: Tensor | list[int] | None = None,
    resets: Tensor | None = None,
    reset_to: Tensor | None = None,
    return_all_states: bool = False,
    return_gates: bool = False,
) -> Any:
    """Elman layer: h' = f(W_ih x + b_ih + W_hh h + b_hh), f the ``nonlinearity``, "tanh" or "relu" (else `ValueError`).

    Args, shapes, dtypes and errors: as the module says. ``hx`` is h_0; returns ``y, h_n``.

    Example:
        >>> y, h_n = rnnfast.functional.rnn(torch.randn(7, 2, 3), None, torch.randn(5, 3), torch.randn(5, 5))
        >>> y.shape
        torch.Size([7, 2, 5])
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    start, options = None if hx is None else (hx,), (lengths, resets, reset_to, return_all_states, return_gates)
    cell = f"rnn_{nonlinearity}"
    y, states, *details = _layer(cell, x, start, w_ih, w_hh, b_ih, b_hh, reverse, backend, recompute, options)
    return y, states[0], *details


def _layer(
    cell: str,
    x: Tensor,
    hx: _States | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reverse: bool,
    backend: str | None,
    recompute: bool,
    options: tuple[Any, ...],
) -> tuple[Any, ...]:
    _check(cell, x, hx, w_ih, w_hh, b_ih, b_hh)
    backends.check_name(backend)
    backends.check_recompute(recompute)
    given: dict[str, Any] = {}
    wanted = sequences.Sequences()
    if sequences.given(*options):
        shapes = ((x.shape[1], w_hh.shape[1]),) * (2 if cell == "lstm" else 1)
        wanted = sequences.read(x, *options, shapes=shapes)
        given = {"lengths": wanted.lengths, "resets": wanted.resets, "reset_to": wanted.reset_to or None}
    name, source = backends.asked(backend)
    obstacles = () if name in ("torch", "reference") else backends.tensor_obstacles(x)
    settled = backends.settle(name, source, obstacles)
    arguments = (cell, x, hx, w_ih, w_hh, b_ih, b_hh)
    if not wanted.details:
        if not given and name is None and settled == "triton" and _torch_wins(*arguments):
            settled = "torch"
        plain = given or transforms.equations_stand_in(x.is_cpu)
        plain = plain or transforms.compiles_no_gradients(cell, x, (*(hx or ()), w_ih, w_hh, b_ih, b_hh))
        run = {"triton": ops.layer, "reference": reference.layer, "torch": reference.layer if plain else _torch_layer}[settled]
    else:
        run = ops.trace if settled == "triton" else reference.trace
    if recompute and settled == "triton":
        given["recompute"] = True
    elif recompute and torch.is_grad_enabled() and not transforms.inside():  # torch.func refuses PyTorch's checkpoint
        run = partial(computed_again, run)
    if not wanted.details:
        return run(*arguments, reverse=reverse, **given)
    y, last, cells, gates = run(*arguments, reverse=reverse, **given)
    return y, last, *([(y, *cells)] if wanted.all_states else []), *([gates] if wanted.gates else [])


def _torch_wins(cell: str, x: Tensor, hx: _States | None, w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None) -> bool:
    """As of the modules, for a module of one layer and direction."""
    if torch.compiler.is_compiling() or transforms.inside() or not kernel_plan.measured(x.device):
        return False
    T, B, I = x.shape
    tensors = (x, *(hx or ()), w_ih, w_hh, *biases)
    return kernel_plan.torch_wins(kernel_plan.shape(cell, T, B, I, w_hh.shape[1], 1, 1, tensors), x.device)


def _check(
    cell: str, x: Tensor, hx: _States | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> None:
    gates = reference.GATES[cell]
    count = 2 if cell == "lstm" else 1
    if hx is not None and not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx must be a tuple of {count} tensors, got {type(hx).__name__}")
    if hx is not None and len(hx) != count:
        raise RuntimeError(f"hx must hold {count} states, got {len(hx)}")
    required = {"x": x, "w_ih": w_ih, "w_hh": w_hh, **{f"hx[{n}]": state for n, state in enumerate(hx or ())}}
    optional = {label: bias for label, bias in (("b_ih", b_ih), ("b_hh", b_hh)) if bias is not None}
    for label, tensor in (required | optional).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(tensor).__name__}")
    if x.dim() != 3:
        raise RuntimeError(f"x must have 3 dimensions, got {x.dim()}")
    if w_hh.dim() != 2 or w_hh.shape[0] != gates * w_hh.shape[1]:
        raise RuntimeError(f"w_hh must be (G*H, H) with G = {gates}, got {tuple(w_hh.shape)}")
    T, B, I = x.shape
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if B == 0 or I == 0:
        raise RuntimeError(f"x must not be empty, got {tuple(x.shape)}")
    rows, H = w_hh.shape
    shapes = {"w_ih": (w_ih, (rows, I)), "w_hh": (w_hh, (rows, H)), "b_ih": (b_ih, (rows,)), "b_hh": (b_hh, (rows,))}
    shapes |= {f"hx[{n}]": (state, (B, H)) for n, state in enumerate(hx or ())}
    for label, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise RuntimeError(f"Expected {label} of size {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype and not (backends.autocast(x.device.type) and tensor.is_floating_point()):
            raise ValueError(f"x has dtype {x.dtype} and {label} has {tensor.dtype}: all tensors must have one dtype")
        if tensor.device != x.device:
            raise RuntimeError(f"x is on {x.device} and {label} on {tensor.device}: all tensors must be on one device")
    if (b_ih is None) != (b_hh is None):
        raise RuntimeError("b_ih and b_hh must be given both or neither")


def _torch_layer(
    cell: str,
    x: Tensor,
    hx: _States | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, _States]:
    """`rnnfast.reference.layer` on PyTorch's own operators, cuDNN on a GPU, ATen elsewhere; for a cell that PyTorch does not
    have, the reference itself."""
    if not hasattr(torch._VF, cell):
        return reference.layer(cell, x, hx, w_ih, w_hh, b_ih, b_hh, reverse=reverse)
    zeros = x.new_zeros(1, x.shape[1], w_hh.shape[1])
    states = (zeros,) * (2 if cell == "lstm" else 1) if hx is None else tuple(state.unsqueeze(0) for state in hx)
    weights = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    run = getattr(torch._VF, cell)
    first = list(states) if cell == "lstm" else states[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")  # nor can they be
        y, *last = run(x.flip(0) if reverse else x, first, weights, len(weights) == 4, 1, 0.0, True, False, False)
    return y.flip(0) if reverse else y, tuple(state.squeeze(0) for state in last)
