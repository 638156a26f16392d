"""The cell `gru`, made by rnnfast.derive. Forward saves r, z, n, h.n."""

# @cell(gates="r z n", states="h")
# def gru(x, h, s):
#     """Gated recurrent unit; h' = (1 - z) n + z h, with a product less."""
#     r = sigmoid(x.r + h.r)
#     z = sigmoid(x.z + h.z)
#     n = tanh(x.n + r * h.n)
#     keep(r, z, n, h.n)
#     return n + z * (s.h - n)

import triton
import triton.language as tl  # noqa: F401 - the interpreter wants it in sight of every jit function

from rnnfast.kernels.maths import sigmoid, tanh


@triton.jit
def forward(x_gates, h_gates, states, given):
    x_r, x_z, x_n = x_gates
    h_r, h_z, h_n = h_gates
    h = states[0]
    r = sigmoid(x_r + h_r)
    z = sigmoid(x_z + h_z)
    n = tanh(x_n + r * h_n)
    new_h = n + z * (h - n)
    return (new_h,), (r, z, n, h_n)


@triton.jit
def backward(saved, states, new_states, given, d_states):
    r, z, n, h_n = saved
    h = states[0]
    d_h = d_states[0]
    d_h_before = d_h * z
    t0 = 1.0 - z
    d_x_n = d_h * t0 * (1.0 - n * n)
    d_h_n = d_x_n * r
    d_z = d_h * (h - n) * z * t0
    d_r = d_x_n * h_n * r * (1.0 - r)
    return (d_x_n, d_r, d_z, d_h_n), (d_h_before,), ()
