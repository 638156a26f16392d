"""Gated recurrent unit (Cho et al., 2014), in the form of torch.nn.GRU: the reset gate after the matrix product.

    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)      n = tanh(x_n + r h_n)      h_t = (1 - z) n + z h_{t-1}

where x_* and h_* are the input and hidden sides of each gate, in the order r, z, n; h_n includes its bias. The two sides
of the new gate have different gradients, stored in the order x_n, r, z, h_n.
"""

import triton
import triton.language as tl  # noqa: F401 - the interpreter wants it in sight of every jit function

from rnnfast.kernels.maths import sigmoid, tanh


@triton.jit
def forward(x_gates, h_gates, states, given):
    r = sigmoid(x_gates[0] + h_gates[0])
    z = sigmoid(x_gates[1] + h_gates[1])
    n = tanh(x_gates[2] + r * h_gates[2])
    h = n + z * (states[0] - n)
    return (h,), (r, z, n, h_gates[2])


@triton.jit
def backward(saved, states, new_states, given, d_states):
    r, z, n, h_n = saved
    d_h = d_states[0]
    d_xn = d_h * (1.0 - z) * (1.0 - n * n)
    d_z = d_h * (states[0] - n) * z * (1.0 - z)
    d_r = d_xn * h_n * r * (1.0 - r)
    return (d_xn, d_r, d_z, d_xn * r), (d_h * z,), ()
