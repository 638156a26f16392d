"""LSTMs of fixed ranges, as quantised and embedded models have them."""

import torch
from torch import sigmoid, tanh

from rnnfast.derive.definition import cell

__all__ = ["clipped_lstm", "hard_sigmoid_lstm"]


@cell(gates="i f g o", states="h c")
def clipped_lstm(x, h, s, *, limit: float = 10.0):
    """LSTM whose cell state is clipped to -limit .. limit (Sak, Senior and Beaufays, 2014, "Long short-term memory
    recurrent neural network architectures for large scale acoustic modeling"; there limit is 50)."""
    i, f, o = sigmoid(x.i + h.i), sigmoid(x.f + h.f), sigmoid(x.o + h.o)
    g = tanh(x.g + h.g)
    c = torch.clamp(f * s.c + i * g, -limit, limit)
    return o * tanh(c), c


@cell(gates="i f g o", states="h c")
def hard_sigmoid_lstm(x, h, s):
    """LSTM with piecewise linear gates, clamp(v / 6 + 1/2, 0, 1), which is torch.nn.functional.hardsigmoid (Courbariaux,
    Bengio and David, 2015, "BinaryConnect", have the slope 1/2)."""
    i, f, o = (torch.clamp(v / 6 + 0.5, 0.0, 1.0) for v in (x.i + h.i, x.f + h.f, x.o + h.o))
    g = tanh(x.g + h.g)
    c = f * s.c + i * g
    return o * tanh(c), c
