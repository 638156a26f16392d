"""Cells that no built-in one is like, for the tests of kernels: by hand in Triton, and in plain PyTorch.

    peephole    three learned vectors (held tiles) that meet the cell state, one of them the new one
    slstm       three carried states, exponential gates
    five        five gates, the last two with sides of their own; two carried states, two held tiles, two tiles of noise; and h
                before the step reaches the one after it by a way other than W_hh
    normed      a layer normalisation in the cell, so that it needs whole rows

`CELLS` has what kernels know of each, `STEPS` its plain function ``step(x, h, states, given) -> new states``. x and h are
tuples of the input and hidden sides of the gates, biases included; states are h and the carried ones; given are the held tiles
and the noise. `STEPS` also has the functions of the built-in cells.
"""

import torch
import triton
import triton.language as tl

from rnnfast.kernels import cells
from rnnfast.kernels.cells import Cell
from rnnfast.kernels.maths import exp, log1p, sigmoid, tanh

__all__ = ["CELLS", "STEPS"]


def lstm(x, h, states, given):
    i, f, o = (torch.sigmoid(x[n] + h[n]) for n in (0, 1, 3))
    c = f * states[1] + i * torch.tanh(x[2] + h[2])
    return o * torch.tanh(c), c


def gru(x, h, states, given):
    r, z = (torch.sigmoid(x[n] + h[n]) for n in (0, 1))
    n = torch.tanh(x[2] + r * h[2])
    return ((1 - z) * n + z * states[0],)


def rnn_tanh(x, h, states, given):
    return (torch.tanh(x[0] + h[0]),)


def rnn_relu(x, h, states, given):
    return (torch.relu(x[0] + h[0]),)


def peephole(x, h, states, given):
    """Gers and Schmidhuber, 2000. The gates are i, f, g, o."""
    c, (w_i, w_f, w_o) = states[1], given
    i, f = torch.sigmoid(x[0] + h[0] + w_i * c), torch.sigmoid(x[1] + h[1] + w_f * c)
    new_c = f * c + i * torch.tanh(x[2] + h[2])
    o = torch.sigmoid(x[3] + h[3] + w_o * new_c)
    return o * torch.tanh(new_c), new_c


@triton.jit
def peephole_forward(x_gates, h_gates, states, given):
    c = states[1]
    i = sigmoid(x_gates[0] + h_gates[0] + given[0] * c)
    f = sigmoid(x_gates[1] + h_gates[1] + given[1] * c)
    g = tanh(x_gates[2] + h_gates[2])
    new_c = f * c + i * g
    o = sigmoid(x_gates[3] + h_gates[3] + given[2] * new_c)
    return (o * tanh(new_c), new_c), (i, f, g, o)


@triton.jit
def peephole_backward(saved, states, new_states, given, d_states):
    i, f, g, o = saved
    c, new_c = states[1], new_states[1]
    tanh_c = tanh(new_c)
    d_o = d_states[0] * tanh_c * o * (1.0 - o)
    d_c = d_states[1] + d_states[0] * o * (1.0 - tanh_c * tanh_c) + d_o * given[2]
    d_i = d_c * g * i * (1.0 - i)
    d_f = d_c * c * f * (1.0 - f)
    d_g = d_c * i * (1.0 - g * g)
    d_c_before = d_c * f + d_f * given[1] + d_i * given[0]
    return (d_i, d_f, d_g, d_o), (tl.zeros_like(d_c), d_c_before), (d_i * c, d_f * c, d_o * new_c)


def slstm(x, h, states, given):
    """xLSTM's scalar cell (Beck et al., 2024), with max(|n|, 1) for n. The gates are i, f, z, o; c, n and the stabiliser m are
    carried. No gradient passes through the stabiliser of the step."""
    _, c, n, m = states
    log_i, log_f = x[0] + h[0], torch.nn.functional.logsigmoid(x[1] + h[1]) + m
    new_m = torch.maximum(log_i, log_f).detach()
    i, f = torch.exp(log_i - new_m), torch.exp(log_f - new_m)
    new_c = f * c + i * torch.tanh(x[2] + h[2])
    new_n = f * n + i
    return torch.sigmoid(x[3] + h[3]) * new_c / new_n.abs().clamp(min=1), new_c, new_n, new_m


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0, tl.PropagateNan.ALL) - log1p(exp(-tl.abs(x)))


@triton.jit
def slstm_forward(x_gates, h_gates, states, given):
    log_i = x_gates[0] + h_gates[0]
    s = x_gates[1] + h_gates[1]
    log_f = log_sigmoid(s) + states[3]
    new_m = tl.maximum(log_i, log_f, tl.PropagateNan.ALL)
    i = exp(log_i - new_m)
    f = exp(log_f - new_m)
    z = tanh(x_gates[2] + h_gates[2])
    o = sigmoid(x_gates[3] + h_gates[3])
    new_c = f * states[1] + i * z
    new_n = f * states[2] + i
    new_h = o * new_c / tl.maximum(tl.abs(new_n), 1.0, tl.PropagateNan.ALL)
    return (new_h, new_c, new_n, new_m), (i, s, z, o)


@triton.jit
def slstm_backward(saved, states, new_states, given, d_states):
    i, s, z, o = saved
    new_c, new_n = new_states[1], new_states[2]
    f = exp(log_sigmoid(s) + states[3] - new_states[3])
    by = 1.0 / tl.maximum(tl.abs(new_n), 1.0, tl.PropagateNan.ALL)
    d_o = d_states[0] * new_c * by * o * (1.0 - o)
    d_c = d_states[1] + d_states[0] * o * by
    d_n = d_states[2] - tl.where(tl.abs(new_n) >= 1.0, d_states[0] * o * new_c * by / new_n, 0.0)
    d_log_i = (d_c * z + d_n) * i
    d_log_f = (d_c * states[1] + d_n * states[2]) * f
    d_z = d_c * i * (1.0 - z * z)
    d_gates = (d_log_i, d_log_f * (1.0 - sigmoid(s)), d_z, d_o)
    return d_gates, (tl.zeros_like(d_c), d_c * f, d_n * f, d_log_f), ()


def five(x, h, states, given):
    """The gates are a to e. Noise makes some units of n keep their value, and is added in the output."""
    before, c, n = states
    w, row, u, v = given
    a, b = torch.sigmoid(x[0] + h[0]), torch.sigmoid(x[1] + h[1] + w * c)
    new_c = torch.sigmoid(x[2] + h[2]) * c + a * torch.tanh(x[3] + a * h[3]) * row
    new_n = torch.where(u < 0.3, n, 0.5 * n + torch.tanh(x[4] + b * h[4]))
    return b * torch.tanh(new_c + new_n * v) + 0.1 * before, new_c, new_n


@triton.jit
def five_forward(x_gates, h_gates, states, given):
    h, c, n = states
    w, row, u, v = given
    a = sigmoid(x_gates[0] + h_gates[0])
    b = sigmoid(x_gates[1] + h_gates[1] + w * c)
    keep = sigmoid(x_gates[2] + h_gates[2])
    d = tanh(x_gates[3] + a * h_gates[3])
    e = tanh(x_gates[4] + b * h_gates[4])
    new_c = keep * c + a * d * row
    new_n = tl.where(u < 0.3, n, 0.5 * n + e)
    new_h = b * tanh(new_c + new_n * v) + 0.1 * h
    return (new_h, new_c, new_n), (a, b, keep, d, e, h_gates[3], h_gates[4])


@triton.jit
def five_backward(saved, states, new_states, given, d_states):
    a, b, keep, d, e, h_d, h_e = saved
    c = states[1]
    w, row, u, v = given
    tanh_y = tanh(new_states[1] + new_states[2] * v)
    d_y = d_states[0] * b * (1.0 - tanh_y * tanh_y)
    d_n = d_states[2] + d_y * v
    kept = u < 0.3
    d_x_e = tl.where(kept, 0.0, d_n) * (1.0 - e * e)
    d_c = d_states[1] + d_y
    d_x_d = d_c * a * row * (1.0 - d * d)
    d_a = (d_c * d * row + d_x_d * h_d) * a * (1.0 - a)
    d_b = (d_states[0] * tanh_y + d_x_e * h_e) * b * (1.0 - b)
    d_keep = d_c * c * keep * (1.0 - keep)
    d_gates = (d_x_d, d_x_e, d_a, d_b, d_keep, d_x_d * a, d_x_e * b)
    d_before = (0.1 * d_states[0], d_c * keep + d_b * w, tl.where(kept, d_n, 0.5 * d_n))
    return d_gates, d_before, (d_b * c, d_c * a * d)


EPS = tl.constexpr(1e-5)


def normed(x, h, states, given):
    """tanh of a normalised sum, without gain and offset."""
    return (torch.tanh(torch.nn.functional.layer_norm(x[0] + h[0], x[0].shape[-1:], eps=EPS.value)),)


@triton.jit
def normed_forward(x_gates, h_gates, states, given, row, row_mean):
    a = x_gates[0] + h_gates[0]
    centred = a - row_mean(a, 0, row)
    scale = 1.0 / tl.sqrt(row_mean(centred * centred, 1, row) + EPS)
    n = centred * scale
    return (tanh(n),), (n, scale)


@triton.jit
def normed_backward(saved, states, new_states, given, d_states, row, row_mean):
    n, scale = saved
    d_n = d_states[0] * (1.0 - new_states[0] * new_states[0])
    d_a = scale * (d_n - row_mean(d_n, 0, row) - n * row_mean(d_n * n, 1, row))
    return (d_a,), (tl.zeros_like(d_a),), ()


CELLS = cells.CELLS | {
    "peephole": Cell(4, 4, 4, 1, False, peephole_forward, peephole_backward, held=3),
    "slstm": Cell(4, 4, 4, 3, False, slstm_forward, slstm_backward),
    "five": Cell(5, 7, 7, 2, True, five_forward, five_backward, held=2, noise=2),
    "normed": Cell(1, 2, 1, 0, False, normed_forward, normed_backward, rows=True),
}
STEPS = {
    "lstm": lstm, "gru": gru, "rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu, "peephole": peephole, "slstm": slstm, "five": five,
    "normed": normed,
}  # fmt: skip
