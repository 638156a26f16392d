"""What a plan has to keep to on a GPU, and what stands in the place of a plan where there is none."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GPUS", "GpuLimits", "NoPlan"]


@dataclass(frozen=True)
class GpuLimits:
    """What a plan has to keep to on one GPU.

    Attributes:
        name: as people say it.
        capability: compute capability, 90 for 9.0.
        sms: streaming multiprocessors.
        shared_bytes: shared memory that one CTA can have at most.
        registers: 32-bit registers of an SM.
        l2_bytes: size of the L2 cache.
    """

    name: str
    capability: int
    sms: int
    shared_bytes: int
    registers: int
    l2_bytes: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuLimits("A100", 80, 108, 163 << 10, 65536, 40 << 20),
        GpuLimits("H100", 90, 132, 227 << 10, 65536, 50 << 20),
        GpuLimits("H200", 90, 132, 227 << 10, 65536, 50 << 20),
        GpuLimits("RTX 3090", 86, 82, 99 << 10, 65536, 6 << 20),
        GpuLimits("RTX 4090", 89, 128, 99 << 10, 65536, 72 << 20),
        GpuLimits("B200", 100, 148, 227 << 10, 65536, 126 << 20),
    )
}


@dataclass(frozen=True)
class NoPlan:
    """There is no plan; `reason` says why, in words."""

    reason: str
