"""`make gpu-check` where there is no GPU: what it writes of the persistent kernels, whatever becomes of their process."""

import pytest
import torch

from benchmarks import gpu_check
from rnnfast.check import Case, Result

CASE = "LSTM T=1 B=1 I=1 H=1 float16 no hx"
TIMED = {"case": CASE, "mode": "forward", "speed_up": 0.5, "rnnfast us/step": 2.0, "torch.nn us/step": 1.0}
TIMED |= {"rnnfast peak MiB": 3.0, "torch.nn peak MiB": 4.0}


@pytest.mark.parametrize(
    "rows, cell",
    [
        ([{"mode": "forward", "persistent us/step": 0.5, "speed_up": 2.0}], "0.50 (2.00)"),
        ([{"error": "not finished in 180 s"}], "not finished in 180 s"),
        ([{"skipped": "no persistent forward: no tiles fit"}], "no persistent forward: no tiles fit"),
        (None, "not run"),
    ],
)
def test_table(rows, cell):
    report = {"environment": {"gpu": "none"}, "tests": {"closing_line": "skipped"}, "benchmark": [TIMED]}
    report["persistent"] = {} if rows is None else {CASE: rows}
    assert gpu_check.table(report).splitlines()[-1] == f"| {CASE} | forward | 2.00 | 1.00 | 0.50 | 3 | 4 | {cell} |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this process is to fail for want of a GPU")
def test_process_that_fails(tmp_path):
    (row,) = gpu_check.run_persistent(0, tmp_path)
    assert row["error"].startswith("gpu-check needs an NVIDIA GPU")


def test_process_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "PERSISTENT_SECONDS", 0.05)
    assert gpu_check.run_persistent(0, tmp_path) == [{"error": "not finished in 0.05 s", "hung": True}]


class Clock:
    """In place of a device event: ticks a millisecond at each record."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Clock.now += 1.0
        self.time = Clock.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.time - self.time


@pytest.fixture
def pretend(monkeypatch):
    """The benchmark on CPU tensors, with a clock for device events."""
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check itself runs it there")
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_measure(cell, pretend, device):
    """A right case gives a row for each mode, with a time a step for both layers."""
    rows = gpu_check.measure(Case(cell, 2, 1, 3, 3, torch.float16, states=False))
    assert [row["mode"] for row in rows] == ["forward", "training step"]
    for row in rows:
        assert row["rnnfast us/step"] == row["torch.nn us/step"] == 500 and row["speed_up"] == 1
    assert "500.00 | 500.00 | 1.00" in gpu_check.table(
        {"environment": {}, "tests": {"closing_line": ""}, "benchmark": rows, "persistent": {}}
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check itself runs it there")
def test_a_wrong_layer_is_not_timed(pretend, monkeypatch):
    """A red check prints the error and no time."""
    monkeypatch.setattr(gpu_check, "compare", lambda case, device, tf32: [Result(case, "output", 1.0, 0.1, 0.3)])
    (row,) = gpu_check.measure(Case("GRU", 2, 1, 3, 3, torch.float32))
    assert row["error"] == "output: error 1.0e+00, allowed 3.0e-01" and "mode" not in row


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check itself runs it there")
def test_stress(pretend, monkeypatch):
    """The same bits every time: nothing to say."""
    monkeypatch.setattr(gpu_check, "STRESS_LAUNCHES", 2)
    assert gpu_check.stress(Case("RNN", 2, 1, 3, 3, torch.float32)) == ""
