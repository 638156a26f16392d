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

from benchmarks.static import stub
from benchmarks.timing.problem import tf32
from rnnfast import ops
from rnnfast.choice import kernel_plan
from rnnfast.derive import registry
from rnnfast.kernels import dropout, one_program, persistent, recompute, runtime, step
from rnnfast.kernels.families import FAMILIES
from rnnfast.kernels.given import Given
from rnnfast.kernels.groups import Group
from rnnfast.kernels.marks import Marks, StartGrads
from rnnfast.kernels.persistent.limits import AMD_GPUS, GPUS, GpuLimits
from rnnfast.kernels.scan import launch as scan
from rnnfast.reference import spec_of

GPU_OF_ARCH = {80: "A100", 86: "RTX 3090", 89: "RTX 4090", 90: "H100", 100: "B200"}


def limits_of(arch: int | str) -> GpuLimits:
    """`arch`: compute capability of an NVIDIA GPU, 90 for 9.0, or the architecture of one of AMD, such as "gfx942"."""
    return AMD_GPUS[arch] if isinstance(arch, str) else GPUS[GPU_OF_ARCH[arch]]


class Launch(NamedTuple):
    """A launch that the stand-in took: name of the kernel, grid, and hash of the compiled code."""

    kernel: str
    grid: tuple[int, int, int]
    compiled: str


class StandInDriver(DriverBase):
    """Answers the questions that Triton asks a GPU driver, without a GPU."""

    def __init__(self, limits: GpuLimits):
        self.limits = limits
        self.launches: list[Launch] = []
        self.seconds: dict[str, float | None] = {}  # seconds of compiling, by hash; None if it was in Triton's cache
        self.utils = self

    is_active = classmethod(lambda cls: True)
    map_python_to_cpp_type = staticmethod(lambda ty: ty)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_current_stream = staticmethod(lambda device: 0)
    load_binary = staticmethod(lambda name, kernel, shared, device: (1, name, 0, 0, 1024))
    unload_module = staticmethod(lambda module: None)
    get_device_interface = staticmethod(lambda: stub.OneStream)

    def get_current_target(self) -> GPUTarget:
        arch = self.limits.arch
        if arch:
            return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
        return GPUTarget("cuda", self.limits.capability, 32)

    def get_current_device(self) -> int:
        self.began = sum(os.times()[:4])  # a launch asks this first, and then compiles
        return 0

    def get_benchmarker(self):
        raise RuntimeError("a stand-in driver cannot time anything")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.limits.shared_bytes, "multiprocessor_count": self.limits.sms}

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
    modules = (step, persistent, one_program, scan, recompute, dropout)
    found = [value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")]
    # pack_kernel is in two
    return list({kernel.fn: kernel for kernel in found if isinstance(kernel, triton.JITFunction)}.values())


@contextmanager
def pretend_gpu(gpu: int | str | GpuLimits) -> Iterator[StandInDriver]:
    """Inside, a launch compiles its kernel for `gpu`, sm_`gpu` if that is a number, and is counted, not run. It takes CPU
    tensors. A text is the architecture of an AMD GPU."""
    if runtime.mode() != "compiled":
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled")
    limits = gpu if isinstance(gpu, GpuLimits) else limits_of(gpu)
    driver = StandInDriver(limits)
    triton.runtime.driver.set_active(driver)
    knobs.compilation.listener = driver.listener
    triton.compiler.compiler.max_shared_mem.cache_clear()  # it holds the value of the last GPU, which may have less
    for kernel in kernels():
        kernel.device_caches.clear()
    try:
        with kernel_plan.pretend_gpu(limits):
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

    `cell`: a name in `rnnfast.reference.CELLS`. `marked`: with lengths and resets, and gradients of the states from which they
    begin.
    """
    spec = spec_of(cell)
    rows = spec.gates * hidden
    w_ih, w_hh, bias = torch.zeros(rows, 8, dtype=dtype), torch.zeros(rows, hidden, dtype=dtype), torch.zeros(rows, dtype=dtype)
    held = torch.zeros(1, spec.held * hidden, dtype=dtype, requires_grad=True) if spec.held else None
    weights = (w_ih, w_hh, bias, bias) if spec.recurrent else (w_ih, w_hh[:0], bias, None)
    weights = (*weights, None, held)
    x = torch.zeros(T, B, 8, dtype=dtype, requires_grad=True)
    states = tuple(torch.zeros(B, hidden, dtype=dtype, requires_grad=marked) for _ in range(spec.states))
    options = {"noise": torch.zeros(1, dtype=torch.int64) if spec.noise else None}
    if marked:
        options |= {"lengths": torch.full((B,), T), "resets": torch.zeros(T, B, dtype=torch.bool), "reset_to": states}
    marks = [len(driver.launches)]
    y, last = ops.layer(cell, x, states, *weights, **options)
    marks.append(len(driver.launches))
    sum(out.sum() for out in (y, *last)).backward()
    marks.append(len(driver.launches))
    with torch.no_grad():
        ops.layer(cell, x, None, *weights, **options)
    marks.append(len(driver.launches))
    return {phase: driver.launches[slice(*marks[at:][:2])] for at, phase in enumerate(("training", "backward", "inference"))}


def run_group(
    driver: StandInDriver, choices: dict[str, kernel_plan.Choice], cell: str, dtype: torch.dtype, hidden: int, N: int, B: int,
    members: int, directions: int, marked: bool = False,
) -> dict[str, list[Launch]]:  # fmt: skip
    """The launches of one round of a group, as `run_layer` has those of a layer: of N steps of each member. They are the two
    directions of a layer, or with `directions` 1 the layers of a stack. `choices`: of each phase."""
    kind, M, T, wide = registry.kernel_cell(cell), members, 2 * N, torch.float32

    def new(*shape, dtype=dtype):
        return torch.zeros(M, *shape, dtype=dtype)

    def in_float32(tiles: int, *shape):
        return new(*shape, tiles * hidden, dtype=wide) if tiles else None

    def cell_states(*shape):
        return in_float32(kind.carried, *shape)

    w, bias = new(kind.gates * hidden * kind.recurrent, hidden), new(kind.gates * hidden)
    given = Given(in_float32(kind.held, B), torch.zeros(M, dtype=torch.int64) if kind.noise else None)
    h = torch.zeros(T, B, 2 * hidden, dtype=dtype) if directions == 2 else new(T, B, hidden)
    x = torch.zeros(M * N, B, kind.gates * hidden)
    dy = h if directions == 2 else new(N, B, hidden)
    saved, d_gates = new(T, B, kind.saved * hidden), new(T, B, kind.grads * hidden)
    h0, c0, c, last_c = new(B, hidden), cell_states(B), cell_states(T, B), cell_states(1, B)
    marks, d_starts = Marks(), StartGrads()
    if marked:
        order = torch.arange(B, dtype=torch.int32)
        marks = Marks(new(T, B, dtype=torch.int8), order, new(2, B, hidden), cell_states(2, B))
        d_starts = StartGrads(new(2, B, hidden, dtype=wide), cell_states(2, B))
        h0 = c0 = None
    group = Group(M, directions, flips=2 if directions == 2 else 0, lag=N if directions == 1 else 0)
    options = {"group": group, "precision": kernel_plan.precision(), "marks": marks, "given": given}
    launches = {}
    for phase, choice in choices.items():
        family, begin = FAMILIES[choice.family].package, len(driver.launches)
        if phase == "backward":
            family.backward(
                kind, lambda: [(0, N, dy, saved)], h, h0, c, c0, w, d_gates, new(B, hidden, dtype=wide), cell_states(B),
                plan=choice.plan, d_starts=d_starts, d_held=in_float32(kind.held, B), **options,
            )  # fmt: skip
        else:
            kept = (c, saved) if phase == "training" else (last_c, None)
            bias_h = bias if kind.recurrent else None
            family.forward(
                kind, lambda: [(0, N, x, (M - 1) * N)], w, bias, bias_h, h0, c0, h, *kept, plan=choice.plan, **options
            )
        launches[phase] = driver.launches[begin:]
    return launches
