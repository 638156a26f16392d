"""Cells from differential equations."""

from torch import sigmoid, tanh
from torch.nn.functional import logsigmoid

from rnnfast.derive.definition import cell

__all__ = ["cfc", "leaky", "liquid"]


@cell(gates="a", states="h")
def leaky(x, h, s, *, leak: float = 0.3):
    """Leaky integrator of echo state networks (Jaeger, Lukosevicius, Popovici and Siewert, 2007, "Optimization and
    applications of echo state networks with leaky-integrator neurons"). An echo state network learns no weight of it:
    layer.requires_grad_(False)."""
    a = tanh(x.a + h.a)
    return (1 - leak) * s.h + leak * a


@cell(gates="f", states="h")
def liquid(x, h, s, *, tau, a, dt: float = 0.5):
    """Liquid time constant: one step dt of dh/dt = -(1/tau + f) h + f a, fused (Hasani, Lechner, Amini, Rus and Grosu,
    2021, "Liquid time-constant networks", the fused solver). Learned: tau, of which softplus is 1/tau, and a, a number a
    unit."""
    f = sigmoid(x.f + h.f)
    rate = -logsigmoid(-tau)  # softplus
    return (s.h + dt * f * a) / (1 + dt * (rate + f))


@cell(gates="g k a b", states="h")
def cfc(x, h, s, *, dt: float = 1.0):
    """Closed-form continuous-time cell (Hasani et al., 2022, "Closed-form continuous-time neural networks") without a
    backbone, as the package ncps has it: t is the share of the second of two candidates after a time of dt."""
    t = sigmoid((x.a + h.a) * dt + x.b + h.b)
    g, k = tanh(x.g + h.g), tanh(x.k + h.k)
    return (1 - t) * g + t * k
