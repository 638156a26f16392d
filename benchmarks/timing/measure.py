"""Measures a `Call`: its time, its peak memory, the bytes that it keeps for backward, and the names of its GPU kernels.

On a GPU, device events time one call. The GPU is idle before the call, so the time includes the launches. L2 is warm (the same
call ran just before) or cold (a buffer larger than any L2 was written in between). The call is eager or, if its mode can be
captured, a CUDA graph. On a CPU, a clock times one call.

Calls of a provider and of torch.nn alternate, so that a change of clocks or load affects both. The ratio is the quotient of the
times of two calls that follow one another.
"""

import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

FLUSH_BYTES = 256 * 2**20
_flush: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Call:
    """``run(before())``, where only ``run`` is timed."""

    run: Callable[[Any], Any]
    before: Callable[[], Any] = lambda: None

    def __call__(self) -> Any:
        return self.run(self.before())


def percentiles(values: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, by linear interpolation."""
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20", "p50", "p80"), found.tolist(), strict=True))


def stopwatch(call: Call, device: str, l2: str = "warm") -> Callable[[], float]:
    """A function that makes the call once and returns its microseconds.

    On a GPU device events stand around the call; `l2` is "warm" or "cold" there. On a CPU a clock does.
    """
    if device == "cpu":
        clock = time.perf_counter_ns

        def once() -> float:
            given = call.before()
            start = clock()
            call.run(given)
            return (clock() - start) / 1000

        return once
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if l2 == "cold" and device not in _flush:
        _flush[device] = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def once_on_gpu() -> float:
        given = call.before()
        if l2 == "cold":
            _flush[device].zero_()
        torch.cuda.synchronize()
        begin.record()
        call.run(given)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000

    return once_on_gpu


def warm_up(once: Callable[[], float], seconds: float) -> float:
    """Call at least twice and for `seconds`, to choose algorithms and fill caches. Returns the last call's microseconds."""
    end = time.perf_counter() + seconds
    once()
    took = once()
    while time.perf_counter() < end:
        took = once()
    return took


def alternate(watches: list[Callable[[], float]], seconds: float, least: int = 5, most: int = 10000) -> list[list[float]]:
    """Times of each watch. They take turns, back and forth, for `seconds`, but `least` times at least and `most` at most."""
    times: list[list[float]] = [[] for _ in watches]
    turns = list(zip(watches, times, strict=True))
    end = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        for n in range(most):
            for once, found in turns if n % 2 == 0 else reversed(turns):
                found.append(once())
            if n + 1 >= least and time.perf_counter() >= end:
                break
    finally:
        if collecting:
            gc.enable()
    return times


def ratio_of(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Percentiles of the ratios of neighbouring times."""
    return percentiles([mine / other for mine, other in zip(ours, theirs, strict=True)])


def captured(call: Call) -> Call:
    """The call as one CUDA graph, without its ``before``. It reads the tensors of the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return Call(lambda _: (graph.replay(), results)[1])


def peak_bytes(call: Call, device: str) -> int:
    """The peak of the bytes allocated during the call, less those allocated before it, by PyTorch's allocator."""
    given = call.before()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call.run(given)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call.run(given)
    found = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    found.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in found), initial=0))


def kernel_names(call: Call) -> list[str]:
    """Names of the GPU kernels of one call, the longest-running first."""
    given = call.before()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call.run(given)
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    return [kernel.key for kernel in found if kernel.self_device_time_total > 0]


def kept(forward: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor], parameters: list[Tensor]) -> dict[str, int]:
    """Bytes that autograd keeps alive for the backward of `forward`. Each storage counts once.

    By what they belong to: "inputs", "parameters", "outputs" (all of which live anyway), and "activations", which is all else.
    """
    storages: dict[int, Tensor] = {}

    def place(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata  # not its address: a fake tensor has none

    def pack(tensor: Tensor) -> Tensor:
        storages.setdefault(place(tensor), tensor.detach())  # held until the end, so that no other can take its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    groups = {"inputs": inputs, "parameters": parameters, "outputs": list(outputs)}
    found = dict.fromkeys([*groups, "activations"], 0)
    names = {place(tensor): name for name, group in groups.items() for tensor in group}
    for where, tensor in storages.items():
        found[names.get(where, "activations")] += tensor.untyped_storage().nbytes()
    return found
