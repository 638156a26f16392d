"""What is saved for backward, and tensors edited in place before it: the same errors and gradients as torch.nn on a CPU."""

import pytest
import torch
from support.groups import Stack
from support.layers import CELLS, H, close, equal, pair
from test_ops import call, make

from rnnfast import ops, reference, torch_private

T, B = 2, 2
NEEDS = [("x",), ("w_ih", "b_ih"), ("w_hh",)]


def gradients(cell, needs, edited, device, **options):
    """The gradients of `needs` where one of the inputs, or "y", is edited between forward and backward; None if PyTorch
    refuses."""
    torch.manual_seed(1)
    tensors = make(cell, device, T=T, B=1, I=2, H=2)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in needs)
    y, *_ = call(lambda *args, **given: ops.layer(*args, **given, **options), cell, tensors)
    loss = (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum()
    with torch.no_grad():
        if edited is not None:
            (tensors | {"y": y})[edited].mul_(2).add_(1)
    try:
        return torch.autograd.grad(loss, [tensors[name] for name in needs])
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return None


@pytest.mark.skipif(not torch_private.unpacks_one_by_one, reason="this PyTorch unpacks all saved tensors at once")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", list(reference.CELLS))
def test_what_backward_reads(cell, recompute, device):
    """For each cell and set of gradients: an edit of what backward reads is refused, any other changes no bit of them."""
    spec = reference.CELLS[cell]
    for needs in NEEDS[:1] if recompute or not spec.allows_edits else NEEDS:
        read = {"w_hh"}
        if not spec.allows_edits:
            read |= {"x", "h0", "c0", "w_ih", "b_ih", "b_hh", "y"}
        if "x" in needs:
            read |= {"w_ih"}
        if "w_ih" in needs:
            read |= {"x"}
        if "w_hh" in needs or spec.reads_h_before:
            read |= {"h0"}
        if recompute and spec.saved:
            read |= {"x", "h0", "w_ih", "b_ih", "b_hh"}
        expected = gradients(cell, needs, None, device, recompute=recompute)
        for name in ("x", "h0", "w_ih", "w_hh", "b_ih", "b_hh", "y"):
            found = gradients(cell, needs, name, device, recompute=recompute)
            assert (found is None) == (name in read), (needs, name)
            assert found is None or equal(found, expected), (needs, name)


def test_edits_as_torch_nn_allows_them():
    """torch.nn's LSTM on a CPU refuses edits, its GRU and RNN allow them. Backward of an RNN's step does not read h_{t-1}."""
    found = {cell: (spec.allows_edits, spec.reads_h_before) for cell, spec in reference.CELLS.items()}
    assert [found[cell] for cell in ("gru", "rnn_tanh", "rnn_relu")] == [(True, True), (True, False), (True, False)]
    assert not found["lstm"][0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", list(reference.CELLS))
def test_what_is_saved(cell, recompute, device):
    """The inputs, which second derivatives read, the output, the activations and the cell states; nothing twice, no copy."""
    tensors, packed = make(cell, device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor), lambda _: None):
        y, *_ = call(lambda *args, **given: ops.layer(*args, **given, recompute=recompute), cell, tensors)
    T, B, H = y.shape
    blocks = 0 if recompute else reference.CELLS[cell].saved
    known = {tensor.data_ptr(): name for name, tensor in (tensors | {"y": y}).items()}
    found = [known.get(tensor.data_ptr(), (tuple(tensor.shape), tensor.dtype)) for tensor in packed if tensor.numel()]
    expected = [*tensors, "y"] + [((1, T, B, blocks * H), y.dtype)] * (blocks > 0)
    assert found == expected + [((1, T, B, H), torch.float32)] * (reference.STATES[cell] - 1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", list(reference.CELLS))
def test_what_is_saved_of_a_stack(cell, recompute, device):
    """The same of each layer, and the outputs of all layers in place of the output: nothing twice, and no copy of a weight."""
    stack, packed = Stack(cell, 3, recompute=recompute, dropout=0.5), []
    tensors = stack.tensors(device)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor), lambda _: None):
        stack.on_kernels(tensors)
    T, B, H = stack.T, stack.B, stack.H
    blocks = 0 if recompute else reference.CELLS[cell].saved
    known = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    found = [known.get(tensor.data_ptr(), (tuple(tensor.shape), tensor.dtype)) for tensor in packed if tensor.numel()]
    expected = [((2,), torch.int64), ((3, T, B, H), torch.float32)]  # the seeds, the outputs
    expected += [((3, T, B, blocks * H), torch.float32)] * (blocks > 0) + [((3, T, B, H), torch.float32)] * (cell == "lstm")
    assert sorted(map(str, found)) == sorted(map(str, [*tensors, *expected]))


def test_nothing_is_saved_of_a_frozen_layer_on_a_constant(device):
    """No input requires a gradient: nothing is saved."""
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor), lambda _: None):
        call(ops.layer, "lstm", make("lstm", device, grad=False))
    assert not packed


def residual(module, x, hx):
    x += module(x, hx)[0]
    return x


def output_edited(module, x, hx):
    return module(x, hx)[0].relu_().mul_(2)


def edits(name):
    def edit(module, x, hx):
        output, _ = module(x, hx)
        with torch.no_grad():
            getattr(module, name).mul_(2)
        return output

    return edit


EDITS = {"residual": residual, "output": output_edited} | {
    name: edits(f"{name}_l0") for name in ("bias_ih", "bias_hh", "weight_ih", "weight_hh")
}


LAYERS = [(name, {"nonlinearity": nonlinearity} if name == "RNN" else {}) for name, nonlinearity in CELLS]
LAYERS += [("GRU", {"batch_first": True}), ("LSTM", {"bidirectional": True, "num_layers": 2})]


@pytest.mark.skipif(not torch_private.unpacks_one_by_one, reason="this PyTorch unpacks all saved tensors at once")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name, options", LAYERS, ids=str)
def test_edits_as_in_torch_nn(name, options, frozen, device):
    """Layers whose weights train or are frozen: what torch.nn on a CPU allows, and its gradients; what it refuses, refused."""
    for edit, program in EDITS.items():
        if edit == "residual" and ("bidirectional" in options or ("batch_first" in options and not frozen)):
            continue  # another width; and a batch-first input, which torch.nn happens to copy
        outcomes = []
        for module in pair(name, "cpu", I=H, **options):
            module = module.to(device) if module.__class__.__module__.startswith("rnnfast") else module
            where = next(module.parameters()).device
            module.requires_grad_(not frozen)
            torch.manual_seed(1)
            given = torch.randn(T, B, H).to(where).requires_grad_()
            try:
                program(module, given * 1, None).square().sum().backward()
                outcomes.append([given.grad.cpu(), *(weight.grad.cpu() for weight in module.parameters() if not frozen)])
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                outcomes.append(None)
        ours, theirs = outcomes
        assert (ours is None) == (theirs is None), edit
        if ours is not None:
            close(ours, theirs)


@pytest.mark.skipif(not torch_private.unpacks_one_by_one, reason="this PyTorch unpacks all saved tensors at once")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ["gru", "rnn_relu"])
def test_output_edited_with_options(cell, reverse, recompute, device):
    """Lengths, resets, given states, either direction: forward runs again for the output, and every gradient stays."""
    found = []
    for edit in (False, True):
        torch.manual_seed(1)
        tensors = make(cell, device, T=T, B=B)
        start, weights = tensors["h0"], [tensors[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
        reset = torch.randn_like(start).requires_grad_()
        given = {"lengths": torch.tensor([2, T], device=device), "resets": torch.ones(T, B, device=device).bool()}
        y, (h_n,) = ops.layer(
            cell, tensors["x"], (start,), *weights, reverse=reverse, recompute=recompute, reset_to=(reset,), **given
        )
        loss = (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum() + h_n.square().sum()
        if edit:
            with torch.no_grad():
                y.fill_(float("nan"))
        found.append(torch.autograd.grad(loss, [*tensors.values(), reset]))
    assert equal(*found)


def test_second_derivatives_read_every_input(device):
    """An edit that a first derivative goes on without is refused by a second one, and by it alone."""
    tensors = make("gru", device, grad=False)
    x = tensors["x"].requires_grad_()
    tensors["x"] = x * 1
    y = call(ops.layer, "gru", tensors)[0]
    first = torch.autograd.grad(y.sum(), x, create_graph=True)
    tensors["x"].add_(1)
    if torch_private.unpacks_one_by_one:
        assert equal(torch.autograd.grad(y.sum(), x, retain_graph=True), first)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_second_backward_is_refused_as_ever(device):
    """Without retain_graph what was saved is gone, and PyTorch says so."""
    tensors = make("gru", device)
    loss = call(ops.layer, "gru", tensors)[0].sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.skipif(not torch_private.unpacks_one_by_one, reason="this PyTorch unpacks all saved tensors at once")
def test_edits_and_batched_gradients(device):
    """An edit of the output, then gradients that are mapped over."""
    found = []
    for edit in (False, True):
        torch.manual_seed(1)
        tensors = make("gru", device)
        y, h_n = call(ops.layer, "gru", tensors)
        upstream = torch.randn(2, *h_n.shape, device=device)
        if edit:
            with torch.no_grad():
                y.zero_()
        found.append(torch.autograd.grad(h_n, list(tensors.values()), upstream, is_grads_batched=True))
    assert equal(*found)
