"""Compiles the kernels for GPUs that are not there, through the very functions that launch them, and counts the result.

    python -m benchmarks.offline [--family step persistent] [--arch 80 90 100] [--cells lstm gru] [--dtypes float16 tf32]
                                 [--hidden 50 512] [--batch 16] [--marked] [--json FILE]

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
from dataclasses import asdict, dataclass, field, replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
GPU_OF_ARCH = {80: "A100", 86: "RTX 3090", 89: "RTX 4090", 90: "H100", 100: "B200"}


def limits_of(arch: int):
    from rnnfast.kernels.persistent.plan import GPUS

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
        def launch(grid_x, grid_y, grid_z, stream, function, kernel_metadata, launch_metadata, on_enter, on_exit, *args):
            assert len(args) == len(src.fn.arg_names), "a launch with more or fewer arguments than the kernel has"
            for (position, *_), value in src.constants.items():
                assert args[position] is value or args[position] == value, f"{src.fn.arg_names[position]} is another constant"
            self.launches.append((function, (grid_x, grid_y, grid_z)))

        return launch


@contextmanager
def pretend_gpu(arch: int) -> Iterator[StandInDriver]:
    """Kernels launched inside compile for sm_`arch` and are counted, not run. Takes CPU tensors."""
    from rnnfast import families
    from rnnfast.kernels import persistent, step

    if step.mode() != "compiled":
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
        with families.assume(limits_of(arch)):
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
    batch: int = 0  # of a persistent kernel; the step kernels' tiles do not depend on it
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
        multiplies that they do over those needed; poll and publish, the strong loads and stores; reread, global loads that do
        not poll, which are the step's inputs; async_copies, anywhere in the kernel; exchange, the accesses of the exchange and
        their scalar width in PTX; cooperative, whether the launch asks for all programs to be resident.
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
        "publish": ",".join(sorted({opcode for opcode in opcodes if opcode.startswith("STG.") and "STRONG" in opcode})),
        "reread": sum("STRONG" not in opcode for opcode in loads),
        "async_copies": len(re.findall(r"\bLDGSTS\b", sass)) + built.asm["ttgir"].count("async_copy"),
        "exchange": ", ".join(sorted(exchange)),
        "cooperative": int(built.metadata.launch_cooperative_grid),
    }


def compiled(kernel: triton.JITFunction) -> list:
    """Every variant of `kernel` compiled so far."""
    return [built for cache in kernel.device_caches.values() for built in cache[0].values()]


SHAPES = ((4, 3), (1, 1), (16, 32), (5, 50))  # (T, B): none of them may cause a variant of its own


@contextmanager
def settings(family: str, tf32: bool) -> Iterator[None]:
    """RNNFAST_KERNELS=`family`, and float32 products in TF32 or not."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
    os.environ["RNNFAST_KERNELS"] = family
    try:
        yield
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before
        del os.environ["RNNFAST_KERNELS"]


def run_layer(cell: str, dtype: torch.dtype, hidden: int, T: int, B: int, marked: bool = False) -> None:
    """Forward and backward in training, forward in inference. `marked`: with lengths, resets and the gradient of all states."""
    from rnnfast import ops
    from rnnfast.reference import GATES

    rows = GATES[cell] * hidden
    weights = [torch.zeros(*shape, dtype=dtype) for shape in ((rows, 8), (rows, hidden), (rows,), (rows,))]
    x = torch.zeros(T, B, 8, dtype=dtype, requires_grad=True)
    states = tuple(torch.zeros(B, hidden, dtype=dtype) for _ in range(2 if cell == "lstm" else 1))
    if marked:
        states = tuple(state.requires_grad_() for state in states)
        lengths, resets = torch.full((B,), T), torch.zeros(T, B, dtype=torch.bool)
        y, last, cells, _ = ops.trace(cell, x, states, *weights, lengths=lengths, resets=resets)
        sum(out.sum() for out in (y, *last, *cells)).backward()
        return
    y, last = ops.layer(cell, x, states, *weights)
    sum(out.sum() for out in (y, *last)).backward()
    with torch.no_grad():
        ops.layer(cell, x, None, *weights)


def compile_layer(arch: int, cell: str, dtype: str, hidden: int, marked: bool = False) -> tuple[list[Built], int]:
    """Run a layer of the step kernels on the stand-in, for several T and B; `marked`: see `run_layer`.

    Returns:
        The counts of every variant that was compiled, and the number of launches.
    """
    from rnnfast.kernels import step

    element, tf32 = DTYPES[dtype]
    with settings("step", tf32), pretend_gpu(arch) as driver:
        for T, B in SHAPES:
            run_layer(cell, element, hidden, T, B, marked)
        built = [
            Built(kernel.__name__, arch, cell, dtype, hidden, **count(variant))
            for kernel in (step.forward_step_kernel, step.backward_step_kernel)
            for variant in compiled(kernel)
        ]
    return built, len(driver.launches)


def compile_persistent(arch: int, cell: str, dtype: str, hidden: int, batch: int) -> tuple[list[Built], int]:
    """`compile_layer` of the persistent kernels, for several T; a direction without a plan has a row that says why."""
    from rnnfast import families
    from rnnfast.kernels import persistent
    from rnnfast.kernels.cells import CELLS

    element, tf32 = DTYPES[dtype]
    gates, precision = CELLS[cell].gates, "tf32" if tf32 else "ieee"
    built = []
    with settings("persistent", tf32), pretend_gpu(arch) as driver:
        for T in (4, 1):
            run_layer(cell, element, hidden, T, batch)
        for kernel, backward in ((persistent.persistent_forward_kernel, False), (persistent.persistent_backward_kernel, True)):
            row = Built(kernel.__name__, arch, cell, dtype, hidden, batch=batch)
            choice = families.choose("persistent", gates, batch, hidden, element.itemsize, precision, backward, limits_of(arch))
            plan = choice.persistent
            if plan is None:
                built.append(replace(row, plan=choice.reason))
                continue
            multiplies = plan.BLOCK_H * gates * plan.BLOCK_B * hidden
            unsized = plan.BLOCK_H * (1 if backward else 1 << (gates - 1).bit_length()) * plan.BLOCK_B * 32 // element.itemsize
            for variant in compiled(kernel):
                loop = count_loop(variant, plan.num_warps, multiplies, unsized)
                built.append(replace(row, plan=plan.words(batch), loop=loop, **count(variant)))
    return built, len(driver.launches)


CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = {
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
SIZES = (1, 29, 50, 512, 1024)


def show(row: Built) -> None:
    head = f"{row.kernel:26} sm_{row.arch:<3}{row.cell:9} {row.dtype:9} {row.hidden:5}"
    counts = " ".join(f"{name}:{n}" for name, n in (row.loop or row.instructions).items())
    if counts:
        head += f" {row.registers:5} {row.stack_bytes:6} {row.shared_bytes:7}  {counts}"
    print(head + (f"  [B={row.batch}: {row.plan}]" if row.plan else ""), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description="Compiles the kernels and counts.")
    parser.add_argument("--family", nargs="+", default=["step"], choices=["step", "persistent"])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(GPU_OF_ARCH))
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--hidden", type=int, nargs="+", default=SIZES)
    parser.add_argument("--batch", type=int, default=16, help="of the persistent kernels")
    parser.add_argument("--marked", action="store_true", help="the step kernels with lengths, resets and all states instead")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args(argv)
    if args.marked and "persistent" in args.family:
        parser.error("the persistent kernels know no marks")
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print(f"{'kernel':26} {'arch':>5} {'cell':9} {'dtype':9} {'H':>5} {'regs':>5} {'stack':>6} {'shared':>7}  counts")
    built, launches = [], 0
    for family, *case in itertools.product(args.family, args.arch, args.cells, args.dtypes, args.hidden):
        rows, launched = compile_layer(*case, args.marked) if family == "step" else compile_persistent(*case, args.batch)
        launches += launched
        for row in rows:
            built.append(row)
            show(row)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"launches": launches, "built": [asdict(row) for row in built]}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
