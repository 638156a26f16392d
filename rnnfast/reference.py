"""The equations in plain PyTorch: the definition of the project, and the oracle of its tests. Any floating dtype, any device.

Written to be read, one time step after another; autograd gives every gradient. For one layer and one direction:

    x      (T, B, I)    inputs of all time steps
    h0     (B, H)       initial hidden state; for the LSTM also c0 (B, H)
    w_ih   (G*H, I)     input weights, G blocks of H rows, a block a gate
    w_hh   (G*H, H)     recurrent weights
    b_ih   (G*H,)       biases, or None
    b_hh   (G*H,)
    y      (T, B, H)    the hidden state h_t of every time step

Gate order and equations are those of torch.nn: i, f, g, o for the LSTM (Hochreiter and Schmidhuber 1997, with the forget
gate of Gers et al. 2000), r, z, n for the GRU (Cho et al. 2014, reset after the product), one block for the Elman network.
"""

from __future__ import annotations

import torch
from torch import Tensor, relu, sigmoid, stack, tanh
from torch.nn.functional import linear

__all__ = ["GATES", "gru_step", "layer", "lstm_step", "marks", "rnn_relu_step", "rnn_tanh_step", "trace", "unroll"]

States = tuple[Tensor, ...]
Step = tuple[States, States]  # the new states, the gate activations in gate order

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


STEPS = {"lstm": lstm_step, "gru": gru_step, "rnn_tanh": rnn_tanh_step, "rnn_relu": rnn_relu_step}
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
# blocks of H that the kernels keep for backward, and that their gate gradients have: `Cell.saved` and `Cell.grads` of the
# kernels, said here too because PyTorch asks for the shapes of results where there is no Triton
SAVED = {"lstm": 4, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}
GRADS = {"lstm": 4, "gru": 4, "rnn_tanh": 1, "rnn_relu": 1}


def marks(x: Tensor, lengths: Tensor | None, resets: Tensor | None, reverse: bool) -> Tensor:
    """What state enters each step of each batch row, in the terms of the direction that runs.

    CONTINUES, that of the step before; STARTS, the initial state; RESETS, the reset state; PADDED, none: the step is padding.
    A reset is a boundary between two steps in time: forward it restarts the state that enters its step, in reverse the one that
    enters the step before it in time.

    Args:
        x: (T, B, I), for its shape and device.
        lengths: (B,) integers in 0..T, the steps of each row that count, the first ones; or None for all.
        resets: (T, B) bool, whether a boundary lies before a step; or None for no resets.
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


def layer(*args, **options) -> tuple[Tensor, States]:
    """`trace` without its details: ``y`` and the states after the last step taken."""
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
) -> tuple[Tensor, States, tuple[Tensor, ...], Tensor]:
    """One layer, one direction: the step unrolled over time.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        x: (T, B, I).
        states: ``(h0, c0)`` for the LSTM, ``(h0,)`` otherwise, each (B, H); None for zeros.
        w_ih, w_hh, b_ih, b_hh: weights as above.
        w_hr: (P, H), of an LSTM with h_t = W_hr (o tanh(c_t)); H is then P in the shapes of h0, ``y`` and w_hh, (G*H, P).
        reverse: from the last step to the first; ``y[t]`` still belongs to ``x[t]``.
        lengths, resets: as in `marks`; both None for full rows that nothing restarts. A padded step gives zeros and leaves
            the states as they are.
        reset_to: what resets restart from, like `states`; None for zeros.

    Returns:
        ``y`` (T, B, H); the states after the last step taken; the cell states of all steps, ``(c,)`` with c (T, B, H), or
        ``()``; the gate activations of all steps (T, B, G, H), without gradient.
    """
    codes = None if lengths is None and resets is None else marks(x, lengths, resets, reverse)
    return unroll(cell, x, states, w_ih, w_hh, b_ih, b_hh, w_hr, reverse=reverse, codes=codes, reset_to=reset_to)


def unroll(
    cell: str,
    x: Tensor,
    states: States | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None = None,
    *,
    reverse: bool,
    codes: Tensor | None,
    reset_to: States | None,
) -> tuple[Tensor, States, tuple[Tensor, ...], Tensor]:
    """`trace`, of which lengths and resets are known as `codes`, the (T, B) of `marks`; None for neither."""
    T, B, _ = x.shape
    zeros = (x.new_zeros(B, w_hh.shape[1]), x.new_zeros(B, w_hh.shape[0] // GATES[cell]))[: 2 if cell == "lstm" else 1]
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
        states, gates = STEPS[cell](x[t], states, w_ih, w_hh, b_ih, b_hh)
        if w_hr is not None:
            states = (linear(states[0], w_hr), *states[1:])
        steps[t] = (*states, torch.cat(gates, dim=1).detach())
        if codes is not None:
            padded = codes[t] == PADDED
            steps[t] = tuple(tensor.masked_fill(padded, 0) for tensor in steps[t])
            states = _select(padded, before, states)
    y, *cells, gates = (stack(tensors) for tensors in zip(*steps, strict=True))
    return y, states, tuple(cells), gates.view(T, B, GATES[cell], -1)


def _select(condition: Tensor, where: States, otherwise: States) -> States:
    return tuple(torch.where(condition, a, b) for a, b in zip(where, otherwise, strict=True))
