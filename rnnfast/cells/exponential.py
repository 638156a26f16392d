"""Exponential gates."""

import torch
from torch import exp, sigmoid, tanh
from torch.nn.functional import logsigmoid

from rnnfast.derive.definition import cell, keep

__all__ = ["slstm"]


@cell(gates="i f z o", states="h c n m")
def slstm(x, h, s, *, exponential_forget: bool = False):
    """sLSTM (Beck et al., 2024, "xLSTM: extended long short-term memory", equations 8 to 17): h, c, a normaliser n, a
    stabiliser m. c and n are scaled by exp(-m), and h is the same for every m, so it takes no gradient. m starts at the
    exponent of i where n is still 0, which leaves n no smaller than 1. Heads: Layer(heads=). The group norm of the paper's
    block follows the layer."""
    log_i, log_f = x.i + h.i, (x.f + h.f if exponential_forget else logsigmoid(x.f + h.f)) + s.m
    m = torch.where(s.n == 0, log_i, torch.maximum(log_i, log_f)).detach()
    i, f = exp(log_i - m), exp(torch.clamp(log_f - m, max=10.0))  # above 0 only where there is nothing to be forgotten
    z, o = tanh(x.z + h.z), sigmoid(x.o + h.o)
    keep(i, z, o)  # i is 1 at most, and in float16 nearer than its exponent
    c, n = f * s.c + i * z, f * s.n + i
    return o * c / n, c, n, m
