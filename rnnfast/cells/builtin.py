"""The cells of torch.nn, each defined once. ``python -m rnnfast.derive --write kernels/cells`` prints their kernels from here.

The equations and the order of the gates are those of torch.nn: i, f, g, o for the LSTM (Hochreiter and Schmidhuber, 1997, with
the forget gate of Gers et al., 2000); r, z, n for the GRU (Cho et al., 2014, with the reset gate after the product); one gate
for the Elman network (1990).
"""

from __future__ import annotations

import torch
from torch import sigmoid, tanh

from rnnfast.derive.definition import cell, keep

__all__ = ["gru", "lstm", "rnn_relu", "rnn_tanh"]


@cell(gates="i f g o", states="h c")
def lstm(x, h, s):
    """Long short-term memory."""
    i = sigmoid(x.i + h.i)
    f = sigmoid(x.f + h.f)
    g = tanh(x.g + h.g)
    o = sigmoid(x.o + h.o)
    keep(i, f, g, o)
    c = f * s.c + i * g
    return o * tanh(c), c


@cell(gates="r z n", states="h")
def gru(x, h, s):
    """Gated recurrent unit; h' = (1 - z) n + z h, with a product less."""
    r = sigmoid(x.r + h.r)
    z = sigmoid(x.z + h.z)
    n = tanh(x.n + r * h.n)
    keep(r, z, n, h.n)
    return n + z * (s.h - n)


@cell(gates="a", states="h")
def rnn_tanh(x, h, s):
    """Elman network."""
    return tanh(x.a + h.a)


@cell(gates="a", states="h")
def rnn_relu(x, h, s):
    """Elman network with relu. Its derivative is taken where h' > 0."""
    return torch.relu(x.a + h.a)
