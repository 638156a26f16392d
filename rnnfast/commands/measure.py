"""Measures the candidates of one shape: checks each against float64, then times them all.

`measure` does it in a separate process, because a candidate may hang or crash:

1. The process first compares each candidate with the float64 reference, by the numerics contract. A wrong one is not timed.
2. It then times the others in turn, with device events. They alternate, so that a change of the GPU's clock affects all alike.
3. If the process hangs or crashes, the candidate that it was at is dropped, and a new process runs the others.

The process is ``python -m rnnfast.commands.measure JOB DEVICE``. It prints JSON lines.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import torch

from rnnfast.choice import child, gpu, tuned, tuning_file
from rnnfast.choice.decide import use_backend
from rnnfast.choice.kernel_plan import precision
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.settings import STRICT

if TYPE_CHECKING:
    from rnnfast.check import Case

__all__ = ["MODULES", "QUIET", "Rows", "measure", "medians", "microseconds", "work", "worker"]

MODULES = {"lstm": ("LSTM", {}), "gru": ("GRU", {}), "rnn_tanh": ("RNN", {}), "rnn_relu": ("RNN", {"nonlinearity": "relu"})}
QUIET = 120  # seconds that a candidate may take to compile, run and be checked
CHECK_STEPS = 512  # at most this many steps are checked, because the float64 reference is slow
ROUNDS = 9
CHOSEN = ("RNNFAST_BACKEND", "RNNFAST_CANARY", "RNNFAST_KERNELS", "TRITON_INTERPRET")  # variables that the child is not given

Rows = Generator[dict, None, None]


def microseconds(call: Callable[[], object], steps: int) -> float:
    """The time of one call divided by its number of time steps, in microseconds, by device events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / steps


# The process that measures


def work(entries: list[Entry], device: str, check_steps: int, rounds: int) -> Rows:
    """Check and time the candidates of one shape. Draws no numbers from PyTorch's generators.

    Args:
        check_steps: the steps that are checked, of a longer sequence the first.
        rounds: how often each candidate is timed.

    Yields:
        ``{"doing": n}`` before it starts on candidate n.
        ``{"wrong": n, "why": ...}`` if candidate n is wrong.
        ``{"timed": n, "us": ...}`` for each time of candidate n, in microseconds per time step.
    """
    from rnnfast import check

    shape = entries[0].shape
    trials = [tuned.Candidate(entry) for entry in entries]
    tf32 = shape.precision == "tf32" if shape.dtype == "float32" else precision() == "tf32"
    with check.products_in_tf32(tf32):
        case = _case(shape, min(shape.T, check_steps))
        right = []
        for n, trial in enumerate(trials):
            yield {"doing": n}
            with _running(trial):
                why = check.fault(check.compare(case, device, None, tf32, shape.training))
            if why:
                yield {"wrong": n, "why": why}
            else:
                right.append(n)
        check.forget()
        call = _call(shape, device)
        for turn, n in itertools.product(range(-2, rounds), right):
            yield {"doing": n}
            with _running(trials[n]):
                us = microseconds(call, shape.T)
            if turn >= 0:  # the first two turns load compiled code and choose algorithms
                yield {"timed": n, "us": us}


@contextmanager
def _running(trial: tuned.Candidate) -> Iterator[None]:
    """Within the ``with`` block and in this thread, layers run on this candidate, and a launch that the driver refuses raises.

    Backward runs in this thread, too, so that it takes the candidate's kernels.
    """
    here = torch.autograd.set_multithreading_enabled(False)
    with use_backend(trial.entry.winner), tuned.only(trial), STRICT.within("1"), here:
        yield


def _case(shape: Shape, T: int) -> Case:
    """A layer of this shape, for T steps."""
    from rnnfast.check import Case

    module, options = MODULES[shape.cell]
    sizes = {"T": T, "B": shape.B, "I": shape.I, "H": shape.H, "dtype": getattr(torch, shape.dtype)}
    return Case(module, **sizes, layers=shape.layers, bidirectional=shape.directions == 2, **options)


def _call(shape: Shape, device: str) -> Callable[[], object]:
    """One call forward, or forward and backward. It runs no hooks that the user has on all modules."""
    from rnnfast import check, nn

    problem = check.Problem(_case(shape, shape.T), device)
    layer, x, dy = problem.module(nn), problem.x, problem.upstream[0]
    inputs = [x.clone().requires_grad_(), *layer.parameters()]

    def inference() -> object:
        with torch.no_grad():
            return layer.forward(x)

    def training() -> object:
        return torch.autograd.grad(layer.forward(inputs[0])[0], inputs, dy)

    return training if shape.training else inference


def worker(job: str, device: str) -> int:
    """Run `work` on a job from `measure`, on CUDA device number `device`, and print what it yields as JSON lines."""
    index = int(device)
    torch.cuda.set_device(index)
    limits = gpu.limits(torch.device("cuda", index))
    assert limits is not None
    for row in work([tuning_file.decode(raw, limits) for raw in json.loads(job)], f"cuda:{index}", CHECK_STEPS, ROUNDS):
        print(json.dumps(row), flush=True)
    return 0


# What starts that process


def measure(
    entries: list[Entry],
    quiet: float = QUIET,
    command: tuple[str, ...] = (),
    until: float = math.inf,
    device: int = 0,
    told: Callable[[Entry], None] = lambda entry: None,
) -> dict[int, float | str]:
    """`medians` of one shape, measured in a process of its own.

    Args:
        quiet, until: as in `child.rows`.
        command: another program in place of this one.
        device: the number of the CUDA device.
        told: as in `medians`.
    """
    command = command or tuple(child.own("commands.measure"))
    env = {k: v for k, v in os.environ.items() if k not in CHOSEN}
    env["PYTHONSAFEPATH"] = "1"  # not a torch that happens to be in this folder
    env["RNNFAST_STRICT"] = "1"  # otherwise the step kernels would be timed in place of a launch that the driver refuses

    def rows(left: list[Entry]) -> Rows:
        job = json.dumps([tuning_file.encode(entry) for entry in left])
        return child.rows([*command, job, str(device)], quiet, env, until)

    return medians(entries, rows, told)


def medians(
    entries: list[Entry], rows: Callable[[list[Entry]], Rows], told: Callable[[Entry], None] = lambda entry: None
) -> dict[int, float | str]:
    """The median time of each candidate of one shape, in microseconds a time step, or why it has none.

    Args:
        rows: what `work` yields of these candidates, or `child.Failed`. It runs again without the candidate that failed.
        told: called with each candidate before it is touched.
    """
    failed: dict[int, float | str] = {}
    while left := [n for n in range(len(entries)) if n not in failed]:
        times: dict[int, list[float]] = {}
        doing = None
        try:
            with closing(rows([entries[n] for n in left])) as found:
                for row in found:
                    if "doing" in row:
                        doing = left[row["doing"]]
                        told(entries[doing])
                    elif "wrong" in row:
                        failed[left[row["wrong"]]] = f"wrong: {row['why']}"
                    elif "timed" in row:
                        times.setdefault(left[row["timed"]], []).append(row["us"])
            return {n: statistics.median(each) for n, each in times.items()} | failed
        except child.Failed as error:
            if doing is None:  # it failed before the first candidate
                return failed | {n: f"not run: {error}" for n in left}
            failed[doing] = f"failed: {error}"
    return failed


if __name__ == "__main__":
    sys.exit(worker(*sys.argv[1:]))
