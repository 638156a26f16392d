"""The ways to exchange a step's result that benchmarks/exchange_designs.py compares: all right, and what sets them apart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from side_by_side import together

from benchmarks.exchange_designs import DESIGNS, launch, predict
from rnnfast import reference
from rnnfast.kernels.persistent.plan import PersistentPlan
from rnnfast.kernels.runtime import mode

ROOT = Path(__file__).parents[1]
interpreted = pytest.mark.skipif(mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1")


@interpreted
@pytest.mark.parametrize("split", [1, pytest.param(2, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("design", DESIGNS)
def test_right_under_any_schedule(design, split):
    """Against the definition in float64: two batch tiles of four programs, the second tile with masked rows."""
    T, B, H = 3, 11, 32
    x = torch.randn(T, B, 4 * H)
    w = (torch.randn(4 * H, H) * H**-0.5).half()
    exact, _ = reference.layer("lstm", x.double(), None, torch.eye(4 * H, dtype=torch.float64), w.double())
    plan = PersistentPlan(8, 8, 16, split, H, 4, 1 << 16, 1 << 20)
    for seed in range(2):
        with together(seed):
            h = launch(x, w, design, plan)
        torch.testing.assert_close(h.double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("designs", [("data", "flags"), pytest.param(DESIGNS, marks=pytest.mark.sweep)])
def test_counts(designs, tmp_path):
    """No design spills; only those with flags pay a fence; only TMA copies asynchronously."""
    out = tmp_path / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.exchange_designs", "--shapes", "256x8", "--designs", *designs]
    done = subprocess.run([*command, "--json", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["design"]: row for row in json.loads(out.read_text())}
    assert set(rows) == set(designs)
    for design, row in rows.items():
        assert row["stack_bytes"] == 0 and row["programs"] >= 16, row
        assert bool(row["fences"]) == (design in ("flags", "tma")), row
        assert bool(row["async_copies"]) == (design == "tma"), row
        assert row["strong_loads"] + row["atomics"] > 0, row
    assert rows["data"]["strong_loads"] > rows["flags"]["strong_loads"] and rows["data"]["atomics"] == 0


def test_prediction():
    """A small tile is polled whole; a large one only after a word of each producer."""
    small = {design: predict(design, 48, 2, 8 * 768 * 2, 1)["microseconds"] for design in DESIGNS}
    large = {design: predict(design, 64, 2, 16 * 4096 * 2, 1)["microseconds"] for design in DESIGNS}
    assert min(small, key=small.get) == "data" and min(large, key=large.get) == "sentinel"
    assert predict("data", 48, 1, 16 * 768 * 2, 0) == {
        "polled_bytes": 1179648, "gathered_bytes": 1179648, "vain": 1, "trips": 2, "microseconds": 1.14,
    }  # fmt: skip
