"""Results files with made-up figures, in the shape of real ones: for the tests of the report and for looking at its page.

    python tests/support/made_up_results.py gpu.json [--scale 1.1]

None of these figures was measured, and none of these files may be committed.
"""

from __future__ import annotations

import argparse
import dataclasses
import random

from benchmarks.floor.ceilings import STATED
from benchmarks.floor.work import floor, work
from benchmarks.timing import cases, results
from benchmarks.timing.cases import Case

FULL = ("rnnfast-persistent", "rnnfast-step", "torch.nn", "flashrnn", "haste", "torch.compile-loop")
OVERHEAD = {
    "rnnfast-persistent": 1.5,
    "rnnfast-step": 5.5,
    "torch.nn": 20.0,
    "flashrnn": 4.0,
    "haste": 15.0,
    "torch.compile-loop": 60.0,
}


def _microseconds(case: Case, provider: str, jitter: random.Random) -> float:
    """A step: the floor, with an overhead that each provider has."""
    gpu = STATED["H100"]
    step = floor(case, gpu).no_overlap * 1e6 / case.T
    overhead = OVERHEAD[provider] * (3 if case.mode == "training" else 1) * case.layers * case.directions
    persistent = case.dtype == "float16" and case.cell == "LSTM" and case.layers == case.directions == 1 and case.H <= 1024
    if provider == "torch.nn" and persistent and case.H % 128 == 0:
        overhead /= 12
    return (step * (3 if provider in FULL[:3] else 5) + overhead) * jitter.uniform(0.95, 1.05) * case.T


def _timing(us: float, how: str, l2: str) -> dict:
    return {"how": how, "l2": l2, "p20": us * 0.98, "p50": us, "p80": us * 1.03, "n": 50}


def _row(set_name: str, case: Case, provider: str, us: float, base: float) -> dict:
    size = {"rnnfast-persistent": 1.0, "rnnfast-step": 1.0, "torch.nn": 3.4}.get(provider, 1.6)
    quotient = {"to": "torch.nn", "p20": 0.98 * us / base, "p50": us / base, "p80": 1.04 * us / base}
    saved = round(work(case).saved * size) if case.mode in ("forward", "training") else 0
    return results.new_row(
        case,
        set_name,
        provider,
        "ok",
        error={"worst": 0.41, "tensor": "y"},
        timings=[_timing(us, "eager", "warm"), _timing(us * 0.9, "cuda graph", "warm"), _timing(us * 1.02, "eager", "cold")],
        ratio=None if provider == "torch.nn" else quotient,
        peak_bytes=round(work(case).bytes + saved),
        saved_bytes=saved,
        compile_s=1.2,
        kernels=[{"name": "persistent_forward_kernel", "us": 900.0, "launches": 2}],
    )


def gpu(scale: float = 1.0, sets: tuple[str, ...] = ("cudnn-best", "cudnn-standard", "long")) -> dict:
    """A file as of an H100. `scale`: of the times of the persistent kernels, for a before and an after."""
    jitter = random.Random(7)
    rows = []
    for name, case in cases.chosen(list(sets), "cuda"):
        us = {provider: _microseconds(case, provider, jitter) for provider in FULL}
        us["rnnfast-persistent"] *= scale
        for provider in FULL:
            if provider == "rnnfast-persistent" and work(case).weight_bytes > 25 << 20:
                rows.append(results.new_row(case, name, provider, "unavailable", note="no tiles fit: no persistent plan"))
            elif provider == "haste" and (case.dtype != "float32" or case.packed):
                rows.append(results.new_row(case, name, provider, "unavailable", note="it computes in IEEE float32 only"))
            elif provider == "flashrnn" and case.H % 128:
                worst = {"worst": 31.0, "tensor": "dx"}
                rows.append(results.new_row(case, name, provider, "wrong", note="not within the contract", error=worst))
            elif provider == "torch.compile-loop" and case.T > 10**5:
                note = "OutOfMemoryError: CUDA out of memory. Tried to allocate 90.00 GiB"
                rows.append(results.new_row(case, name, provider, "out of memory", note=note))
            else:
                rows.append(_row(name, case, provider, us[provider], us["torch.nn"]))
    environment = {
        "gpu": "NVIDIA H100 80GB HBM3 (made up, not measured)",
        "driver": "000.00",
        "torch": "2.13.0",
        "triton": "3.9.0",
        "cudnn": "91300",
        "commit": "0000000",
        "tf32": "rnn tf32, matmul tf32",
        "time": "2000-01-01T00:00:00+00:00",
    }
    ceilings = {"hbm_bytes_per_s": 2.9e12, "l2_bytes_per_s": 5.4e12, "exchange_us": 0.66}
    ceilings["flops_per_s"] = {"float16": 7e14, "bfloat16": 7e14, "tf32": 3.5e14, "float32": 5e13}
    return {"schema": results.SCHEMA, "environment": environment, "settings": {"n": 50}, "ceilings": ceilings, "rows": rows}


def cpu() -> dict:
    """A small file as of a CPU: three providers, eager alone, no ceilings."""
    jitter = random.Random(3)
    rows = []
    sweep = [("sweep", Case("LSTM", 32, 8, H, H, dtype="float32")) for H in (64, 128, 256)]
    for name, case in [*cases.chosen(["quick"], "cpu"), *sweep]:
        base = 40 + case.T * (2 + case.H * case.B / 500)
        for provider, factor in (("rnnfast-torch", 1.004), ("torch.nn", 1.0), ("torch.compile-loop", 2.5)):
            us = base * factor * jitter.uniform(0.99, 1.01)
            row = _row(name, case, provider, us, base)
            note = "PyTorch's own layer" if provider == "rnnfast-torch" else ""
            rows.append(row | {"timings": row["timings"][:1], "note": note})
    environment = {
        "gpu": None,
        "cpu": "a made-up CPU",
        "torch": "2.13.0",
        "commit": "0000000",
        "time": "2000-01-01T00:00:00+00:00",
    }
    return {"schema": results.SCHEMA, "environment": environment, "settings": {}, "ceilings": None, "rows": rows}


def one_case(**changes) -> Case:
    return dataclasses.replace(Case("LSTM", 8, 2, 16, 16), **changes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    results.save(cpu() if args.cpu else gpu(args.scale), args.out)
