"""The process that measures: it serves until it dies or hangs, and then is there anew."""

import os
import signal
import time

import pytest

from benchmarks.worker import Died, Worker


def act(what):
    """What a worker is asked to do here."""
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "be killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "leave":
        os._exit(3)
    if what == "hang":
        time.sleep(60)
    return {"said": what, "process": os.getpid(), "ignores": signal.getsignal(signal.SIGINT) == signal.SIG_IGN}


@pytest.fixture
def worker():
    worker = Worker(act)
    yield worker
    worker.stop()


def test_it_goes_on(worker):
    first, second = (worker.do(what, limit=60) for what in ("hello", "again"))
    assert first["said"] == "hello" and second["said"] == "again"
    assert first["process"] == second["process"] != os.getpid() and first["ignores"]


@pytest.mark.parametrize(
    "what, words",
    [
        ("crash", "its process ended with SIGSEGV"),
        ("be killed", "its process was killed, which is what Linux does when memory runs out"),
        ("leave", "its process ended with exit code 3"),
    ],
)
def test_death(what, words, worker):
    with pytest.raises(Died) as caught:
        worker.do(what, limit=60)
    assert str(caught.value) == words
    assert worker.do("hello", limit=60)["said"] == "hello"


def test_hang(worker):
    first = worker.do("hello", limit=60)
    with pytest.raises(Died) as caught:
        worker.do("hang", limit=0.2)
    assert str(caught.value) == "not finished in 0.2 s"
    with pytest.raises(ProcessLookupError):
        os.kill(first["process"], 0)
    assert worker.do("hello", limit=60)["process"] != first["process"]
