"""The kernels as compiled, run on a CPU (tests/ptx), and the mistakes that this notices.

They compile in a process of its own, since this one interprets.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ptx.cases import QUICK, SWEEP
from tests.ptx.mistakes import MISTAKES

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).parents[1]


@functools.cache
def outcomes(*options: str) -> dict[str, str]:
    """What is wrong with each layer, and with the way in which each mistake was noticed."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ptx", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("layer", QUICK, ids=str)
def test_layer(layer):
    """Right by the numerics contract, without a race, a read of what nobody wrote, or an address out of bounds."""
    assert outcomes("--layers", "quick")[str(layer)] == ""


@pytest.mark.sweep
@pytest.mark.parametrize("layer", SWEEP, ids=str)
def test_every_layer(layer):
    assert outcomes("--layers", "sweep")[str(layer)] == ""


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_noticed(mistake):
    assert outcomes("--layers", "none", "--mistakes")[mistake.name] == ""
