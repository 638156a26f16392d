"""Which families of kernels may run on a GPU without being asked for: those that its canary found right.

The canary (`rnnfast.commands.canary`) runs every family on the GPU in a process of its own, which may hang or crash without
harm. It runs once for a kind of GPU and the versions of what runs on it, when a call would first take a family. Its verdict is
kept in a file beside the tuning file. Several processes of a machine that need one at a time share a run, by a lock.

RNNFAST_CANARY, "auto" by default:

    "auto"    run it when it is needed
    "off"     never run it: what no verdict calls right is not chosen automatically
    "trust"   never run it, and take every family to be right

Nobody has run the kernels on an AMD GPU. There no call runs it, and none takes the kernels, asked for or not, before
``rnnfast check`` has found the step kernels right.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from rnnfast.choice import child, gpu, obstacles, tuning_file
from rnnfast.choice.obstacles import user_level
from rnnfast.settings import CANARY

if TYPE_CHECKING:
    from rnnfast.kernels.persistent.limits import GpuLimits

__all__ = ["UNCHECKED", "CanaryWarning", "Verdict", "device_obstacle", "examine", "families", "trusted", "where", "words"]

FORMAT, SCHEMA = "rnnfast canary", 2
QUIET = 60.0  # seconds that one family may take to compile and run
SECONDS = 180.0  # that the whole may take
UNCHECKED = "the kernels have never run on an AMD GPU, and `rnnfast check` has not found them right on this one"

_verdicts: dict[GpuLimits, Verdict] = {}  # of this process


class CanaryWarning(UserWarning):
    """Some kernels are not used on this GPU; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """What the canary found.

    Attributes:
        faults: for each family that was run, what was wrong with it; empty if nothing was.
        why: why the canary could not run, else empty. Such a verdict is not written to the file.
    """

    faults: dict[str, str] = field(default_factory=dict)
    why: str = ""

    @property
    def right(self) -> tuple[str, ...]:
        return tuple(family for family, fault in self.faults.items() if not fault)

    def __str__(self) -> str:
        words = [f"{family} {fault or 'right'}" for family, fault in self.faults.items()]
        return f"the check of the kernels could not run: {self.why}" if self.why else "; ".join(words)


def families() -> tuple[str, ...]:
    """All families of kernels."""
    from rnnfast.kernels.families import FAMILIES

    return tuple(FAMILIES)


def where(limits: GpuLimits) -> Path:
    """The file of the verdict on this kind of GPU, there or not."""
    return tuning_file.where(limits).with_suffix(".canary.json")


def verdict(limits: GpuLimits) -> Verdict | None:
    """What is known of this kind of GPU, without running anything."""
    if limits not in _verdicts:
        found = _read(limits)
        if found is None:
            return None
        _remember(limits, found)
    return _verdicts[limits]


def device_obstacle(kind: str, index: int | None) -> str | None:
    """Why the kernels cannot run on this device, or None: `obstacles.device_obstacle`, and on an AMD GPU what its verdict says.

    Found once, so that RNNFAST_CANARY=trust counts on an AMD GPU as it is at the first call.
    """
    found = obstacles.device_obstacle(kind, index)
    if found is None and kind == "cuda" and torch.version.hip and CANARY.get() != "trust":
        limits = gpu.limits(torch.device(kind, index))
        assert limits is not None
        found = obstacles.known[f"{kind}:{index}"] = _obstacle(limits, verdict(limits))
    return found


def _obstacle(limits: GpuLimits, found: Verdict | None) -> str | None:
    """Why no call can run on the kernels with this verdict. The step kernels run what no other family can."""
    if found is not None and (fault := found.faults.get("step")):
        return f"the check of the step kernels failed on it: {fault}"
    if limits.arch and (found is None or found.why):
        return f"{UNCHECKED} ({found})" if found else UNCHECKED
    return None


def trusted(device: torch.device) -> tuple[str, ...]:
    """The families that may run on `device` without being asked for.

    Runs the canary if it is needed and allowed, but never while code is compiled or a CUDA graph is captured, and never on an
    AMD GPU.
    """
    limits = gpu.limits(device)
    if limits is None:
        return ()
    asked = CANARY.get() or "auto"
    if asked == "trust":
        return families()
    found = verdict(limits)
    may_run = asked == "auto" and not limits.arch and not torch.compiler.is_compiling()
    if found is None and may_run and not _capturing(device):
        found = examine(device)
    return found.right if found else ()


def words(limits: GpuLimits) -> str:
    """What is known of the kernels on this kind of GPU, in words."""
    if CANARY.get() == "trust":
        return "RNNFAST_CANARY=trust takes the kernels to be right"
    found = verdict(limits)
    if found is None and limits.arch:
        return UNCHECKED
    if found is None:
        return "the kernels were not checked on this GPU yet: the first call that may take them does it, and rnnfast check"
    return str(found) if found.why else f"checked on this GPU: {found}"


def examine(device: torch.device, again: bool = False, seconds: float = SECONDS) -> Verdict:
    """Run the canary on `device` and keep its verdict, unless another process has just done so.

    Args:
        device: a GPU.
        again: run it though there is a verdict.
        seconds: that the whole may take.
    """
    limits = gpu.limits(device)
    assert limits is not None
    path = where(limits)
    with _alone(path):
        found = None if again else _read(limits)
        if found is None:
            announced = f"rnnfast: checking its kernels on {limits.name}, once, in its own process (RNNFAST_CANARY=off: not)"
            print(announced, file=sys.stderr, flush=True)
            found = _run(device, seconds)
            if not found.why:
                _write(found, path, limits)
    _remember(limits, found)
    return found


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _run(device: torch.device, seconds: float = SECONDS) -> Verdict:
    """Run every family in a child process, and again without one at which the child hung or crashed."""
    faults: dict[str, str] = {}
    left, until = list(families()), time.monotonic() + seconds
    env = {k: v for k, v in os.environ.items() if not k.startswith("RNNFAST_") and k != "TRITON_INTERPRET"}
    env["PYTHONSAFEPATH"] = "1"  # not a torch that happens to be in this folder
    while left:
        doing = None
        command = child.own("commands.canary", str(device.index or 0), *left)
        try:
            with closing(child.rows(command, QUIET, env, until)) as rows:
                for row in rows:
                    doing = row["family"]
                    if "fault" in row:
                        faults[doing] = row["fault"]
                        left.remove(doing)
                        doing = None
            left.clear()  # a family without a row has no plan on this GPU
        except child.Failed as error:
            if doing is None:
                return Verdict(why=str(error))
            faults[doing] = str(error)
            left.remove(doing)
    return Verdict(faults)


def _remember(limits: GpuLimits, found: Verdict) -> None:
    """Keep a verdict for this process, and say once what it forbids."""
    _verdicts[limits] = found
    gpu.known.clear()
    faults = {family: fault for family, fault in found.faults.items() if fault}
    if found.why:
        words = f"{found}; PyTorch's own layers run (RNNFAST_CANARY=trust uses the kernels all the same)"
        warnings.warn(words, CanaryWarning, stacklevel=user_level())
    elif faults:
        listed = "; ".join(f"the {family} kernels: {fault}" for family, fault in faults.items())
        warnings.warn(f"not used on {limits.name}, as its check failed: {listed}", CanaryWarning, stacklevel=user_level())
    obstacle = _obstacle(limits, found)
    if obstacle or limits.arch:
        for device in gpu.devices(limits):
            obstacles.known[f"{device.type}:{device.index}"] = obstacle


def _read(limits: GpuLimits) -> Verdict | None:
    """The verdict in the file; None if there is none, or one of another GPU or of other versions, or a damaged one."""
    try:
        data = json.loads(where(limits).read_text(encoding="utf-8"))
        here = {"format": FORMAT, "schema": SCHEMA, **tuning_file.machine(limits)}
        faults = data["faults"]
        if {name: data[name] for name in here} == here and all(isinstance(text, str) for text in faults.values()):
            return Verdict({str(family): text for family, text in faults.items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass  # then the canary runs again, and says so
    return None


def _write(found: Verdict, path: Path, limits: GpuLimits) -> None:
    data: dict[str, Any] = {"format": FORMAT, "schema": SCHEMA, **tuning_file.machine(limits), "faults": found.faults}
    try:
        tuning_file.write(data, path)
    except OSError as error:
        words = f"the check of the kernels will run again in the next process, as {path} cannot be written: {error}"
        warnings.warn(words, CanaryWarning, stacklevel=user_level())


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Within the ``with`` block no other process of this machine that asks for the same file is. Where there can be no lock,
    for the folder cannot be written or the system has none, each runs a canary of its own."""
    file: IO[str] | None = None
    with suppress(OSError, ImportError):
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_suffix(".lock"), "w", encoding="utf-8")  # noqa: SIM115 - kept until the block ends
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if file is not None:
            file.close()
