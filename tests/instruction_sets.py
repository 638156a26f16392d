"""Runs the numerical tests with the code that PyTorch, oneDNN and MKL have for older and for newer CPUs: `make sweep`.

Each of the three chooses its code by what the CPU can do. The choices sum in different orders and round differently, so a
test that passes on one CPU by luck fails on another. Environment variables make each take the code for an older CPU.

A test that compares numbers has the marker `numerical`. One process runs all of them with one set and one number of threads,
because the libraries read the variables when they are loaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# What torch.backends.cpu.get_cpu_capability() says of a CPU with the set -> what limits each library to it, the oldest first.
SETS = {
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "AVX512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_CBWR": "AVX512"},
}
VARIABLES = tuple(SETS["DEFAULT"])


def available() -> list[str]:
    """The sets that this CPU has. PyTorch takes ATEN_CPU_CAPABILITY's word for it and crashes on a set that the CPU lacks."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        raise RuntimeError("ATEN_CPU_CAPABILITY is set, so PyTorch does not say what this CPU has: unset it")
    names = list(SETS)
    found = torch.backends.cpu.get_cpu_capability()
    return names[: names.index(found) + 1] if found in names else names[:1]


def run(name: str, threads: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on the numerical tests, limited to the set `name`."""
    options = ["-m", "numerical and not sweep", "--threads", str(threads), "-p", "no:cacheprovider", *arguments]
    # Collecting the other files would take longer than a sample of these.
    files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "pytest.mark.numerical" in path.read_text()]
    command = [sys.executable, "-m", "pytest", *options, *files]
    return subprocess.run(command, cwd=ROOT, env=os.environ | SETS[name], capture_output=True, text=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/instruction_sets.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    options, for_pytest = parser.parse_known_args(arguments)
    here, failed = available(), False
    for name in options.sets:
        for threads in options.threads:
            title = f"{' '.join(f'{key}={value}' for key, value in SETS[name].items())}, threads: {threads}"
            if name not in here:
                print(f"{title}: this CPU has no {name}", flush=True)
                continue
            done = run(name, threads, *for_pytest)
            failed |= done.returncode != 0
            if done.returncode:
                print(done.stdout + done.stderr)
            print(f"{title}: {(done.stdout.strip().splitlines() or ['no output'])[-1].strip('= ')}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
