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

from rnnfast import ops, reference, torch_private
from rnnfast.choice import calls, kernel_plan, tuning_file
from rnnfast.choice.decide import Decision, check_backend, decide, tell
from rnnfast.nn.base import checkpointed
from rnnfast.nn.checks import ONEDNN, check_function, check_recompute
from rnnfast.nn.options import CallOptions, read
from rnnfast.reference import STATES

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
    lengths: Any = None,
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
    options = CallOptions(lengths, resets, reset_to, return_all_states, return_gates)
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
    lengths: Any = None,
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
    options = CallOptions(lengths, resets, reset_to, return_all_states, return_gates)
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
    lengths: Any = None,
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
    options = CallOptions(lengths, resets, reset_to, return_all_states, return_gates)
    start, cell = None if hx is None else (hx,), f"rnn_{nonlinearity}"
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
    options: CallOptions,
) -> tuple[Any, ...]:
    check_function(cell, x, hx, w_ih, w_hh, b_ih, b_hh)
    check_backend(backend)
    check_recompute(recompute)
    given = tuple(options.given)
    if given:
        options = read(x, options, shapes=((x.shape[1], w_hh.shape[1]),) * STATES[cell])
    tensors = (x, *(hx or ()), w_ih, w_hh, b_ih, b_hh)
    trains = cell in ONEDNN and torch.is_grad_enabled() and any([each is not None and each.requires_grad for each in tensors])

    def decision() -> Decision:
        return decide(
            backend,
            x.device.type,
            x.device.index,
            x.dtype,
            options=given,
            packable=False,  # PyTorch's operator takes no lengths
            onednn_trains=trains,
            torch_wins=_torch_wins(cell, tensors, bool(given)),
        )

    chosen = decision()
    if chosen.watched and calls.before(None, cell, x, chosen, not given, lambda: _shape(cell, tensors)):
        chosen = decision()
    if chosen.gives_way:
        tell(chosen.asked, chosen.asked_by, chosen.gives_way)
    if chosen.runner == "torch":
        run: Any = _torch_layer
    else:
        run = partial(reference.alone, {"kernels": ops.group, "equations": reference.group}[chosen.runner])
    if chosen.runner == "equations" and torch.jit.is_tracing():
        x = torch.stack(x.unbind(0))  # the trace fails on another number of steps
    keywords: dict[str, Any] = {"reverse": reverse} | (options.of_layer() if given else {})
    if recompute and chosen.runner == "kernels":
        keywords["recompute"] = True
    elif recompute and torch.is_grad_enabled() and not chosen.inside:  # torch.func refuses PyTorch's checkpoint
        run = partial(checkpointed, run)
    y, last, cells, gates = run(cell, x, hx, w_ih, w_hh, b_ih, b_hh, **keywords)
    return (y, last, *options.returned((y, *cells), gates))


def _torch_wins(cell: str, tensors: tuple[Tensor | None, ...], has_options: bool) -> str:
    """As for a module of one layer and direction."""
    x = tensors[0]
    assert x is not None
    if torch.compiler.is_compiling() or torch_private.inside() or not kernel_plan.predicts(x):
        return ""
    return kernel_plan.torch_wins_call(cell, *_sizes(tensors), tensors, kernels_only=has_options)


def _sizes(tensors: tuple[Tensor | None, ...]) -> tuple[int, int, int, int, int, int]:
    """T, B, I, H, layers and directions of a call of one layer. `tensors`: the input, the states and the weights."""
    x, w_hh = tensors[0], tensors[-3]
    assert x is not None and w_hh is not None
    T, B, I = x.shape
    return T, B, I, w_hh.shape[1], 1, 1


def _shape(cell: str, tensors: tuple[Tensor | None, ...]) -> tuning_file.Shape:
    T, B, I, H, layers, directions = _sizes(tensors)
    return kernel_plan.shape(cell, T, B, I, H, layers, directions, tensors)


def _torch_layer(
    cell: str,
    x: Tensor,
    hx: _States | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, _States, tuple[Tensor, ...], None]:
    """`rnnfast.reference.trace` without cell states and gates, on PyTorch's own operators: cuDNN on a GPU, ATen elsewhere. A
    cell that PyTorch does not have runs on the reference."""
    if not torch_private.has_operator(cell):
        return *reference.layer(cell, x, hx, w_ih, w_hh, b_ih, b_hh, reverse=reverse), (), None
    zeros = x.new_zeros(1, x.shape[1], w_hh.shape[1])
    states = [zeros] * STATES[cell] if hx is None else [state.unsqueeze(0) for state in hx]
    weights = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    first = states if len(states) > 1 else states[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")  # nor can they be
        flags = (len(weights) == 4, 1, 0.0, True, False, False)
        y, *last = torch_private.run_operator(cell, x.flip(0) if reverse else x, first, weights, *flags)
    return y.flip(0) if reverse else y, tuple(state.squeeze(0) for state in last), (), None
