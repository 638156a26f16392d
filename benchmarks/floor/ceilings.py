"""The ceilings of a GPU: bytes and FLOPs per second, and the latency of a word from one SM to another.

There are two kinds of ceilings, which are never mixed. `STATED` has those of data sheets and papers. No program reaches them,
so no program can be faster than a floor computed from them. `benchmarks.floor.probes` measures the other kind on the GPU on
which the benchmark runs.
"""

import re
from dataclasses import dataclass, replace

from rnnfast.kernels.hardware import CLUSTER_HOP, GHZ, MEMORY_GB, PORT_BYTES, REGISTER_BYTES
from rnnfast.kernels.persistent.plan import GPUS

HOP_SOURCE = f"SM to SM: {CLUSTER_HOP} clocks at least (arXiv 2402.13499, H100; through L2 it takes longer)"


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of one GPU. `exchange_us`: microseconds until one SM sees a word that another has published."""

    name: str
    sms: int
    sm_bytes: int  # what an SM can hold: shared memory and registers, with the tensor memory of sm_100
    l2_size: int
    hbm_bytes_per_s: float
    l2_bytes_per_s: float
    flops_per_s: dict[str, float]  # keys: "float16", "bfloat16", "tf32", "float32"
    exchange_us: float
    source: str


def _stated(name, sms, shared, l2_size, clock, hbm, half, tf32, single, source, extra=0) -> Ceilings:
    """From a data sheet: `clock` in GHz, `hbm` in GB/s, the FLOPs in TFLOP/s, dense and with sums in float32."""
    flops = {"float16": half * 1e12, "bfloat16": half * 1e12, "tf32": tf32 * 1e12, "float32": single * 1e12}
    l2, hop = PORT_BYTES * sms * clock * 1e9, CLUSTER_HOP / clock / 1e3
    return Ceilings(name, sms, shared + REGISTER_BYTES + extra, l2_size, hbm * 1e9, l2, flops, hop, f"{source}. {HOP_SOURCE}")


_SHEETS = {  # half, TF32, float32, source
    "A100": (312, 156, 19.5, "NVIDIA A100 data sheet (80 GB SXM)"),
    "H100": (989.4, 494.7, 66.9, "NVIDIA H100 data sheet (SXM5)"),
    "H200": (989.4, 494.7, 66.9, "NVIDIA H200 data sheet (SXM)"),
    "RTX 3090": (71, 35.6, 35.6, "NVIDIA GA102 whitepaper"),
    "RTX 4090": (165.2, 82.6, 82.6, "NVIDIA Ada whitepaper"),
    "B200": (2250, 1125, 80, "NVIDIA DGX B200 data sheet, an eighth of it"),
}
_OLD = (  # no kernel of ours runs on these GPUs; others have published times on them
    ("Titan X (Maxwell)", 24, 96 << 10, 3 << 20, 1.075, 336.5, 6.6, 6.6, 6.6, "NVIDIA GTX Titan X specifications"),
    ("Titan X (Pascal)", 28, 96 << 10, 3 << 20, 1.531, 480, 10.97, 10.97, 10.97, "NVIDIA Titan X specifications"),
    ("Titan Xp", 30, 96 << 10, 3 << 20, 1.582, 547.7, 12.15, 12.15, 12.15, "NVIDIA Titan Xp specifications"),
)
STATED = {
    name: _stated(
        name, gpu.sms, gpu.shared_bytes, gpu.l2_bytes, GHZ[name], MEMORY_GB[name], *sheet, (256 << 10) * (gpu.capability >= 100)
    )
    for name, sheet in _SHEETS.items()
    for gpu in (GPUS[name],)
} | {old[0]: _stated(*old) for old in _OLD}


def stated(gpu: str) -> Ceilings | None:
    """The stated ceilings of a GPU by a name such as "NVIDIA H100 80GB HBM3". None for a GPU without an entry."""
    for name, ceilings in STATED.items():
        if re.search(rf"\b{re.escape(name)}(?!\w| Ti\b)", gpu, re.IGNORECASE):
            return ceilings
    return None


def of_results(results: dict) -> Ceilings | None:
    """The ceilings measured in the run of a results file, else those stated for its GPU. None if they are unknown."""
    gpu = results["environment"].get("gpu") or ""
    ceilings, measured = stated(gpu), results["ceilings"]
    if ceilings is None or measured is None:
        return ceilings
    named = {name: measured[name] for name in ("hbm_bytes_per_s", "l2_bytes_per_s", "flops_per_s", "exchange_us")}
    return replace(ceilings, **named, source="measured in the same run; sizes of caches as stated")
