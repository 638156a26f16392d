"""The cells of the library in float64, against loops written from their papers: outputs, last states and all gradients."""

import pytest
import torch
from support.paper_loops import LOOPS, Numbers

import rnnfast
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
        registry.spec(cell, **constants), windows(cell, given["x"]), start, given["w_ih"], w_hh, given["b_ih"],
        given.get("b_hh"), held=held, seed=torch.tensor(SEED) if cell.noise else None,
    )  # fmt: skip
    return (y, *others)[cell.output], *last


def theirs(cell, given: dict, constants: dict):
    """The same by the loop from the paper."""

    def by_gate(name):
        return dict(zip(cell.gates, given[name].chunk(len(cell.gates)), strict=True)) if name in given else {}

    noise = reference.noise(torch.tensor(SEED), T, B, H, len(cell.noise)).double() if cell.noise else ()
    v = {name: given[name] for name in cell.held} | dict(zip(cell.noise, noise, strict=True))
    start = {name: given[f"start {name}"] for name in cell.states}
    W, U, b, d = (by_gate(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh"))
    return LOOPS[cell.name](Numbers(windows(cell, given["x"]), W, U, b, d, start, v), **constants)


def with_gradients(results, given: dict) -> list[torch.Tensor]:
    """The results, and the gradients of everything under upstream gradients that are the same each time."""
    draw = torch.Generator().manual_seed(5)
    weights = [torch.randn(result.shape, dtype=torch.float64, generator=draw) for result in results]
    loss = torch.stack([(result * weight).sum() for result, weight in zip(results, weights, strict=True)]).sum()
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


@pytest.mark.parametrize("name", ["slstm", "layer_norm_lstm"])
def test_heads(name):
    """A layer with heads is the loop with a block-diagonal U; a cell with means over rows has those of each head."""
    cell, k, part = getattr(cells, name), 2, 3
    layer = rnnfast.Layer(cell, I, k * part, heads=k, dtype=torch.float64, backend="reference")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    given = {"x": torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), **dict(layer.named_parameters())}
    start = {state: torch.rand(B, k * part, dtype=torch.float64) for state in cell.states}
    y, last = layer(given["x"], tuple(state[None] for state in start.values()))
    G = len(cell.gates)
    blocks = {g: torch.stack([block.chunk(G)[n] for block in given["weight_hh_l0"]]) for n, g in enumerate(cell.gates)}
    kinds = ("weight_ih", "bias_ih", "bias_hh")
    whole = [dict(zip(cell.gates, given[f"{kind}_l0"].chunk(G), strict=True)) for kind in kinds]
    v = {learned: given[f"{learned}_l0"] for learned in cell.learned}

    def run(units: slice, U: dict):
        W, b, d = ({g: rows[units] for g, rows in parts.items()} for parts in whole)
        states = {state: tensor[:, units] for state, tensor in start.items()}
        return LOOPS[name](Numbers(given["x"], W, U, b, d, states, {own: vector[units] for own, vector in v.items()}))

    if name == "slstm":
        right = run(slice(None), {g: torch.block_diag(*block) for g, block in blocks.items()})
    else:
        heads = [run(slice(m * part, (m + 1) * part), {g: block[m] for g, block in blocks.items()}) for m in range(k)]
        right = [torch.cat(results, -1) for results in zip(*heads, strict=True)]
    found = y, *(state[0] for state in last[: len(right) - 1])
    if name == "slstm":
        found = y, found[1], *(state[0] * last[3][0].exp() for state in last[1:3])
    results = [f"result {n}" for n in range(len(right))]
    assert_equal(with_gradients(found, given), with_gradients(right, given), [*results, *given])
