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
from torch import Tensor, stack
from torch.nn.functional import linear

from rnnfast.cells import builtin

__all__ = [
    "CELLS", "GATES", "Cell", "Traced", "Weights", "alone", "group", "joined", "layer", "marks", "noise", "spec_of", "trace",
]  # fmt: skip

States = tuple[Tensor, ...]
Step = tuple[States, States]  # the new states, and what the cell keeps: its gate activations in gate order

CONTINUES, STARTS, RESETS, PADDED = range(4)  # the marks: see `marks`


@dataclass(frozen=True, eq=False)
class Cell:
    """What the code around the kernels has to know of a cell. Only `step` is an equation.

    What it has in common with `rnnfast.kernels.cells.Cell` is here too, because PyTorch asks for the shapes of results where
    there is no Triton. `rnnfast.kernels.cells` explains it.

    Attributes:
        step: the equations of one time step, ``step(x, h, states, given) -> (new_states, kept)``. x (B, G * H) is W_ih x_t +
            b_ih; h (B, G * H) is W_hh h_{t-1} + b_hh, None without W_hh; the states, those given (held, then noise) and what is
            kept are tuples of (B, H).
        states: the states that a caller sees: h, then those carried in float32.
        gates: blocks of H rows in the weights.
        saved: blocks of H that the kernels save for backward, for each batch row and step.
        grads: blocks of H of gate gradients.
        held, noise: tiles that no step changes, and tiles of random numbers.
        recurrent: whether there is a W_hh. Without, it has the shape (0, H).
        rows: whether a step needs the means of whole rows.
        kept32: blocks of H that the kernels save in float32: further carried states, which nothing reads before the step.
        reads_h_before: whether backward of a step reads h_{t-1}.
        allows_edits: whether the input, the biases and the output may be edited in place before backward, where it does not
            read the values that were. As in torch.nn on a CPU: its LSTM (oneDNN) refuses, its GRU and RNN accept.
    """

    step: Callable[[Tensor, Any, States, States], Step]
    states: int
    gates: int
    saved: int
    grads: int
    held: int = 0
    noise: int = 0
    recurrent: bool = True
    rows: bool = False
    kept32: int = 0
    reads_h_before: bool = False
    allows_edits: bool = True

    @property
    def carried(self) -> int:
        """States that the kernels carry in float32."""
        return self.states - 1 + self.kept32

    @property
    def apart(self) -> int:
        """How many gates, the last ones, have two sides with gradients of their own."""
        return self.grads - self.gates


CELLS = {
    "lstm": Cell(builtin.lstm.step, states=2, gates=4, saved=4, grads=4, allows_edits=False),
    "gru": Cell(builtin.gru.step, states=1, gates=3, saved=4, grads=4, reads_h_before=True),
    "rnn_tanh": Cell(builtin.rnn_tanh.step, states=1, gates=1, saved=0, grads=1),
    "rnn_relu": Cell(builtin.rnn_relu.step, states=1, gates=1, saved=0, grads=1),
}
"""The cells by name. `rnnfast.derive.registry` adds those that a user defines."""
STATES = {name: cell.states for name, cell in CELLS.items()}
GATES = {name: cell.gates for name, cell in CELLS.items()}
SAVED = {name: cell.saved for name, cell in CELLS.items()}


def spec_of(cell: str | Cell) -> Cell:
    """The cell of this name.

    Raises:
        RuntimeError: there is none, as in a process that loads a program with a user's cell before it made a layer of it.
    """
    if not isinstance(cell, str):
        return cell
    if cell not in CELLS:
        raise RuntimeError(
            f"this process does not know the cell {cell!r}: make an rnnfast.Layer of it, with the same numbers, before a "
            "program runs that was compiled or exported with the cell"
        )
    return CELLS[cell]


def noise(seed: Tensor, T: int, B: int, H: int, count: int) -> Tensor:
    """The random numbers of a cell, (count, T, B, H) in float32: those of `rnnfast.kernels.given`, where the method is named.

    Args:
        seed: one int64.
    """
    low32 = 0xFFFFFFFF
    row = torch.arange(T * B, device=seed.device)[:, None]
    seed = seed.reshape(())
    c = [torch.arange(H, device=seed.device) + 0 * row, row & low32, row >> 32, 0 * row]
    k0, k1 = seed & low32, seed >> 32 & low32
    for _ in range(10):
        products = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # int64 wraps, which leaves the 64 bits right
        (high0, low0), (high2, low2) = ((product >> 32 & low32, product & low32) for product in products)
        c = [high2 ^ c[1] ^ k0, low2, high0 ^ c[3] ^ k1, low0]
        k0, k1 = k0 + 0x9E3779B9 & low32, k1 + 0xBB67AE85 & low32
    words = [(word.expand(T * B, H) >> 8).float() / (1 << 24) for word in c[:count]]
    return stack(words).view(count, T, B, H)


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
    held: Tensor | None = None


class Traced(NamedTuple):
    """The results of `group`.

    Attributes:
        y: (T, B, D * H), the hidden states of all steps, of D directions side by side.
        last: the states after the last step of each row, (members, B, H).
        cells: with ``details``, the states besides h of all steps, (T, B, D * H) each.
        gates: with ``details``, the gate activations of all steps, (T, B, D, G, H), without gradient; None for a cell that
            does not keep them.
    """

    y: Tensor
    last: States
    cells: tuple[Tensor, ...]
    gates: Tensor | None


def group(
    cell: str | Cell,
    x: Tensor,
    states: States | None,
    weights: Sequence[Weights],
    *,
    flips: int = 0,
    details: bool = False,
    reset_to: States | None = None,
    noise: Tensor | None = None,
    **options: Any,
) -> Traced:
    """Members that read one input and lie side by side: the directions of a layer, or its heads.

    Args:
        cell, x: as for `trace`.
        states, reset_to: as for `trace`, but of all members, (M, B, H) each.
        weights: those of each member.
        flips: bit m is 1 if member m runs from the last step to the first.
        details: whether the states besides h and the gates are wanted.
        noise: (M,) int64, a seed for each member, for a cell with noise.
        options: the others of `trace`.
    """
    ys, lasts, cells, gates = [], [], [], []
    for m, own in enumerate(weights):
        starts = [None if given is None else tuple(state[m] for state in given) for given in (states, reset_to)]
        seed = None if noise is None else noise[m]
        found = trace(cell, x, starts[0], *own, reverse=bool(flips >> m & 1), reset_to=starts[1], seed=seed, **options)
        for results, result in zip((ys, lasts, cells, gates), found, strict=True):
            results.append(result)
    last = tuple(stack(state) for state in zip(*lasts, strict=True))
    if not details:
        return Traced(joined(ys), last, (), None)
    others = tuple(joined(each) for each in zip(*cells, strict=True))
    return Traced(joined(ys), last, others, None if gates[0] is None else stack(gates, dim=2))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Side by side."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=-1)


def alone(
    run: Callable[..., Traced],
    cell: str | Cell,
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
    cell: str | Cell,
    x: Tensor,
    states: States | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    held: Tensor | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_to: States | None = None,
    codes: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, States, tuple[Tensor, ...], Tensor | None]:
    """One layer in one direction: the step, unrolled over time.

    Args:
        cell: a name in `CELLS`, or a cell.
        x: (T, B, I).
        states: ``(h0, c0)`` for the LSTM, ``(h0,)`` for a cell with one state, each (B, H). None for zeros.
        w_ih, w_hh, b_ih, b_hh: weights, with the shapes above. For a cell without W_hh w_hh is (0, H) and b_hh is None.
        w_hr: (P, H), for an LSTM with h_t = W_hr (o tanh(c_t)). Then h0 and ``y`` have P units instead of H, and w_hh is
            (G*H, P).
        held: (B, E*H), or (1, E*H) for all rows: the E tiles that no step changes, side by side.
        reverse: from the last step to the first; ``y[t]`` still belongs to ``x[t]``.
        lengths, resets: as in `marks`. A padded step gives zeros and leaves the states as they are.
        reset_to: the states after a reset, like `states`. None for zeros.
        codes: the result of `marks`, instead of lengths and resets.
        seed: one int64, for a cell with noise.

    Returns:
        ``y`` (T, B, H); the states after the last step of each row; the states besides h of all steps, (T, B, H) each; the gate
        activations of all steps (T, B, G, H), without gradient, or None for a cell that does not keep them.
    """
    T, B, _ = x.shape
    if codes is None and (lengths is not None or resets is not None):
        codes = marks(x, lengths, resets, reverse)
    spec = spec_of(cell)
    H = w_ih.shape[0] // spec.gates
    zeros = (x.new_zeros(B, w_hh.shape[1]), *[x.new_zeros(B, H)] * (spec.states - 1))
    start, reset = states or zeros, reset_to or zeros
    tiles = () if held is None else held.expand(B, -1).chunk(spec.held, -1)
    if spec.noise:
        assert seed is not None
        random = noise(seed, T, B, H, spec.noise).to(x.dtype)
    if codes is not None:
        codes = codes[..., None]
        x = x.masked_fill(codes == PADDED, 0)  # a NaN in padding would reach gradients as 0 * NaN
    states = start
    steps: list[States] = [()] * T
    for t in reversed(range(T)) if reverse else range(T):
        before = states
        if codes is not None:
            states = _select(codes[t] == STARTS, start, _select(codes[t] == RESETS, reset, states))
        hidden = linear(states[0], w_hh, b_hh) if spec.recurrent else None
        given = (*tiles, *random[:, t]) if spec.noise else tiles
        states, kept = spec.step(linear(x[t], w_ih, b_ih), hidden, states, given)
        if w_hr is not None:
            states = (linear(states[0], w_hr), *states[1:])
        kept = kept[: spec.gates] or states[:1]
        steps[t] = (*states, torch.cat(kept, dim=1).detach())
        if codes is not None:
            padded = codes[t] == PADDED
            steps[t] = tuple(tensor.masked_fill(padded, 0) for tensor in steps[t])
            states = _select(padded, before, states)
    y, *cells, gates = (stack(tensors) for tensors in zip(*steps, strict=True))
    keeps_gates = gates.shape[-1] == spec.gates * H
    return y, states, tuple(cells), gates.view(T, B, spec.gates, -1) if keeps_gates else None


def _select(condition: Tensor, where: States, otherwise: States) -> States:
    return tuple(torch.where(condition, a, b) for a, b in zip(where, otherwise, strict=True))
