"""Stand-ins for what only a GPU has, on CPU tensors."""

from types import SimpleNamespace

import torch

from rnnfast.choice import gpu, launchable, obstacles
from rnnfast.kernels import runtime


class Event:
    """In place of a device event. Ticks a millisecond at each record."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 1.0
        self.time = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.time - self.time


class Profiler:
    """In place of PyTorch's. Saw two kernels, the second of which ran longer, and something on the CPU."""

    def __init__(self, activities):
        assert [activity.name for activity in activities] == ["CUDA"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def key_averages(self):
        times = {"gemm": 1.0, "RNN_blockPersist_fp_LSTM": 2.0, "aten::mm": 0.0}
        return [SimpleNamespace(key=name, self_device_time_total=time, count=3) for name, time in times.items()]


def stand_in_gpu(monkeypatch) -> None:
    """CPU tensors pass for a GPU's: device events, streams and memory statistics (7 bytes, at most 10)."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    numbers = {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 7, "max_memory_allocated": 10}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


def stand_in_amd_gpu(monkeypatch, arch: str = "gfx942") -> torch.device:
    """The device of a GPU of AMD, as PyTorch for ROCm describes one, on which Triton can launch. There are no tensors on it."""
    properties = SimpleNamespace(name="AMD Instinct MI300X", gcnArchName=f"{arch}:sramecc+:xnack-", multi_processor_count=228)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(runtime, "mode", lambda: "compiled")
    monkeypatch.setattr(launchable, "obstacle", lambda index: None)
    monkeypatch.setattr(obstacles, "known", {"triton": None})
    monkeypatch.setattr(gpu, "_limits", {})
    return torch.device("cuda", 0)
