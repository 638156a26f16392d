"""How kernels run, compiled or interpreted: their launches, and whether this machine can launch any."""

from __future__ import annotations

import functools
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton import knobs

from rnnfast.kernels import turns

__all__ = [
    "INTERPRETED",
    "MOST_LAUNCHERS",
    "Launcher",
    "Repeated",
    "addresses",
    "as_a_gpu",
    "emulates_bf16",
    "mode",
    "prepare_a_launch",
    "python_header",
    "trial_kernel",
]

_compiling = threading.Lock()  # of two threads that load a kernel of Triton's at once, one may find it half loaded
MOST_LAUNCHERS = 1024  # launchers that a family keeps
SOURCE = "#include <Python.h>\n#include <cuda.h>\nCUresult trial(void) { return cuInit(0); }\n"


@triton.jit
def trial_kernel(number):
    """Does nothing. It is compiled and loaded, never launched."""
    tl.debug_barrier()


def mode() -> str:
    """How kernels run: "compiled", or "interpreted" if TRITON_INTERPRET=1 was set in time; "mixed", which runs neither way,
    if it was changed between the import of Triton and that of this module."""
    interpreted = [not isinstance(function, triton.JITFunction) for function in (trial_kernel, tl.zeros)]
    return "interpreted" if all(interpreted) else "mixed" if any(interpreted) else "compiled"


INTERPRETED = mode() == "interpreted"  # bfloat16 then needs EMULATE_BF16: see `rnnfast.kernels.maths`


def as_a_gpu(function):
    """Have numpy say nothing where a GPU gives inf or NaN without a word: it warns in the interpreter."""
    if mode() == "compiled":
        return function
    from triton.runtime.interpreter import np

    return np.errstate(all="ignore")(function)


def addresses(*values):
    """What a function that `Launcher.bind` gave takes for these: addresses for tensors, or in the interpreter the tensors
    themselves. Numbers and None stay as they are."""
    return values if INTERPRETED else _classify(values, (False,) * len(values), [])


def emulates_bf16(dtype) -> bool:
    """Whether kernels have to round to bfloat16 themselves: see `rnnfast.kernels.maths`."""
    return INTERPRETED and "bfloat16" in str(dtype)


def _classify(values, specialized, classes: list) -> tuple:
    """Append to `classes` what Triton compiles a kernel for, value by value; return the values with addresses for tensors.

    `specialized`: for each value whether Triton also tells the integer 1 and multiples of 16 from others.
    """
    plain = []
    for value, special in zip(values, specialized, strict=True):
        if value is None:
            classes.append(None)
            plain.append(None)
        elif value.__class__ is int:
            classes.append(-0x80000000 <= value <= 0x7FFFFFFF)
            if special:
                classes.append(1 if value == 1 else value % 16 == 0 and 16)
            plain.append(value)
        elif isinstance(value, tuple):
            plain.append(_classify(value, (special,) * len(value), classes))
        elif value.__class__ is float:
            classes.append(float)
            plain.append(value)
        else:
            at = value.data_ptr()
            classes.append(value.dtype)
            classes.append(at % 16 == 0)
            plain.append(at)
    return tuple(plain)


class Launcher:
    """Launches a kernel with constants and options that stay.

    Triton binds and specializes every argument at each launch: 15 to 25 us of the host's time. Here what it compiled
    is looked up by what it depends on: the device, and of each argument whether it is None, the dtype and the alignment to 16
    bytes of a tensor, the width of an integer, and whether it is 1 or a multiple of 16 where Triton specializes for that.
    Kernels are compiled by Triton's ordinary way, and anew if Triton has dropped its own cache of them. Where someone watches
    launches (`triton.knobs.runtime.launch_enter_hook`, as Triton's profiler does), each goes through Triton.

    Args:
        kernel: a ``@triton.jit`` function.
        constants: its last arguments, by name.
        options: Triton's options of a launch. Programs that wait for one another need ``launch_cooperative_grid=True``; such
            grids take turns (`rnnfast.kernels.turns`).
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any):
        self.kernel, self.constants = kernel, constants
        # fused multiply-adds by name: the default of Triton 3.10 is to be without
        self.options = options | {"enable_fp_fusion": True}
        self.compiled = isinstance(kernel, triton.JITFunction)
        self.waits = "launch_cooperative_grid" in options
        if self.compiled:
            arguments = [parameter for parameter in kernel.params if parameter.name not in constants]
            self.specialized = tuple(not parameter.do_not_specialize for parameter in arguments)
            self.tail = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        self.built: dict[tuple, tuple] = {}

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch once."""
        if not self.compiled:
            self.kernel[grid](*args, **self.constants, **self.options)
            return
        launch, plain = self._prepare(grid, args)
        launch(*plain)

    def bind(self, grid: tuple[int, int, int], *args: Any) -> tuple[Callable[..., None], tuple]:
        """A function for many launches on the current stream, whose arguments are as these in all that a kernel is compiled
        for; and these arguments as it takes them, with `addresses` in place of tensors. It checks nothing. For an integer that
        changes, give the largest here."""
        if not self.compiled:
            return functools.partial(self.kernel[grid], **self.constants, **self.options), args
        return self._prepare(grid, args)

    def _prepare(self, grid: tuple[int, int, int], args: tuple) -> tuple[Callable[..., None], tuple]:
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        stream = driver.get_current_stream(device)
        classes: list = [device]
        plain = _classify(args, self.specialized, classes)
        watched = _is_watched(self.kernel)
        key = tuple(classes)
        caches, run, function, metadata = self.built.get(key, (None,) * 4)
        if watched or run is None or caches is not self.kernel.device_caches.get(device):
            with _compiling:
                options = dict(self.options)
                if driver.get_current_target().backend != "cuda":
                    options.pop("maxnreg", None)  # an option of Triton's compiler for NVIDIA GPUs alone
                built = self.kernel.warmup(*args, grid=grid, **self.constants, **options)
                run, function, metadata = built.run, built.function, built.packed_metadata  # the first access loads it
            if watched:
                run = built[grid]
            else:
                self.built[key] = self.kernel.device_caches[device], run, function, metadata
        tail = self.tail
        if watched:
            launch = lambda *args: run(*args, *tail)  # noqa: E731
        else:
            head = (*grid, stream, function, metadata, None, None, None)
            launch = lambda *args: run(*head, *args, *tail)  # noqa: E731
        return (functools.partial(turns.launch, launch, device, stream) if self.waits else launch), plain


class Repeated:
    """Many launches of a `Launcher` with one grid on the current stream. `fixed` are tensors that all of them take."""

    def __init__(self, launcher: Launcher, grid: tuple[int, int, int], *fixed: Any):
        self.launcher, self.grid, self.fixed = launcher, grid, fixed
        self.aligned: list[bool] | None = None

    def of(self, *tensors: Any, sizes: tuple[int, ...]) -> Callable[..., None]:
        """The function that launches on `tensors`, then the fixed ones. It takes the integers that follow, and checks nothing.

        Args:
            tensors: may be others at the next call, of the same dtypes.
            sizes: these integers; for one that changes, the largest.
        """
        # what may change with them is whether each begins at a multiple of 16 bytes, which a kernel is compiled for
        aligned = [tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors]
        if aligned == self.aligned:
            return functools.partial(self.launch, *addresses(*tensors), *self.fixed_at)
        self.aligned, count = aligned, len(tensors)
        self.launch, plain = self.launcher.bind(self.grid, *tensors, *self.fixed, *sizes)
        self.fixed_at = plain[count : count + len(self.fixed)]
        return functools.partial(self.launch, *plain[:count], *self.fixed_at)


def _is_watched(kernel: Any) -> bool:
    """Whether anyone is to be told of each launch."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return bool(kernel.pre_run_hooks) or any([hook is not None and getattr(hook, "calls", True) for hook in hooks])


def python_header() -> Path:
    """Where Triton's C code looks for Python.h."""
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)  # as triton.runtime.build has it
    return Path(paths["include"]) / "Python.h"


def prepare_a_launch() -> None:
    """Do all that comes before a launch on the current GPU: build Triton's driver, compile, load and prepare a kernel.

    Triton 3.6 builds a launcher with the C compiler for each new list of argument types. Its cache may hold that of
    `trial_kernel` from a time when there was a compiler, so with 3.6 a program is built that no cache holds; on an AMD
    GPU not, because the program is one for NVIDIA's driver.

    Raises:
        Exception: whatever Triton raises.
    """
    triton.runtime.driver.active.utils  # noqa: B018 - the first access builds it
    if triton.runtime.driver.active.get_current_target().backend == "cuda":
        from triton.backends.nvidia import driver

        if hasattr(driver, "make_launcher"):
            from triton.runtime.build import _build

            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / "trial.c"
                source.write_text(SOURCE)
                _build("trial", str(source), folder, driver.library_dirs(), driver.include_dirs, driver.libraries, [])
    trial_kernel.warmup(2, grid=(1,), enable_fp_fusion=True).run  # noqa: B018 - the first access builds the launcher and loads the kernel
