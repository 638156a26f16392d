"""Elman network (Elman, 1990), as torch.nn.RNN: h_t = f(x + h) with f = tanh or relu, x and h the gate's two sides.

Backward needs nothing but h_t, which the output holds: tanh' = 1 - h_t^2, relu' = 0 where h_t <= 0, else 1.
"""

import triton
import triton.language as tl

from rnnfast.kernels.maths import tanh


@triton.jit
def tanh_forward(x_gates, h_gates, states, given):
    return (tanh(x_gates[0] + h_gates[0]),), ()


@triton.jit
def tanh_backward(saved, states, new_states, given, d_states):
    h = new_states[0]
    d_h = d_states[0]
    return (d_h * (1.0 - h * h),), (d_h,), ()


@triton.jit
def relu_forward(x_gates, h_gates, states, given):
    gate = x_gates[0] + h_gates[0]
    return (tl.where(gate < 0.0, 0.0, gate),), ()  # a NaN stays a NaN, as in torch.relu


@triton.jit
def relu_backward(saved, states, new_states, given, d_states):
    d_h = d_states[0]
    return (tl.where(new_states[0] <= 0.0, 0.0, d_h),), (d_h,), ()
