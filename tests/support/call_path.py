"""Counts the functions of ours that a call runs, and the changes of file among them, until the recurrence would be launched.

    python -m tests.support.call_path             a table of calls
    python -m tests.support.call_path "forward"   the path of the calls with this word in their name too

Each call of a function in rnnfast/ or kernels/ counts, a generator once. Comprehensions do not count, nor do functions of
PyTorch and Triton. A change of file is a function in another file than the one that ran before it. What is known after a first
call is known here: the second call is counted. It runs in Triton's interpreter, on CPU tensors, and stops before the launch.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

import rnnfast
from rnnfast.choice.kernel_plan import pretend_gpu

ROOT = Path(rnnfast.__file__).resolve().parents[1]
FOLDERS = tuple(f"{ROOT / name}{os.sep}" for name in ("rnnfast", "kernels"))
KERNELS = ("forward_step_kernel", "backward_step_kernel", "persistent_forward_kernel", "persistent_backward_kernel")


class Launched(BaseException):
    """The recurrence would be launched now. No handler of exceptions in between takes it for an error of its own."""


@contextmanager
def no_launch() -> Iterator[None]:
    """Within the ``with`` block a launch of a recurrence raises `Launched`."""
    from triton.runtime.interpreter import InterpretedFunction

    launch = InterpretedFunction.__getitem__

    def instead(self, grid):
        if self.fn.__name__ in KERNELS:
            raise Launched
        return launch(self, grid)

    InterpretedFunction.__getitem__ = instead
    try:
        yield
    finally:
        InterpretedFunction.__getitem__ = launch


real = functools.cache(os.path.realpath)  # rnnfast/kernels is a link


def path_of(call: Callable[[], object]) -> list[tuple[str, str]]:
    """The file and the name of each function of ours, in order, until the launch or until `call` returns."""
    found: list[tuple[str, str]] = []
    seen: dict[int, FrameType] = {}  # kept, so that no other frame gets the id of one: a generator's is entered again and again

    def watch(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code.co_name.startswith("<") or id(frame) in seen:
            return
        seen[id(frame)] = frame
        file = real(code.co_filename)
        if file.startswith(FOLDERS):
            found.append((os.path.relpath(file, ROOT), code.co_name))

    sys.setprofile(watch)
    try:
        call()
    except Launched:
        pass
    finally:
        sys.setprofile(None)
    return found


def changes(path: list[tuple[str, str]]) -> int:
    """How often the file changes along `path`."""
    return sum(one[0] != other[0] for one, other in itertools.pairwise(path))


@contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def paths() -> dict[str, list[tuple[str, str]]]:
    """The path of each call of the table, by its name."""
    from rnnfast.kernels.persistent.plan import GPUS

    x = torch.randn(4, 3, 5)
    plain, layer, wide = rnnfast.LSTM(5, 64, backend="torch"), rnnfast.LSTM(5, 64), rnnfast.LSTM(5, 256)
    unset = rnnfast.LSTM(5, 64)
    weights = dict(layer.named_parameters())

    def inference() -> None:
        with torch.no_grad():
            layer(x)

    def grad() -> None:
        torch.func.grad(lambda weights: torch.func.functional_call(layer, weights, (x,))[0].sum())(weights)

    found = {}

    def count(name: str, call: Callable[[], object]) -> None:
        with suppress(Launched):
            call()
        found[name] = path_of(call)

    with no_launch():
        count("plain CPU call", lambda: plain(x))
        with setting("RNNFAST_BACKEND", "torch"):
            count("CPU call with RNNFAST_BACKEND=torch", lambda: unset(x))
        count("step kernels, forward", inference)
        count("step kernels, forward in training", lambda: layer(x))
        with pretend_gpu(GPUS["H200"]), setting("RNNFAST_KERNELS", "persistent"):
            count("persistent kernels", lambda: wide(x))
            count("persistent kernels with lengths", lambda: wide(x, lengths=[4, 3, 2]))
        count("torch.func.grad", grad)
    return found


def main() -> None:
    for name, path in paths().items():
        print(f"{name:40} {len(path):4} calls {changes(path):4} changes of file")
        if len(sys.argv) > 1 and sys.argv[1] in name:
            for file, function in path:
                print(f"    {file:32} {function}")


if __name__ == "__main__":
    main()
