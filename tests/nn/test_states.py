"""return_all_states= and return_gates=: what a layer does at every step."""

import pytest
import torch
from support import loops
from support.layers import CELLS, B, H, I, T, close, pair, states

import rnnfast
from rnnfast import functional, numerics

pytestmark = pytest.mark.numerical

BOTH = {"return_all_states": True, "return_gates": True}


@pytest.mark.parametrize("lengths", [None, [2, 1, 0, 2, 1]], ids=["full", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, nonlinearity", CELLS)
def test_equals_a_loop(name, nonlinearity, dtype, lengths, device):
    """All states and gates, and the gradients that enter through every state, within the contract of the loop."""
    options = {"nonlinearity": nonlinearity} if name == "RNN" else {}
    ours = getattr(rnnfast, name)(I, 15, bidirectional=True, **options, device=device, dtype=dtype, backend="triton")
    tensors, wanted = loops.arguments(ours, T, 5), BOTH | {"lengths": lengths}
    found = loops.everything(loops.by_module(ours, wanted), tensors, dtype)
    loop = loops.by_loop(ours, wanted)
    common = loops.everything(loop, tensors, dtype)
    assert not numerics.fault(found, common, lambda: loops.everything(loop, tensors, torch.float64), dtype)


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("name, options", [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {})])
def test_layout(name, options, backend, device):
    """An entry for each layer; laid out as the output, with the last states among them; gates carry no gradient, states do."""
    ours = getattr(rnnfast, name)(I, H, 2, bidirectional=True, batch_first=True, **options, device=device, backend=backend)
    x, count, width = torch.randn(B, T, I, device=device), 2 if name == "LSTM" else 1, options.get("proj_size", H)
    output, last, all_states, gates = ours(x, **BOTH)
    G = {"LSTM": 4, "GRU": 3, "RNN": 1}[name]
    assert len(all_states) == len(gates) == 2 and all(len(each) == count for each in all_states)
    assert all(g.shape == (B, T, 2, G, H) and not g.requires_grad for g in gates)
    assert all(state.requires_grad for each in all_states for state in each)
    assert torch.equal(all_states[-1][0], output)
    for index, each in enumerate(all_states):
        for state, end, size in zip(each, last if name == "LSTM" else (last,), (width, H), strict=False):
            assert state.shape == (B, T, 2 * size)
            torch.testing.assert_close(state[:, -1, :size], end[2 * index])
            torch.testing.assert_close(state[:, 0, size:], end[2 * index + 1])
    assert torch.equal(ours(x, return_gates=True)[2][0], gates[0])
    assert torch.equal(ours(x, return_all_states=True)[2][0][-1], all_states[0][-1])


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_nothing_else_changes(name, device):
    """The output is bitwise that without the options; they work without gradients and without a batch too."""
    ours, _ = pair(name, device, bidirectional=True)
    x, hx = torch.randn(T, B, I, device=device), states(name, 2, B, H, device=device)
    plain = ours(x, hx)
    kept = ours(x, hx, **BOTH)
    with torch.no_grad():
        free = ours(x, hx, **BOTH)
    assert torch.equal(kept[0], plain[0]) and torch.equal(free[0], plain[0])
    assert torch.equal(kept[2][0][-1], free[2][0][-1]) and torch.equal(kept[3][0], free[3][0])
    assert not free[2][0][-1].requires_grad
    alone = ours(x[:, 0], **BOTH)
    assert alone[2][0][0].shape == (T, 2 * H) and alone[3][0].shape[:2] == (T, 2)


def test_the_equations_hold(device):
    """c_t = f c_{t-1} + i g and h_t = o tanh(c_t), of the states and gates that are returned."""
    ours, _ = pair("LSTM", device)
    output, _, ((_, c),), (gates,) = ours(torch.randn(T, B, I, device=device), **BOTH)
    i, f, g, o = gates[:, :, 0].unbind(2)
    before = torch.cat([torch.zeros_like(c[:1]), c[:-1]])
    torch.testing.assert_close(c, f * before + i * g)
    torch.testing.assert_close(output, o * c.tanh())


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_functions(name, backend, device):
    """By the functions: the states and gates of their one layer and direction."""
    ours, _ = pair(name, device, backend)
    x = torch.randn(T, B, I, device=device)
    _, _, (all_states,), (gates,) = ours(x, **BOTH)
    y, _, by_function, its_gates = getattr(functional, name.lower())(x, None, *ours.parameters(), backend=backend, **BOTH)
    close(by_function, all_states)
    close([its_gates, y], [gates[:, :, 0], all_states[0]])


def test_explain(device):
    """What runs these calls, and why not on other kernels, is said."""
    ours, x = rnnfast.LSTM(I, H, device=device), torch.randn(T, B, I, device=device)
    assert "step kernels" in rnnfast.explain(ours, x, lengths=[1, 2, 2]).details
    with pytest.raises(RuntimeError, match="Expected lengths of size"):
        rnnfast.explain(ours, x, lengths=[1])
    with pytest.raises(TypeError, match="unknown"):
        rnnfast.explain(ours, x, unknown=1)
    with rnnfast.use_backend("torch"):
        assert "packed by their lengths" in rnnfast.explain(ours, x, lengths=[1, 2, 2]).details
        assert rnnfast.explain(ours, x, return_gates=True).details.startswith("the equations in plain PyTorch")


@pytest.mark.parametrize("options", [{"lengths": [1, 2, 2]}, {"return_all_states": True}], ids=str)
def test_explain_the_family(options, device, monkeypatch):
    """Asked for the persistent kernels these calls run on them where there is a plan; else it is said why not."""
    from rnnfast.choice import kernel_plan
    from rnnfast.kernels.persistent.plan import GPUS

    monkeypatch.setenv("RNNFAST_KERNELS", "persistent")
    ours, x = rnnfast.LSTM(32, 32, device=device), torch.randn(T, B, 32, device=device)
    with kernel_plan.pretend_gpu(GPUS["H100"]):
        text = str(rnnfast.explain(ours, x, **options)).replace(", interpreted", "")
        large = rnnfast.LSTM(1, 2200, device=device)
        assert "not persistent: no tiles fit" in str(rnnfast.explain(large, torch.zeros(T, B, 1, device=device), **options))
    assert "forward: persistent kernels, one launch" in text and "backward: persistent kernels, one launch" in text
