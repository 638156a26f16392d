"""Layer normalisation in the recurrence. These cells need means of whole rows: the step and one-program kernels run them.

What is normalised is W_ih x + b_ih and W_hh h + b_hh. For the published forms make the layer with bias=False.
"""

from torch import sigmoid, tanh

from rnnfast.derive.definition import Learned, cell, row_norm

__all__ = ["layer_norm_gru", "layer_norm_lstm"]

ONES, ZEROS = Learned(1.0), Learned(0.0)


@cell(gates="i f g o", states="h c")
def layer_norm_lstm(
    x, h, s, *, x_i=ONES, x_f=ONES, x_g=ONES, x_o=ONES, h_i=ONES, h_f=ONES, h_g=ONES, h_o=ONES, b_i=ZEROS, b_f=ZEROS,
    b_g=ZEROS, b_o=ZEROS, gain=ONES, offset=ZEROS,
):  # fmt: skip
    """LSTM of layer norms (Ba, Kiros and Hinton, 2016, "Layer normalization", appendix), as haste has it: W_ih x and W_hh h
    are normalised over the 4 H units of all gates, c where the output reads it. Learned: gains x_ and h_, biases b_, and
    gain and offset of c. (PyTorch's benchmarks/fastrnns/custom_lstms.py has another form: it carries the normalised c.)"""
    sides = zip((x_i, x_f, x_g, x_o), row_norm(*x), (h_i, h_f, h_g, h_o), row_norm(*h), (b_i, b_f, b_g, b_o), strict=True)
    i, f, g, o = (gain_x * a + gain_h * b + bias for gain_x, a, gain_h, b, bias in sides)
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * s.c + i * g
    return o * tanh(gain * row_norm(c) + offset), c


@cell(gates="r z n", states="h")
def layer_norm_gru(
    x, h, s, *, x_r=ONES, x_z=ONES, x_n=ONES, h_r=ONES, h_z=ONES, h_n=ONES, b_r=ZEROS, b_z=ZEROS, b_n=ZEROS, c_n=ZEROS
):
    """GRU of layer norms as haste has it: W_ih x and W_hh h are normalised over the 3 H units of all gates (Ba et al.,
    2016, normalise n apart), and the reset comes after the product. Learned: gains x_ and h_, biases b_, and c_n, which the
    reset multiplies."""
    (a_r, a_z, a_n), (d_r, d_z, d_n) = row_norm(*x), row_norm(*h)
    r, z = sigmoid(x_r * a_r + h_r * d_r + b_r), sigmoid(x_z * a_z + h_z * d_z + b_z)
    n = tanh(x_n * a_n + b_n + r * (h_n * d_n + c_n))
    return (1 - z) * n + z * s.h
