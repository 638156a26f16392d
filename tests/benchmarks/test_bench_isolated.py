"""Jobs in a child process: the child goes on until it dies or hangs, and then a new one does the rest."""

import os
import time
from pathlib import Path

import pytest

from benchmarks.timing import isolated

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).parents[2]


def rows(*jobs, quiet=60.0, seconds=120.0, function="child_jobs:act"):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return list(isolated.rows(function, [[job] for job in jobs], quiet, time.monotonic() + seconds, env))


def test_one_child_does_all_jobs():
    """Whatever else is printed, and however many rows a job has."""
    found = rows("hello", "twice", "speak", "bye")
    assert [(job, row["said"]) for job, row in found] == [
        (0, "hello"), (1, "twice"), (1, "again"), (2, "speak"), (3, "bye"),
    ]  # fmt: skip
    assert len({row["process"] for _, row in found}) == 1 and found[0][1]["process"] != os.getpid()


@pytest.mark.parametrize(
    "what, words",
    [
        ("crash", "its process ended with SIGSEGV"),
        ("be killed", "its process was killed, which is what Linux does when memory runs out"),
        ("leave", "exit code 3"),
        ("raise", "RuntimeError: CUDA error: x"),
    ],
)
def test_death(what, words):
    (zero, first), (one, dead), (two, last) = rows("hello", what, "bye")
    assert (zero, one, two) == (0, 1, 2) and dead == {"error": words, "hung": False}
    assert first["said"] == "hello" and last["said"] == "bye" and first["process"] != last["process"]


def test_hang():
    (_, first), (_, hung), (_, last) = rows("hello", "hang", "bye", quiet=3)
    assert hung == {"error": "nothing for 3 s", "hung": True}
    for row in (first, last):
        with pytest.raises(ProcessLookupError):
            os.kill(row["process"], 0)
    assert first["process"] != last["process"]


def test_a_child_that_cannot_start():
    """It would fail again: all jobs fail."""
    found = rows("hello", "bye", function="no_such_module:act")
    assert [job for job, _ in found] == [0, 1]
    assert all(row["error"].startswith("not run: ModuleNotFoundError") and not row["hung"] for _, row in found)


def test_no_child_outlives_its_time():
    started = time.monotonic()
    found = rows("hello", "hang", "bye", seconds=5)
    assert time.monotonic() - started < 60 and found[0][1]["said"] == "hello"
    assert found[1][1] == {"error": "no time was left", "hung": False}
    assert found[2][1] == {"error": "not run: no time was left", "hung": False}
