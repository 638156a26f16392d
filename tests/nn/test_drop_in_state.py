"""What drop-ins forget, state: weights that change by any route, tied and missing ones, loading, copies, old pickles,
processes and threads. All side by side with torch.nn."""

import copy
import gc
import io
import multiprocessing
import pickle
import threading
import weakref

import pytest
import torch
from support.layers import NAMES, B, H, I, close, equal, flat, outcome, pair, run, states
from torch import nn
from torch.nn import functional as F

import rnnfast


def set_(m):
    with torch.no_grad():
        m.weight_hh_l0.set_(m.weight_hh_l0.detach() * 2)


def parameters_entry(m):
    m._parameters["weight_hh_l0"] = nn.Parameter(m.weight_hh_l0.detach() * 2)


def flat_vector(m):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(m.parameters()) * 2, m.parameters())


def shared_memory(m):
    m.share_memory()
    m.weight_hh_l0.detach().mul_(2)


def half_and_back(m):
    m.half().float()
    m.weight_hh_l0.detach().mul_(2)


def ema(m):
    average = torch.optim.swa_utils.AveragedModel(m)
    average.module.weight_hh_l0.detach().mul_(3)
    m.load_state_dict(average.module.state_dict())


def deleted(m):
    weight = m.weight_hh_l0
    del m.weight_hh_l0
    m.to(torch.float32).weight_hh_l0 = nn.Parameter(weight.detach() * 2)


CHANGES = (set_, parameters_entry, flat_vector, shared_memory, half_and_back, ema, deleted)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_changed_weights_are_seen(name, change, device):
    """Used, changed, used: the second call has the new weights, as torch.nn's."""
    ours, theirs = pair(name, device)
    x, hx = torch.randn(1, B, I, device=device), states(name, 1, B, H, device=device)
    before = flat(ours(x, hx))
    for module in (ours, theirs):
        module(x, hx)
        change(module)
    after = flat(ours(x, hx))
    assert (after[0] - before[0]).abs().max() > 1e-2
    close(after, flat(theirs(x, hx)))


class WeightDrop(nn.Module):
    """DropConnect on the recurrent weight as AWD-LSTM and many after it write it."""

    def __init__(self, layer, p):
        super().__init__()
        self.layer, self.p = layer, p
        raw = layer.weight_hh_l0
        del layer._parameters["weight_hh_l0"]
        layer.flatten_parameters = lambda *_: None
        layer.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.detach()))

    def forward(self, *args):
        self.layer.weight_hh_l0 = F.dropout(self.layer.weight_hh_l0_raw, self.p, self.training)
        return self.layer(*args)


@pytest.mark.parametrize("name", NAMES)
def test_dropconnect(name, device):
    """DropConnect by replacing the weight before each call: same masks from the same seed, gradients of the raw weight."""
    found = []
    for layer in pair(name, device):
        module = WeightDrop(layer, 0.5)
        torch.manual_seed(1)
        found.append((run(module, torch.randn(2, B, I, device=device)), run(module, torch.ones(2, B, I, device=device))))
    close(*(first for first, _ in found))
    close(*(second for _, second in found))


@pytest.mark.parametrize("tie", ["input and recurrent", "layers", "modules"])
def test_tied_weights(tie, device):
    """A Parameter in two places gets the sum of both gradients and counts once."""
    found = []
    for layers in zip(*(pair("GRU", device, I=H, num_layers=2) for _ in range(2)), strict=True):
        first, second = layers
        torch.manual_seed(1)
        for weight in first.parameters():
            nn.init.uniform_(weight, -0.5, 0.5)
        second.load_state_dict(first.state_dict())
        if tie == "input and recurrent":
            first.weight_ih_l0 = first.weight_hh_l0
        elif tie == "layers":
            first.weight_hh_l1 = first.weight_hh_l0
        else:
            second.weight_hh_l0 = first.weight_hh_l0
        both = nn.ModuleList([first, second])
        output = second(first(torch.ones(2, B, H, device=device))[0])[0]
        found.append([output, *torch.autograd.grad(output.square().sum(), list(both.parameters()))])
    assert len(found[0]) == 1 + 15
    close(*found)


BAD = {
    "missing": lambda state: state.pop("weight_hh_l0"),
    "unexpected": lambda state: state.update(more=torch.zeros(1)),
    "wrong shape": lambda state: state.update(weight_hh_l0=torch.zeros(1)),
    "wrong type": lambda state: state.update(weight_hh_l0="w"),
}


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
@pytest.mark.parametrize("kind", BAD)
def test_bad_state(kind, options, device):
    """A state that does not fit: the same error or report as torch.nn's."""
    said = []
    for module in pair("LSTM", device):
        state = module.state_dict()
        BAD[kind](state)
        said.append(str(outcome(module.load_state_dict, state, **options)))
    assert said[0] == said[1]


def test_copies_after_use(device):
    """deepcopy, pickle and torch.save of a layer that has run forward and backward, is shared, or is inside a model."""
    ours, theirs = pair("LSTM", device, num_layers=2)
    x = torch.randn(1, B, I, device=device)
    ours(x)[0].sum().backward()
    model = nn.Sequential(ours)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert equal(flat(copied[0](x)), flat(ours(x)))
        assert all(a is b for a, b in zip(copied[0]._flat_weights, copied[0].parameters(), strict=True))
    close(flat(copy.copy(ours)(x)), flat(theirs(x)))


@pytest.mark.parametrize("name", NAMES)
def test_old_pickles(name, device):
    """The state of a module that an old torch pickled, without what later versions added."""
    _, theirs = pair(name, device, num_layers=2, bidirectional=True)
    x = torch.randn(1, B, I, device=device)
    for missing in ({"proj_size"}, {"proj_size", "_flat_weights", "_flat_weights_names", "_all_weights"}):
        state = copy.deepcopy({key: value for key, value in theirs.__getstate__().items() if key not in missing})
        if "_all_weights" in missing:  # before 1.0: the weights themselves, under another name
            state["all_weights"] = [[state["_parameters"]["weight_ih_l0"]]]
        module = getattr(rnnfast, name).__new__(getattr(rnnfast, name))
        module.__setstate__(state)
        assert module.proj_size == 0 and rnnfast.explain(module, x).backend == "triton"
        for _ in range(2):
            close(flat(module(x)), flat(theirs(x)))
            module.double().float()


def test_no_reference_cycles(device):
    """What forward keeps is freed with its outputs, at once, without the garbage collector."""
    ours, _ = pair("LSTM", device, num_layers=2, bidirectional=True)
    ours(torch.zeros(2, B, I, device=device))  # the first call imports Triton, and leaves frames to the collector
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            x = torch.randn(2, B, I, device=device, requires_grad=True) * 1
            output, last = ours(x)
            if backward:
                (output.sum() + last[1].sum()).backward()
            watched = [weakref.ref(tensor) for tensor in (x, output, *last)]
            del x, output, last
            assert [ref() for ref in watched] == [None] * 4
    finally:
        gc.enable()


def test_threads(device):
    """Several threads may call one layer at the same time. (Not interpreted kernels: Triton's interpreter is not for that.)"""
    ours, _ = pair("GRU", device, backend="triton" if device == "cuda" else "reference", num_layers=2)
    x = torch.randn(3, B, I, device=device)
    expected, found = run(ours, x), []
    threads = [threading.Thread(target=lambda: found.append(run(ours, x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(equal(each, expected) for each in found)


def _forked(module, x, queue):
    with torch.no_grad():
        queue.put([tensor.numpy() for tensor in flat(module(x))])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork(device):
    """A forked process computes what its parent does, as data loaders and old multiprocessing code need. On the CPU."""
    ours, _ = pair("LSTM", "cpu", backend="triton" if device == "cpu" else "torch")
    x, context = torch.randn(1, B, I), multiprocessing.get_context("fork")
    expected, queue = flat(ours(x)), context.SimpleQueue()
    process = context.Process(target=_forked, args=(ours, x, queue))
    process.start()
    found = [torch.from_numpy(array) for array in queue.get()]
    process.join()
    assert process.exitcode == 0 and equal(found, [tensor.detach() for tensor in expected])
