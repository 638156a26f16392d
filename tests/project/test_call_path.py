"""How many functions a reader follows from a call to the launch: see `tests/support/call_path.py`."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Calls and changes of file. Two changes are the price of one launcher for all kernels, and of input sides that are made when a
# chunk asks for them: these save a third of the host's time (docs/kernels.md).
MOST = {
    "plain CPU call": (2, 1),
    "step kernels, forward": (25, 10),
    "step kernels, forward in training": (25, 12),
}


def test_paths_stay_short():
    """In a process of its own, since Triton has to be interpreted, on a GPU machine too."""
    done = subprocess.run([sys.executable, "-m", "tests.support.call_path"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {
        name.strip(): (int(calls), int(changes))
        for name, calls, changes in re.findall(r"(.+?) +(\d+) calls +(\d+)", done.stdout)
    }
    print(done.stdout)
    for name, (calls, changes) in MOST.items():
        assert 0 < found[name][0] <= calls and found[name][1] <= changes, f"{name}: {found[name]}"
