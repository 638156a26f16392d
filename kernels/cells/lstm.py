"""The cell `lstm`, made by rnnfast.derive. Forward saves i, f, g, o."""

# @cell(gates="i f g o", states="h c")
# def lstm(x, h, s):
#     """Long short-term memory."""
#     i = sigmoid(x.i + h.i)
#     f = sigmoid(x.f + h.f)
#     g = tanh(x.g + h.g)
#     o = sigmoid(x.o + h.o)
#     keep(i, f, g, o)
#     c = f * s.c + i * g
#     return o * tanh(c), c

import triton
import triton.language as tl

from rnnfast.kernels.maths import sigmoid, tanh


@triton.jit
def forward(x_gates, h_gates, states, given):
    x_i, x_f, x_g, x_o = x_gates
    h_i, h_f, h_g, h_o = h_gates
    c = states[1]
    i = sigmoid(x_i + h_i)
    f = sigmoid(x_f + h_f)
    g = tanh(x_g + h_g)
    o = sigmoid(x_o + h_o)
    new_c = f * c + i * g
    new_h = o * tanh(new_c)
    return (new_h, new_c), (i, f, g, o)


@triton.jit
def backward(saved, states, new_states, given, d_states):
    i, f, g, o = saved
    c = states[1]
    new_c = new_states[1]
    d_h, d_c = d_states
    t0 = tanh(new_c)
    t1 = d_c + d_h * o * (1.0 - t0 * t0)
    d_c_before = t1 * f
    d_o = d_h * t0 * o * (1.0 - o)
    d_g = t1 * i * (1.0 - g * g)
    d_f = t1 * c * f * (1.0 - f)
    d_i = t1 * g * i * (1.0 - i)
    return (d_i, d_f, d_g, d_o), (tl.zeros_like(d_states[0]), d_c_before), ()
