"""LSTMs with noise or a mask in the recurrence."""

import torch
from torch import sigmoid, tanh

from rnnfast.derive.definition import Noise, Row, cell

__all__ = ["variational_lstm", "zoneout_lstm"]


@cell(gates="i f g o", states="h c")
def zoneout_lstm(x, h, s, *, u_h: Noise, u_c: Noise, z_h: float = 0.05, z_c: float = 0.5, training: bool = True):
    """LSTM of which a part z_h of the units keeps h as it was at each step, and a part z_c keeps c; in evaluation the
    expectation (Krueger et al., 2017, "Zoneout: regularizing RNNs by randomly preserving hidden activations"; the defaults
    are those of its model of characters)."""
    i, f, o = sigmoid(x.i + h.i), sigmoid(x.f + h.f), sigmoid(x.o + h.o)
    g = tanh(x.g + h.g)
    c = f * s.c + i * g
    y = o * tanh(c)
    if training:
        return torch.where(u_h < z_h, s.h, y), torch.where(u_c < z_c, s.c, c)
    return z_h * s.h + (1 - z_h) * y, z_c * s.c + (1 - z_c) * c


@cell(gates="i f g o", states="h c y", output="y")
def variational_lstm(x, h, s, *, mask: Row):
    """LSTM with one dropout mask (B, H) for all steps: W_hh meets mask * y (Gal and Ghahramani, 2016, "A theoretically
    grounded application of dropout in recurrent neural networks"). So the state h is mask * y, and the output is y. Draw
    the mask as bernoulli(1 - p) / (1 - p), or ones in evaluation."""
    i, f, o = sigmoid(x.i + h.i), sigmoid(x.f + h.f), sigmoid(x.o + h.o)
    g = tanh(x.g + h.g)
    c = f * s.c + i * g
    y = o * tanh(c)
    return mask * y, c, y
