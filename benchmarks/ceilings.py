"""What a GPU can do at most: bytes and FLOPs a second, and the latency of handing a word from one SM to another.

Two kinds of figures, never mixed: `STATED`, from data sheets and papers (each above what a program ever reaches, so a floor
made of them is a floor), and those that `benchmarks.probes` measures on the very GPU that a benchmark runs on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rnnfast.kernels.persistent.plan import GPUS

__all__ = ["STATED", "Ceilings", "of_results", "stated"]

REGISTER_BYTES = 256 << 10  # of an SM, of every GPU below
HOP_CLOCKS = 180  # the fastest way between two SMs that has been published: distributed shared memory on an H100
HOP_SOURCE = "SM to SM: 180 clocks at least (arXiv 2402.13499, H100; an L2 hit takes about 260)"
L2_BYTES_PER_CLOCK = 64  # of one SM's port to L2, the most that it can take (CUDA programming guides of all these GPUs)


@dataclass(frozen=True)
class Ceilings:
    """Of one GPU. `exchange_us`: microseconds until a word that one SM has published is seen by another."""

    name: str
    sms: int
    sm_bytes: int  # that an SM can hold: shared memory and registers, with the tensor memory of sm_100
    l2_size: int
    hbm_bytes_per_s: float
    l2_bytes_per_s: float
    flops_per_s: dict[str, float]  # by "float16", "bfloat16", "tf32", "float32"
    exchange_us: float
    source: str

    @property
    def chip_bytes(self) -> int:
        return self.sms * self.sm_bytes


def _stated(name, sms, shared, l2_size, clock, hbm, half, tf32, single, source, extra=0) -> Ceilings:
    """From a data sheet: `clock` in GHz, `hbm` in GB/s, the FLOPs in TFLOP/s, dense and with sums in float32."""
    flops = {"float16": half * 1e12, "bfloat16": half * 1e12, "tf32": tf32 * 1e12, "float32": single * 1e12}
    l2 = L2_BYTES_PER_CLOCK * sms * clock * 1e9
    hop = HOP_CLOCKS / clock / 1e3
    return Ceilings(name, sms, shared + REGISTER_BYTES + extra, l2_size, hbm * 1e9, l2, flops, hop, f"{source}. {HOP_SOURCE}")


_SHEETS = {  # clock at boost, HBM, half, TF32, float32, where from
    "A100": (1.41, 2039, 312, 156, 19.5, "NVIDIA A100 data sheet (80 GB SXM)"),
    "H100": (1.98, 3350, 989.4, 494.7, 66.9, "NVIDIA H100 data sheet (SXM5)"),
    "H200": (1.98, 4800, 989.4, 494.7, 66.9, "NVIDIA H200 data sheet (SXM)"),
    "RTX 3090": (1.695, 936, 71, 35.6, 35.6, "NVIDIA GA102 whitepaper"),
    "RTX 4090": (2.52, 1008, 165.2, 82.6, 82.6, "NVIDIA Ada whitepaper"),
    "B200": (1.965, 8000, 2250, 1125, 80, "NVIDIA DGX B200 data sheet, an eighth of it"),
}

STATED = {
    name: _stated(
        name,
        GPUS[name].sms,
        GPUS[name].shared_bytes,
        GPUS[name].l2_bytes,
        *sheet,
        extra=256 << 10 if GPUS[name].capability >= 100 else 0,
    )
    for name, sheet in _SHEETS.items()
} | {  # no kernel of ours runs on these; others have published times on them
    "Titan X (Maxwell)": _stated(
        "Titan X (Maxwell)", 24, 96 << 10, 3 << 20, 1.075, 336.5, 6.6, 6.6, 6.6, "NVIDIA GTX Titan X specifications"
    ),
    "Titan X (Pascal)": _stated(
        "Titan X (Pascal)", 28, 96 << 10, 3 << 20, 1.531, 480, 10.97, 10.97, 10.97, "NVIDIA Titan X specifications"
    ),
    "Titan Xp": _stated("Titan Xp", 30, 96 << 10, 3 << 20, 1.582, 547.7, 12.15, 12.15, 12.15, "NVIDIA Titan Xp specifications"),
}


def stated(gpu: str) -> Ceilings | None:
    """The stated ceilings of a GPU by a name such as "NVIDIA H100 80GB HBM3", or None for a GPU without an entry."""
    for name, ceilings in STATED.items():
        if re.search(rf"\b{re.escape(name)}(?!\w| Ti\b)", gpu, re.IGNORECASE):
            return ceilings
    return None


def of_results(results: dict) -> Ceilings | None:
    """Those measured in the run of a results file; else those stated for its GPU; None without a GPU, or for an unknown one."""
    gpu = results["environment"].get("gpu") or ""
    ceilings, measured = stated(gpu), results["ceilings"]
    if ceilings is None or measured is None:
        return ceilings
    named = {name: measured[name] for name in ("hbm_bytes_per_s", "l2_bytes_per_s", "flops_per_s", "exchange_us")}
    return replace(ceilings, **named, source="measured in the same run; sizes of caches as stated")
