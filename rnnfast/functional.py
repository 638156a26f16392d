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

`run` is the same for a cell of the user's own (`rnnfast.cell`).
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
from rnnfast.derive.definition import Cell
from rnnfast.nn import heads, layer_checks, variants
from rnnfast.nn.base import checkpointed
from rnnfast.nn.checks import ONEDNN, check_function, check_recompute
from rnnfast.nn.options import CallOptions, read
from rnnfast.ops.dropout import seeds
from rnnfast.reference import STATES, Weights, spec_of

__all__ = ["gru", "lstm", "rnn", "run"]

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


def run(
    cell: Cell,
    x: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor | None = None,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
    recompute: bool = False,
    lengths: Any = None,
    resets: Tensor | None = None,
    reset_to: Any = None,
    return_all_states: bool = False,
    **given: Any,
) -> Any:
    """A layer of any cell (`rnnfast.cell`), with G gates in the order of its definition.

    Args:
        cell: what `rnnfast.cell` made of a function. Its kernels are derived at the first call, which may take a second.
        hx: a tensor (B, H) for a cell with one state, else a tuple of one for each state, in its order; None for zeros.
        w_hh: (G*H, H); or (heads, G*H/heads, H/heads), the blocks of a block-diagonal W_hh, of which each belongs to the units
            of one head. None for a cell without W_hh, which has no ``b_hh``.
        given: the arguments of the cell by their names: a learned vector (H,), a `rnnfast.Row` (B, H) or (H,), and numbers that
            are not to be the cell's own, among them ``training`` if the cell has it.
        x, w_ih, b_ih, b_hh and the others: as the module says.

    Returns:
        ``y, states``: y (T, B, H), the cell's output state of each step, and the last states in the form of ``hx``. With
        ``return_all_states`` also a tuple of the states of every step, (T, B, H) each. All are differentiable with respect to
        every tensor given.

    Raises:
        TypeError: for a learned vector or row that is missing, and for a name that the cell does not have; and what the module
            says.

    A cell with noise draws a seed for each head from PyTorch's generator of the device, as `rnnfast.Layer` does.

    Example:
        >>> @rnnfast.cell(gates="a", states="h")
        ... def leaky(x, h, s, *, leak: float = 0.3):
        ...     return (1 - leak) * s.h + leak * torch.tanh(x.a + h.a)
        >>> x, w_ih, w_hh = torch.randn(7, 2, 3), torch.randn(5, 3), torch.randn(5, 5)
        >>> y, h_n = rnnfast.functional.run(leaky, x, None, w_ih, w_hh, leak=0.1)
        >>> y.shape, h_n.shape
        (torch.Size([7, 2, 5]), torch.Size([2, 5]))
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"cell should be what rnnfast.cell makes of a function, got: {type(cell).__name__}")
    layer_checks.own_names(cell, run)
    check_backend(backend)
    check_recompute(recompute)
    constants = {name: value for name, value in given.items() if name not in cell.held}
    found = variants.variant(cell, layer_checks.checked_constants(cell, constants, modes=False))
    spec, single = spec_of(found.cell), len(cell.states) == 1
    start = (hx,) if single and hx is not None else hx
    check_function(found.cell, x, start, w_ih, w_hh, b_ih, b_hh, heads=True)
    B = x.shape[1]
    count, H = w_hh.shape[0] if w_hh is not None and w_hh.dim() == 3 else 1, w_ih.shape[0] // spec.gates
    tiles = layer_checks.rows_of(cell, {name: given[name] for name in given if name in cell.rows}, x, B, H, 1)
    learned = layer_checks.learned_of(cell, given, x, H)
    options = CallOptions(lengths, resets, reset_to, bool(return_all_states))
    options = read(x, options, shapes=((B, H),) * spec.states)
    own = Weights(w_ih, w_ih.new_empty(0, H) if w_hh is None else w_hh, b_ih, b_hh, None, variants.held(learned, tiles, 0))
    members = heads.members(own, count, spec.gates, len(cell.held))
    chosen = variants.decided(cell, found, backend, x)
    variants.announce(cell, chosen)
    group: Any = {"kernels": ops.group, "equations": reference.group}[chosen.runner]
    if chosen.runner == "equations" and torch.jit.is_tracing():
        x = torch.stack(x.unbind(0))  # the trace fails on another number of steps
    keywords: dict[str, Any] = {"flips": ((1 << count) - 1) * reverse} | options.of_layer()
    keywords |= {"details": True} if cell.output else {}
    keywords |= {"noise": seeds(x, 0.0, count)} if spec.noise else {}
    if variants.checkpoints(recompute, chosen):
        keywords |= {"recompute": True} if chosen.runner == "kernels" else {}
        group = group if chosen.runner == "kernels" else partial(checkpointed, group)

    def of_members(states: Any) -> tuple[Tensor, ...] | None:
        return None if states is None else tuple(heads.apart(state[None], count) for state in states)

    if options.reset_to is not None:
        keywords["reset_to"] = of_members(options.reset_to)
    traced = group(found.cell, x, of_members(start), members, **keywords)
    states = (traced.y, *traced.cells)
    last = tuple(heads.joined(state, count)[0] for state in traced.last)
    return (states[cell.output], last[0] if single else last, *options.returned(states, None))


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
