"""Stand-ins for what only a GPU has, on CPU tensors."""

from types import SimpleNamespace

import torch


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
