"""The kernels run on a GPU where there is one. Elsewhere they run in Triton's interpreter on CPU tensors."""

import gc
import inspect
import os
from importlib.metadata import version
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported

import pytest
from hypothesis import settings

from rnnfast.choice import gpu

if os.environ.get("TRITON_INTERPRET"):
    from support import quick_interpreter

    quick_interpreter.install()

# PyTorch's own module checks need expecttest, which a GPU machine may lack.
collect_ignore_glob = [] if find_spec("expecttest") else ["*/test_module_db.py"]
gc.set_threshold(100_000, 20, 20)  # looking for cycles as often as Python does took a seventh of the time
settings.register_profile("rnnfast", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("rnnfast")


def pytest_addoption(parser):
    group = parser.getgroup("rnnfast")
    # One by default: the cores are shared among pytest's workers.
    group.addoption("--threads", type=int, default=1, help="threads that PyTorch computes with (default: 1)")
    group.addoption("--sample", type=int, default=1, metavar="N", help="run every N-th of the chosen tests")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))


def pytest_report_header(config):
    """What the results depend on. tests/matrix.py and tests/instruction_sets.py read this line."""
    versions = [f"{name} {version(name)}" for name in ("torch", "triton", "numpy") if find_spec(name)]
    return f"stack: {', '.join(versions)}; {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    items[:] = items[:: config.getoption("--sample")]


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay, and need no look


def pytest_unconfigure():
    gc.unfreeze()  # else what Triton's libraries hold counts as leaked when Python ends


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"


@pytest.fixture(autouse=True)
def _clean_settings(monkeypatch, request):
    """Every test starts from the same seed, without the user's RNNFAST_* settings and without what he has tuned."""
    for name in ("RNNFAST_BACKEND", "RNNFAST_KERNELS", "RNNFAST_STRICT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RNNFAST_TUNING_FILE", os.devnull + ".no-such-file")
    monkeypatch.setenv("RNNFAST_CANARY", "trust")
    if torch.cuda.is_available() and "device" in request.fixturenames:
        monkeypatch.setenv("RNNFAST_KERNELS", "step")  # the automatic choice would leave small layers to cuDNN
    monkeypatch.setattr("rnnfast.choice.tuned._tables", {})
    monkeypatch.setattr("rnnfast.choice.trust._verdicts", {})
    gpu.known.clear()
    torch.manual_seed(0)
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # of float32 products on a GPU; TF32 has a test of its own
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


@pytest.fixture
def cudnn_benchmark():
    """Sets ``torch.backends.cudnn.benchmark``, until the test ends. PyTorch's own module tests, once imported, forbid the usual
    way."""
    before = torch._C._get_cudnn_benchmark()
    yield torch._C._set_cudnn_benchmark
    torch._C._set_cudnn_benchmark(before)


@pytest.fixture
def no_launch(monkeypatch):
    """A launch fails the test."""

    def forward(*args, **kwargs):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr("rnnfast.kernels.step.forward", forward)


@pytest.fixture
def saved(monkeypatch):
    """What each forward recurrence was given to keep activations in, as they run."""
    from rnnfast.kernels import step

    found, signature, inner = [], inspect.signature(step.forward), step.forward

    def forward(*args, **kwargs):
        found.append(signature.bind(*args, **kwargs).arguments["saved"])
        return inner(*args, **kwargs)

    monkeypatch.setattr("rnnfast.kernels.step.forward", forward)
    return found
