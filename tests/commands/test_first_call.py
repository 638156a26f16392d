"""What `torch.backends.cudnn.benchmark = True` measures at the first call of a new shape, with a stand-in for the GPU."""

import threading
from dataclasses import replace

import pytest
import torch
from support.stand_ins import Event
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
from rnnfast import check
from rnnfast.choice import calls, kernel_plan, trust, tuned, tuning_file
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.commands import first_call
from rnnfast.kernels import step
from rnnfast.kernels.persistent.plan import GPUS, persistent_plans

pytestmark = [
    pytest.mark.same_everywhere,
    pytest.mark.skipif(torch.cuda.is_available(), reason="takes CPU tensors, in the interpreter"),
]

H100 = GPUS["H100"]
SHAPE = Shape("lstm", "float32", "ieee", 3, 2, 4, 32, 2, 1, training=True)
CPU = torch.device("cpu")


@pytest.fixture
def pretend(monkeypatch, cudnn_benchmark):
    """CPU tensors pass for an H100's, with a clock for device events, and the switch is on."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    cudnn_benchmark(True)
    monkeypatch.setenv("RNNFAST_CANARY", "off")
    trust._verdicts[H100] = trust.Verdict({"step": ""})
    with kernel_plan.pretend_gpu(H100):
        yield


def persistent_entry(shape):
    return Entry(shape, "triton", persistent_plans(4, shape.B, shape.H, 4, "ieee", False, H100)[0])


def test_candidates(pretend):
    """Persistent kernels only where the canary found them right, and one plan of them."""
    plain = [Entry(SHAPE, "torch"), Entry(SHAPE, "triton")]
    assert first_call.candidates(SHAPE, CPU) == plain
    backward = persistent_plans(4, 2, 32, 4, "ieee", True, H100, 1)[0]
    trust._verdicts[H100] = trust.Verdict({"step": "", "persistent": ""})
    assert first_call.candidates(SHAPE, CPU) == [*plain, Entry(SHAPE, "triton", None, backward)]
    near = persistent_entry(replace(SHAPE, training=False))
    found = first_call.candidates(SHAPE, CPU, near)
    assert [(entry.forward, entry.backward) for entry in found[2:]] == [(near.forward, None), (near.forward, backward)]


@pytest.mark.parametrize("known", [True, False])
def test_forward_comes_first(known, pretend, monkeypatch):
    """In training with persistent kernels: the forward kernels are those that win in inference, measured if need be."""
    trust._verdicts[H100] = trust.Verdict({"step": "", "persistent": ""})
    near = persistent_entry(replace(SHAPE, training=False))
    asked = []

    def medians(entries, rows):
        asked.append(entries)
        return {n: 10.0 - n for n in range(len(entries))}

    monkeypatch.setattr(first_call, "medians", medians)
    with tuned.override_tuning(H100, [near if known else replace(near, shape=replace(near.shape, H=64))]):
        entry = first_call.measure(SHAPE, CPU)
    assert [entries[0].shape.training for entries in asked] == ([True] if known else [False, True])
    assert entry.forward == near.forward and entry.backward == asked[-1][-1].backward is not None


def test_measured_once(pretend, tmp_path, monkeypatch):
    """At the first call of a shape, in inference and in training, and no more; in memory, not in the file."""
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("RNNFAST_TUNING_FILE", str(path))
    measured, inner = [], calls.measure
    monkeypatch.setattr(calls, "measure", lambda *args: measured.append(args) or inner(*args))
    layer, x = rnnfast.LSTM(4, 32, num_layers=2, dropout=0.5), torch.randn(3, 2, 4)
    for _ in range(3):
        layer(x)[0].sum().backward()
        with torch.no_grad():
            layer(x)
    assert measured == [(SHAPE, CPU), (replace(SHAPE, training=False), CPU)]
    assert {entry.shape for entry in tuned.table(H100).entries} == {shape for shape, _ in measured}
    times = tuned.table(H100).entries[0].times
    assert set(times) == {"torch.nn", "step kernels; backward step kernels"} and set(times.values()) == {1000 / 3}
    assert not path.exists()
    assert rnnfast.explain(layer, x).tuning == f"by torch.backends.cudnn.benchmark in this process, measured at {SHAPE}"


@pytest.mark.parametrize("winner", ["torch", "triton"])
def test_the_call_itself_runs_on_the_winner(winner, pretend, monkeypatch, no_launch):
    """From the first call on."""
    monkeypatch.setattr(calls, "measure", lambda shape, device: Entry(shape, winner))
    layer, x = rnnfast.GRU(4, 8), torch.randn(3, 2, 4)
    for _ in range(2):
        if winner == "torch":
            assert torch.equal(layer(x)[0], torch.nn.GRU.forward(layer, x)[0])
        else:
            with pytest.raises(AssertionError, match="a kernel was launched"):
                layer(x)


def test_the_caller_notices_nothing(pretend, monkeypatch):
    """The bits of a training step with dropout, the generators, tensors, gradients and modes are as without measuring."""
    x = torch.randn(3, 2, 4)
    layer = rnnfast.LSTM(4, 32, num_layers=2, dropout=0.5)

    def call():
        torch.manual_seed(5)
        layer.zero_grad()
        counter = FlopCounterMode(display=False)
        with counter, torch.autocast("cpu", enabled=False), torch.autograd.graph.save_on_cpu():
            y, _ = layer(x)
            y.sum().backward()
        return [y, *(p.grad for p in layer.parameters()), torch.get_rng_state(), torch.tensor(counter.get_total_flops())]

    with rnnfast.use_backend("triton"):
        expected = call()
    inner = calls.measure

    def measure(*args):
        entry = inner(*args)
        assert entry is not None and len(entry.times) == 2
        return replace(entry, winner="triton")  # whatever won on this clock

    monkeypatch.setattr(calls, "measure", measure)
    versions = [tensor._version for tensor in (x, *layer.parameters())]
    threads = threading.active_count()
    for got, wanted in zip(call(), expected, strict=True):
        assert torch.equal(got, wanted)
    assert versions == [tensor._version for tensor in (x, *layer.parameters())]
    assert threads == threading.active_count() and tuned.has(H100, SHAPE)
    assert check._prepared.cache_info().currsize == 0  # nothing stays in the memory of the GPU


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("memory is full"), RuntimeError("CUDA error")])
def test_a_candidate_that_fails(error, pretend, monkeypatch):
    """Is dropped, and the other one runs; this thread sees no error."""

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(step, "forward", fail)
    entry = first_call.measure(SHAPE, CPU)
    assert entry.winner == "torch" and set(entry.times) == {"torch.nn"}
    monkeypatch.setattr(torch.nn.LSTM, "forward", fail)
    assert first_call.measure(SHAPE, CPU) is None


def test_a_wrong_candidate(pretend, monkeypatch):
    """Does not win."""
    inner = step.forward

    def wrong(*args, **options):
        inner(*args, **options)
        args[6].mul_(1.01)

    monkeypatch.setattr(step, "forward", wrong)
    entry = first_call.measure(replace(SHAPE, training=False), CPU)
    assert entry.winner == "torch" and set(entry.times) == {"torch.nn"}


def test_interrupted(pretend, monkeypatch):
    """Ctrl-C while the thread measures: the thread ends, then the interrupt goes on, and nothing is remembered."""
    inner, threads = threading.Thread.join, threading.active_count()

    def join(thread, *args):
        monkeypatch.setattr(threading.Thread, "join", inner)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        rnnfast.LSTM(4, 32)(torch.randn(3, 2, 4))
    assert threading.active_count() == threads and not tuned.table(H100).entries


def test_what_no_module_has(pretend):
    """A cell that only a function has is not measured."""
    assert first_call.measure(replace(SHAPE, cell="mgu"), CPU) is None


def test_a_file_is_enough(pretend, tmp_path, monkeypatch):
    """What `rnnfast.tune` measured is not measured again."""
    monkeypatch.setenv("RNNFAST_TUNING_FILE", str(tmp_path / "tuning.json"))
    tuning_file.store([Entry(SHAPE, "torch")], tmp_path / "tuning.json", H100)
    monkeypatch.setattr(calls, "measure", None)
    rnnfast.LSTM(4, 32, num_layers=2)(torch.randn(3, 2, 4))
