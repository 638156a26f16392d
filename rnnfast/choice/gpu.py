"""The limits and abilities of a GPU, each asked for once, and a stand-in for a GPU that is absent."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rnnfast.kernels.persistent.limits import GpuLimits

__all__ = ["cooperative", "devices", "driver_version", "known", "limits", "pretend_gpu"]

COOPERATIVE_LAUNCH = 95  # CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH

# Results that `rnnfast.choice.kernel_plan` keeps, by their arguments. Cleared when the facts about a GPU change.
known: dict[tuple, Any] = {}
_limits: dict[torch.device, GpuLimits | None] = {}
_cooperative: dict[torch.device, bool] = {}


def limits(device: torch.device) -> GpuLimits | None:
    """The limits of the GPU `device`. None for a CPU, and for an AMD GPU that the kernels were not compiled for.

    On a CPU, Triton's interpreter runs the programs of a grid one after another. The first program of a persistent kernel would
    wait for the others for ever, so there must be no plan for it.
    """
    if device not in _limits:
        _limits[device] = _find_limits(device) if device.type == "cuda" else None
    return _limits[device]


def _find_limits(device: torch.device) -> GpuLimits | None:
    from rnnfast.kernels.persistent.limits import AMD_GPUS, GpuLimits

    gpu: Any = torch.cuda.get_device_properties(device)  # its stub lacks some of these
    if torch.version.hip:
        arch = gpu.gcnArchName.partition(":")[0]  # of "gfx942:sramecc+:xnack-"
        return replace(AMD_GPUS[arch], name=gpu.name, sms=gpu.multi_processor_count) if arch in AMD_GPUS else None
    return GpuLimits(
        name=gpu.name,
        capability=gpu.major * 10 + gpu.minor,
        sms=gpu.multi_processor_count,
        shared_bytes=gpu.shared_memory_per_block_optin,
        registers=gpu.regs_per_multiprocessor,
        l2_bytes=gpu.L2_cache_size,
    )


@contextmanager
def pretend_gpu(gpu: GpuLimits, cooperative: bool = True) -> Iterator[None]:
    """Plan launches for CPU tensors as if they were on `gpu`, within the ``with`` block.

    It serves to compile kernels and to count their instructions without a GPU. Nothing can be run.

    Args:
        gpu: its limits.
        cooperative: whether it has cooperative launch.
    """
    cpu = torch.device("cpu")
    before = _limits.get(cpu), _cooperative.get(cpu, False)
    _limits[cpu], _cooperative[cpu] = gpu, cooperative
    known.clear()
    try:
        yield
    finally:
        _limits[cpu], _cooperative[cpu] = before
        known.clear()


def devices(gpu: GpuLimits) -> list[torch.device]:
    """The devices of this process that are known to be of this kind."""
    return [device for device, known in _limits.items() if known == gpu]


def cooperative(device: torch.device) -> bool:
    """Whether `device` has cooperative launch. Such a launch makes all programs of a grid resident at once, or is refused.

    True if the driver cannot be asked. If the GPU lacks it after all, the driver refuses the launch itself.
    """
    if device not in _cooperative:
        _cooperative[device] = _attribute(COOPERATIVE_LAUNCH, device.index or 0) != 0
    return _cooperative[device]


def _attribute(number: int, index: int) -> int | None:
    """An attribute of GPU `index`. None if the driver does not say. PyTorch must have initialised the driver."""
    device, value = ctypes.c_int(), ctypes.c_int()
    found = _ask("cuDeviceGet", ctypes.byref(device), index)
    return value.value if found and _ask("cuDeviceGetAttribute", ctypes.byref(value), number, device) else None


def driver_version() -> int | None:
    """The CUDA version of the driver, for example 13000 for CUDA 13.0. None if the driver does not say."""
    value = ctypes.c_int()
    return value.value if _ask("cuDriverGetVersion", ctypes.byref(value)) else None


def _ask(function: str, *args: Any) -> bool:
    """Call a function of the CUDA driver. Returns whether it succeeded."""
    try:
        return getattr(ctypes.CDLL("libcuda.so.1"), function)(*args) == 0
    except (OSError, AttributeError):
        return False
