"""Compiles the kernels for absent GPUs, through the functions that launch them.

A stand-in replaces Triton's GPU driver. It names the target, accepts the machine code, and counts each launch without running
it. The types, alignments, tiles and options are therefore those of a real launch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from benchmarks.timing.problem import tf32
from rnnfast import ops
from rnnfast.choice import kernel_plan
from rnnfast.kernels import dropout, persistent, recompute, runtime, step
from rnnfast.kernels.persistent.plan import GPUS
from rnnfast.reference import GATES

GPU_OF_ARCH = {80: "A100", 86: "RTX 3090", 89: "RTX 4090", 90: "H100", 100: "B200"}


def limits_of(arch: int):
    return GPUS[GPU_OF_ARCH[arch]]


class Launch(NamedTuple):
    """A launch that the stand-in took: name of the kernel, grid, and hash of the compiled code."""

    kernel: str
    grid: tuple[int, int, int]
    compiled: str


class StandInDriver(DriverBase):
    """Answers the questions that Triton asks a GPU driver, without a GPU."""

    def __init__(self, arch: int):
        self.arch = arch
        self.launches: list[Launch] = []
        self.seconds: dict[str, float | None] = {}  # seconds of compiling, by hash; None if it was in Triton's cache
        self.utils = self

    is_active = classmethod(lambda cls: True)
    map_python_to_cpp_type = staticmethod(lambda ty: ty)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_current_stream = staticmethod(lambda device: 0)
    load_binary = staticmethod(lambda name, kernel, shared, device: (1, name, 0, 0, 1024))
    unload_module = staticmethod(lambda module: None)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        self.began = sum(os.times()[:4])  # a launch asks this first, and then compiles
        return 0

    def get_benchmarker(self):
        raise RuntimeError("a stand-in driver cannot time anything")

    def get_device_properties(self, device: int) -> dict[str, int]:
        limits = limits_of(self.arch)
        return {"max_shared_mem": limits.shared_bytes, "multiprocessor_count": limits.sms}

    def launcher_cls(self, src, metadata):
        def launch(grid_x, grid_y, grid_z, stream, function, kernel_metadata, launch_metadata, on_enter, on_exit, *args):
            assert len(args) == len(src.fn.arg_names), "a launch with more or fewer arguments than the kernel has"
            for path, value in src.constants.items():  # a path, as an argument may be a tuple
                given = args
                for position in path:
                    given = given[position]
                assert given is value or given == value, f"{src.fn.arg_names[path[0]]} is another constant"
            self.launches.append(Launch(function, (grid_x, grid_y, grid_z), metadata.hash))

        return launch

    def listener(self, *, metadata, cache_hit, **_) -> None:
        self.seconds[metadata["hash"]] = None if cache_hit else sum(os.times()[:4]) - self.began


def kernels() -> list[triton.JITFunction]:
    """Every kernel that a layer can launch."""
    modules = (step, persistent, recompute, dropout)
    found = [value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")]
    return [kernel for kernel in found if isinstance(kernel, triton.JITFunction)]


@contextmanager
def pretend_gpu(arch: int) -> Iterator[StandInDriver]:
    """Inside, a launch compiles its kernel for sm_`arch` and is counted, not run. It takes CPU tensors."""
    if runtime.mode() != "compiled":
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled")
    driver = StandInDriver(arch)
    triton.runtime.driver.set_active(driver)
    knobs.compilation.listener = driver.listener
    triton.compiler.compiler.max_shared_mem.cache_clear()  # it holds the value of the last GPU, which may have less
    for kernel in kernels():
        kernel.device_caches.clear()
    try:
        with kernel_plan.pretend_gpu(limits_of(arch)):
            yield driver
    finally:
        knobs.compilation.listener = None
        triton.runtime.driver.set_active(None)  # the default, looked up when next asked for


def compiled() -> dict[str, triton.compiler.CompiledKernel]:
    """Every variant of every kernel that was compiled since `pretend_gpu` began, by hash."""
    caches = [cache for kernel in kernels() for cache in kernel.device_caches.values()]
    return {built.hash: built for cache in caches for built in cache[0].values()}


@contextmanager
def settings(family: str, allow_tf32: bool) -> Iterator[None]:
    """Set RNNFAST_KERNELS to `family`, and let float32 products use TF32 or not."""
    with mock.patch.dict(os.environ, RNNFAST_KERNELS=family), tf32(allow_tf32):
        yield


def run_layer(
    driver: StandInDriver, cell: str, dtype: torch.dtype, hidden: int, T: int, B: int, marked: bool = False
) -> dict[str, list[Launch]]:
    """The launches of a layer: "training" (forward) and "backward", its two halves, and "inference".

    `marked`: with lengths and resets, and gradients of the states from which they begin.
    """
    rows = GATES[cell] * hidden
    weights = [torch.zeros(*shape, dtype=dtype) for shape in ((rows, 8), (rows, hidden), (rows,), (rows,))]
    x = torch.zeros(T, B, 8, dtype=dtype, requires_grad=True)
    states = tuple(torch.zeros(B, hidden, dtype=dtype, requires_grad=marked) for _ in range(2 if cell == "lstm" else 1))
    options = {}
    if marked:
        options = {"lengths": torch.full((B,), T), "resets": torch.zeros(T, B, dtype=torch.bool), "reset_to": states}
    marks = [len(driver.launches)]
    y, last = ops.layer(cell, x, states, *weights, **options)
    marks.append(len(driver.launches))
    sum(out.sum() for out in (y, *last)).backward()
    marks.append(len(driver.launches))
    with torch.no_grad():
        ops.layer(cell, x, None, *weights, **options)
    marks.append(len(driver.launches))
    return {phase: driver.launches[slice(*marks[at:][:2])] for at, phase in enumerate(("training", "backward", "inference"))}
