"""The oracle itself, against torch.nn in float64."""

import pytest
import torch
from support import loops

from rnnfast import check, numerics, reference

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize(
    "layers, bidirectional, bias, states", [(1, False, True, False), (2, True, True, True), (2, False, False, False)]
)
@pytest.mark.parametrize("cell, nonlinearity", [("LSTM", "tanh"), ("GRU", "tanh"), ("RNN", "tanh"), ("RNN", "relu")])
def test_equals_torch_nn(cell, nonlinearity, layers, bidirectional, bias, states, device):
    """Outputs and every gradient of the reference backend equal torch.nn's to float64 rounding."""
    case = check.Case(
        cell, 6, 3, 5, 7, torch.float64, layers=layers, bidirectional=bidirectional, bias=bias, nonlinearity=nonlinearity,
        states=states,
    )  # fmt: skip
    contract, theirs = check.contract_of(case, device, backend="torch")
    assert theirs.keys() >= {"output", "h_n", "grad of input", "grad of weight_hh_l0"}
    for name, tensor in theirs.items():
        assert numerics.rms(tensor - contract.exact(name)) < 1e-14, name


@pytest.mark.parametrize("cell", reference.GATES)
def test_reverse_is_a_flip(cell):
    """reverse=True gives what flipping input and output in time gives."""
    G, T, B, I, H = reference.GATES[cell], 5, 2, 3, 4
    x, w_ih, w_hh = (torch.randn(*shape, dtype=torch.float64) for shape in ((T, B, I), (G * H, I), (G * H, H)))
    y, last = reference.layer(cell, x, None, w_ih, w_hh, reverse=True)
    flipped, flipped_last = reference.layer(cell, x.flip(0), None, w_ih, w_hh)
    assert torch.equal(y, flipped.flip(0))
    assert all(torch.equal(a, b) for a, b in zip(last, flipped_last, strict=True))
    assert torch.equal(y[0], last[0])


def test_one_step_by_hand():
    """A one-unit LSTM and GRU whose arithmetic is written out here, with other gates than the code's chunks."""
    one = torch.ones(1, 1, dtype=torch.float64)
    w = torch.tensor([[0.1], [0.2], [0.3], [0.4]], dtype=torch.float64)
    (h, c), gates = loops.step("lstm", one, (2 * one, 3 * one), w, 2 * w, None, None)
    i, f, g, o = (weight + 2 * weight * 2 for weight in (0.1, 0.2, 0.3, 0.4))
    sigmoid = lambda v: 1 / (1 + torch.tensor(-v, dtype=torch.float64).exp())  # noqa: E731
    expected = sigmoid(f) * 3 + sigmoid(i) * torch.tensor(g, dtype=torch.float64).tanh()
    assert torch.allclose(torch.cat(gates), torch.stack([sigmoid(i), sigmoid(f), torch.tensor(g).tanh(), sigmoid(o)])[:, None])
    assert torch.allclose(c, expected) and torch.allclose(h, sigmoid(o) * expected.tanh())
    (h,), gates = loops.step("gru", one, (2 * one,), w[:3], w[:3], None, w[:3, 0])
    r, z = sigmoid(0.1 + 0.2 + 0.1), sigmoid(0.2 + 0.4 + 0.2)
    n = (0.3 + r * (0.6 + 0.3)).tanh()
    assert torch.allclose(h, (1 - z) * n + z * 2)
    assert torch.allclose(torch.cat(gates), torch.stack([r, z, n])[:, None])
