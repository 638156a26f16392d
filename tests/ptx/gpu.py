"""A GPU that is a CPU: Triton's launches inside `simulated_gpu` run their PTX here, on the memory of CPU tensors.

Nothing of the library is replaced. Triton's driver is: it says that it is a GPU of some architecture, takes what Triton
compiled for it, and gets each launch with its arguments. So what runs is what a GPU would be given, tensors, sizes and all.
"""

from __future__ import annotations

import ctypes
import gc
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from triton import knobs

from benchmarks.static.offline import pretend_gpu, settings
from benchmarks.timing.cases import DTYPES
from rnnfast.choice import kernel_plan
from rnnfast.kernels import runtime
from rnnfast.kernels.persistent import give_up
from tests.ptx.decode import Code, decode
from tests.ptx.machine import Machine, Region
from tests.ptx.memory import Space
from tests.ptx.parse import Program, parse

__all__ = ["DTYPES", "Ran", "Simulation", "settings", "simulated_gpu"]

classify = runtime._classify
Mistake = Callable[[str], str]  # from a kernel's PTX to one with something wrong


@dataclass
class Ran:
    """One kernel: its launches, CTAs and warps of the last, instructions that warps executed, seconds of a CPU."""

    name: str
    launches: int = 0
    ctas: int = 0
    warps: int = 0
    instructions: int = 0
    seconds: float = 0.0


@dataclass
class Simulation:
    """What happens inside `simulated_gpu`.

    Attributes:
        seed: of the order in which warps go on.
        mistakes: planted in the kernel of that name.
        texts: the PTX of each kernel that ran, by the hash of its compilation.
        ran: kernels, by name.
    """

    seed: int
    mistakes: dict[str, Mistake] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    ran: dict[str, Ran] = field(default_factory=dict)
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)  # those that were launched with, by their address
    decoded: dict[str, tuple[Program, Code]] = field(default_factory=dict)

    def listen(self, *, metadata, metadata_group, **_) -> None:
        """Triton has compiled something."""
        (path,) = (path for name, path in metadata_group.items() if name.endswith(".ptx"))
        self.texts[metadata["hash"]] = Path(path).read_text()

    def launcher(self, source, metadata) -> Callable[..., None]:
        """What Triton calls to launch a kernel."""
        types = [source.signature[name] for name in source.fn.arg_names]

        def launch(grid_x, grid_y, grid_z, stream, function, kernel_metadata, launch_metadata, on_enter, on_exit, *values):
            arguments = [(kind, self.tensor(kind, value)) for kind, value in _flat(types, values)]
            self.run(metadata, (grid_x, grid_y, grid_z), arguments)

        return launch

    def classify(self, values, specialized, classes: list) -> tuple:
        """In place of `rnnfast.kernels.runtime._classify`: it hands on addresses, of which the tensors are kept here."""
        for value in values:
            if isinstance(value, torch.Tensor):
                self.tensors[value.data_ptr()] = value
        return classify(values, specialized, classes)

    def tensor(self, kind: str, value: object) -> object:
        """The tensor at an address."""
        if not kind.startswith("*") or not isinstance(value, int):
            return value
        if value not in self.tensors:  # of a later chunk, whose launcher was bound with the first
            found = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.data_ptr() == value]
            self.tensors[value] = max(found, key=lambda each: each.untyped_storage().nbytes())
        return self.tensors[value]

    def run(self, metadata, grid: tuple[int, int, int], arguments: list[tuple[str, object]]) -> None:
        if metadata.hash not in self.decoded:
            text = self.texts[metadata.hash]
            program = parse(self.mistakes.get(metadata.name, lambda text: text)(text))
            self.decoded[metadata.hash] = program, decode(program)
        program, code = self.decoded[metadata.hash]
        bits = [_bits(kind, value) for kind, value in arguments]
        bits += [0] * (len(program.parameters) - len(bits))  # scratch memory, which nothing here asks for
        tensors = [value for _, value in arguments if isinstance(value, torch.Tensor)]
        began = time.process_time()
        self.seed += 1
        machine = Machine(
            code, grid, metadata.num_warps, metadata.shared, dict(zip(program.parameters, bits, strict=True)),
            _regions(tensors, code.granules["global"]), self.seed,
        )  # fmt: skip
        ran = self.ran.setdefault(metadata.name, Ran(metadata.name))
        try:
            with np.errstate(all="ignore"):  # as a GPU
                machine.run()
        finally:
            ran.launches += 1
            ran.ctas, ran.warps = len(machine.ctas), metadata.num_warps
            ran.instructions += machine.executed
            ran.seconds += time.process_time() - began


def _flat(types, values) -> Iterator[tuple[str, object]]:
    """Type and value of each argument that the machine code gets: tuples taken apart, constants left out."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def _bits(kind: str, value: object) -> int:
    if kind.startswith("*"):
        return 0 if value is None else value.data_ptr()
    if kind == "fp32":
        return struct.unpack("I", struct.pack("f", value))[0]
    return int(value) & (1 << 64) - 1


def _regions(tensors: list[torch.Tensor], granule: int) -> list[Region]:
    """The storages of the tensors. What `torch.empty` left, and nobody wrote since, counts as never written."""
    regions = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        begin, size = storage.data_ptr(), storage.nbytes()
        if begin not in regions and size:
            data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(begin))
            fill = torch.empty(size // tensor.itemsize, dtype=tensor.dtype).view(torch.uint8).numpy()
            elements = (data != fill).reshape(-1, tensor.itemsize).any(1)
            written = np.repeat(elements, tensor.itemsize)
            name = f"a tensor of {size} bytes, {str(tensor.dtype).removeprefix('torch.')}"
            regions[begin] = Region(begin, Space(data, granule, written, name, False))
    return list(regions.values())


@contextmanager
def simulated_gpu(seed: int, mistakes: dict[str, Mistake] | None = None, arch: int = 80) -> Iterator[Simulation]:
    """Kernels launched inside run on the CPU as compiled for sm_`arch`, in the order that `seed` gives."""
    simulation = Simulation(seed, mistakes or {})
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    state = {"_waiting": {}, "_gave_up": {}, "_unannounced": []}  # as in a process of its own
    words, keep = mock.patch.object(give_up, "_words", {}), mock.patch.object(runtime, "_classify", simulation.classify)
    with mock.patch.multiple(kernel_plan, **state), words, keep, pretend_gpu(arch) as driver:
        driver.launcher_cls = simulation.launcher
        knobs.compilation.listener = simulation.listen
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty gives NaN, or the largest integer
        try:
            yield simulation
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = fill
