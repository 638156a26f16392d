"""The launcher launches what Triton's JIT would: see `tests/support/launches.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.static import stub

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(bool(stub.unavailable()), reason=stub.unavailable())
def test_launches_as_triton_does(tmp_path):
    """Random arguments of every class, emptied caches, hooks, threads, and whole layers, on a stub of the CUDA driver."""
    stub.build(tmp_path)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "RNNFAST"))}
    command = [sys.executable, "-m", "tests.support.launches", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert found["random_launches"]["compiled"] > 80 and found["after_clearing"] == {"hooked": 3}
    assert found["in_threads"]["launches"] == 160
    launches = found["layers"]
    assert launches["step"] >= 40 and launches["persistent"] >= 16 and launches["one_program"] >= 8
