"""Long short-term memory (Hochreiter and Schmidhuber, 1997; with the forget gate of Gers et al., 2000), as torch.nn.LSTM.

    i, f, o = sigmoid(x_i + h_i), sigmoid(x_f + h_f), sigmoid(x_o + h_o)      g = tanh(x_g + h_g)
    c_t = f c_{t-1} + i g                                                     h_t = o tanh(c_t)

where x_* and h_* are the input and hidden sides of each gate, in the order i, f, g, o.
"""

import triton
import triton.language as tl  # noqa: F401 - the interpreter wants it in sight of every jit function

from rnnfast.kernels.maths import sigmoid, tanh


@triton.jit
def forward(x_gates, h_gates, states, given):
    i = sigmoid(x_gates[0] + h_gates[0])
    f = sigmoid(x_gates[1] + h_gates[1])
    g = tanh(x_gates[2] + h_gates[2])
    o = sigmoid(x_gates[3] + h_gates[3])
    c = f * states[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


@triton.jit
def backward(saved, states, new_states, given, d_states):
    i, f, g, o = saved
    tanh_c = tanh(new_states[1])
    d_h = d_states[0]
    d_c = d_states[1] + d_h * o * (1.0 - tanh_c * tanh_c)
    d_i = d_c * g * i * (1.0 - i)
    d_f = d_c * states[1] * f * (1.0 - f)
    d_g = d_c * i * (1.0 - g * g)
    d_o = d_h * tanh_c * o * (1.0 - o)
    return (d_i, d_f, d_g, d_o), (d_h, d_c * f), ()
