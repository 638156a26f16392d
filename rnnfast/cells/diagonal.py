"""Cells without W_hh: no unit waits for another, and a scan runs all steps in one launch."""

import torch
from torch import sigmoid, tanh
from torch.nn.functional import logsigmoid

from rnnfast.derive.definition import cell

__all__ = ["indrnn", "mingru", "minlstm", "qrnn", "sru"]


@cell(gates="a", states="h", recurrent=False)
def indrnn(x, s, *, u):
    """h' = relu(W x + u h + b) (Li, Li, Cook, Zhu and Gao, 2018, "Independently recurrent neural network (IndRNN)").
    Learned: u, a number a unit."""
    return torch.relu(x.a + u * s.h)


@cell(gates="z f r k", states="h c", recurrent=False)
def sru(x, s, *, v_f, v_r):
    """Simple recurrent unit (Lei, Zhang, Wang, Dai and Artzi, 2018, "Simple recurrent units for highly parallelizable
    recurrence"). The skip connection is W_k x, which the paper has where the sizes of input and output differ. Learned:
    v_f, v_r, a number a unit."""
    f, r = sigmoid(x.f + v_f * s.c), sigmoid(x.r + v_r * s.c)
    c = f * s.c + (1 - f) * x.z
    return r * c + (1 - r) * x.k, c


@cell(gates="z f o", states="h c", recurrent=False)
def qrnn(x, s):
    """Quasi-recurrent network, fo-pooling (Bradbury, Merity, Xiong and Socher, 2017, "Quasi-recurrent neural networks").
    Its convolution over time is W_ih on windows: give it x_t and the inputs of the steps before, side by side."""
    z, f, o = tanh(x.z), sigmoid(x.f), sigmoid(x.o)
    c = f * s.c + (1 - f) * z
    return o * c, c


@cell(gates="z n", states="h", recurrent=False)
def mingru(x, s):
    """minGRU (Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, 2024, "Were RNNs all we needed?"), the form without
    logarithms."""
    z = sigmoid(x.z)
    return (1 - z) * s.h + z * x.n


@cell(gates="f i n", states="h", recurrent=False)
def minlstm(x, s):
    """minLSTM (Feng et al., 2024, as above), the form without logarithms of states. f / (f + i) is written as a sigmoid,
    which is never 0 / 0."""
    f = sigmoid(logsigmoid(x.f) - logsigmoid(x.i))
    return f * s.h + (1 - f) * x.n
