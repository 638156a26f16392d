"""How kernels run: compiled or interpreted; launched many times at little cost; and whether this machine can launch any."""

from __future__ import annotations

import contextlib
import sysconfig
import tempfile
import warnings
from pathlib import Path

import triton
import triton.language as tl

__all__ = ["Launcher", "as_a_gpu", "emulate_bf16", "mode", "prepare_a_launch", "python_header", "trial_kernel"]

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


def emulate_bf16(tensor) -> bool:
    """Whether a kernel on this tensor has to make up for what the interpreter does wrong in bfloat16."""
    return mode() == "interpreted" and "bfloat16" in str(tensor.dtype)


@contextlib.contextmanager
def as_a_gpu():
    """Silences numpy, which warns in the interpreter where a GPU gives inf or NaN without a word."""
    if mode() == "compiled":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


class Launcher:
    """Launches one kernel many times with the same argument types.

    Triton binds and specialises every argument at each call, which costs several times a launch. The first two calls go that
    way: the initial state may be aligned otherwise than the output that follows it. The rest reuse what the second call built.
    """

    def __init__(self, kernel, grid, constants: dict, options: dict):
        self.kernel, self.grid, self.constants, self.options = kernel, grid, constants, options
        self.calls, self.compiled = 0, None

    def __call__(self, *args):
        if self.compiled is not None:
            self.compiled(*args, *(self.constants[name] for name in self.kernel.arg_names[len(args) :]))
            return
        built = self.kernel[self.grid](*args, **self.constants, **self.options)
        self.calls += 1
        if self.calls == 2 and built is not None:  # the interpreter gives None
            self.compiled = built[self.grid]


def python_header() -> Path:
    """Where Triton's C code looks for Python.h."""
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)  # as triton.runtime.build has it
    return Path(paths["include"]) / "Python.h"


def prepare_a_launch() -> None:
    """Do all that comes before a launch on the current GPU: build Triton's driver, compile, load and prepare a kernel.

    Triton 3.6 builds a launcher with the C compiler for each new list of argument types. Its cache may hold that of
    `trial_kernel` from a time when there was a compiler, so with 3.6 a program is built that no cache holds.

    Raises:
        Exception: whatever Triton raises.
    """
    triton.runtime.driver.active.utils  # noqa: B018 - the first access builds it
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        from triton.runtime.build import _build

        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "trial.c"
            source.write_text(SOURCE)
            _build("trial", str(source), folder, driver.library_dirs(), driver.include_dirs, driver.libraries, [])
    trial_kernel.warmup(2, grid=(1,), enable_fp_fusion=True).run  # noqa: B018 - the first access builds the launcher and loads the kernel
