"""A cell is derived anywhere, to the same text, and the caller's state stays as it was. The cache folder is not trusted."""

from __future__ import annotations

import contextlib
import sys
import threading

import pytest
import torch
from torch import sigmoid, tanh
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rnnfast.derive import cache
from rnnfast.derive.definition import cell, keep
from rnnfast.derive.deriving import derive
from rnnfast.derive.registry import derived, fused, kernel_cell
from rnnfast.reference import CELLS
from rnnfast.settings import CELL_CACHE

pytestmark = pytest.mark.same_everywhere


@cell(gates="f n", states="h c")
def coupled(x, h, s, *, w, leak: float = 0.5):
    f = sigmoid(x.f + h.f + w * s.c)
    keep(f)
    n = torch.where(x.n > 0, tanh(x.n + f * h.n), h.n)
    c = f * s.c + (1 - f) * n
    return leak * torch.nn.functional.softplus(c) * f, c


class Watch(TorchDispatchMode):
    """A mode of the caller's, which should see nothing."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": default_dtype,
    "device": lambda: torch.device("meta"),
    "fake": FakeTensorMode,
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_same_text_anywhere(name):
    expected = derived(coupled).source
    random = torch.get_rng_state()
    with SURROUNDINGS[name](), Watch() as watch:
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        found = derive(coupled, coupled.constants).source
        after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    assert found == expected and before == after and not watch.seen
    assert torch.equal(torch.get_rng_state(), random)


def test_the_same_text_inside_of_transforms():
    expected, found = derived(coupled).source, []

    def inside(v):
        found.append(derive(coupled, coupled.constants).source)
        return (v * v).sum()

    torch.func.vmap(inside)(torch.ones(2, 3))
    torch.func.grad(torch.func.grad(lambda v: inside(v) ** 2))(torch.tensor(2.0))
    torch.func.jvp(inside, (torch.ones(2),), (torch.ones(2),))
    torch.fx.experimental.proxy_tensor.make_fx(inside)(torch.ones(2))
    sys.setprofile(lambda *_: None)
    try:
        profiler = sys.getprofile()
        inside(torch.ones(2))
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
    assert found == [expected] * len(found) and len(found) == 5


def test_inside_of_compiled_code():
    @cell(gates="a")
    def own(x, h, s, *, leak: float = 0.5):
        y = tanh(x.a + h.a)
        keep(y)
        return leak * s.h + y

    def program(x, s):
        name = fused(own, leak=0.25)
        (new,), kept = CELLS[name].step(x, x, (s,), ())
        return new, kept[0]

    x, s = torch.randn(2, 3), torch.randn(2, 3)
    new, kept = torch.compile(program, fullgraph=True, backend="eager")(x, s)
    torch.testing.assert_close(new, 0.25 * s + tanh(2 * x))
    torch.testing.assert_close(kept, tanh(2 * x))


def test_threads_derive_once():
    calls = []

    @cell(gates="a")
    def own(x, h, s):
        calls.append(threading.current_thread().name)
        return tanh(x.a + h.a)

    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(fused(own))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert calls == ["rnnfast-derive"] * 4  # once to record, three times to verify


def test_the_file_is_for_readers(tmp_path):
    source = derived(coupled).source
    with CELL_CACHE.within(str(tmp_path / "new" / "folder")):
        path = cache.write("coupled", source)
        assert path.read_text() == source and path.parent == tmp_path / "new" / "folder"
        assert [each.name for each in path.parent.iterdir()] == ["coupled.py"]
        written = path.stat().st_mtime_ns
        assert cache.write("coupled", source).stat().st_mtime_ns == written
        path.write_text("raise SystemExit('an edited file was run')")
        module = cache.load("coupled", source)
        assert path.read_text() == source and module.__file__ == str(path) and hasattr(module, "backward")
    (tmp_path / "file").write_text("")
    with CELL_CACHE.within(str(tmp_path / "file" / "folder")):  # nobody can write there, not even root
        path = cache.write("coupled", source)
        assert path.read_text() == source and tmp_path not in path.parents and cache.write("coupled", source) == path


def test_the_folder_is_a_setting(monkeypatch, tmp_path):
    monkeypatch.setenv(CELL_CACHE.variable, str(tmp_path))
    assert cache.folder() == tmp_path
    monkeypatch.delenv(CELL_CACHE.variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "rnnfast" / "cells"


def test_a_function_without_a_text(tmp_path):
    scope = {"tanh": tanh}
    exec("def made(x, h, s):\n    y = x.a + h.a\n    return tanh(y) * y\n", scope)
    own = cell(gates="a")(scope["made"])
    found = derived(own)
    assert "# made, a function made from text" in found.source and found.saved == ("add",)
    with CELL_CACHE.within(str(tmp_path)):
        assert kernel_cell(fused(own)).saved == 1


def test_readers_find_the_function_and_its_names():
    source = derived(coupled).source
    for line in ("# @cell(gates=", "#     f = sigmoid(x.f + h.f + w * s.c)", "Numbers: leak = 0.5.", "    f = sigmoid("):
        assert line in source, source
    assert "    return (new_h, new_c), (f, " in source
