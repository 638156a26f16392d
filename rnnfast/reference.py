"""The equations in plain PyTorch. They define what this project computes, and its tests compare with them.

They run in any floating dtype on any device, one time step after another; autograd gives the gradients. For one layer in one
direction:

    x      (T, B, I)    inputs of all time steps
    h0     (B, H)       initial hidden state; the LSTM has an initial cell state c0 (B, H) too
    w_ih   (G*H, I)     input weights: G blocks of H rows, one block a gate
    w_hh   (G*H, H)     recurrent weights
    b_ih   (G*H,)       biases, or None
    b_hh   (G*H,)
    y      (T, B, H)    the hidden state h_t of every time step

Gate order and equations are those of torch.nn: i, f, g, o for the LSTM (Hochreiter and Schmidhuber 1997, with the forget
gate of Gers et al. 2000); r, z, n for the GRU (Cho et al. 2014, with the reset gate after the product); one block for the Elman
network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, relu, sigmoid, stack, tanh
from torch.nn.functional import linear

__all__ = [
    "CELLS", "GATES", "Cell", "Traced", "Weights", "alone", "group", "gru_step", "joined", "layer", "lstm_step", "marks",
    "rnn_relu_step", "rnn_tanh_step", "trace",
]  # fmt: skip

States = tuple[Tensor, ...]
Step = tuple[States, States]  # the new states, and the gate activations in gate order

CONTINUES, STARTS, RESETS, PADDED = range(4)  # the marks: see `marks`


def lstm_step(x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Step:
    """i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c')."""
    h, c = states
    i, f, g, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, dim=-1)
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c + i * g
    return (o * tanh(c), c), (i, f, g, o)


def gru_step(x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Step:
    """r, z = sigmoid(.); n = tanh(x_n + r h_n) with h_n = W_hn h + b_hn; h' = (1 - z) n + z h."""
    (h,) = states
    x_r, x_z, x_n = linear(x, w_ih, b_ih).chunk(3, dim=-1)
    h_r, h_z, h_n = linear(h, w_hh, b_hh).chunk(3, dim=-1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = tanh(x_n + r * h_n)
    return ((1 - z) * n + z * h,), (r, z, n)


def rnn_tanh_step(x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Step:
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    h = tanh(linear(x, w_ih, b_ih) + linear(states[0], w_hh, b_hh))
    return (h,), (h,)


def rnn_relu_step(x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Step:
    """h' = relu(W_ih x + b_ih + W_hh h + b_hh)."""
    h = relu(linear(x, w_ih, b_ih) + linear(states[0], w_hh, b_hh))
    return (h,), (h,)


@dataclass(frozen=True)
class Cell:
    """What the code around the kernels has to know of a cell. Only `step` is an equation.

    `saved` and `grads` repeat `rnnfast.kernels.cells.Cell`, because PyTorch asks for the shapes of results where there is no
    Triton. `rnnfast.kernels.cells` explains them.

    Attributes:
        step: the equations of one time step.
        states: the number of states: 2 if there is a cell state besides h, else 1.
        gates: blocks of H rows in the weights.
        saved: blocks of H that the kernels save for backward, for each batch row and step.
        grads: blocks of H of gate gradients.
        reads_h_before: whether backward of a step reads h_{t-1}.
        allows_edits: whether the input, the biases and the output may be edited in place before backward, where it does not
            read the values that were. As in torch.nn on a CPU: its LSTM (oneDNN) refuses, its GRU and RNN accept.
    """

    step: Callable[..., Step]
    states: int
    gates: int
    saved: int
    grads: int
    reads_h_before: bool = False
    allows_edits: bool = True


CELLS = {
    "lstm": Cell(lstm_step, states=2, gates=4, saved=4, grads=4, allows_edits=False),
    "gru": Cell(gru_step, states=1, gates=3, saved=4, grads=4, reads_h_before=True),
    "rnn_tanh": Cell(rnn_tanh_step, states=1, gates=1, saved=0, grads=1),
    "rnn_relu": Cell(rnn_relu_step, states=1, gates=1, saved=0, grads=1),
}
STEPS = {name: cell.step for name, cell in CELLS.items()}
STATES = {name: cell.states for name, cell in CELLS.items()}
GATES = {name: cell.gates for name, cell in CELLS.items()}
SAVED = {name: cell.saved for name, cell in CELLS.items()}


def marks(x: Tensor, lengths: Tensor | None, resets: Tensor | None, reverse: bool) -> Tensor:
    """A code for each step of each batch row: which state enters it, for the direction that runs.

    CONTINUES: the state of the step before. STARTS: the initial state. RESETS: the reset state. PADDED: none, the step is
    padding.

    A reset is a boundary between two steps in time. In the forward direction it replaces the state that enters the step after
    the boundary; in reverse, the state that enters the step before the boundary.

    Args:
        x: (T, B, I), for its shape and device.
        lengths: (B,) integers in 0..T: the first so many steps of each row count. None if all steps count.
        resets: (T, B) bool, whether there is a boundary before a step. None for no resets.
        reverse: from the last step to the first.

    Returns:
        (T, B) int8.
    """
    T, B, _ = x.shape
    steps = torch.arange(T, device=x.device)[:, None]
    if lengths is None:
        lengths = steps.new_full((B,), T)
    begins = steps == (lengths - 1 if reverse else 0)
    if resets is None:
        found = torch.where(begins, STARTS, CONTINUES)
    elif reverse:
        resets = torch.cat([resets[1:], torch.zeros_like(resets[:1])])
        found = torch.where(begins, STARTS, torch.where(resets, RESETS, CONTINUES))
    else:
        found = torch.where(resets, RESETS, torch.where(begins, STARTS, CONTINUES))
    return torch.where(steps >= lengths, PADDED, found).to(torch.int8)


class Weights(NamedTuple):
    """The weights of one layer in one direction, as the functions below have them; None for what it does not have."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


class Traced(NamedTuple):
    """The results of `group`.

    Attributes:
        y: (T, B, D * H), the hidden states of all steps, of D directions side by side.
        last: the states after the last step of each row, (members, B, H).
        cells: with ``details``, the cell states of all steps, ``(c,)`` with c (T, B, D * H), or ``()``.
        gates: with ``details``, the gate activations of all steps, (T, B, D, G, H), without gradient.
    """

    y: Tensor
    last: States
    cells: tuple[Tensor, ...]
    gates: Tensor | None


def group(
    cell: str,
    x: Tensor,
    states: States | None,
    weights: Sequence[Weights],
    *,
    flips: int = 0,
    details: bool = False,
    reset_to: States | None = None,
    **options: Any,
) -> Traced:
    """A layer in one direction or in both.

    Args:
        cell, x: as for `trace`.
        states, reset_to: as for `trace`, but of all directions, (D, B, H) each.
        weights: those of each direction.
        flips: bit m is 1 if direction m runs from the last step to the first.
        details: whether the cell states and the gates are wanted.
        options: the others of `trace`.
    """
    ys, lasts, cells, gates = [], [], [], []
    for m, own in enumerate(weights):
        starts = [None if given is None else tuple(state[m] for state in given) for given in (states, reset_to)]
        found = trace(cell, x, starts[0], *own, reverse=bool(flips >> m & 1), reset_to=starts[1], **options)
        for results, result in zip((ys, lasts, cells, gates), found, strict=True):
            results.append(result)
    last = tuple(stack(state) for state in zip(*lasts, strict=True))
    if not details:
        return Traced(joined(ys), last, (), None)
    return Traced(joined(ys), last, tuple(joined(each) for each in zip(*cells, strict=True)), stack(gates, dim=2))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Side by side."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=-1)


def alone(
    run: Callable[..., Traced],
    cell: str,
    x: Tensor,
    states: States | None,
    *weights: Any,
    reverse: bool = False,
    reset_to: States | None = None,
    **options: Any,
) -> tuple[Tensor, States, tuple[Tensor, ...], Any]:
    """One layer in one direction by a function like `group`, with the arguments and results of `trace`."""
    given = [None if each is None else tuple(state.unsqueeze(0) for state in each) for each in (states, reset_to)]
    found = run(cell, x, given[0], [Weights(*weights)], flips=int(reverse), reset_to=given[1], **options)
    last = tuple(state.squeeze(0) for state in found.last)
    return found.y, last, found.cells, None if found.gates is None else found.gates.squeeze(2)


def layer(*args, **options) -> tuple[Tensor, States]:
    """The first two results of `trace`: ``y`` and the states after the last step."""
    y, states, _, _ = trace(*args, **options)
    return y, states


def trace(
    cell: str,
    x: Tensor,
    states: States | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_to: States | None = None,
    codes: Tensor | None = None,
) -> tuple[Tensor, States, tuple[Tensor, ...], Tensor]:
    """One layer in one direction: the step, unrolled over time.

    Args:
        cell: a name in `CELLS`.
        x: (T, B, I).
        states: ``(h0, c0)`` for the LSTM, ``(h0,)`` for the others, each (B, H). None for zeros.
        w_ih, w_hh, b_ih, b_hh: weights, with the shapes above.
        w_hr: (P, H), for an LSTM with h_t = W_hr (o tanh(c_t)). Then h0 and ``y`` have P units instead of H, and w_hh is
            (G*H, P).
        reverse: from the last step to the first; ``y[t]`` still belongs to ``x[t]``.
        lengths, resets: as in `marks`. A padded step gives zeros and leaves the states as they are.
        reset_to: the states after a reset, like `states`. None for zeros.
        codes: the result of `marks`, instead of lengths and resets.

    Returns:
        ``y`` (T, B, H); the states after the last step of each row; the cell states of all steps, ``(c,)`` with c (T, B, H),
        or ``()``; the gate activations of all steps (T, B, G, H), without gradient.
    """
    T, B, _ = x.shape
    if codes is None and (lengths is not None or resets is not None):
        codes = marks(x, lengths, resets, reverse)
    spec = CELLS[cell]
    zeros = (x.new_zeros(B, w_hh.shape[1]), *[x.new_zeros(B, w_hh.shape[0] // spec.gates)] * (spec.states - 1))
    start, reset = states or zeros, reset_to or zeros
    if codes is not None:
        codes = codes[..., None]
        x = x.masked_fill(codes == PADDED, 0)  # a NaN in padding would reach gradients as 0 * NaN
    states = start
    steps: list[States] = [()] * T
    for t in reversed(range(T)) if reverse else range(T):
        before = states
        if codes is not None:
            states = _select(codes[t] == STARTS, start, _select(codes[t] == RESETS, reset, states))
        states, gates = spec.step(x[t], states, w_ih, w_hh, b_ih, b_hh)
        if w_hr is not None:
            states = (linear(states[0], w_hr), *states[1:])
        steps[t] = (*states, torch.cat(gates, dim=1).detach())
        if codes is not None:
            padded = codes[t] == PADDED
            steps[t] = tuple(tensor.masked_fill(padded, 0) for tensor in steps[t])
            states = _select(padded, before, states)
    y, *cells, gates = (stack(tensors) for tensors in zip(*steps, strict=True))
    return y, states, tuple(cells), gates.view(T, B, spec.gates, -1)


def _select(condition: Tensor, where: States, otherwise: States) -> States:
    return tuple(torch.where(condition, a, b) for a, b in zip(where, otherwise, strict=True))
