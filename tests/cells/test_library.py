"""The cells of the library in float64, against loops written from their papers: outputs, last states and all gradients."""

import pytest
import torch
from support.paper_loops import LOOPS, Numbers

from rnnfast import cells, reference
from rnnfast.derive import registry

pytestmark = [pytest.mark.numerical, pytest.mark.same_everywhere]

T, B, I, H, SEED = 6, 3, 4, 5, 11
VARIANTS = [(name, {}) for name in cells.__all__] + [
    ("slstm", {"exponential_forget": True}), ("zoneout_lstm", {"training": False}), ("zoneout_lstm", {"z_h": 0.3, "z_c": 0.0}),
    ("clipped_lstm", {"limit": 0.4}), ("leaky", {"leak": 1.0}), ("cfc", {"dt": 0.25}), ("liquid", {"dt": 2.0}),
]  # fmt: skip


def leaves(cell) -> dict[str, torch.Tensor]:
    """What a layer of the cell has and is given, by name."""

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, dtype=torch.float64).mul_(scale).requires_grad_()

    G = len(cell.gates)
    found = {"x": normal(T, B, I), "w_ih": normal(G * H, I), "b_ih": normal(G * H)}
    if cell.recurrent:
        found |= {"w_hh": normal(G * H, H, scale=0.5), "b_hh": normal(G * H)}
    found |= {name: normal(H) for name in cell.learned} | {name: normal(B, H) for name in cell.rows}
    found |= {f"start {name}": normal(B, H) for name in cell.states}
    if cell.name == "slstm":
        found["start n"] = normal(B, H).detach().exp().requires_grad_()  # a sum of exponentials
    if cell.name == "qrnn":
        found["x"] = normal(T + 1, B, I // 2)  # of which it gets windows
    return found


def windows(cell, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:-1], x[1:]], dim=-1) if cell.name == "qrnn" else x


def ours(cell, given: dict, constants: dict):
    """The output and the last states by the equations in plain PyTorch."""
    start = tuple(given[f"start {name}"] for name in cell.states)
    held = torch.cat([given[name].expand(B, H) for name in cell.held], -1) if cell.held else None
    w_hh = given["w_hh"] if cell.recurrent else given["w_ih"].new_empty(0, H)
    y, last, others, _ = reference.trace(
        registry.spec(cell, **constants), windows(cell, given["x"]), start, given["w_ih"], w_hh, given["b_ih"], given.get("b_hh"),
        held=held, seed=torch.tensor(SEED) if cell.noise else None,
    )  # fmt: skip
    return (y, *others)[cell.output], *last


def theirs(cell, given: dict, constants: dict):
    """The same by the loop from the paper."""

    def by_gate(name):
        return dict(zip(cell.gates, given[name].chunk(len(cell.gates)), strict=True)) if name in given else {}

    noise = reference.noise(torch.tensor(SEED), T, B, H, len(cell.noise)).double() if cell.noise else ()
    v = {name: given[name] for name in cell.held} | dict(zip(cell.noise, noise, strict=True))
    start = {name: given[f"start {name}"] for name in cell.states}
    parts = (by_gate(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh"))
    return LOOPS[cell.name](Numbers(windows(cell, given["x"]), *parts, start, v), **constants)


def with_gradients(results, given: dict) -> list[torch.Tensor]:
    """The results, and the gradients of everything under upstream gradients that are the same each time."""
    draw = torch.Generator().manual_seed(5)
    loss = sum((result * torch.randn(result.shape, dtype=torch.float64, generator=draw)).sum() for result in results)
    return [*results, *torch.autograd.grad(loss, list(given.values()), allow_unused=True, materialize_grads=True)]


def assert_equal(found, right, names):
    for name, a, b in zip(names, found, right, strict=True):
        assert float((a - b).detach().abs().max()) <= 1e-12 * max(1.0, float(b.detach().abs().max())), name


@pytest.mark.parametrize("name, constants", VARIANTS, ids=lambda value: str(value) if value else "")
def test_equals_the_paper(name, constants):
    cell = getattr(cells, name)
    given = leaves(cell)
    found, right = ours(cell, given, constants), theirs(cell, given, constants)
    if name == "slstm":  # the loop has no stabiliser m, so its c and n are those times exp(m)
        y, h, c, n, m = found
        found = y, h, c * m.exp(), n * m.exp()
    results = [f"result {k}" for k in range(len(right))]
    assert_equal(with_gradients(found, given), with_gradients(right, given), [*results, *given])
