"""Runs a command that may hang or crash, and yields the JSON objects that it prints while it runs. `own`: one of ours."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rnnfast.version import PACKAGE

__all__ = ["Failed", "own", "rows"]

# ``python -m`` finds installed packages, and this one may be none: it may lie in any folder and have any name.
_RUN = """
import importlib.util, runpy, sys
name, path, module = sys.argv[1:4]
spec = importlib.util.spec_from_file_location(name, path)
package = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
sys.argv[:4] = [module]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


class Failed(Exception):
    """The command hung, crashed or ran out of time. `hung` says whether it hung."""

    def __init__(self, words: str, hung: bool) -> None:
        super().__init__(words)
        self.hung = hung


def own(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package, of the same files and under the same name, in a new Python.

    Args:
        module: its name within the package, for example "commands.canary".
    """
    path = Path(__file__).parents[1] / "__init__.py"
    return [sys.executable, "-c", _RUN, PACKAGE, str(path), f"{PACKAGE}.{module}", *arguments]


def rows(
    command: Sequence[str],
    quiet: float,
    env: Mapping[str, str] | None = None,
    until: float = math.inf,
) -> Generator[dict, None, None]:
    """Yield each JSON object that `command` prints on a line of its own. Other lines are ignored.

    When the generator ends, is closed or is interrupted, the command and its children are killed.

    Args:
        quiet: the command counts as hung after this many seconds without a line.
        until: the time by which the command has to end, on the clock of `time.monotonic`.

    Raises:
        Failed: the command hangs, takes too long, or ends with an exit code other than 0.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=env,
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
        )
        out = process.stdout
        assert out is not None

        def listen() -> None:
            for line in out:
                lines.put(line)
            lines.put(None)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            while (line := _next(lines, quiet, until)) is not None:
                with suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict):
                        yield row
            code = _wait(process, quiet)
            if code == -signal.SIGKILL:
                raise Failed("its process was killed, which is what Linux does when memory runs out", hung=False)
            if code < 0:
                raise Failed(f"its process ended with {signal.Signals(-code).name}", hung=False)
            if code != 0:
                errors.seek(0)
                said = [line.strip() for line in errors.read().splitlines() if line.strip()]
                raise Failed(said[-1] if said else f"exit code {code}", hung=False)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a process inside a driver call dies only when the call returns
                process.wait(10)
            listener.join(1)
            if not listener.is_alive():
                out.close()


def _next(lines: queue.Queue[str | None], quiet: float, until: float) -> str | None:
    left = until - time.monotonic()
    try:
        return lines.get(timeout=max(0.0, min(quiet, left)))
    except queue.Empty:
        raise Failed(f"nothing for {quiet:g} s" if quiet <= left else "no time was left", hung=quiet <= left) from None


def _wait(process: subprocess.Popen, quiet: float) -> int:
    try:
        return process.wait(quiet)
    except subprocess.TimeoutExpired:
        raise Failed(f"did not end in {quiet:g} s", hung=True) from None
