"""The equations of the library's cells once more, from their papers: loops over time that share nothing with `rnnfast.cells`.

Each takes a `Numbers` and returns the outputs of all steps (T, B, H) and the last of each state, in the order of the cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv1d, layer_norm, relu6

__all__ = ["LOOPS", "Numbers"]


@dataclass
class Numbers:
    """What a layer of a cell has: matrices and vectors by gate, and whatever else the cell is given, by name.

    Attributes:
        x: (T, B, I).
        W, U: W_ih and W_hh of each gate, (H, I) and (H, H).
        b, d: b_ih and b_hh of each gate, (H,).
        start: each state before the first step, (B, H).
        v: learned vectors (H,), rows (B, H) and noise (T, B, H).
    """

    x: Tensor
    W: dict[str, Tensor]
    U: dict[str, Tensor]
    b: dict[str, Tensor]
    d: dict[str, Tensor]
    start: dict[str, Tensor]
    v: dict[str, Tensor]

    def sums(self, t: int, h: Tensor) -> dict[str, Tensor]:
        """W x_t + U h + b of each gate."""
        return {g: self.x[t] @ self.W[g].T + self.b[g] + h @ self.U[g].T + self.d[g] for g in self.W}

    def inputs(self, t: int) -> dict[str, Tensor]:
        """W x_t + b of each gate."""
        return {g: self.x[t] @ self.W[g].T + self.b[g] for g in self.W}


def logistic(v: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-v))


def cifg(p: Numbers):
    h, c, ys = p.start["h"], p.start["c"], []
    for t in range(len(p.x)):
        a = p.sums(t, h)
        f = logistic(a["f"])
        i = 1 - f
        c = f * c + i * torch.tanh(a["z"])
        h = logistic(a["o"]) * torch.tanh(c)
        ys.append(h)
    return torch.stack(ys), h, c


def peephole(p: Numbers):
    h, c, ys = p.start["h"], p.start["c"], []
    for t in range(len(p.x)):
        a = p.sums(t, h)
        i, f = logistic(a["i"] + p.v["w_ci"] * c), logistic(a["f"] + p.v["w_cf"] * c)
        c = f * c + i * torch.tanh(a["g"])
        h = logistic(a["o"] + p.v["w_co"] * c) * torch.tanh(c)
        ys.append(h)
    return torch.stack(ys), h, c


def mgu(p: Numbers):
    h, ys = p.start["h"], []
    for t in range(len(p.x)):
        f = logistic(p.sums(t, h)["f"])
        candidate = torch.tanh(p.x[t] @ p.W["n"].T + p.b["n"] + f * (h @ p.U["n"].T + p.d["n"]))
        h = (1 - f) * h + f * candidate
        ys.append(h)
    return torch.stack(ys), h


def layer_norm_lstm(p: Numbers):
    """Ba, Kiros and Hinton: layer normalisation over the units of all gates in a row."""
    h, c, ys, H = p.start["h"], p.start["c"], [], p.start["h"].shape[1]
    W, U, b, d = (torch.cat([part[g] for g in "ifgo"]) for part in (p.W, p.U, p.b, p.d))
    gain_x, gain_h, bias = (torch.cat([p.v[f"{kind}_{g}"] for g in "ifgo"]) for kind in "xhb")
    for t in range(len(p.x)):
        from_x = layer_norm(p.x[t] @ W.T + b, (4 * H,), gain_x)
        from_h = layer_norm(h @ U.T + d, (4 * H,), gain_h)
        i, f, g, o = (from_x + from_h + bias).split(H, dim=1)
        c = logistic(f) * c + logistic(i) * torch.tanh(g)
        h = logistic(o) * torch.tanh(layer_norm(c, (H,), p.v["gain"], p.v["offset"]))
        ys.append(h)
    return torch.stack(ys), h, c


def layer_norm_gru(p: Numbers):
    """As haste's plain PyTorch version reads: biases outside of both norms, the reset after the product."""
    h, ys, H = p.start["h"], [], p.start["h"].shape[1]
    W, U, b, d = (torch.cat([part[g] for g in "rzn"]) for part in (p.W, p.U, p.b, p.d))
    gain_x, gain_h, bias = (torch.cat([p.v[f"{kind}_{g}"] for g in "rzn"]) for kind in "xhb")
    for t in range(len(p.x)):
        from_x = layer_norm(p.x[t] @ W.T + b, (3 * H,), gain_x) + bias
        from_h = layer_norm(h @ U.T + d, (3 * H,), gain_h)
        r, z = logistic(from_x + from_h)[:, : 2 * H].split(H, dim=1)
        n = torch.tanh(from_x[:, 2 * H :] + r * (from_h[:, 2 * H :] + p.v["c_n"]))
        h = z * h + (1 - z) * n
        ys.append(h)
    return torch.stack(ys), h


def lstm_step(p: Numbers, t: int, h: Tensor, c: Tensor, gate=logistic):
    """The plain LSTM, which some cells begin with."""
    a = p.sums(t, h)
    c = gate(a["f"]) * c + gate(a["i"]) * torch.tanh(a["g"])
    return gate(a["o"]) * torch.tanh(c), c


def zoneout_lstm(p: Numbers, z_h: float = 0.05, z_c: float = 0.5, training: bool = True):
    h, c, ys = p.start["h"], p.start["c"], []
    for t in range(len(p.x)):
        new_h, new_c = lstm_step(p, t, h, c)
        keep_h = (p.v["u_h"][t] < z_h).double() if training else z_h
        keep_c = (p.v["u_c"][t] < z_c).double() if training else z_c
        h, c = keep_h * h + (1 - keep_h) * new_h, keep_c * c + (1 - keep_c) * new_c
        ys.append(h)
    return torch.stack(ys), h, c


def variational_lstm(p: Numbers):
    """The state h that begins is what W_hh meets; from then on that is the mask times the output."""
    met, c, ys = p.start["h"], p.start["c"], []
    for t in range(len(p.x)):
        y, c = lstm_step(p, t, met, c)
        met = y * p.v["mask"]
        ys.append(y)
    return torch.stack(ys), met, c, ys[-1]


def clipped_lstm(p: Numbers, limit: float = 10.0):
    h, c, ys = p.start["h"], p.start["c"], []
    for t in range(len(p.x)):
        a = p.sums(t, h)
        c = (logistic(a["f"]) * c + logistic(a["i"]) * torch.tanh(a["g"])).clip(-limit, limit)
        h = logistic(a["o"]) * torch.tanh(c)
        ys.append(h)
    return torch.stack(ys), h, c


def hard_sigmoid_lstm(p: Numbers):
    h, c, ys = p.start["h"], p.start["c"], []
    for t in range(len(p.x)):
        h, c = lstm_step(p, t, h, c, lambda v: relu6(v + 3) / 6)
        ys.append(h)
    return torch.stack(ys), h, c


def slstm(p: Numbers, exponential_forget: bool = False):
    """Without the stabiliser, which leaves the outputs as they are: c and n are then exp(m) times those of the cell."""
    h, m = p.start["h"], p.start["m"]
    c, n, ys = p.start["c"] * torch.exp(m), p.start["n"] * torch.exp(m), []
    for t in range(len(p.x)):
        a = p.sums(t, h)
        i, f = torch.exp(a["i"]), torch.exp(a["f"]) if exponential_forget else logistic(a["f"])
        c, n = f * c + i * torch.tanh(a["z"]), f * n + i
        h = logistic(a["o"]) * (c / n)
        ys.append(h)
    return torch.stack(ys), h, c, n


def leaky(p: Numbers, leak: float = 0.3):
    h, ys = p.start["h"], []
    for t in range(len(p.x)):
        h = h + leak * (torch.tanh(p.sums(t, h)["a"]) - h)
        ys.append(h)
    return torch.stack(ys), h


def liquid(p: Numbers, dt: float = 0.5):
    h, ys = p.start["h"], []
    rate = torch.log(1 + torch.exp(p.v["tau"]))
    for t in range(len(p.x)):
        f = logistic(p.sums(t, h)["f"])
        h = (h + dt * f * p.v["a"]) / (1 + dt * (rate + f))
        ys.append(h)
    return torch.stack(ys), h


def cfc(p: Numbers, dt: float = 1.0):
    h, ys = p.start["h"], []
    for t in range(len(p.x)):
        a = p.sums(t, h)
        share = logistic(a["a"] * dt + a["b"])
        h = torch.tanh(a["g"]) * (1 - share) + share * torch.tanh(a["k"])
        ys.append(h)
    return torch.stack(ys), h


def indrnn(p: Numbers):
    h, ys = p.start["h"], []
    for t in range(len(p.x)):
        h = torch.relu(p.x[t] @ p.W["a"].T + h @ torch.diag(p.v["u"]) + p.b["a"])
        ys.append(h)
    return torch.stack(ys), h


def sru(p: Numbers):
    c, ys = p.start["c"], []
    for t in range(len(p.x)):
        a = p.inputs(t)
        f, r = logistic(a["f"] + p.v["v_f"] * c), logistic(a["r"] + p.v["v_r"] * c)
        c = f * c + (1 - f) * a["z"]
        ys.append(r * c + (1 - r) * a["k"])
    return torch.stack(ys), ys[-1], c


def qrnn(p: Numbers):
    """The input is windows of two steps side by side: here a convolution over time."""
    I, T = p.x.shape[2] // 2, len(p.x)
    steps = torch.cat([p.x[:1, :, :I], p.x[..., I:]])  # the step before the first, then all steps
    signal = steps.permute(1, 2, 0)
    z, f, o = (conv1d(signal, p.W[g].view(-1, 2, I).transpose(1, 2), p.b[g]).permute(2, 0, 1) for g in "zfo")
    z, f, o = torch.tanh(z), logistic(f), logistic(o)
    c, ys = p.start["c"], []
    for t in range(T):
        c = f[t] * c + (1 - f[t]) * z[t]
        ys.append(o[t] * c)
    return torch.stack(ys), ys[-1], c


def mingru(p: Numbers):
    """In closed form: h_t is the sum over all steps j up to t of z_j n_j times all (1 - z_k) after j."""
    gates = [p.inputs(t) for t in range(len(p.x))]
    z, n = (torch.stack([a[g] for a in gates]) for g in "zn")
    share, kept = logistic(z), 1 - logistic(z)
    ys = []
    for t in range(len(p.x)):
        terms = [share[j] * n[j] * torch.prod(kept[j + 1 : t + 1], 0) for j in range(t + 1)]
        ys.append(p.start["h"] * torch.prod(kept[: t + 1], 0) + sum(terms))
    return torch.stack(ys), ys[-1]


def minlstm(p: Numbers):
    h, ys = p.start["h"], []
    for t in range(len(p.x)):
        a = p.inputs(t)
        f, i = logistic(a["f"]), logistic(a["i"])
        h = f / (f + i) * h + i / (f + i) * a["n"]
        ys.append(h)
    return torch.stack(ys), h


def in_torch(name: str):
    """PyTorch's own operator, for the cells that it has."""

    def run(p: Numbers):
        weights = [torch.cat(list(part.values())) for part in (p.W, p.U, p.b, p.d)]
        start = [state[None] for state in p.start.values()]
        y, *last = getattr(torch, name)(p.x, start if name == "lstm" else start[0], weights, True, 1, 0.0, False, False, False)
        return y, *(state[0] for state in last)

    return run


LOOPS = {
    loop.__name__: loop
    for loop in (
        cfc, cifg, clipped_lstm, hard_sigmoid_lstm, indrnn, layer_norm_gru, layer_norm_lstm, leaky, liquid, mgu, mingru,
        minlstm, peephole, qrnn, slstm, sru, variational_lstm, zoneout_lstm,
    )
} | {name: in_torch(name) for name in ("gru", "lstm", "rnn_relu", "rnn_tanh")}  # fmt: skip
