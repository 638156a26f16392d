"""How many functions a reader follows from a call to the launch: see `tests/support/call_path.py`."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Calls and changes of file. Before a launch could run a group, the step kernels were 24 calls and 10 changes away. Since then
# the weights of the members are put together (1 call), the call is cut into groups and their rounds (5), every product sets the
# precision (3), and the arguments of the launches are bound once a call (4).
MOST = {
    "plain CPU call": (2, 1),
    "step kernels, forward": (37, 21),
    "step kernels, forward in training": (38, 22),
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
