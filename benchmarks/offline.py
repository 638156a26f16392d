"""Compiles the kernels for GPUs that are not there, through the very functions that launch them, and counts the result.

    python -m benchmarks.offline [--arch 80 90 100] [--cells lstm gru] [--dtypes float16 tf32] [--hidden 50 512] [--json FILE]

A stand-in takes the place of Triton's GPU driver: it names the target, accepts the finished machine code, and counts each
launch without running it. So argument types, alignment specialisation, tile minimums and options are those of a real launch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}  # opt-in shared memory of a CTA on A100, H100, B200


class StandInDriver(DriverBase):
    """What Triton asks of a GPU driver, answered without a GPU."""

    def __init__(self, arch: int):
        self.arch = arch
        self.launches: list[tuple[str, tuple[int, int, int]]] = []
        self.utils = self

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self):
        raise RuntimeError("a stand-in driver cannot time anything")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.arch], "multiprocessor_count": 1}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, str, int, int, int]:
        return 1, name, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, src, metadata):
        def launch(grid_x, grid_y, grid_z, stream, function, *_):
            self.launches.append((function, (grid_x, grid_y, grid_z)))

        return launch


@contextmanager
def pretend_gpu(arch: int) -> Iterator[StandInDriver]:
    """Kernels launched inside compile for sm_`arch` and are counted, not run. Takes CPU tensors."""
    from rnnfast.kernels import step

    if step.mode() != "compiled":
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled")
    driver = StandInDriver(arch)
    triton.runtime.driver.set_active(driver)
    for kernel in (step.forward_step_kernel, step.backward_step_kernel):
        kernel.device_caches.clear()
    try:
        yield driver
    finally:
        triton.runtime.driver.set_active(None)  # the default, looked up when next asked for


@dataclass
class Built:
    """The counts of one compiled kernel."""

    kernel: str
    arch: int
    cell: str
    dtype: str
    hidden: int
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    instructions: dict[str, int] = field(default_factory=dict)


OPCODES = ("HMMA", "HGMMA", "UTCHMMA", "LDG", "LDGSTS", "STG", "LDSM", "LDL", "STL", "BAR", "FFMA")


def count(built) -> dict:
    """Registers, stack, shared memory and opcodes of a `triton.compiler.CompiledKernel`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [f"{BIN}/cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([f"{BIN}/nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    return {
        "registers": int(match[1]),
        "stack_bytes": int(match[2]),
        "shared_bytes": built.metadata.shared,
        "instructions": {op: n for op in OPCODES if (n := len(re.findall(rf"\b{op}\b", sass)))},
    }


def compiled(kernel: triton.JITFunction) -> list:
    """Every variant of `kernel` compiled so far."""
    return [built for cache in kernel.device_caches.values() for built in cache[0].values()]


SHAPES = ((4, 3), (1, 1), (16, 32), (5, 50))  # (T, B): none of them may cause a variant of its own


def compile_layer(arch: int, cell: str, dtype: torch.dtype, hidden: int, tf32: bool = False) -> tuple[list[Built], int]:
    """Run a layer on the stand-in: forward and backward in training, forward in inference, for several T and B.

    Returns:
        The counts of every variant that was compiled, and the number of launches.
    """
    from rnnfast import ops
    from rnnfast.kernels import step
    from rnnfast.reference import GATES

    rows = GATES[cell] * hidden
    weights = [torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in ((rows, 8), (rows, hidden), (rows,), (rows,))]
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        with pretend_gpu(arch) as driver:
            for T, B in SHAPES:
                x = torch.zeros(T, B, 8, dtype=dtype)
                states = tuple(torch.zeros(B, hidden, dtype=dtype) for _ in range(2 if cell == "lstm" else 1))
                y, last = ops.layer(cell, x, states, *weights)
                sum(out.sum() for out in (y, *last)).backward()
                with torch.no_grad():
                    ops.layer(cell, x, None, *weights)
            name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
            built = [
                Built(kernel.__name__, arch, cell, name, hidden, **count(variant))
                for kernel in (step.forward_step_kernel, step.backward_step_kernel)
                for variant in compiled(kernel)
            ]
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before
    return built, len(driver.launches)


CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = {
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
SIZES = (1, 29, 50, 512, 1024)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description="Compiles the kernels and counts.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_BYTES))
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--hidden", type=int, nargs="+", default=SIZES)
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args(argv)
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print(f"{'kernel':22} {'arch':>5} {'cell':9} {'dtype':9} {'H':>5} {'regs':>5} {'stack':>6} {'shared':>7}  instructions")
    built, launches = [], 0
    for arch in args.arch:
        for cell in args.cells:
            for dtype, tf32 in (DTYPES[name] for name in args.dtypes):
                for hidden in args.hidden:
                    rows, launched = compile_layer(arch, cell, dtype, hidden, tf32)
                    launches += launched
                    for row in rows:
                        built.append(row)
                        ops = " ".join(f"{op}:{n}" for op, n in row.instructions.items())
                        print(
                            f"{row.kernel:22} sm_{row.arch:<3}{cell:9} {row.dtype:9} {hidden:5} {row.registers:5} "
                            f"{row.stack_bytes:6} {row.shared_bytes:7}  {ops}",
                            flush=True,
                        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"launches": launches, "built": [asdict(row) for row in built]}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
