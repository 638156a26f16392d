"""The kernels as compiled, run on a CPU (tests/ptx), and the mistakes that this notices.

They compile in a process of its own, since this one interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.ptx.cases import QUICK, SWEEP
from tests.ptx.memory import Race, Space, stamp
from tests.ptx.mistakes import MISTAKES

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).parents[2]


def wrong(names: list, *options: str) -> dict[str, str]:
    """What is wrong with each layer of these names, or with the way in which each mistake was noticed. Nothing is said of what
    is right. One process runs all: so one test asks for all, lest each worker of a run starts a process of its own."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ptx", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    return {str(name): found[str(name)] for name in names if found[str(name)]}


def test_layers():
    """Right by the numerics contract, without a race, a read of what nobody wrote, or an address out of bounds."""
    assert wrong(QUICK, "--layers", "quick") == {}


@pytest.mark.sweep
def test_every_layer():
    assert wrong(SWEEP, "--layers", "sweep") == {}


@pytest.mark.sweep  # a minute; the tests below show on single words what counts as a race
def test_mistakes_are_noticed():
    assert wrong([mistake.name for mistake in MISTAKES], "--layers", "none", "--mistakes") == {}


# Accesses to one word: read or write, CTA, barriers passed, syncs of the warp, warp, lane, strong or not.
ORDERED = {
    "one thread": [("write", 0, 0, 0, 0, 3, 0), ("read", 0, 0, 0, 0, 3, 0), ("write", 0, 0, 0, 0, 3, 0)],
    "two warps, a barrier between": [("write", 0, 0, 0, 0, 0, 0), ("read", 0, 1, 0, 1, 0, 0), ("write", 0, 2, 0, 2, 0, 0)],
    "one warp, a sync between": [("write", 0, 0, 0, 1, 0, 0), ("read", 0, 0, 1, 1, 5, 0), ("write", 0, 0, 2, 1, 6, 0)],
    "reads only": [("read", 0, 0, 0, 0, 0, 0), ("read", 0, 0, 0, 1, 0, 0), ("read", 1, 0, 0, 0, 0, 0)],
    "two CTAs, both strong": [("write", 0, 0, 0, 0, 0, 1), ("read", 1, 0, 0, 0, 0, 1), ("write", 2, 0, 0, 0, 0, 1)],
    "a sync after each lane's read": [("read", 0, 0, 0, 0, 0, 0), ("read", 0, 0, 1, 0, 1, 0), ("write", 0, 0, 1, 0, 1, 0)],
}
UNORDERED = {
    "two lanes": [("write", 0, 0, 0, 0, 0, 0), ("read", 0, 0, 0, 0, 1, 0)],
    "two warps, both synced": [("read", 0, 0, 0, 0, 0, 0), ("write", 0, 0, 1, 1, 0, 0)],
    "the first of two readers": [("read", 0, 0, 0, 0, 0, 0), ("read", 0, 0, 0, 1, 0, 0), ("write", 0, 0, 0, 1, 0, 0)],
    "two CTAs, barriers passed": [("write", 0, 0, 0, 0, 0, 0), ("read", 1, 5, 0, 0, 0, 0)],
    "two CTAs, the writer weak": [("write", 0, 0, 0, 0, 0, 0), ("read", 1, 0, 0, 0, 0, 1)],
    "two CTAs, a reader weak": [("read", 0, 0, 0, 0, 0, 0), ("read", 1, 0, 0, 0, 0, 1), ("write", 1, 1, 0, 0, 0, 1)],
    "two writes": [("write", 0, 0, 0, 0, 0, 0), ("write", 0, 0, 0, 1, 0, 0)],
}


def touch(accesses):
    """A word of global memory under these accesses, each write of another value."""
    space = Space(np.zeros(8, np.uint8), 4, np.ones(8, bool), "a word", own=False)
    for number, (kind, cta, barriers, syncs, warp, lane, strong) in enumerate(accesses):
        access = stamp(cta, barriers, syncs, warp, np.array([lane])) | strong
        if kind == "read":
            space.load(np.array([4]), 4, 1, access)
        else:
            space.store(np.array([4]), 4, np.array([[number + 1]], np.uint32), access)


@pytest.mark.parametrize("accesses", ORDERED.values(), ids=ORDERED)
def test_ordered_accesses(accesses):
    touch(accesses)


@pytest.mark.parametrize("accesses", UNORDERED.values(), ids=UNORDERED)
def test_race(accesses):
    touch(accesses[:-1])
    with pytest.raises(Race):
        touch(accesses)
