"""The providers on small cases, on a CPU: right, or refused a time; what is kept for backward; pytest-benchmark."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from support.stand_ins import Profiler, stand_in_gpu

import rnnfast
from benchmarks import cpu_overhead, memory
from benchmarks.timing import measure, run
from benchmarks.timing.cases import Case, Unknown
from benchmarks.timing.problem import Problem, of_module, tf32
from benchmarks.timing.providers import BASE, Provider, TorchNN, all_providers, named_provider, peers
from benchmarks.timing.results import STATUSES

SETTINGS = {"device": "cpu", "seconds": 0.001, "threads": 1, "interpret": True}
SMALL = Case("LSTM", 3, 2, 3, 4, dtype="float32")

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.same_everywhere,
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN"),  # PyTorch's own
]


@pytest.fixture(autouse=True)
def _own_problems():
    forget = run.problem_of.cache_clear
    forget()
    yield
    forget()


@pytest.mark.parametrize(
    "name, mode",
    [("torch.nn", mode) for mode in ("inference", "forward", "backward", "training")]
    + [("loop", "backward"), ("onnxruntime", "inference"), ("onnxruntime", "training")]
    + [(name, mode) for name in ("rnnfast-step", "rnnfast-one-program", "rnnfast-torch") for mode in ("inference", "training")],
)
def test_rows(name, mode, device):
    """A right provider gets times, a ratio to torch.nn and bytes; one that cannot run says why."""
    case = Case("GRU", 3, 2, 3, 4, dtype="float32", mode=mode)
    provider = named_provider(name)
    row = run.row_of(case, "quick", provider, SETTINGS)
    assert row["status"] in STATUSES and row["provider"] == name and Case(**row["case"]) == case
    if name == "onnxruntime" and mode != "inference":
        assert row["status"] == "unavailable" and row["note"] == "it has inference only" and not row["timings"]
        return
    assert row["status"] == "ok", row["note"]
    assert row["error"]["worst"] <= 1
    assert ("grad" in row["error"]["tensor"] or row["error"]["tensor"] in ("output", "h_n")) and row["kernels"] == []
    (timing,) = row["timings"]
    assert timing["how"] == "eager" and 0 < timing["p20"] <= timing["p50"] <= timing["p80"] and timing["n"] >= 5
    assert (row["ratio"] is None) == (name == BASE)
    assert (row["peak_bytes"] is None) == (name == "onnxruntime") and (row["saved_bytes"] is None) == (mode == "inference")
    assert ("Triton's interpreter" in row["note"]) == (name in ("rnnfast-step", "rnnfast-one-program"))
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("layers, directions", [(1, 1), (2, 2)])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("name", ["loop", "onnxruntime"])
def test_stacks(name, cell, layers, directions):
    """Gate orders and layouts of those that do not take torch.nn's as they are."""
    mode = "inference" if name == "onnxruntime" else "training"
    case = Case(cell, 3, 2, 3, 4, layers, directions, "float32", mode=mode)
    provider, problem = named_provider(name), Problem(case, "cpu")
    assert provider.obstacle(case, "cpu") is None
    assert problem.check(provider.ready(problem))["worst"] <= 1


@pytest.mark.parametrize("name", ["torch.compile-nn", "torch.compile-loop"])
def test_compiled(name, monkeypatch):
    """With Dynamo's "eager" backend, which needs no compiler."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args: compile(*args, backend="eager"))
    row = run.row_of(SMALL, "quick", named_provider(name), SETTINGS)
    assert row["status"] == "ok", row["note"]
    assert row["compile_s"] > 0 and not torch._dynamo.config.allow_rnn


def test_packed():
    """Those that take packed input are right on it; the kernels do where `explain` says so."""
    case = Case("LSTM", 6, 3, 3, 4, dtype="float32", packed=True)
    takes = {"torch.nn", "rnnfast", "rnnfast-torch"}
    layer, x = rnnfast.LSTM(3, 4, backend="triton"), Problem(case, "cpu").x
    if rnnfast.explain(layer, x).backend == "triton":
        takes |= {"rnnfast-step", "rnnfast-one-program"}
    for name in all_providers():
        row = run.row_of(case, "quick", named_provider(name), SETTINGS)
        if name in takes:
            assert row["status"] == "ok" and "checked against torch.nn in float64" in row["note"]
        else:
            assert row["status"] == "unavailable" and row["note"]


def test_unavailable():
    """Each says why in words."""
    found = {
        name: run.row_of(Case("LSTM", 99, 1, 3, 4, dtype="float32"), "quick", named_provider(name), SETTINGS)
        for name in ("rnnfast-persistent", "torch.compile-nn", "flashrnn", "haste", "torchrl")
    }
    assert {row["status"] for row in found.values()} == {"unavailable"}
    assert "one after another" in found["rnnfast-persistent"]["note"]
    assert found["torch.compile-nn"]["note"] == "it would unroll 99 time steps, and more than 8 compile for minutes"
    assert found["haste"]["note"] == "haste_pytorch is not installed"
    with pytest.raises(Unknown, match=r"unknown provider 'cudnn'; there are: torch\.nn, rnnfast, rnnfast-step"):
        named_provider("cudnn")


class Spoilt(TorchNN):
    """torch.nn, with something done to its output."""

    def __init__(self, spoil):
        super().__init__("spoilt")
        self.spoil = spoil

    def ready(self, problem):
        ready = super().ready(problem)
        forward = ready.forward
        ready.forward = lambda x: self.spoil(*forward(x))
        return ready


@pytest.mark.parametrize(
    "spoil, tensor",
    [
        (lambda y, last: (y * 1.001, last), "output"),
        (lambda y, last: (y, (last[0], last[1] + 1e-3)), "c_n"),
        (lambda y, last: (y.detach() + 0 * y, last), "grad of"),
        (lambda y, last: (y * torch.tensor(float("nan")), last), "output"),
    ],
)
def test_a_wrong_provider_is_refused_a_time(spoil, tensor, monkeypatch):
    monkeypatch.setattr(measure, "stopwatch", lambda *args: pytest.fail("it was timed"))
    row = run.row_of(SMALL, "quick", Spoilt(spoil), SETTINGS)
    assert row["status"] == "wrong" and row["timings"] == [] and row["ratio"] is None and row["saved_bytes"] is None
    assert row["error"]["worst"] > 1 and row["error"]["tensor"].startswith(tensor)
    assert "times the error allowed; not timed" in run.words(row)
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    "error, status",
    [
        (RuntimeError("CUDA error: an illegal\nmemory access"), "error"),
        (AssertionError(), "error"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ],
)
def test_what_a_provider_raises_becomes_its_row(error, status):
    def spoil(y, last):
        raise error

    row = run.row_of(SMALL, "quick", Spoilt(spoil), SETTINGS)
    assert row["status"] == status and row["note"].startswith(f"{type(error).__name__}: ") and "\n" not in row["note"]
    assert run.row_of(SMALL, "quick", named_provider(BASE), SETTINGS)["status"] == "ok"


def test_wrong_shape():
    row = run.row_of(SMALL, "quick", Spoilt(lambda y, last: (y[:, :1].expand_as(y)[..., None], last)), SETTINGS)
    assert row["status"] == "error"


def test_tf32_is_as_the_case_says():
    places = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [place.fp32_precision for place in places]
    for allowed, precision in ((True, "tf32"), (False, "ieee")):
        with tf32(allowed):
            assert [place.fp32_precision for place in places] == [precision] * 2
    assert [place.fp32_precision for place in places] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about what is done on a GPU, where there is none")
@pytest.mark.parametrize("mode, fails", [("training", False), ("training", True), ("backward", False)])
def test_what_is_measured_on_a_gpu(mode, fails, monkeypatch):
    """Eager and as a graph, warm and cold; a capture that fails is noted and voids nothing."""
    problem = Problem(Case("GRU", 3, 2, 3, 4, dtype="float32", mode=mode), "cpu")
    base = problem.call(named_provider(BASE).ready(problem))
    monkeypatch.setattr(run, "problem_of", lambda case, device: (problem, base))
    monkeypatch.setattr(run, "GPU_WARM_UP", 0)
    monkeypatch.setitem(measure._flush, "cuda", torch.zeros(1))
    stand_in_gpu(monkeypatch)
    monkeypatch.setattr(measure, "profile", Profiler)

    def captured(call):
        if fails:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return call

    monkeypatch.setattr(measure, "captured", captured)
    status, values = run.measured(problem.case, named_provider("rnnfast-torch"), SETTINGS | {"device": "cuda"})
    found = [(timing["how"], timing["l2"]) for timing in values["timings"]]
    graphs = [("cuda graph", "warm"), ("cuda graph", "cold")] if mode == "training" and not fails else []
    assert status == "ok" and found == [("eager", "warm"), ("eager", "cold"), *graphs]
    assert {timing["p50"] for timing in values["timings"]} == {1000.0} and values["ratio"]["p50"] == 1
    assert values["kernels"] == [
        {"name": "RNN_blockPersist_fp_LSTM", "us": 2.0, "launches": 3},
        {"name": "gemm", "us": 1.0, "launches": 3},
    ]
    assert values["peak_bytes"] == 3 and values["saved_bytes"] > 0
    graph = "; no CUDA graph: operation not permitted when stream is capturing"
    assert values["note"] == "PyTorch's own layer" + graph * fails


@pytest.mark.parametrize("most, steps", [(8, 2), (400, 20), (0, 20)])
def test_a_check_of_fewer_steps(most, steps, monkeypatch):
    """It is what is compared with the reference; the whole sequence is timed all the same."""
    checked, timed = [], []
    inner, call = Problem.check, Problem.call
    monkeypatch.setattr(Problem, "check", lambda self, ready: checked.append(self.case.T) or inner(self, ready))
    monkeypatch.setattr(Problem, "call", lambda self, ready: timed.append(self.case.T) or call(self, ready))
    case = Case("GRU", 20, 2, 3, 4, layers=2, directions=2, dtype="float32", mode="inference")
    row = run.row_of(case, "quick", named_provider("rnnfast-torch"), SETTINGS | {"check_steps": most})
    assert row["status"] == "ok" and checked == [steps] and timed[-1] == 20
    assert ("checked on 2 steps" in row["note"]) == (most == 8)


# Adapters of libraries that are not installed, against stand-ins with those libraries' layouts


def flashrnn(Wx, R, b, config):
    """The layouts of flashrnn: Wx (T, B, G, 1, H), R (G, 1, H, H) and b (G, 1, H) give states (S, T, B, 1, H), twice."""
    _, B, _, _, H = Wx.shape
    h = c = Wx.new_zeros(B, H)
    steps = []
    for x in Wx[:, :, :, 0]:
        r = torch.stack([h @ gate.t() for gate in R[:, 0]], 1) + b[None, : R.shape[0], 0]
        if config.function == "lstm":
            i, f, z, o = (x + r).unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * z.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            g, of_r, of_z = r.unbind(1)
            z = (x[:, 1] + of_z).sigmoid()
            h = z * h + (1 - z) * (x[:, 2] + b[3, 0] + (x[:, 0] + of_r).sigmoid() * g).tanh()
        steps.append(torch.stack((h, c) if config.function == "lstm" else (h,)))
    states = torch.stack(steps, 1)[:, :, :, None]
    return states, states[:, -1:]


class HasteLayer(torch.nn.Module):
    """The layouts of haste_pytorch's layers."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        G, self.H = self.gates, hidden_size
        self.kernel = torch.nn.Parameter(torch.zeros(input_size, G * hidden_size))
        self.recurrent_kernel = torch.nn.Parameter(torch.zeros(hidden_size, G * hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(G * hidden_size))
        if G == 3:
            self.recurrent_bias = torch.nn.Parameter(torch.zeros(G * hidden_size))

    def forward(self, input):
        h = c = input.new_zeros(input.shape[1], self.H)
        ys = []
        for x in input @ self.kernel + self.bias:
            r = h @ self.recurrent_kernel
            if self.gates == 4:
                i, g, f, o = (x + r).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (x_z, x_r, x_n), (r_z, r_r, r_n) = x.chunk(3, 1), (r + self.recurrent_bias).chunk(3, 1)
                z = (x_z + r_z).sigmoid()
                h = z * h + (1 - z) * (x_n + (x_r + r_r).sigmoid() * r_n).tanh()
            ys.append(h)
        return torch.stack(ys), (h[None], c[None]) if self.gates == 4 else h[None]


def torchrl_lstm(x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init, input_precision):
    """The layouts of TorchRL's ``lstm_triton``: x (B, T, I), states (B, T, H), is_init (B, T)."""
    assert not is_init.any() and hidden.shape == cell.shape == (*is_init.shape, w_hh.shape[1]) == (*x.shape[:2], w_hh.shape[1])
    first = hidden[None, :, 0], cell[None, :, 0]
    y, h, c = torch.lstm(x, first, [w_ih, w_hh, b_ih, b_hh], True, 1, 0.0, False, False, True)
    return y, y, h[0], c[0]  # the second are all cell states, which are not compared


def torchrl_gru(x, hidden, w_ih, w_hh, b_ih, b_hh, is_init, input_precision):
    assert not is_init.any() and hidden.shape == (*is_init.shape, w_hh.shape[1]) == (*x.shape[:2], w_hh.shape[1])
    y, h = torch.gru(x, hidden[None, :, 0], [w_ih, w_hh, b_ih, b_hh], True, 1, 0.0, False, False, True)
    return y, h[0]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("name", ["flashrnn", "haste", "torchrl"])
def test_layouts_of_peers(name, cell, mode, monkeypatch):
    stand_in = types.ModuleType("stand-in")
    if name == "flashrnn":
        stand_in.flashrnn, stand_in.FlashRNNConfig = flashrnn, types.SimpleNamespace
    elif name == "torchrl":
        stand_in.lstm_triton, stand_in.gru_triton = torchrl_lstm, torchrl_gru
    else:
        kinds = {"LSTM": type("LSTM", (HasteLayer,), {"gates": 4}), "GRU": type("GRU", (HasteLayer,), {"gates": 3})}
        stand_in.LSTM, stand_in.GRU = kinds["LSTM"], kinds["GRU"]
    modules = {"haste": "haste_pytorch", "torchrl": "torchrl.modules.tensordict_module._rnn_triton"}
    monkeypatch.setitem(sys.modules, modules.get(name, name), stand_in)
    monkeypatch.setattr(peers, "installed", lambda distribution: "1.0")
    provider, case = named_provider(name), Case(cell, 4, 3, 5, 6, dtype="float32", mode=mode)
    assert provider.obstacle(case, "cuda") is None and provider.obstacle(case, "cpu") == "its kernels need a GPU"
    problem = Problem(case, "cpu")
    assert problem.check(provider.ready(problem))["worst"] <= 1


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_of_torchrl(allowed):
    """TorchRL reads the older name of the setting, which is an error where only the newer one was set."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with tf32(allowed), named_provider("torchrl").settings():
        assert matmul.allow_tf32 == allowed and matmul.fp32_precision == ("tf32" if allowed else "ieee")
    assert not matmul.allow_tf32 and matmul.fp32_precision == before


# What is kept for backward


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers, directions", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_bytes_kept_by_the_kernels(cell, dtype, layers, directions, recompute, device):
    """Those of the declared shapes are those of the kernels' results, and what docs/memory.md says: LSTM 4 elements, 4 bytes;
    GRU 4 elements, RNN nothing, a unit and step; with recompute the 4 bytes alone. A stack also keeps all layers' outputs."""
    case = Case(cell, 4, 3, 5, 18, layers, directions, dtype)
    declared = memory.kept_by_kernels(case, recompute)
    problem = Problem(case, device)
    layer = problem.module(getattr(rnnfast, cell), backend="triton", recompute=recompute)
    assert declared == problem.kept(of_module(layer))
    e = case.torch_dtype.itemsize
    units = 4 * 3 * 18 * layers * directions
    outputs = units * e if layers > 1 else 0
    elements, cell_state = {"LSTM": (4 * (not recompute), 4), "GRU": (4 * (not recompute), 0), "RNN": (0, 0)}[cell]
    assert declared["activations"] - outputs == units * (elements * e + cell_state)
    assert declared["inputs"] == 4 * 3 * 5 * e


def test_kept_counts_a_storage_once():
    x = torch.ones(8, requires_grad=True)
    w = torch.ones(8, requires_grad=True)

    def forward():
        inner = (x * w).exp()  # keeps x, w and itself
        return (inner[:4] * inner[4:],)  # keeps two halves of one storage

    assert measure.kept(forward, [x], [w]) == {"inputs": 32, "parameters": 32, "outputs": 0, "activations": 32}


def test_peak_on_the_cpu():
    peak = measure.peak_bytes(measure.Call(lambda _: (torch.ones(1000) + torch.ones(1000)).sum()), "cpu")
    assert 8000 <= peak <= 16000


def test_memory_table(capsys):
    assert memory.main(["--T", "3", "--B", "2", "--H", "8", "--dtype", "float16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kept = [line.split("|")[-3].strip() for line in lines[-3:] if line.startswith("| GRU float16 | ")]
    assert len(kept) == 3 and kept[1:] == ["8.00", "0.00"]


# Timing without a clock


def test_alternate():
    """Neighbours alternate, so that each is first as often as the other."""
    called = []
    watches = [lambda name=name: called.append(name) or float(len(called)) for name in "ab"]
    times = measure.alternate(watches, 0, least=3)
    assert "".join(called) == "abbaab" and times == [[1, 4, 5], [2, 3, 6]]
    assert measure.ratio_of([2.0, 4.0], [1.0, 1.0]) == {"p20": 2.4, "p50": 3.0, "p80": 3.6}
    assert measure.percentiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}


def test_cpu_overhead_puts_forward_back(monkeypatch):
    before = torch.nn.GRU.forward
    ours, theirs = cpu_overhead.own_cost("GRU", calls=2, rounds=2)
    assert ours > 0 and theirs > 0 and torch.nn.GRU.forward is before
    row = cpu_overhead.compare(Case("GRU", 1, 1, 3, 4, dtype="float32"), 0.001)
    assert row["calls"] >= 20 and set(cpu_overhead.TOLERANCES) == {"call_ratio"}


def test_providers_say_what_they_are():
    assert all(isinstance(provider, Provider) and provider.name == name for name, provider in all_providers().items())


# pytest-benchmark


def test_pytest_benchmark(tmp_path):
    """`pytest benchmarks/` times what can run here, and writes its JSON."""
    root = Path(__file__).resolve().parents[2]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    kept |= {"BENCHMARK_SET": "quick", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "benchmarks/"]
    command += ["-k", "LSTM-T1- and inference and (torch.nn or loop or haste) and not compile"]
    command += [f"--benchmark-json={tmp_path / 'out.json'}"]
    done = subprocess.run(command, cwd=root, env=kept, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert [entry["extra_info"]["provider"] for entry in found] == ["torch.nn", "loop"]
    assert {entry["group"] for entry in found} == {"LSTM-T1-B1-I8-H8-float32-inference"}
