"""What is done with a call before it runs: whoever watches is told of it, and a new shape may be measured.

`rnnfast.tune` watches a model to find its recurrent calls. With ``torch.backends.cudnn.benchmark = True`` the first call of a
new shape is measured in this process, as PyTorch's users expect of that switch (docs/tuning.md).

The measuring runs layers, which stand above this module. So it is registered here, as `measure`, when rnnfast is imported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rnnfast import torch_private
from rnnfast.choice import kernel_plan, tuned
from rnnfast.choice.decide import Decision, watcher
from rnnfast.choice.tuning_file import Entry, Shape

__all__ = ["Seen", "before", "watched"]

measure: Callable[[Shape, torch.device], Entry | None] | None = None
_lock = threading.Lock()


@dataclass(frozen=True)
class Seen:
    """A call that was watched.

    Attributes:
        layer: the module, or None for a call of `rnnfast.functional`.
        cell: the name of its equations.
        device: that of the input.
        chosen: the decision on it.
        plain: whether it is a call as `Shape` describes it, without lengths, resets, projection and the like.
        shape: None if the kernels cannot run it.
        given: what the layer was called with: input, hx and a dictionary of options. Empty for a function.
    """

    layer: torch.nn.Module | None
    cell: str
    device: torch.device
    chosen: Decision
    plain: bool
    shape: Shape | None
    given: tuple[Any, ...] = ()


@contextmanager
def watched(tell: Callable[[Seen], None]) -> Iterator[None]:
    """Tell of each recurrent call of rnnfast, within the ``with`` block and in this thread.

    No call is measured meanwhile.
    """
    token = watcher.set(tell)
    try:
        yield
    finally:
        watcher.reset(token)


def before(
    layer: torch.nn.Module | None, cell: str, x: Tensor, chosen: Decision, plain: bool, shape: Callable[[], Shape],
    given: tuple[Any, ...] = (),
) -> bool:  # fmt: skip
    """Tell of a well-formed call, or measure it if it should be. Returns whether it was measured: decide again then.

    It is for calls whose decision says that they are `watched`.

    Args:
        layer, cell, chosen, plain, given: as in `Seen`.
        x: its input.
        shape: gives its shape. It is called only if the kernels can run the call.
    """
    tell = watcher.get()
    if tell is not None:
        tell(Seen(layer, cell, x.device, chosen, plain, None if chosen.obstacles else shape(), given))
        return False
    if measure is None or not plain or not _may_measure(chosen, x):
        return False
    gpu = kernel_plan.limits(x.device)
    wanted = shape()
    if gpu is None or tuned.has(gpu, wanted):
        return False
    with _lock:
        if not tuned.has(gpu, wanted):  # another thread may have measured it meanwhile
            entry = measure(wanted, x.device)
            tuned.learn(gpu, () if entry is None else [entry], own=[wanted])
    return True


def _may_measure(chosen: Decision, x: Tensor) -> bool:
    """Whether the choice is automatic, and the call runs here and now, with numbers, as no part of another computation."""
    return (
        chosen.asked is None
        and not chosen.obstacles
        and not chosen.inside
        and kernel_plan.asked() == "auto"
        and not torch_private.is_fake(x)
        and not torch_private.in_backward()
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )
