"""What children do in test_bench_isolated and test_gpu_check. Imports nothing large, so that they start at once."""

import os
import signal
import sys
import time


def act(what):
    """Yield rows, or whatever `what` says instead."""
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "be killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "leave":
        os._exit(3)
    if what == "raise":
        raise RuntimeError("CUDA error: x")
    if what == "hang":
        time.sleep(60)
    if what == "speak":
        os.system("echo a library prints {without} an end of line | tr -d '\\n'")
    yield {"said": what, "process": os.getpid()}
    if what == "twice":
        yield {"said": "again", "process": os.getpid()}


def check(name):
    """The case that FAULTY names hangs or crashes, as FAULT says, both in the environment."""
    if name == os.environ["FAULTY"]:
        exec(os.environ["FAULT"], {"time": time, "sys": sys})
    yield {}
