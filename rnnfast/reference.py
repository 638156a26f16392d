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

from torch import Tensor, relu, sigmoid, stack, tanh
from torch.nn.functional import linear

__all__ = ["GATES", "gru_step", "layer", "lstm_step", "rnn_relu_step", "rnn_tanh_step"]

States = tuple[Tensor, ...]


def lstm_step(x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> States:
    """i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c')."""
    h, c = states
    i, f, g, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, dim=-1)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def gru_step(x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> States:
    """r, z = sigmoid(.); n = tanh(x_n + r h_n) with h_n = W_hn h + b_hn; h' = (1 - z) n + z h."""
    (h,) = states
    x_r, x_z, x_n = linear(x, w_ih, b_ih).chunk(3, dim=-1)
    h_r, h_z, h_n = linear(h, w_hh, b_hh).chunk(3, dim=-1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = tanh(x_n + r * h_n)
    return ((1 - z) * n + z * h,)


def rnn_tanh_step(x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> States:
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    return (tanh(linear(x, w_ih, b_ih) + linear(states[0], w_hh, b_hh)),)


def rnn_relu_step(x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> States:
    """h' = relu(W_ih x + b_ih + W_hh h + b_hh)."""
    return (relu(linear(x, w_ih, b_ih) + linear(states[0], w_hh, b_hh)),)


STEPS = {"lstm": lstm_step, "gru": gru_step, "rnn_tanh": rnn_tanh_step, "rnn_relu": rnn_relu_step}
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
# blocks of H that the kernels keep for backward, and that their gate gradients have: `Cell.saved` and `Cell.grads` of the
# kernels, said here too because PyTorch asks for the shapes of results where there is no Triton
SAVED = {"lstm": 4, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}
GRADS = {"lstm": 4, "gru": 4, "rnn_tanh": 1, "rnn_relu": 1}


def layer(
    cell: str,
    x: Tensor,
    states: States | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, States]:
    """One layer, one direction: the step unrolled over time.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        x: (T, B, I).
        states: ``(h0, c0)`` for the LSTM, ``(h0,)`` otherwise, each (B, H); None for zeros.
        w_ih, w_hh, b_ih, b_hh: weights as above.
        reverse: from the last step to the first; ``y[t]`` still belongs to ``x[t]``.

    Returns:
        ``y`` (T, B, H) and the states after the last step taken.
    """
    step, outputs = STEPS[cell], [x] * x.shape[0]
    if states is None:
        states = (x.new_zeros(x.shape[1], w_hh.shape[1]),) * (2 if cell == "lstm" else 1)
    for t in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
        states = step(x[t], states, w_ih, w_hh, b_ih, b_hh)
        outputs[t] = states[0]
    return stack(outputs), states
