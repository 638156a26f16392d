"""What is saved, which gradients are computed, and the modes a layer can be run in, beside torch.nn."""

import itertools

import pytest
import torch
from support.layers import NAMES, B, H, I, T, close, equal, flat, outcome, pair, run, states
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_saves_nothing(name, mode, device, saved):
    """Without gradients nothing is kept for backward, and the numbers are those of training."""
    ours, _ = pair(name, device, num_layers=2)
    x, hx = torch.randn(T, B, I, device=device), states(name, 2, B, H, device=device)
    trained = flat(ours(x, hx))
    assert len(saved) == 1 and saved[0] is not None  # both layers in one call
    saved.clear()
    with mode():
        result = flat(ours(x, hx))
    ours.requires_grad_(False)
    frozen = flat(ours(x, hx))
    assert saved == [None] * 2
    assert not any(tensor.requires_grad for tensor in (*result, *frozen))
    assert equal(result, trained) and equal(frozen, trained)
    assert result[0].is_inference() == (mode is torch.inference_mode)


@pytest.mark.parametrize("name", NAMES)
def test_eval_mode(name, device):
    """eval() changes nothing without dropout, and backward runs in it (where cuDNN's refuses)."""
    ours, _ = pair(name, device, num_layers=2)
    x = torch.randn(T, B, I, device=device)
    assert equal(run(ours.train(), x), run(ours.eval(), x))


@pytest.mark.parametrize("name", NAMES)
def test_backward_twice(name, device):
    """A retained graph gives bitwise the same gradients again; a freed one gives PyTorch's error."""
    ours, _ = pair(name, device, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, device=device, requires_grad=True)
    loss = sum(out.square().sum() for out in flat(ours(x)))
    first, second = (torch.autograd.grad(loss, [x, *ours.parameters()], retain_graph=keep) for keep in (True, False))
    assert equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_every_frozen_subset(device):
    """Whichever weights are frozen, those get no gradient and the others bitwise the gradient they get with none frozen."""
    ours, _ = pair("LSTM", device)
    x, hx = torch.randn(2, B, I, device=device), states("LSTM", 1, B, H, device=device)
    full = {}
    for trained in sorted(itertools.product([True, False], repeat=4), reverse=True):
        for weight, flag in zip(ours.parameters(), trained, strict=True):
            weight.requires_grad_(flag)
            weight.grad = None
        loss = sum(out.square().sum() for out in flat(ours(x, hx)))
        assert loss.requires_grad == any(trained)
        if any(trained):
            loss.backward()
        for (name, weight), flag in zip(ours.named_parameters(), trained, strict=True):
            assert (weight.grad is not None) == flag, name
            if flag:
                assert torch.equal(weight.grad, full.setdefault(name, weight.grad)), name


@pytest.mark.parametrize("name", NAMES)
def test_requires_grad(name, device):
    """Outputs require gradients exactly when torch.nn's do, for each combination of input, states and weights; dtypes too."""
    ours, theirs = pair(name, device)
    for x_grad, hx_grad, w_grad in itertools.product([True, False], repeat=3):
        x = torch.randn(1, B, I, device=device, requires_grad=x_grad)
        hx = states(name, 1, B, H, device=device, requires_grad=hx_grad)
        found = []
        for module in (ours, theirs):
            module.requires_grad_(w_grad)
            outputs = flat(module(x, hx))
            assert all(out.requires_grad == (out.grad_fn is not None) for out in outputs)
            found.append([out.requires_grad for out in outputs])
        assert found[0] == found[1]


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_each_output_alone(name, device):
    """A loss of the output alone, of h_n alone or of c_n alone gives every gradient that torch.nn gives."""
    ours, theirs = pair(name, device, num_layers=2)
    x, hx = torch.randn(2, B, I, device=device), states(name, 2, B, H, device=device)
    for n in range(3 if name == "LSTM" else 2):
        found = []
        for module in (ours, theirs):
            copied = x.clone().requires_grad_()
            start = tuple(h.clone().requires_grad_() for h in (hx if name == "LSTM" else (hx,)))
            out = flat(module(copied, start if name == "LSTM" else start[0]))[n]
            found.append(torch.autograd.grad(out.square().sum(), [copied, *start, *module.parameters()]))
        close(*found)


@pytest.mark.parametrize("edited", ["input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "output"])
def test_edit_in_place_after_forward(edited, device):
    """What backward still needs cannot be overwritten unnoticed between forward and backward."""
    ours, _ = pair("LSTM", device, batch_first=True)
    x = torch.randn(B, 2, I, device=device, requires_grad=True)
    h_0, c_0 = (state.requires_grad_() for state in states("LSTM", 1, B, H, device=device))
    output, (h_n, c_n) = ours(x, (h_0, c_0))
    loss = output.square().sum() + h_n.sum() + c_n.sum() if edited != "output" else output.sum()
    with torch.no_grad():
        {"input": x, "h_0": h_0, "c_0": c_0, "output": output, **dict(ours.named_parameters())}[edited].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_layouts(name, device):
    """Transposed, strided and expanded inputs, states and upstream gradients give what dense ones give; none is written."""
    ours, _ = pair(name, device, bidirectional=True)
    wide, other = torch.randn(B, 2 * T, 2 * I, device=device), torch.randn(B, 2, H, device=device)
    turned = {"x": wide.transpose(0, 1)[::2, :, ::2], "h": other.transpose(0, 1)}
    single = {"x": wide[:1, :1, :I].expand(T, B, I), "h": other[:1, :1].expand(2, B, H)}
    for x, h in (tuple(views.values()) for views in (turned, single)):
        copies, found = (x.clone(), h.clone()), []
        for dense in (False, True):
            start = h.contiguous() if dense else h
            upstream = [x.new_ones(()).expand(T, B, 2 * H), *[x.new_ones(()).expand(2, B, H)] * (2 if name == "LSTM" else 1)]
            upstream = [grad.contiguous() if dense else grad for grad in upstream]
            outputs = flat(ours(x.contiguous() if dense else x, (start, start) if name == "LSTM" else start))
            found.append((*outputs, *torch.autograd.grad(outputs, list(ours.parameters()), upstream)))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
        assert equal((x, h), copies)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_written(training, device):
    """Input, states, weights and upstream gradients are, after forward and backward, what they were."""
    ours, _ = pair("LSTM", device, num_layers=2)
    x, hx = torch.randn(2, B, I, device=device), states("LSTM", 2, B, H, device=device)
    upstream = [torch.randn(2, B, H, device=device) for _ in range(3)]
    given = [x, *hx, *ours.parameters(), *upstream]
    copies, versions = [tensor.detach().clone() for tensor in given], [tensor._version for tensor in given]
    outputs = flat(ours.train(training)(x, hx))
    torch.autograd.grad(outputs, list(ours.parameters()), upstream)
    assert equal([tensor.detach() for tensor in given], copies) and [tensor._version for tensor in given] == versions


def test_accumulation(device):
    """backward() adds to .grad, as everywhere in PyTorch, and one module may run twice in one graph."""
    ours, _ = pair("GRU", device)
    x = torch.randn(2, B, I, device=device)
    output, _ = ours(x)
    output.sum().backward()
    once = [weight.grad.clone() for weight in ours.parameters()]
    ours(x)[0].sum().backward()
    assert equal([weight.grad for weight in ours.parameters()], [2 * grad for grad in once])
    whole = run(ours, torch.cat([x, x]))
    first = ours(x)
    second = ours(x, first[1])
    close([torch.cat([first[0], second[0]]), second[1]], whole[:2])


def test_checkpoint(device):
    """torch.utils.checkpoint recomputes the layer, with the same dropout mask, to the same gradients."""
    ours, _ = pair("LSTM", device, num_layers=2, dropout=0.5)
    x = torch.randn(2, B, I, device=device, requires_grad=True)
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        output, _ = checkpoint(ours, x, use_reentrant=False) if again else ours(x)
        found.append((output, *torch.autograd.grad(output.sum(), [x, *ours.parameters()])))
    assert equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, dtype, device):
    """Under autocast, outputs and gradients have the dtypes that torch.nn gives them, or its error; on a CPU, its numbers."""
    ours, theirs = pair(name, device, backend=None)
    for x in (torch.randn(T, B, I, device=device), torch.randn(T, B, I, device=device).to(dtype)):
        found = []
        for module in (ours, theirs):
            with torch.autocast(device, dtype=dtype):
                found.append(outcome(run, module, x))
        assert [str(item) if isinstance(item, type | str) else item.dtype for item in found[0]] == [
            str(item) if isinstance(item, type | str) else item.dtype for item in found[1]
        ]
        if device == "cpu" and isinstance(found[1], list):
            assert equal(*found)
