"""`make gpu-check` where there is no GPU: what it writes of the persistent kernels, whatever becomes of their process."""

import pytest
import torch

from benchmarks import gpu_check

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
    assert gpu_check.run_persistent(0, tmp_path) == [{"error": "not finished in 0.05 s"}]
