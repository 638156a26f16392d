"""A process for work that may crash or hang, and be done again by the next one."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable

__all__ = ["Died", "Worker"]


class Died(Exception):
    """The process that was to measure something is no more; the message says how it ended."""


class Worker:
    """A process that calls `function` again and again; started when needed, and anew after it died.

    `function` and its arguments are pickled. Ctrl-C is left to the caller.
    """

    def __init__(self, function: Callable[..., dict]) -> None:
        self.function = function
        self._process = self._pipe = None

    def do(self, *args, limit: float) -> dict:
        """``function(*args)``. Raises `Died` if the process ends on the way, or is not done after `limit` seconds."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(self.function, theirs), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._pipe.send(args)
            if not self._pipe.poll(limit):
                self.stop()
                raise Died(f"not finished in {limit:g} s")
            return self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            self.stop()
            if code == -signal.SIGKILL:
                raise Died("its process was killed, which is what Linux does when memory runs out") from None
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise Died(f"its process ended with {how}") from None

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = self._pipe = None


def _serve(function: Callable[..., dict], pipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            args = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*args))
