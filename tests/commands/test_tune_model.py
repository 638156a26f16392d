"""`rnnfast.tune` where there is no GPU: which calls it finds, what an interrupted run keeps, and that it leaves no trace."""

import copy
import random
import re
import sys

import numpy as np
import pytest
import torch
from support import own_cells

import rnnfast
from rnnfast import functional
from rnnfast.choice import gpu, kernel_plan, tuned, tuning_file
from rnnfast.commands import tune, tune_model
from rnnfast.kernels.persistent.plan import GPUS

pytestmark = [
    pytest.mark.same_everywhere,
    pytest.mark.skipif(torch.cuda.is_available(), reason="takes CPU tensors, in the interpreter"),
]

H100 = GPUS["H100"]


class Model(torch.nn.Module):
    """Two layers of ours, a function of ours, a layer and a cell of torch.nn's; and what changes in a call."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(32)
        self.encoder = rnnfast.LSTM(32, 32, dropout=0.5, num_layers=2)
        self.decoder = rnnfast.GRU(32, 32, batch_first=True)
        self.theirs = torch.nn.LSTM(32, 32)
        self.cell = rnnfast.GRUCell(32, 32)
        self.w = torch.nn.Parameter(torch.randn(32, 32) / 8)
        self.words = torch.nn.Embedding(4, 32, max_norm=0.1)  # changes its weight in a call
        self.seen = 0

    def forward(self, x, scale=1.0):
        self.seen += 1
        self.last = x
        x.mul_(scale)
        random.random(), np.random.rand()
        y = self.norm(x.transpose(1, 2)).transpose(1, 2) + self.words(torch.tensor(1))
        y, _ = self.encoder(y)
        y, _ = self.decoder(y.transpose(0, 1))
        y, _ = functional.rnn(y.transpose(0, 1), None, self.w, self.w)
        y, _ = self.theirs(y)
        self.decoder(y.transpose(0, 1))
        return self.cell(y[-1])


@pytest.fixture
def path(monkeypatch, tmp_path):
    """CPU tensors pass for an H100's; where its tuning file is. Persistent kernels, which win, compute nothing."""
    monkeypatch.setattr("rnnfast.kernels.persistent.forward", lambda *args, **options: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RNNFAST_TUNING_FILE", str(tmp_path / "tuning.json"))
    with kernel_plan.pretend_gpu(H100):
        yield tmp_path / "tuning.json"


class Child:
    """In place of the process that measures: each candidate takes a microsecond longer than the next one."""

    def __init__(self, monkeypatch, interrupted_at=None, fails=()):
        self.asked, self.interrupted_at, self.fails = [], interrupted_at, fails
        monkeypatch.setattr(tune_model.tune, "__defaults__", (self,))

    def __call__(self, entries, device, told):
        if len(self.asked) == self.interrupted_at:
            raise KeyboardInterrupt
        self.asked.append(entries[0].shape)
        for entry in entries:
            told(entry)
        if entries[0].shape.cell in self.fails:
            return dict.fromkeys(range(len(entries)), "failed: no")
        return {n: 10.0 - n for n in range(len(entries))}


SHAPES = [
    "lstm float32 T=3 B=2 I=32 H=32 2 layers, {}",
    "gru float32 T=3 B=2 I=32 H=32, {}",
    "rnn_tanh float32 T=3 B=2 I=32 H=32, {}",
]


def inputs():
    return torch.randn(3, 2, 32)


def test_finds_the_calls(path, monkeypatch, capsys):
    """Layers and functions of ours, each shape once, inference before its training; what is not measured is said."""
    child, model = Child(monkeypatch), Model()
    report = rnnfast.tune(model, inputs(), scale=2.0)
    modes = ("inference", "training")
    assert [str(shape) for shape in child.asked] == [shape.format(mode) for shape in SHAPES for mode in modes]
    assert [entry.shape for entry in tuning_file.read(path, H100)] == child.asked
    calls = [row.calls for row in report.rows]
    assert calls[::2] == calls[1::2] == [("encoder",), ("decoder",), ("rnnfast.functional",)]
    assert dict(report.skipped) == {
        "theirs": "not rnnfast's: rnnfast.accelerate(model) exchanges it, or says why not",
        "cell": "a cell, which runs one step a call: there is nothing to choose",
    }
    out = capsys.readouterr()
    assert str(report) in out.out and "[6/6] rnn_tanh float32 T=3 B=2 I=32 H=32, training; about 0 s left" in out.err


def test_without_gradients(path, monkeypatch):
    """Inference alone."""
    child = Child(monkeypatch)
    with torch.no_grad():
        rnnfast.tune(Model().eval(), inputs())
    assert [str(shape) for shape in child.asked] == [shape.format("inference") for shape in SHAPES]


def test_the_table(path, monkeypatch, capsys):
    """Of each kind of kernels the fastest; rows of the file are as those that were measured."""
    Child(monkeypatch)
    layer, x = rnnfast.LSTM(768, 768, dtype=torch.float16), torch.randn(4, 16, 768, dtype=torch.float16)
    monkeypatch.setattr("rnnfast.kernels.step.forward", lambda *args, **options: None)
    first = rnnfast.tune(layer, x)
    again = rnnfast.tune(layer, x)
    shape = first.rows[1].shape
    entries = tune.candidates(shape, H100, tuning_file.read(path, H100)[0])
    assert len(entries) == 7
    assert first.rows[1].times == {"torch.nn": 10, "step": 9, "step + persistent": 8, "persistent": 4}
    assert first.rows[1].winner == "persistent" and first.rows[1].ratio == 0.4
    assert [(row.shape, row.times) for row in first.rows] == [(row.shape, row.times) for row in again.rows]
    assert not any(row.new for row in again.rows)
    lines = str(first).splitlines()
    assert re.split("  +", lines[1]) == [
        *("cell", "dtype", "T", "B", "I", "H", "mode", "torch.nn", "step", "persistent", "step + persistent", "winner"),
        *("of torch.nn", "calls"),
    ]
    assert re.split("  +", lines[3]) == [
        *("lstm", "float16", "4", "16", "768", "768", "training", "10.00", "9.00", "4.00", "8.00", "persistent"),
        *("0.40", "the model itself"),
    ]
    assert lines[-1] == f"2 measured, 0 known before; in {path}" and f"0 measured, 2 known before; in {path}" in str(again)


def test_interrupted_and_resumed(path, monkeypatch, capsys):
    """What was found is kept, the table of it is printed, and the second call goes on; `again` measures all anew."""
    model, x = Model(), inputs()
    Child(monkeypatch, interrupted_at=3)
    with pytest.raises(KeyboardInterrupt):
        rnnfast.tune(model, x)
    printed = capsys.readouterr()
    assert "3 measured, 0 known before" in printed.out and "interrupted: what was measured is kept" in printed.err
    assert len(tuning_file.read(path, H100)) == 3
    child = Child(monkeypatch)
    report = rnnfast.tune(model, x)
    assert len(child.asked) == 3 and [row.new for row in report.rows] == [False] * 3 + [True] * 3
    assert "3 measured, 3 known before" in capsys.readouterr().out
    child = Child(monkeypatch)
    rnnfast.tune(model, x)
    assert not child.asked
    rnnfast.tune(model, x, again=True)
    assert len(child.asked) == 6 and len(tuning_file.read(path, H100)) == 6


def test_what_failed_is_said(path, monkeypatch):
    """It is not stored, and the others are measured."""
    Child(monkeypatch, fails=("lstm",))
    report = rnnfast.tune(Model(), inputs())
    assert "lstm float32 T=3 B=2 I=32 H=32 2 layers, inference: torch.nn: failed: no; step kernels: failed: no" in str(report)
    assert [row.winner for row in report.rows[:2]] == ["-", "-"] and "4 measured" in str(report)


def test_is_followed_at_once(path, monkeypatch):
    """By the calls of this process, which had read the file before."""
    Child(monkeypatch)
    layer, x = rnnfast.LSTM(32, 32), inputs()
    with torch.no_grad():
        assert rnnfast.explain(layer, x).tuning.startswith("not measured here")
        rnnfast.tune(layer, x)
        assert rnnfast.explain(layer, x).tuning == f"by {path}, measured at lstm float32 T=3 B=2 I=32 H=32, inference"


def state(model, x):
    """All that a call could change."""
    generators = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    tensors = [tensor.clone() for tensor in (*model.state_dict().values(), x)]
    attributes = [sorted(vars(module)) for module in model.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    flags = [module.training for module in model.modules()]
    cudnn = [torch.backends.cudnn.benchmark, torch.backends.cudnn.rnn.fp32_precision, torch.backends.cudnn.deterministic]
    grads = [parameter.grad for parameter in model.parameters()]
    return (generators, attributes, hooks, flags, cudnn, grads, model.seen), tensors


@pytest.mark.parametrize("ends", ["well", "interrupted", "model raises"])
def test_leaves_no_trace(ends, path, monkeypatch, cudnn_benchmark):
    """However it ends."""
    Child(monkeypatch, interrupted_at=1 if ends == "interrupted" else None)
    model, x = Model(), inputs()
    model.decoder.register_forward_hook(lambda *args: None)
    model.norm.eval()
    cudnn_benchmark(True)
    if ends == "model raises":
        model.theirs = torch.nn.LSTM(5, 5)
    before, tensors = state(model, x)
    monkeypatch.setattr("rnnfast.choice.calls.measure", None)  # nothing is measured in this process meanwhile
    try:
        rnnfast.tune(model, x, scale=3.0)
        assert ends == "well"
    except KeyboardInterrupt:
        assert ends == "interrupted"
    except RuntimeError as error:
        assert ends == "model raises" and "input.size(-1) must be equal to input_size" in str(error)
    after, others = state(model, x)
    assert before == after
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
    assert tuned.candidate.get() is None


def test_numbers_of_a_run_are_as_without(path, monkeypatch):
    """A training step after `rnnfast.tune` gives the bits that it gives without it, dropout included."""
    Child(monkeypatch)
    model = Model()
    other = copy.deepcopy(model)
    torch.manual_seed(7)
    expected = other(inputs())
    torch.manual_seed(7)
    x = inputs()
    rnnfast.tune(model, x)
    tuning_file.store([], path, H100)
    with tuned.override_tuning(H100, []):
        assert torch.equal(model(x), expected)


def test_other_calls(path, monkeypatch):
    """What cannot be measured, or is measured as a simpler call, is said."""
    Child(monkeypatch)

    class Others(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.projected = rnnfast.LSTM(32, 32, proj_size=8)
            self.named = rnnfast.GRU(32, 32, backend="reference")
            self.wide = rnnfast.GRU(32, 32, dtype=torch.float64)
            self.own = rnnfast.Layer(own_cells.gru, 32, 32, backend="reference")

        def forward(self, x):
            self.projected(x)
            self.named(x)
            self.wide(x.double())
            functional.gru(x, None, torch.randn(96, 32), torch.randn(96, 32), lengths=[3, 2])
            self.own(x)
            self.packed = rnnfast.RNN(32, 32)
            self.packed(torch.nn.utils.rnn.pack_padded_sequence(x, [3, 1]))

    with torch.no_grad():
        report = rnnfast.tune(Others(), inputs())
    note = "(measured without its lengths, resets or projection)"
    assert [row.calls for row in report.rows] == [(f"projected {note}",), (f"rnnfast.functional {note}",), (f"RNN {note}",)]
    assert {(row.shape.T, row.shape.B) for row in report.rows} == {(3, 2)}
    assert dict(report.skipped)["named"] == "'reference' is asked for by backend=, so there is nothing to choose"
    assert "the dtype is torch.float64" in dict(report.skipped)["wide"]
    assert dict(report.skipped)["own"] == "a layer of the cell `gru`: only layers that torch.nn has are measured"


def test_on_the_cpu(path, monkeypatch):
    """Layers that run by torch.nn's short path elsewhere are named, with what to do."""
    Child(monkeypatch)
    report = rnnfast.tune(rnnfast.GRU(32, 32, backend="torch"), inputs())
    assert not report.rows and "there was nothing to measure" in str(report)
    assert report.skipped == (("the model itself", "'torch' is asked for by backend=, so there is nothing to choose"),)
    with monkeypatch.context() as patch:
        patch.setitem(gpu._limits, torch.device("cpu"), None)
        report = rnnfast.tune(rnnfast.GRU(32, 32), inputs())
    why = "it ran on cpu, where there is no choice: move the model and its inputs to the GPU"
    assert report.skipped == (("the model itself", why),)


def test_a_compiled_model(monkeypatch, request):
    """It runs as it was written, so that its calls are seen."""
    child = Child(monkeypatch)
    torch._dynamo.reset()
    before = torch._dynamo.config.allow_rnn
    rnnfast.enable_compile()
    try:
        with torch.no_grad():
            compiled = torch.compile(torch.nn.Sequential(rnnfast.GRU(32, 32)), backend="eager")
            x = inputs()
            compiled(x)
            request.getfixturevalue("path")  # now, for Dynamo would ask for the GPU
            rnnfast.tune(compiled, x)
    finally:
        monkeypatch.undo()
        torch._dynamo.config.allow_rnn = before
        torch._dynamo.reset()
    assert [str(shape) for shape in child.asked] == ["gru float32 T=3 B=2 I=32 H=32, inference"]


class Terminal:
    """In place of stderr: a terminal."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_progress_at_a_terminal(path, monkeypatch):
    """One line that is rewritten, and removed at the end."""
    Child(monkeypatch)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "56")
    with torch.no_grad():
        rnnfast.tune(rnnfast.GRU(32, 32), inputs())
    assert "\n" not in terminal.text and terminal.text.endswith("\r\x1b[K")
    lines = terminal.text.split("\r\x1b[K")
    assert lines[1:3] == [
        "[1/1] gru float32 T=3 B=2 I=32 H=32, inference",
        "[1/1] gru float32 T=3 B=2 I=32 H=32, inference: torch.n",
    ]


def test_wrong_calls(path, monkeypatch, capsys):
    Child(monkeypatch)
    with pytest.raises(TypeError, match=r"model should be a torch\.nn\.Module, got function"):
        rnnfast.tune(lambda x: x, inputs())
    with pytest.raises(ValueError, match="call it once before"):
        rnnfast.tune(torch.nn.LazyLinear(3), inputs())
    with pytest.raises(TypeError):
        rnnfast.tune(rnnfast.GRU(32, 32), inputs(), wrong=1)
    with pytest.raises(ValueError, match="RNN: Expected input to be 2D or 3D"):
        rnnfast.tune(rnnfast.RNN(32, 32), torch.randn(32))
    path.write_text("{")
    with pytest.warns(rnnfast.TuningWarning), pytest.raises(RuntimeError, match=r"(?s)cannot be read.*RNNFAST_TUNING_FILE"):
        rnnfast.tune(rnnfast.GRU(32, 32), inputs())


def test_without_a_gpu():
    with pytest.raises(RuntimeError, match="needs a GPU, and PyTorch sees none here: run it on"):
        rnnfast.tune(rnnfast.GRU(32, 32), inputs())
