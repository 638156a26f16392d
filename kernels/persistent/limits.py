"""What a plan has to keep to on a GPU, and what stands in the place of a plan where there is none."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AMD_GPUS", "GPUS", "GpuLimits", "NoPlan"]


@dataclass(frozen=True)
class GpuLimits:
    """What a plan has to keep to on one GPU.

    Attributes:
        name: as people say it.
        capability: compute capability of an NVIDIA GPU, 90 for 9.0; 0 for one of AMD.
        sms: streaming multiprocessors; of an AMD GPU what its driver counts, CUs or pairs of them (WGPs).
        shared_bytes: shared memory that one CTA can have at most.
        registers: 32-bit registers of an SM.
        l2_bytes: size of the L2 cache.
        arch: the name of an AMD GPU for its compiler, such as "gfx942"; empty for an NVIDIA GPU.
    """

    name: str
    capability: int
    sms: int
    shared_bytes: int
    registers: int
    l2_bytes: int
    arch: str = ""


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
AMD_GPUS = {  # by arch. AMD's data sheets and instruction set manuals; L2 of one chiplet. No kernel has run on any
    gpu.arch: gpu
    for gpu in (
        GpuLimits("MI300X", 0, 304, 64 << 10, 131072, 4 << 20, "gfx942"),
        GpuLimits("MI355X", 0, 256, 160 << 10, 131072, 4 << 20, "gfx950"),
        GpuLimits("RX 7900 XTX", 0, 48, 64 << 10, 98304, 6 << 20, "gfx1100"),
    )
}


@dataclass(frozen=True)
class NoPlan:
    """There is no plan; `reason` says why, in words."""

    reason: str
