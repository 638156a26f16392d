"""What drop-ins forget, training: optimizers, scalers, hooks, checkpoints and everything that watches autograd. All side by
side with torch.nn."""

import contextlib

import pytest
import torch
from support.layers import NAMES, B, H, I, close, equal, flat, outcome, pair, run, states
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.numerical

T = 2


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=2)


def accumulating(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=False)


@pytest.mark.parametrize("make", [lbfgs, accumulating, torch.optim.Adam, torch.optim.RMSprop])
def test_optimizers(make, device):
    """Two steps of an optimizer that calls a closure, with clipping and an averaged model, go where torch.nn's go."""
    found = []
    for module in pair("LSTM", device):
        torch.manual_seed(1)
        x, optimizer = torch.randn(T, B, I, device=device), make(module.parameters())
        average = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))

        def closure(module=module, x=x, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (module(x)[0] - 0.1).square().sum()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            return loss

        for _ in range(2):
            optimizer.step(closure)
            average.update_parameters(module)
        found.append([*module.parameters(), *average.module.parameters(), *flat(average(x))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # Adam divides by the root of tiny squares


@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler(name, device):
    """Loss scaling in float16: the same weights after a step, and an overflow leaves both alone."""
    found = []
    for module in pair(name, device):
        torch.manual_seed(1)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0)
        optimizer, x = torch.optim.SGD(module.parameters(), lr=0.1), torch.randn(T, B, I, device=device)
        for factor in (1.0, float("inf")):
            optimizer.zero_grad()
            scaler.scale(module(x)[0].square().sum() * factor).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        found.append([*module.parameters(), torch.tensor(scaler.get_scale())])
    close(*found)
    assert found[0][-1] == 512


@contextlib.contextmanager
def on_cpu():
    with torch.autograd.graph.save_on_cpu():
        yield


@contextlib.contextmanager
def packing():
    """Saved tensors go through numpy, as offloading and compression do."""
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (t.device, t.detach().cpu().numpy().copy()), lambda p: torch.from_numpy(p[1]).to(p[0])
    ):
        yield


@pytest.mark.parametrize(
    "context", [on_cpu, packing, torch.autograd.detect_anomaly, torch.autograd.graph.allow_mutation_on_saved_tensors]
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("name", NAMES)
def test_contexts(name, context, device):
    """What takes hold of saved tensors changes no result."""
    ours, _ = pair(name, device, num_layers=2)
    x, hx = torch.randn(T, B, I, device=device), states(name, 2, B, H, device=device)
    expected = run(ours, x, hx)
    with context():
        assert equal(run(ours, x, hx), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # anomaly mode's own, and its traceback
def test_anomaly_is_found(device):
    """A NaN that arises in our backward is reported by anomaly mode, by our name."""
    ours, _ = pair("GRU", device)
    output, _ = ours(torch.randn(T, B, I, device=device))
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match=r"[Rr]nnfast.*returned nan"):
        output.backward(torch.full_like(output, float("inf")))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_checkpoint(name, reentrant, device):
    """Both kinds of checkpoint: the gradients of a call without, with dropout."""
    ours, _ = pair(name, device, num_layers=2, dropout=0.5)
    x, found = torch.randn(T, B, I, device=device, requires_grad=True), []
    for again in (False, True):
        torch.manual_seed(3)
        ours.zero_grad()
        x.grad = None
        output = checkpoint(ours, x, use_reentrant=reentrant)[0] if again else ours(x)[0]
        output.square().sum().backward()
        found.append([output, x.grad, *(weight.grad for weight in ours.parameters())])
    assert equal(*found)


@pytest.mark.parametrize("name", NAMES)
def test_hooks(name, device):
    """Hooks on modules, tensors and parameters see the shapes that torch.nn's see, in the same order."""
    seen = []
    for module in pair(name, device):
        calls = []

        def note(label, calls=calls):
            def hook(*args):
                shapes = [tuple(t.shape) for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
                calls.append((label, shapes))

            return hook

        module.register_forward_pre_hook(note("pre"))
        module.register_forward_hook(note("forward"))
        module.register_full_backward_pre_hook(note("backward pre"))
        module.register_full_backward_hook(note("backward"))
        module.weight_ih_l0.register_post_accumulate_grad_hook(note("accumulated"))
        module.bias_hh_l0.register_hook(note("gradient"))
        x = torch.randn(T, B, I, device=device, requires_grad=True)
        output, _ = module(x)
        output.register_hook(note("output"))
        output.sum().backward()
        seen.append(calls)
    # among the leaves of one node the order is not defined
    assert [call for call in seen[0] if call[0] not in ("accumulated", "gradient")] == [
        call for call in seen[1] if call[0] not in ("accumulated", "gradient")
    ]
    assert sorted(seen[0]) == sorted(seen[1]) and len(seen[0]) == 7


def test_global_hooks(device):
    """Hooks for all modules of the process see ours once, as one module."""
    ours, _ = pair("LSTM", device)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        ours(torch.randn(T, B, I, device=device))
    finally:
        handle.remove()
    assert seen == [ours]


@pytest.mark.parametrize("name", NAMES)
def test_only_the_states_need_gradients(name, device):
    """Frozen weights and an input without gradient: the states get theirs, through padding of any output."""
    found = []
    for module in pair(name, device, num_layers=2, bidirectional=True):
        torch.manual_seed(1)
        module.requires_grad_(False)
        hx = states(name, 4, B, H, device=device, requires_grad=True)
        each = hx if isinstance(hx, tuple) else (hx,)
        output = module(torch.randn(T, B, I, device=device), hx)[0]
        found.append([output, *torch.autograd.grad(output[0, 0, 0], each)])
    close(*found)


def test_deterministic_mode(device, monkeypatch):
    """use_deterministic_algorithms(True) refuses nothing of ours, and the bits are those without."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    ours, _ = pair("LSTM", device, num_layers=2)
    x = torch.randn(T, B, I, device=device)
    expected = run(ours, x)
    torch.use_deterministic_algorithms(True)
    try:
        assert equal(run(ours, x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", NAMES)
def test_data_parallel(name, device):
    """Inside DataParallel, and as the replica that it makes of a layer."""
    ours, theirs = pair(name, device)
    x = torch.randn(T, B, I, device=device)
    close(flat(nn.DataParallel(ours, dim=1)(x)), flat(theirs(x)))
    replica = ours._replicate_for_data_parallel()
    for key, weight in ours.named_parameters():
        setattr(replica, key, weight * 1)  # as DataParallel does: tensors that are no Parameters
    found = torch.autograd.grad(replica(x)[0].sum(), list(ours.parameters()))
    close(found, torch.autograd.grad(theirs(x)[0].sum(), list(theirs.parameters())))


@pytest.mark.parametrize("what", ["output", "h_n"])
def test_edits_of_outputs(what, device):
    """An output may be edited in place like any tensor: gradients are right or it raises, as torch.nn's."""
    found = []
    for module in pair("GRU", device):
        torch.manual_seed(1)
        x = torch.randn(T, B, I, device=device, requires_grad=True)
        output, h_n = module(x)
        edited = output if what == "output" else h_n

        def gradient(output=output, h_n=h_n, x=x, edited=edited):
            edited.mul_(2).add_(1)
            return list(torch.autograd.grad(output.sum() + h_n.sum(), x))

        found.append(outcome(gradient))
    if isinstance(found[0], tuple):
        assert issubclass(found[0][0], RuntimeError)
    else:
        close(*found)


def test_no_grad_parts(device):
    """A layer inside no_grad, and then outside, in one program; outputs detached between truncated windows."""
    ours, theirs = pair("LSTM", device)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        with torch.no_grad():
            hx = module(torch.randn(T, B, I, device=device))[1]
        assert not hx[0].requires_grad
        total = 0
        for _ in range(2):
            output, hx = module(torch.randn(T, B, I, device=device), tuple(state.detach() for state in hx))
            total = total + output.square().sum()
        found.append([total, *torch.autograd.grad(total, list(module.parameters()))])
    close(*found)
