"""`torch_private.matmul_precision`: what it sets inside, and that it puts back what was set."""

import itertools
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rnnfast import torch_private
from rnnfast.torch_private import matmul_precision

FACTOR: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32)
PLACES = [("generic", "all"), *((backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn"))]
get: Any = torch._C._get_fp32_precision_getter
put: Any = torch._C._set_fp32_precision_setter


def of_legacy(getter):
    """What a legacy getter says, or that it finds a mix of both APIs."""
    try:
        return getter()
    except RuntimeError as error:
        assert "mix of the legacy and new APIs" in str(error)
        return "mix"


def seen() -> tuple[list[str], list[Any]]:
    """What anyone can read, now."""
    legacy = torch._C._get_cublas_allow_tf32, torch._C._get_float32_matmul_precision
    return [get(*place) for place in PLACES], [of_legacy(getter) for getter in legacy]


def state(above):
    """What anyone can read, now and after each change of what others inherit from. `above`: what those are set to."""
    found = [seen()]
    for place, before in above.items():
        for other in ("none", "ieee", "tf32"):
            put(*place, other)
            found.append(seen())
        put(*place, before)
    return found


def settings():
    """Every way to set the precision of matmuls: legacy functions, the new API at each level, and what CPUs have."""
    legacy, names = ("highest", "high", "medium"), ("none", "ieee", "tf32")
    for old, matmul, cuda, generic in itertools.product(legacy, names, names, (*names, "bf16")):
        for mkldnn, cpu in itertools.product(("none", "bf16"), ("none", "ieee", "tf32", "bf16")):
            yield old, matmul, cpu, {("generic", "all"): generic, ("cuda", "all"): cuda, ("mkldnn", "all"): mkldnn}


def apply(old: str, matmul: str, cpu: str, above: dict[tuple[str, str], str]) -> None:
    torch.set_float32_matmul_precision(old)
    put("cuda", "matmul", matmul)
    put("mkldnn", "matmul", cpu)
    for place, precision in above.items():
        put(*place, precision)


@pytest.fixture(autouse=True)
def _as_pytorch_starts():
    yield
    apply("highest", "none", "none", dict.fromkeys([("generic", "all"), ("cuda", "all"), ("mkldnn", "all")], "none"))


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_every_setting(precision):
    """Inside, cuBLAS reads `precision`. No getter finds a mix that did not before. Afterwards all is as it was."""
    switched = 0
    for setting in settings():
        apply(*setting)
        before, (places, legacy) = state(setting[-1]), seen()
        with matmul_precision(precision, FACTOR):
            inside, found = seen()
            at = PLACES.index(("cuda", "matmul"))
            assert (inside[at] == "tf32") == (precision == "tf32"), setting
            others = [n for n, place in enumerate(PLACES) if place not in (("cuda", "matmul"), ("mkldnn", "matmul"))]
            assert [inside[n] for n in others] == [places[n] for n in others], setting
            assert all(now != "mix" or then == "mix" for now, then in zip(found, legacy, strict=True)), setting
            switched += inside[at] != places[at]
            if (places[at] == "tf32") == (precision == "tf32"):
                assert (inside, found) == (places, legacy), setting  # it was right: nothing is set
            elif precision == "tf32":
                assert inside[PLACES.index(("mkldnn", "matmul"))] == places[PLACES.index(("mkldnn", "matmul"))], setting
        assert state(setting[-1]) == before, setting
    assert switched > 100


def test_legacy_switch():
    """`allow_tf32` alone, whose value for CPUs stays, and what PyTorch starts with."""
    for allowed in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        before = seen()
        for precision in ("tf32", "ieee"):
            with matmul_precision(precision, FACTOR):
                assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
            assert seen() == before


def test_setting_of_layers():
    """`rnn_precision` is PyTorch's setting, under any name."""
    for value in ("ieee", "tf32"):
        put("cuda", "rnn", value)
        assert torch_private.rnn_precision() == torch.backends.cudnn.rnn.fp32_precision == value  # type: ignore[attr-defined]


def test_error_inside():
    before = seen()
    with pytest.raises(ZeroDivisionError), matmul_precision("tf32", FACTOR):
        raise ZeroDivisionError
    assert seen() == before
    found = []

    def other():
        with matmul_precision("tf32", FACTOR):
            found.append(get("cuda", "matmul"))

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    thread.join(60)
    assert found == ["tf32"]  # the turn was given back, too


def test_nested():
    before = seen()
    with matmul_precision("tf32", FACTOR):
        inside = seen()
        with matmul_precision("ieee", FACTOR), matmul_precision("tf32", FACTOR):
            assert get("cuda", "matmul") == "tf32"
        assert seen() == inside
    assert seen() == before


@pytest.mark.parametrize(
    "factor", [torch.ones(2), SimpleNamespace(is_cuda=True, dtype=torch.float16), torch.ones(2, device="meta")]
)
def test_others(factor):
    """Factors that are not float32 on a GPU: a context that does nothing, always the same one."""
    found = matmul_precision("tf32", factor)
    assert isinstance(found, nullcontext) and found is matmul_precision("ieee", factor)


def test_threads():
    """Calls of several threads take turns: each computes in its own precision, and the user's setting survives."""
    put("cuda", "all", "ieee")
    before, wrong = seen(), []

    def work(precision):
        for _ in range(300):
            with matmul_precision(precision, FACTOR):
                wrong.extend(name for name in [get("cuda", "matmul")] if (name == "tf32") != (precision == "tf32"))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(precision,)) for precision in ("tf32", "ieee") * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and seen() == before


def test_deprecation(monkeypatch):
    """PyTorch 2.9.0 warns when a legacy getter is called first. Where warnings are errors, that is no error of ours."""
    torch.set_float32_matmul_precision("high")
    put("mkldnn", "matmul", "none")
    inner, before = torch_private._get_legacy, seen()
    calls = iter(range(100))

    def getter():
        if next(calls) == 0:
            raise UserWarning("Please use the new API settings to control TF32 behavior")
        return inner()

    monkeypatch.setattr(torch_private, "_get_legacy", getter)
    with matmul_precision("ieee", FACTOR):
        assert seen()[1] == [False, "highest"]
    assert seen() == before and next(calls) == 2


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs TF32")
@pytest.mark.parametrize("product", [torch.mm, lambda a, b: torch.bmm(a[None], b[None])[0], lambda a, b: torch.addmm(a, a, b)])
def test_products(product):
    """On a GPU: products differ from float64 as the precision says."""
    a, b = torch.randn(2, 256, 256, device="cuda")
    exact = product(a.double(), b.double())
    errors = {}
    for precision in ("tf32", "ieee"):
        with matmul_precision(precision, a):
            errors[precision] = ((product(a, b) - exact).norm() / exact.norm()).item()
    assert errors["ieee"] < 1e-6 and 1e-4 < errors["tf32"] < 2e-3
