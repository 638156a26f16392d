"""Cells as a user writes them, for the tests of `rnnfast.Layer`: at the top of a module, where pickle finds them."""

import torch
from torch import sigmoid, tanh

from rnnfast import Learned, Noise, Row, cell

__all__ = ["cumulated", "everything", "gru", "indrnn", "lstm", "peephole", "rnn_tanh", "zoneout"]


@cell(gates="i f g o", states="h c")
def lstm(x, h, s):
    i, f, o = sigmoid(x.i + h.i), sigmoid(x.f + h.f), sigmoid(x.o + h.o)
    c = f * s.c + i * tanh(x.g + h.g)
    return o * tanh(c), c


@cell(gates="r z n", states="h")
def gru(x, h, s):
    r, z = sigmoid(x.r + h.r), sigmoid(x.z + h.z)
    n = tanh(x.n + r * h.n)
    return (1 - z) * n + z * s.h


@cell(gates="a", states="h")
def rnn_tanh(x, h, s):
    return tanh(x.a + h.a)


@cell(gates="i f g o", states="h c")
def peephole(x, h, s, *, w_i, w_f=Learned(1.0), w_o: Learned):
    i, f = sigmoid(x.i + h.i + w_i * s.c), sigmoid(x.f + h.f + w_f * s.c)
    c = f * s.c + i * tanh(x.g + h.g)
    o = sigmoid(x.o + h.o + w_o * c)
    return o * tanh(c), c


@cell(gates="f n", states="h c y", output="y")
def everything(x, h, s, *, w, mask: Row, leak: float = 0.25):
    """A learned vector, a row, a number, another output than h, and a gate with two sides."""
    f = sigmoid(x.f + h.f + w * s.c)
    n = tanh(x.n + f * h.n)
    c = (1 - leak) * f * s.c + leak * n
    y = n * tanh(c)
    return mask * y + leak * s.h, c, y


@cell(gates="i f g o", states="h c")
def zoneout(x, h, s, *, keep_h: Noise, z: float = 0.25, training: bool = True):
    i, f, o = sigmoid(x.i + h.i), sigmoid(x.f + h.f), sigmoid(x.o + h.o)
    c = f * s.c + i * tanh(x.g + h.g)
    y = o * tanh(c)
    return torch.where(keep_h < z, s.h, y) if training else z * s.h + (1 - z) * y, c


@cell(gates="a", states="h", recurrent=False)
def indrnn(x, s, *, u):
    return torch.relu(x.a + u * s.h)


@cell(gates="a", states="h")
def cumulated(x, h, s):
    """No kernels of it: a sum over units."""
    return tanh(torch.cumsum(x.a + h.a, -1))
