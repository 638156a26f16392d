"""Measures a call of a new shape in this process, as ``torch.backends.cudnn.benchmark = True`` asks for.

It is quicker than `rnnfast.tune` and knows less. It takes only families of kernels that are trusted on this GPU, because a hang
would hang the program. It takes one plan of each family, checks fewer steps against float64 and times fewer rounds. What it
finds is kept in memory and not in the tuning file.

The caller's tensors are not touched, and nothing is drawn from PyTorch's generators.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from rnnfast.choice import child, gpu, trust, tuned
from rnnfast.choice.pipeline import grouping
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.commands import tune
from rnnfast.commands.measure import MODULES, Rows, medians, work

__all__ = ["candidates", "measure"]

CHECK_STEPS = 32
ROUNDS = 3


def candidates(shape: Shape, device: torch.device, forward: Entry | None = None) -> list[Entry]:
    """PyTorch's own layer, and a candidate of each family that is trusted. `forward`: as in `rnnfast.commands.tune`."""
    limits, trusted = gpu.limits(device), set(trust.trusted(device))
    assert limits is not None
    return [entry for entry in tune.candidates(shape, limits, forward, most=1) if tune.families(entry) <= trusted]


def measure(shape: Shape, device: torch.device) -> Entry | None:
    """The entry to follow for calls of this shape; None if nothing could be measured, or no kernels are trusted."""
    limits = gpu.limits(device)
    if limits is None or shape.cell not in MODULES:
        return None
    entries = candidates(shape, device, _forward(shape, device))
    if len(entries) < 2:
        return None
    stopped = threading.Event()
    found: dict[int, float | str] = {}

    def rows(left: list[Entry]) -> Rows:
        try:
            for row in work(left, str(device), CHECK_STEPS, ROUNDS):
                if stopped.is_set():
                    return
                yield row
        except Exception as error:  # whatever it is, this candidate does not run here: memory is full, a launch is refused
            raise child.Failed(f"{type(error).__name__}: {error}", hung=False) from error

    def run() -> None:
        from rnnfast import check

        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
                torch.cuda.synchronize()  # what the caller has launched shall not share the GPU with what is timed
            found.update(medians(entries, rows))
        finally:
            check.forget()

    _in_a_thread(run, stopped)
    return tune.best(entries, found)


def _forward(shape: Shape, device: torch.device) -> Entry | None:
    """For training, what is the fastest in inference, measured if it is not known and there is more than the step kernels."""
    inference, limits = replace(shape, training=False), gpu.limits(device)
    if limits is None or not shape.training or all(entry.forward is None for entry in candidates(inference, device)):
        return None
    group = grouping(shape.layers, shape.directions)[:2]
    known = tuned.kernels(limits, shape.cell, shape.T, shape.B, shape.H, shape.dtype, shape.precision, False, *group)
    return known or measure(inference, device)


def _in_a_thread(run: Callable[[], None], stopped: threading.Event) -> None:
    """Run it in a thread of its own, which has none of the caller's modes: autocast, grad mode, a FlopCounterMode, saved-tensor
    hooks, `rnnfast.use_backend`. On Ctrl-C, set `stopped` and wait for the thread to end."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, name="rnnfast measures", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        stopped.set()
        thread.join()
        raise
    if errors:
        raise errors[0]
