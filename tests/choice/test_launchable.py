"""A GPU machine on which Triton cannot launch: no C compiler, no Python.h, no cache folder, a broken installation."""

import contextlib
import errno
import importlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
from test_backends import python

import rnnfast
from benchmarks.static import stub
from rnnfast.choice import launchable, obstacles
from rnnfast.kernels import runtime

FAILED = subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c", "-O3"])


def raises(error):
    def build():
        raise error

    return build


@pytest.fixture
def pretended(monkeypatch):
    """CUDA device 0 passes for an sm_90, and kernels for compiled; a list to which each trial adds."""
    tried = []

    def build():
        tried.append("trial")

    monkeypatch.setattr(runtime, "prepare_a_launch", build)
    monkeypatch.setattr(runtime, "mode", lambda: "compiled")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(obstacles, "known", {"triton": None})
    return tried


WORDS = [
    (RuntimeError("Failed to find C compiler. Please specify via CC"), "Triton found no C compiler: install gcc, or set CC"),
    (PermissionError(errno.EACCES, "Permission denied", "mycc"), "cannot run the C compiler mycc (Permission denied)"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "mycc"), "cannot run the C compiler mycc (No such file"),
    (FAILED, "Triton builds its launcher with a C compiler, and /usr/bin/gcc failed with exit status 1"),
    (OSError(errno.EROFS, "Read-only file system", "/root/.triton"), "cannot write to its cache ([Errno 30] Read-only file"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), "make ~/.triton writable, or set TRITON_CACHE_DIR"),
    (AssertionError("libcuda.so cannot found!\nPlease"), "Triton found no libcuda.so.1: set TRITON_LIBCUDA_PATH"),
    (FileNotFoundError(errno.ENOENT, "No such file", "/sbin/ldconfig"), "Triton found no libcuda.so.1"),
    (ImportError("cannot import name 'x'\nmore"), "Triton cannot launch a kernel (ImportError: cannot import name 'x')"),
    (KeyError(), "Triton cannot launch a kernel (KeyError)"),
]


@pytest.mark.parametrize("error, words", WORDS)
def test_words(error, words, pretended, monkeypatch):
    """Each failure gives a reason of one line, which says what to do where that is known."""
    monkeypatch.setattr(runtime, "prepare_a_launch", raises(error))
    monkeypatch.setattr(runtime, "python_header", lambda: Path(__file__))
    monkeypatch.setenv("CC", "mycc")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    found = launchable.obstacle(0)
    assert words in found and "\n" not in found


def test_no_python_header(pretended, monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "prepare_a_launch", raises(FAILED))
    monkeypatch.setattr(runtime, "python_header", lambda: tmp_path / "Python.h")
    assert launchable.obstacle(0) == f"Triton found no {tmp_path / 'Python.h'}: install Python's headers (python3-dev)"


def test_once_a_device_and_only_where_kernels_are_compiled(pretended, monkeypatch):
    for index in (0, 1, 0, 0):
        assert obstacles.device_obstacle("cuda", index) is None
    assert pretended == ["trial"] * 2
    obstacles.known.clear()
    monkeypatch.setattr(runtime, "mode", lambda: "interpreted")
    assert obstacles.device_obstacle("cuda", 0) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(runtime, "mode", lambda: "compiled")
    assert "sm_75" in obstacles._find_device_obstacle("cuda", 0)
    assert "the tensors are on the CPU" in obstacles._find_device_obstacle("cpu", None)
    assert pretended == ["trial"] * 2


@pytest.mark.parametrize("asked, strict", [(None, False), ("triton", False), (None, True)])
def test_layer_runs_on_pytorch(asked, strict, device, monkeypatch):
    """PyTorch's own layer runs, with a warning only where a backend was named; explain says why; strict mode raises."""
    reason = "Triton found no C compiler: install gcc, or set CC"
    monkeypatch.setattr(obstacles, "known", {"triton": None, "cpu:None": reason, "cuda:0": reason})
    layer, x = rnnfast.LSTM(3, 4, device=device, backend=asked), torch.randn(5, 2, 3, device=device)
    if strict:
        monkeypatch.setenv("RNNFAST_STRICT", "1")
        with pytest.raises(RuntimeError, match=reason):
            layer(x)
        return
    if asked:
        with pytest.warns(rnnfast.FallbackWarning, match=reason):
            y = layer(x)[0]
    else:
        y = layer(x)[0]
    assert torch.equal(y, torch.nn.LSTM.forward(layer, x)[0])
    assert f"not triton: {reason}" in str(rnnfast.explain(layer, x))


PROGRAM = """
import json, os, shutil, sys, sysconfig, warnings
from pathlib import Path

HERE = os.environ["TRITON_LIBCUDA_PATH"]
from benchmarks.static import stub

library = stub.load(HERE)
import torch, triton
from triton.backends.nvidia import driver as nvidia
import rnnfast
from rnnfast.choice import kernel_plan
from rnnfast.kernels.persistent.plan import GPUS

def no_compiler():
    os.environ["PATH"] = HERE

def failing_compiler():
    os.environ["CC"] = os.path.join(HERE, "fails")

def missing_compiler():
    os.environ["CC"] = "/nowhere/cc"

def no_header():
    own = sysconfig.get_paths
    sysconfig.get_paths = lambda *args, **options: own(*args, **options) | {"include": "/nowhere"}

def no_cache():
    os.environ["TRITON_CACHE_DIR"] = os.path.join(HERE, "libcuda.so.1", "cache")

def broken():
    nvidia.CudaUtils = None

def nothing():
    pass

def no_compiler_any_more():  # with what `nothing` has left in the cache
    shutil.which = lambda name: None  # the key of the cache depends on the PATH
    os.environ["TRITON_CACHE_DIR"] = os.path.join(HERE, "nothing")

for change in (no_compiler, failing_compiler, missing_compiler, no_header, no_cache, broken, nothing, no_compiler_any_more):
    sys.stdout.flush()
    child = os.fork()  # each as in a process of its own
    if child:
        assert os.waitpid(child, 0)[1] == 0, Path(HERE, "said").read_text()
        continue
    os.dup2(os.open(os.path.join(HERE, "said"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)  # by the compiler too
    os.environ["TRITON_CACHE_DIR"] = os.path.join(HERE, change.__name__)
    os.environ["RNNFAST_KERNELS"] = "step"  # so few steps would run on PyTorch's own layer, as predicted
    change()
    stub.pretend()
    layer, x = rnnfast.RNN(8, 64), torch.randn(4, 8, 8)
    with kernel_plan.pretend_gpu(GPUS["H200"]), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x)[0]
        told = rnnfast.explain(layer, x)
        refused = {}
        if change is nothing:
            os.environ["RNNFAST_KERNELS"] = "persistent"
            for code in (1, 700, 701, 719, 720, 801):
                kernel_plan._refused.clear()
                library.stub_refuse(code)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    try:
                        layer(x)
                        refused[code] = str(caught[0].message)
                    except RuntimeError as error:
                        refused[code] = f"raised: {error}"
    same = torch.equal(y, torch.nn.RNN.forward(layer, x)[0])
    print(json.dumps([change.__name__, told.backend, told.obstacles, same, library.stub_launches(), refused]), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(bool(stub.unavailable()), reason=stub.unavailable())
def test_real_launcher_on_a_stub_driver(tmp_path):
    """Triton's own driver and launcher, on a CUDA driver that does nothing, with this and that missing."""
    stub.build(tmp_path)
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\nexit 3\n")
    fails.chmod(0o755)
    out = python(PROGRAM, TRITON_LIBCUDA_PATH=str(tmp_path))
    found = {name: rest for name, *rest in map(json.loads, out.splitlines())}
    reasons = {
        "no_compiler": "Triton found no C compiler: install gcc, or set CC",
        "failing_compiler": f"Triton builds its launcher with a C compiler, and {fails} failed with exit status 3",
        "missing_compiler": "Triton cannot run the C compiler /nowhere/cc (No such file or directory): install gcc, or set CC",
        "no_header": "Triton found no /nowhere/Python.h: install Python's headers (python3-dev)",
        "broken": "Triton cannot launch a kernel (TypeError: 'NoneType' object is not callable)",
    }
    for name, reason in reasons.items():
        assert found[name] == ["torch", [reason], True, 0, {}], name
    assert found["no_cache"][0] == "torch" and "Triton cannot write to its cache" in found["no_cache"][1][0]
    backend, obstacles, _, launches, refused = found["nothing"]
    assert (backend, obstacles) == ("triton", []) and launches >= 4
    step_kernels = "the persistent kernels were chosen, but the step kernels run: the driver refused the launch: "
    assert all(refused[code].startswith(step_kernels) for code in ("1", "701", "720", "801")), refused
    assert refused["700"] == "raised: Triton Error [CUDA]: an illegal memory access was encountered"
    assert refused["719"] == "raised: Triton Error [CUDA]: unspecified launch failure"
    builds = hasattr(importlib.import_module("triton.backends.nvidia.driver"), "make_launcher")  # Triton 3.6, for each kernel
    assert found["no_compiler_any_more"][:2] == (["torch", [reasons["no_compiler"]]] if builds else ["triton", []])
