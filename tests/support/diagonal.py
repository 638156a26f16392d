"""Cells without W_hh for the tests of the scan kernels: as in `support.cells`, by hand in Triton and in plain PyTorch.

indrnn  a learned vector in place of W_hh (Li et al., 2018)
quasi   h reaches the step after it through the cell state only, as in a quasi-recurrent net (Bradbury et al., 2017)
mixed   two carried states, two held tiles, noise; h reaches the step after it in two ways
"""

import torch
import triton
import triton.language as tl

from rnnfast.kernels.cells import Cell
from rnnfast.kernels.maths import sigmoid, tanh

__all__ = ["CELLS", "STEPS"]


def indrnn(x, h, states, given):
    return (torch.relu(x[0] + given[0] * states[0]),)


@triton.jit
def indrnn_forward(x_gates, h_gates, states, given):
    y = x_gates[0] + given[0] * states[0]
    return (tl.where(y <= 0.0, 0.0, y),), ()


@triton.jit
def indrnn_backward(saved, states, new_states, given, d_states):
    d_y = tl.where(new_states[0] <= 0.0, 0.0, d_states[0])
    return (d_y,), (d_y * given[0],), (d_y * states[0],)


def quasi(x, h, states, given):
    f, z, o = torch.sigmoid(x[0]), torch.tanh(x[1]), torch.sigmoid(x[2])
    c = f * states[1] + (1 - f) * z
    return o * c, c


@triton.jit
def quasi_forward(x_gates, h_gates, states, given):
    f = sigmoid(x_gates[0])
    z = tanh(x_gates[1])
    o = sigmoid(x_gates[2])
    c = z + f * (states[1] - z)
    return (o * c, c), (f, z, o)


@triton.jit
def quasi_backward(saved, states, new_states, given, d_states):
    f, z, o = saved
    d_c = d_states[1] + d_states[0] * o
    d_f = d_c * (states[1] - z) * f * (1.0 - f)
    d_z = d_c * (1.0 - f) * (1.0 - z * z)
    d_o = d_states[0] * new_states[1] * o * (1.0 - o)
    return (d_f, d_z, d_o), (tl.zeros_like(d_c), d_c * f), ()


def mixed(x, h, states, given):
    before, c, n = states
    w, v, u = given
    f, z = torch.sigmoid(x[0] + w * before), torch.tanh(x[1] + v * c)
    new_c = f * c + (1 - f) * z
    new_n = torch.where(u < 0.3, n, 0.5 * n + new_c)
    return f * torch.tanh(new_c + new_n) + 0.1 * before, new_c, new_n


@triton.jit
def mixed_forward(x_gates, h_gates, states, given):
    h, c, n = states
    w, v, u = given
    f = sigmoid(x_gates[0] + w * h)
    z = tanh(x_gates[1] + v * c)
    new_c = f * c + (1.0 - f) * z
    new_n = tl.where(u < 0.3, n, 0.5 * n + new_c)
    return (f * tanh(new_c + new_n) + 0.1 * h, new_c, new_n), (f, z)


@triton.jit
def mixed_backward(saved, states, new_states, given, d_states):
    f, z = saved
    h, c = states[0], states[1]
    w, v, u = given
    tanh_y = tanh(new_states[1] + new_states[2])
    d_y = d_states[0] * f * (1.0 - tanh_y * tanh_y)
    d_n = d_states[2] + d_y
    kept = u < 0.3
    d_c = d_states[1] + d_y + tl.where(kept, 0.0, d_n)
    d_f = (d_states[0] * tanh_y + d_c * (c - z)) * f * (1.0 - f)
    d_z = d_c * (1.0 - f) * (1.0 - z * z)
    d_before = (0.1 * d_states[0] + d_f * w, d_c * f + d_z * v, tl.where(kept, d_n, 0.5 * d_n))
    return (d_f, d_z), d_before, (d_f * h, d_z * c)


CELLS = {
    "indrnn": Cell(1, 0, 1, 0, True, indrnn_forward, indrnn_backward, held=1, recurrent=False),
    "quasi": Cell(3, 3, 3, 1, False, quasi_forward, quasi_backward, recurrent=False),
    "mixed": Cell(2, 2, 2, 2, True, mixed_forward, mixed_backward, held=2, noise=1, recurrent=False),
}
STEPS = {"indrnn": indrnn, "quasi": quasi, "mixed": mixed}
