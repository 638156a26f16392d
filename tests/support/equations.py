"""What is right for a layer of `support.recurrence`: a loop over the steps in plain PyTorch, and its gradients by autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnnfast.reference import PADDED, RESETS, STARTS

from .cells import STEPS
from .recurrence import ADDED_TO, Layer

__all__ = ["Right", "assert_right", "noise_words", "right"]


def noise_words(seed: int, T: int, B: int, H: int, count: int) -> Tensor:
    """The noise of `rnnfast.kernels.given`, (count, T, B, H) in float32."""
    low32 = 0xFFFFFFFF
    row = torch.arange(T * B)[:, None]
    c = [torch.arange(H) + 0 * row, row & low32, row >> 32, 0 * row]
    k0, k1 = seed & low32, seed >> 32 & low32
    for _ in range(10):
        products = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # int64 wraps, which leaves the 64 bits right
        high, low = zip(*((p >> 32 & low32, p & low32) for p in products), strict=True)
        c = [high[1] ^ c[1] ^ k0, low[1], high[0] ^ c[3] ^ k1, low[0]]
        k0, k1 = k0 + 0x9E3779B9 & low32, k1 + 0xBB67AE85 & low32
    return torch.stack([(word.expand(-1, H) >> 8).float() / (1 << 24) for word in c[:count]]).view(count, T, B, H)


class Right(NamedTuple):
    """Results in float64; the gradients of what a layer has not are None.

    Attributes:
        h: (T, B, H).
        c: (T, B, carried * H), or None.
        d_gates: (T, B, grads * H), as the kernels store it.
        d_h0: (B, H), or with marks (2, B, H), of the initial and the reset state.
        d_c0: likewise.
        d_held: (B, held * H).
        d_w: (gates * H, H); without W_hh empty.
    """

    h: Tensor
    c: Tensor | None
    d_gates: Tensor
    d_h0: Tensor | None
    d_c0: Tensor | None
    d_held: Tensor | None
    d_w: Tensor


def _blocks(tensor: Tensor | None, count: int) -> tuple[Tensor, ...]:
    return () if tensor is None else tensor.chunk(count, -1)


def right(layer: Layer, step: Any = None) -> Right:
    """The loop of `layer` in float64. h is rounded to the layer's type at each step, as the kernels keep it, and passes its
    gradient. step: the plain function; without, that of the layer's name in `support.cells.STEPS`."""
    step = step or STEPS[layer.name]
    (T, B, H), cell, dtype = layer.shape, layer.cell, layer.w.dtype
    G, K, k = cell.gates, cell.carried, cell.apart
    codes, starts = layer.marks.codes, (layer.marks.starts_h, layer.marks.starts_c)

    def leaf(tensor):
        return None if tensor is None else tensor.double().nan_to_num().requires_grad_()

    x, w, held = leaf(layer.x), leaf(layer.w), leaf(layer.held)
    h0, c0 = (leaf(layer.h0), leaf(layer.c0)) if codes is None else map(leaf, starts)
    hidden_sides = torch.zeros(T, B, G * H, dtype=torch.float64, requires_grad=True)  # to have their gradients
    bias_x, bias_h = (0 if bias is None else bias.double() for bias in (layer.bias_x, layer.bias_h))
    noise = noise_words(int(layer.seed), T, B, H, cell.noise).double() if cell.noise else None
    zeros = torch.zeros(B, H, dtype=torch.float64)

    def begin(n):
        """The initial or the reset states."""
        h, c = (h0, c0) if codes is None else (h0[n], None if c0 is None else c0[n])
        return (zeros if h is None else h, *(_blocks(c, K) or (zeros,) * K))

    states, steps = begin(0), [()] * T
    for t in reversed(range(T)) if layer.reverse else range(T):
        before = states
        if codes is not None:
            code = codes[t][:, None]
            states = tuple(
                torch.where(code == STARTS, a, torch.where(code == RESETS, b, c))
                for a, b, c in zip(begin(0), begin(1), states, strict=True)
            )
        side, hidden = x[t] + bias_x, ()
        if cell.recurrent:
            hidden = (linear(states[0], w) + bias_h + hidden_sides[t]).chunk(G, -1)
        else:  # both sides are one
            side = side + hidden_sides[t]
        given = (*_blocks(held, cell.held), *(() if noise is None else noise[:, t]))
        h, *c = step(side.chunk(G, -1), hidden, states, given)
        states = h + (h.to(dtype).double() - h).detach(), *c
        steps[t] = states
        if codes is not None:
            states = tuple(torch.where(code == PADDED, old, new) for old, new in zip(before, states, strict=True))
    hs, *cs = (torch.stack(state) for state in zip(*steps, strict=True))
    ends = [(states[0], layer.d_h), (hs, layer.dy)]
    c = torch.cat(cs, -1) if K else None
    if K:
        ends += [(torch.cat(states[1:], -1), layer.d_c), (c, layer.dcs)]
    loss = sum((value * gradient.double().nan_to_num()).sum() for value, gradient in ends if gradient is not None)
    leaves = {"x": x, "h": hidden_sides, "h0": h0, "c0": c0, "held": held, "w": w}
    wanted = {name: tensor for name, tensor in leaves.items() if tensor is not None}
    found = torch.autograd.grad(loss, [*wanted.values()], allow_unused=True, materialize_grads=True)
    d = dict.fromkeys(leaves) | dict(zip(wanted, found, strict=True))
    d_gates = torch.cat([d["x"][..., (G - k) * H :], d["h"]], -1)
    return Right(hs.detach(), None if c is None else c.detach(), d_gates, d["h0"], d["c0"], d["held"], d["w"])


def assert_right(layer: Layer, forward, backward, *, step: Any = None, tolerance: float = 1e-5) -> None:
    """What `Layer.forward` (of training) and `Layer.backward` gave is `right`, at each step that is not padded. `tolerance`:
    the largest difference, relative to the largest value of each result or 1."""
    (T, B, H), cell, theirs = layer.shape, layer.cell, right(layer, step)
    k, codes = cell.apart, layer.marks.codes
    (h, c, _), (d_gates, d_h, d_c, *rest) = forward, backward
    runs = torch.ones(T, B, dtype=torch.bool) if codes is None else codes != PADDED

    def check(name, ours, wanted):
        assert not ours.isnan().any(), name
        difference = (ours.double() - wanted).abs().max() if ours.numel() else 0.0
        assert difference <= tolerance * max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0), (name, difference)

    check("h", h[runs], theirs.h[runs])
    if c is not None:
        check("c", c[runs], theirs.c[runs])
    check("d_gates", d_gates[runs], theirs.d_gates[runs])
    hidden = d_gates[..., k * H :].double() * runs[..., None]  # the kernels write nothing where a step is padded
    entered = hidden[-1 if layer.reverse else 0] @ layer.w.double() if cell.recurrent else 0.0
    direct = torch.zeros(B, H) if d_h is None else d_h.double()
    if cell.held:
        *rest, d_held = rest
        check("d_held", d_held - ADDED_TO, theirs.d_held)
    if codes is None:
        if theirs.d_h0 is not None:
            check("d_h0", entered + direct, theirs.d_h0)
        if theirs.d_c0 is not None:
            check("d_c0", d_c, theirs.d_c0)
    elif layer.starts:
        first = codes[-1 if layer.reverse else 0][:, None]
        empty = (~runs).all(0)[:, None]
        d_h0 = rest[0].double() - ADDED_TO
        through = entered + direct * ~empty
        d_h0[0] += torch.where(first == STARTS, through, 0)
        d_h0[1] += torch.where(first == RESETS, through, 0)
        d_h0[0] += torch.where(empty, direct, 0)
        check("d_h0", d_h0, theirs.d_h0)
        if cell.carried:
            d_c0 = rest[1].double() - ADDED_TO
            d_c0[0] += torch.where(empty, d_c.double(), 0)
            check("d_c0", d_c0, theirs.d_c0)
