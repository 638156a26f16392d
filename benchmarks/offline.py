"""Compiles the kernels for GPUs that are not there, through the very functions that launch them, and counts the result.

    python -m benchmarks.offline [--family step persistent] [--arch 80 90 100] [--json FILE]

A stand-in takes the place of Triton's GPU driver: it names the target, accepts the finished machine code, and counts each
launch without running it. So argument types, alignment specialisation, tile minimums and options are those of a real launch.
"""

from __future__ import annotations

import argparse
import itertools
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
GPU_OF_ARCH = {80: "A100", 86: "RTX 3090", 89: "RTX 4090", 90: "H100", 100: "B200"}


def limits_of(arch: int):
    from rnnfast.kernels.plan import GPUS

    return GPUS[GPU_OF_ARCH[arch]]


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
        limits = limits_of(self.arch)
        return {"max_shared_mem": limits.shared_bytes, "multiprocessor_count": limits.sms}

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
    from rnnfast.kernels import persistent, step

    if step.interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled")
    driver = StandInDriver(arch)
    triton.runtime.driver.set_active(driver)
    for kernel in (
        step.forward_step_kernel,
        step.backward_step_kernel,
        persistent.persistent_forward_kernel,
        persistent.persistent_backward_kernel,
        persistent.clear_kernel,
    ):
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
    batch: int = 0
    launches: int = 0  # of a persistent kernel, for all time steps
    plan: str = ""  # of a persistent kernel, or why there is none
    loop: dict[str, int | float | str] = field(default_factory=dict)  # of a persistent kernel, see `count_loop`


OPCODES = ("HMMA", "HGMMA", "UTCHMMA", "LDG", "LDGSTS", "STG", "LDSM", "LDL", "STL", "BAR", "FFMA")


def disassemble(built) -> tuple[str, str]:
    """Resource usage and machine code of a `triton.compiler.CompiledKernel`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [f"{BIN}/cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([f"{BIN}/nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    return usage, sass


def count(built) -> dict:
    """Registers, stack, shared memory and opcodes of a `triton.compiler.CompiledKernel`."""
    usage, sass = disassemble(built)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    return {
        "registers": int(match[1]),
        "stack_bytes": int(match[2]),
        "shared_bytes": built.metadata.shared,
        "instructions": {op: n for op in OPCODES if (n := len(re.findall(rf"\b{op}\b", sass)))},
    }


def time_loop(sass: str) -> list[str]:
    """The instructions of the longest loop, from its first to its last."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loop = (0, 0)
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            instructions.append(code[1])
            target = re.match(r"BRA\b.*?(\.L_x_\d+)", code[1])
            if target and target[1] in labels and len(instructions) - labels[target[1]] > loop[1] - loop[0]:
                loop = (labels[target[1]], len(instructions))
    return instructions[slice(*loop)]


def count_loop(built, warps: int, multiplies: int, unsized: int) -> dict[str, int | float | str]:
    """What a persistent kernel does in a time step, by its machine code; the loop that polls again is part of it.

    Args:
        warps: of a program.
        multiplies: that the step needs of a program: its units' gates times its batch rows times H.
        unsized: multiplies of one UTCHMMA, whose size is not in the machine code: rows * columns * K.

    Returns:
        instructions, barriers and spill accesses in the loop; tensor_core, instructions a warp or warp group; redundancy, the
        multiplies that they do over those needed; poll, width of the polling loads; reread, global loads that do not poll,
        which are the step's inputs; async_copies, anywhere in the kernel; exchange, the accesses of the exchange and their
        scalar width in PTX; cooperative, whether the launch asks for all programs to be resident.
    """
    _, sass = disassemble(built)
    loop = time_loop(sass)
    opcodes = [instruction.split()[0] for instruction in loop]
    done = tensor_core = 0
    for opcode in opcodes:
        if hgmma := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\b", opcode):
            done += int(hgmma[1]) * int(hgmma[2]) * int(hgmma[3]) * (warps // 4)
        elif hmma := re.match(r"HMMA\.168(\d+)\b", opcode):
            done += 16 * 8 * int(hmma[1]) * warps
        elif opcode.startswith("UTCHMMA"):
            done += unsized
        else:
            continue
        tensor_core += 1
    if not tensor_core:  # a plain float32 product; the cell's own few are counted with it
        done = 32 * warps * sum(opcode.startswith("FFMA") for opcode in opcodes)
    loads = [opcode for opcode in opcodes if opcode.startswith("LDG.")]
    exchange = {
        f"{access} {width}"
        for access, pattern in (("ld.volatile", r"ld\.volatile"), ("st.cg", r"st\.global\.cg"))
        for width in re.findall(rf"{pattern}[\w.]*\.([bsuf]\d+)", built.asm["ptx"])
    }
    return {
        "instructions": len(loop),
        "barriers": sum(opcode.startswith("BAR") for opcode in opcodes),
        "spills": sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes),
        "tensor_core": tensor_core,
        "redundancy": round(done / multiplies, 3),
        "poll": ",".join(sorted({opcode for opcode in loads if "STRONG" in opcode})),
        "reread": sum("STRONG" not in opcode for opcode in loads),
        "async_copies": len(re.findall(r"\bLDGSTS\b", sass)) + built.asm["ttgir"].count("async_copy"),
        "exchange": ", ".join(sorted(exchange)),
        "cooperative": int(built.metadata.launch_cooperative_grid),
    }


def compiled(kernel: triton.JITFunction) -> list:
    """Every variant of `kernel` compiled so far."""
    return [built for cache in kernel.device_caches.values() for built in cache[0].values()]


def compile_layer(arch: int, cell: str, dtype: torch.dtype, hidden: int, tf32: bool = False, T: int = 4, B: int = 3):
    """Run one layer forward and backward on the stand-in; yields its `Built` counts and the launches counted."""
    from rnnfast import ops
    from rnnfast.kernels import step
    from rnnfast.reference import GATES

    rows = GATES[cell] * hidden
    x, h0, c0 = (torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in ((T, B, 8), (B, hidden), (B, hidden)))
    weights = [torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in ((rows, 8), (rows, hidden), (rows,), (rows,))]
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        with pretend_gpu(arch) as driver:
            y, states = ops.layer(cell, x, (h0, c0) if cell == "lstm" else (h0,), *weights, False)
            sum(out.sum() for out in (y, *states)).backward()
            name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
            rows = [
                Built(kernel.__name__, arch, cell, name, hidden, **count(built))
                for kernel in (step.forward_step_kernel, step.backward_step_kernel)
                for built in compiled(kernel)
            ]
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before
    return rows, driver.launches


def compile_persistent(arch: int, cell: str, dtype: torch.dtype, hidden: int, batch: int, tf32: bool = False, T: int = 4):
    """The `Built` counts of the persistent forward and backward of one layer, for the plan of the GPU of `arch`."""
    from rnnfast.kernels import persistent
    from rnnfast.kernels.cells import CELLS
    from rnnfast.kernels.plan import NoPlan, persistent_plan

    spec, precision = CELLS[cell], "tf32" if tf32 else "ieee"
    name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    h0, h = torch.zeros(batch, hidden, dtype=dtype), torch.zeros(T, batch, hidden, dtype=dtype)
    w, bias = torch.zeros(spec.gates * hidden, hidden, dtype=dtype), torch.zeros(spec.gates * hidden, dtype=dtype)
    saved = torch.zeros(T, batch, spec.width(True) * hidden, dtype=dtype)
    d_gates = torch.zeros(T, batch, spec.grads * hidden, dtype=dtype)
    d_h = torch.zeros(batch, hidden)
    c0, c = (d_h, torch.zeros(T, batch, hidden)) if spec.carries_c else (None, None)
    rows = []
    for kernel, backward in ((persistent.persistent_forward_kernel, False), (persistent.persistent_backward_kernel, True)):
        row = Built(kernel.__name__.removesuffix("_kernel"), arch, cell, name, hidden, batch=batch)
        rows.append(row)
        plan = persistent_plan(spec.gates, batch, hidden, dtype.itemsize, precision, backward, limits_of(arch))
        if isinstance(plan, NoPlan):
            row.plan = plan.reason
            continue
        grids = "+".join(f"{x}x{y}" for (x, y, _), _ in plan.launches(batch))
        row.plan = (
            f"B{plan.BLOCK_B} H{plan.BLOCK_H} K{plan.BLOCK_K} split{plan.SPLIT} pad{plan.H_PAD} {plan.num_warps} warps, {grids}"
        )
        options = {"reverse": False, "precision": precision, "plan": plan}
        with pretend_gpu(arch) as driver:
            if backward:
                kept = saved if spec.saved else None
                d_c = d_h if spec.carries_c else None
                persistent.backward(spec, h, kept, h, h0, c, c0, w, d_gates, d_h, d_c, **options)
            else:
                persistent.forward(spec, saved, w, bias, h0, c0, h, c, save=True, **options)
            (built,) = compiled(kernel)
        for key, value in count(built).items():
            setattr(row, key, value)
        weight_rows = plan.BLOCK_H * (1 if backward else 1 << (spec.gates - 1).bit_length())
        multiplies = plan.BLOCK_H * spec.gates * plan.BLOCK_B * hidden
        row.launches = sum(name == kernel.__name__ for name, _ in driver.launches)
        row.loop = count_loop(built, plan.num_warps, multiplies, weight_rows * plan.BLOCK_B * 32 // dtype.itemsize)
    return rows


CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = {
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
SIZES = (1, 29, 50, 512, 1024)


def print_step(row: Built) -> None:
    ops = " ".join(f"{op}:{n}" for op, n in row.instructions.items())
    print(
        f"{row.kernel:22} sm_{row.arch:<3}{row.cell:9} {row.dtype:9} {row.hidden:5} {row.registers:5} {row.stack_bytes:6} "
        f"{row.shared_bytes:7}  {ops}",
        flush=True,
    )


def print_persistent(row: Built) -> None:
    head = f"{row.kernel:22} sm_{row.arch:<3}{row.cell:9} {row.dtype:9} {row.hidden:5}"
    if row.loop:
        head += f" {row.registers:5} {row.stack_bytes:6} {row.shared_bytes:7}  "
        head += " ".join(f"{name}:{n}" for name, n in row.loop.items())
    print(f"{head}  [B={row.batch}: {row.plan}]", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", default=["step", "persistent"], choices=["step", "persistent"])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(GPU_OF_ARCH))
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--hidden", type=int, nargs="+", default=SIZES)
    parser.add_argument(
        "--batch", type=int, default=16, help="of the persistent kernels; the step kernels' tiles do not depend on it"
    )
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args(argv)
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print(f"{'kernel':22} {'arch':>5} {'cell':9} {'dtype':9} {'H':>5} {'regs':>5} {'stack':>6} {'shared':>7}  instructions")
    built = []
    for family, arch, cell, dtype, hidden in itertools.product(args.family, args.arch, args.cells, args.dtypes, args.hidden):
        element, tf32 = DTYPES[dtype]
        if family == "step":
            rows, show = compile_layer(arch, cell, element, hidden, tf32)[0], print_step
        else:
            rows, show = compile_persistent(arch, cell, element, hidden, args.batch, tf32), print_persistent
        for row in rows:
            built.append(row)
            show(row)
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(row) for row in built], file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
