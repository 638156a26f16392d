"""LSTMs and GRUs with other gates."""

from torch import sigmoid, tanh

from rnnfast.derive.definition import cell

__all__ = ["cifg", "mgu", "peephole"]


@cell(gates="f z o", states="h c")
def cifg(x, h, s):
    """LSTM whose input gate is 1 - f (Greff, Srivastava, Koutnik, Steunebrink and Schmidhuber, 2017, "LSTM: a search space
    odyssey", the variant CIFG of section IV)."""
    f, o = sigmoid(x.f + h.f), sigmoid(x.o + h.o)
    z = tanh(x.z + h.z)
    c = f * s.c + (1 - f) * z
    return o * tanh(c), c


@cell(gates="i f g o", states="h c")
def peephole(x, h, s, *, w_ci, w_cf, w_co):
    """LSTM whose gates see the cell state (Gers and Schmidhuber, 2000, "Recurrent nets that time and count"; in this form
    Graves, 2013, "Generating sequences with recurrent neural networks", equations 7 to 11). Learned: w_ci, w_cf, w_co, a
    number a unit."""
    i, f = sigmoid(x.i + h.i + w_ci * s.c), sigmoid(x.f + h.f + w_cf * s.c)
    g = tanh(x.g + h.g)
    c = f * s.c + i * g
    o = sigmoid(x.o + h.o + w_co * c)
    return o * tanh(c), c


@cell(gates="f n", states="h")
def mgu(x, h, s):
    """Minimal gated unit (Zhou, Wu, Zhang and Zhou, 2016, "Minimal gated unit for recurrent neural networks") with the
    reset after the product, as in cuDNN's GRU: n = tanh(W_n x + f (U_n h)), where the paper has U_n (f h)."""
    f = sigmoid(x.f + h.f)
    n = tanh(x.n + f * h.n)
    return (1 - f) * s.h + f * n
