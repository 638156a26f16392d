"""Cells become the Triton functions that they should: what is saved, what the kernels are told, the text."""

from __future__ import annotations

import pytest
import torch
from torch import exp, sigmoid, tanh
from torch.nn.functional import hardsigmoid, logsigmoid, softplus, softsign

from rnnfast.cells import builtin
from rnnfast.derive.__main__ import files
from rnnfast.derive.definition import Learned, Noise, Row, cell, keep, row_mean, row_norm
from rnnfast.derive.registry import derived, fused, kernel_cell, spec
from rnnfast.derive.verify import ALLOWED
from rnnfast.kernels import cells as kernel_cells
from rnnfast.reference import CELLS
from tests.support.random_cells import random_cell

pytestmark = pytest.mark.same_everywhere


@cell(gates="i f g o", states="h c")
def lstm(x, h, s):
    i, f, o = sigmoid(x.i + h.i), sigmoid(x.f + h.f), sigmoid(x.o + h.o)
    g = tanh(x.g + h.g)
    c = f * s.c + i * g
    return o * tanh(c), c


@cell(gates="r z n")
def gru(x, h, s):
    r, z = sigmoid(x.r + h.r), sigmoid(x.z + h.z)
    n = tanh(x.n + r * h.n)
    return (1 - z) * n + z * s.h


@cell(gates="f z o", states="h c")
def coupled(x, h, s):
    f, o, z = sigmoid(x.f + h.f), sigmoid(x.o + h.o), tanh(x.z + h.z)
    c = f * s.c + (1 - f) * z
    return o * tanh(c), c


@cell(gates="i f g o", states="h c")
def peephole(x, h, s, *, w_i, w_f: Learned, w_o: Learned(1.0)):
    i, f, g = sigmoid(x.i + h.i + w_i * s.c), sigmoid(x.f + h.f + w_f * s.c), tanh(x.g + h.g)
    c = f * s.c + i * g
    o = sigmoid(x.o + h.o + w_o * c)
    return o * tanh(c), c


@cell(gates="f n")
def minimal(x, h, s):
    f = sigmoid(x.f + h.f)
    n = tanh(x.n + f * h.n)
    return (1 - f) * s.h + f * n


@cell(gates="i f g o", states="h c")
def piecewise(x, h, s):
    i, f, o = hardsigmoid(x.i + h.i), hardsigmoid(x.f + h.f), hardsigmoid(x.o + h.o)
    c = f * s.c + i * softsign(x.g + h.g)
    return o * softsign(c), c


@cell(gates="i f z o", states="h c n m")
def scalar_lstm(x, h, s):
    log_i, log_f = x.i + h.i, logsigmoid(x.f + h.f) + s.m
    m = torch.maximum(log_i, log_f).detach()
    i, f = exp(log_i - m), exp(log_f - m)
    z, o = tanh(x.z + h.z), sigmoid(x.o + h.o)
    c, n = f * s.c + i * z, f * s.n + i
    return o * c / torch.clamp(n, min=1e-6), c, n, m


@cell(gates="i f g o", states="h c")
def zoneout(x, h, s, *, u: Noise, v: Noise, z_h: float = 0.1, z_c: float = 0.3, training: bool):
    i, f, o, g = sigmoid(x.i + h.i), sigmoid(x.f + h.f), sigmoid(x.o + h.o), tanh(x.g + h.g)
    c = f * s.c + i * g
    y = o * tanh(c)
    if training:
        return torch.where(u < z_h, s.h, y), torch.where(v < z_c, s.c, c)
    return z_h * s.h + (1 - z_h) * y, z_c * s.c + (1 - z_c) * c


@cell(gates="i f g o", states="h c y", output="y")
def variational(x, h, s, *, mask: Row):
    i, f, o, g = sigmoid(x.i + h.i), sigmoid(x.f + h.f), sigmoid(x.o + h.o), tanh(x.g + h.g)
    c = f * s.c + i * g
    y = o * tanh(c)
    return mask * y, c, y


@cell(gates="i f g o", states="h c")
def clipped(x, h, s, *, limit: float = 1.0):
    i, f, o, g = sigmoid(x.i + h.i), sigmoid(x.f + h.f), sigmoid(x.o + h.o), tanh(x.g + h.g)
    c = torch.clamp(f * s.c + i * g, -limit, limit)
    return o * tanh(c), c


@cell(gates="a")
def leaky(x, h, s, *, leak: float = 0.3):
    return (1 - leak) * s.h + leak * tanh(x.a + h.a)


@cell(gates="f")
def liquid(x, h, s, *, tau, a, dt: float = 0.5):
    f = sigmoid(x.f + h.f)
    return (s.h + dt * f * a) / (1 + dt * (softplus(tau) + f))


@cell(gates="a", recurrent=False)
def independent(x, s, *, u):
    return torch.relu(x.a + u * s.h)


@cell(gates="i f z o", states="h c", recurrent=False)
def diagonal(x, s, *, u_i, u_f, u_z, u_o):
    i, f, o = sigmoid(x.i + u_i * s.h), sigmoid(x.f + u_f * s.h), sigmoid(x.o + u_o * s.h)
    c = f * s.c + i * tanh(x.z + u_z * s.h)
    return o * tanh(c), c


@cell(gates="a b c d e", states="h c n")
def five(x, h, s, *, w, m: Row, u: Noise, v: Noise):
    a, b, c_ = sigmoid(x.a + h.a), sigmoid(x.b + h.b + w * s.c), sigmoid(x.c + h.c)
    d, e = tanh(x.d + a * h.d), tanh(x.e + b * h.e)
    c = c_ * s.c + a * d * m
    n = torch.where(u < 0.3, s.n, 0.5 * s.n + e)
    return b * tanh(c + n * v) + 0.1 * s.h, c, n


@cell(gates="i f g o", states="h c")
def layer_norm_lstm(x, h, s, *, gain: Learned(1.0), offset: Learned(0.0)):
    i, f, g, o = row_norm(*[a + b for a, b in zip(x, h, strict=True)])
    c = sigmoid(f) * s.c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(gain * row_norm(c) + offset), c


# name: what is saved, and grads, carried, held, noise, direct, reads_h_before
EXPECTED = {
    "lstm": ("i f o g", 4, 1, 0, 0, False, False),
    "gru": ("h.n r z n", 4, 0, 0, 0, True, True),
    "coupled": ("f o z", 3, 1, 0, 0, False, False),
    "peephole": ("i f g o", 4, 1, 3, 0, False, False),
    "minimal": ("h.n f n", 3, 0, 0, 0, True, True),
    "piecewise": ("add add add add", 4, 1, 0, 0, False, False),
    "scalar_lstm": ("add i z o", 4, 3, 0, 0, False, False),
    "zoneout": ("i f o g", 4, 1, 0, 2, True, False),
    "variational": ("i f o g", 4, 2, 1, 0, False, False),
    "clipped": ("i f o g", 4, 1, 0, 0, False, False),
    "leaky": ("tanh", 1, 0, 0, 0, True, False),
    "liquid": ("f", 1, 0, 2, 0, True, False),
    "independent": ("", 1, 0, 1, 0, True, True),
    "diagonal": ("i f o tanh", 4, 1, 4, 0, True, True),
    "five": ("h.d h.e a b c_ d e", 7, 2, 2, 2, True, False),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_the_kernels_are_told(name):
    own: object = globals()[name]
    found = derived(own)  # and compared with autograd
    counts = found.grads, found.carried, found.held, found.noise, found.direct, found.reads_h_before
    assert (" ".join(found.saved), *counts) == EXPECTED[name]
    assert not found.kept32 and not found.rows and found.recurrent == own.recurrent


def test_a_cell_in_the_tables():
    name = fused(five)
    found, kernels = CELLS[name], kernel_cell(name)
    for key in ("gates", "saved", "grads", "held", "noise", "recurrent", "rows"):
        assert getattr(found, key) == getattr(kernels, key), key
    assert (found.states, found.carried, kernels.carried, kernels.apart) == (3, 2, 2, 2)
    assert kernel_cell(name) is kernels and fused(five) == name
    assert fused(clipped, limit=2) != fused(clipped, limit=3.0) != fused(clipped)
    assert fused(builtin.lstm) == "lstm" and kernel_cell("lstm") is kernel_cells.CELLS["lstm"]


def test_step_runs_the_function_and_gives_what_it_keeps():
    x, h, s = torch.randn(3, 6), torch.randn(3, 6), torch.randn(3, 2)
    (new,), kept = builtin.gru.step(x, h, (s,))
    r, z = sigmoid(x + h)[:, :2], sigmoid(x + h)[:, 2:4]
    n = tanh(x[:, 4:] + r * h[:, 4:])
    for ours, theirs in zip((new, *kept), (n + z * (s - n), r, z, n, h[:, 4:]), strict=True):
        torch.testing.assert_close(ours, theirs)
    given = torch.full((3, 2), 2.0), torch.full((3, 2), 0.5)
    own = spec(liquid, dt=0.25)
    (new,), _ = own.step(x[:, :2], h[:, :2], (s,), given)
    torch.testing.assert_close(new, liquid.step(x[:, :2], h[:, :2], (s,), given, {"dt": 0.25})[0][0])
    assert (own.states, own.gates, own.saved, own.held, own.carried) == (1, 1, 0, 2, 0)


@cell(gates="i f", states="h c")
def exponential(x, h, s):
    i, f = exp(x.i + h.i), sigmoid(x.f + h.f)
    keep(f, i)
    c = f * s.c + i
    return tanh(c) * i, c


@cell(gates="i f", states="h c")
def logarithmic(x, h, s):
    i, f = exp(x.i + h.i), sigmoid(x.f + h.f)
    c = f * s.c + i
    return tanh(c) * i, c


@cell(gates="i f", states="h c")
def wide(x, h, s):
    f, i = sigmoid(x.f + h.f), exp(x.i + h.i)
    keep(f)
    keep(i, dtype=torch.float32)
    c = f * s.c + i
    return tanh(c) * i, c


def test_what_leaves_the_range_of_float16_is_saved_in_float32():
    saved = [(derived(own).saved, derived(own).kept32) for own in (exponential, logarithmic, wide)]
    assert saved == [(("f",), ("i",)), (("add", "f"), ()), (("f",), ("i",))]
    found = CELLS[fused(wide)]
    assert (found.kept32, found.states, found.carried, kernel_cell(fused(wide)).carried) == (1, 2, 2, 2)


def test_rows():
    found = derived(layer_norm_lstm)
    assert found.rows and found.held == 2 and kernel_cell(fused(layer_norm_lstm)).rows
    forward, backward = found.source[found.source.index("@triton") :].split("def backward")
    assert all(f", {n}, row)" in forward and f", {n}, row)" in backward for n in range(4)), found.source
    tile = torch.randn(3, 4)
    torch.testing.assert_close(row_mean(tile), tile.mean(1, keepdim=True).expand(3, 4))
    torch.testing.assert_close(row_norm(tile), torch.nn.functional.layer_norm(tile, (4,)))
    both = torch.nn.functional.layer_norm(torch.cat([tile, 2 * tile], 1), (8,)).chunk(2, 1)
    for ours, theirs in zip(row_norm(tile, 2 * tile), both, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_committed_kernels_are_those_derived(request):
    """``python -m rnnfast.derive --write kernels/cells`` writes them."""
    folder = request.config.rootpath / "kernels" / "cells"
    assert {path.name for path in folder.glob("*.py")} == {"__init__.py", *files()}
    for name, text in files().items():
        assert (folder / name).read_text(encoding="utf-8") == text, name
    for name in builtin.__all__:
        own = kernel_cells.CELLS[name]
        found, known = derived(getattr(builtin, name)), CELLS[name]
        for key in ("gates", "grads", "carried", "direct", "held", "noise", "recurrent", "rows"):
            assert getattr(own, key) == getattr(found, key), (name, key)
        assert len(found.saved) == own.saved == known.saved and (own.grads, own.gates) == (known.grads, known.gates)
        assert (found.reads_h_before, len(cell_states(name))) == (known.reads_h_before, known.states)


def cell_states(name: str) -> tuple[str, ...]:
    return getattr(builtin, name).states


@pytest.mark.parametrize("seed", range(20))
def test_random_cells(seed):
    derived(random_cell(seed))


@pytest.mark.sweep
def test_a_thousand_random_cells():
    from rnnfast.derive.deriving import derive
    from rnnfast.derive.recording import alone
    from rnnfast.derive.verify import worst

    found = {seed: random_cell(seed) for seed in range(1000)}
    differences = {seed: alone(worst, own, {}, derive(own, {})) for seed, own in found.items()}
    largest = max(differences, key=differences.__getitem__)
    print(f"1000 random cells, largest relative difference {differences[largest]:.1e}, of cell {largest}")
    assert differences[largest] < ALLOWED
