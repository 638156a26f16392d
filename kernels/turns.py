"""Grids whose programs wait for one another take turns on a GPU.

Two such grids on two streams could each hold a part of the SMs and wait for programs that find no room. Cooperative launch only
promises that a grid fits on an empty GPU. So a launch on another stream than the last one has the GPU wait for that one.
Launches on one stream come one after another anyway, and cost a comparison here.

A stream that a graph is being captured from cannot wait for work outside of the graph, so a captured launch waits for none. The
launches of one capture may be on one stream only; a warning says so otherwise. What a graph runs when it is replayed is not
seen here: see docs/kernels.md.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import triton

__all__ = ["launch"]

_turn = threading.Lock()


class _Last(NamedTuple):
    """The last launch on a device.

    Attributes:
        handle: of its stream, if that lives as long as the process, as all of PyTorch's own do; else None.
        stream: the stream, if it does; else None.
        event: recorded after the launch otherwise: someone else's stream may be gone when the next launch comes, and its handle
            may be another's.
    """

    handle: int | None
    stream: Any = None
    event: Any = None


_last: dict[int, _Last] = {}
_captured: dict[int, int] = {}  # the stream of the last launch that was captured, by device


def launch(function: Callable[..., None], device: int, stream: int, *args: Any) -> None:
    """Call ``function(*args)``, which launches on `stream`, the current stream of `device`, in its turn."""
    with _turn:
        last = _last.get(device)
        if last is not None and last.handle == stream:
            function(*args)
        else:
            _launch_on_another(function, device, stream, last, args)


def _launch_on_another(function: Callable[..., None], device: int, stream: int, last: _Last | None, args: tuple) -> None:
    gpu = triton.runtime.driver.active.get_device_interface()  # torch.cuda
    if gpu.is_current_stream_capturing():
        if _captured.setdefault(device, stream) != stream:
            _captured[device] = stream
            warnings.warn(
                "persistent kernels were captured on two streams of a GPU: they must not run at the same time, whether in one "
                "graph or in two (docs/kernels.md)",
                RuntimeWarning,
                stacklevel=2,
            )
        function(*args)
        return
    current = gpu.current_stream(device)
    if last is not None:
        event = last.event or _event(gpu, last.stream)
        if event is not None:
            current.wait_event(event)
    function(*args)
    if stream and current.stream_id == stream:  # the id of a stream of someone else's is its handle
        _last[device] = _Last(None, event=_event(gpu, current))
    else:
        _last[device] = _Last(stream, current)


def _event(gpu: Any, stream: Any) -> Any:
    """An event after all that `stream` was given; None if a graph is being captured from it, which nothing outside can wait
    for."""
    with gpu.stream(stream):
        if gpu.is_current_stream_capturing():
            return None
    event = gpu.Event()
    event.record(stream)
    return event
