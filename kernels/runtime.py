"""How kernels run, compiled or interpreted; and whether this machine can launch any."""

from __future__ import annotations

import sysconfig
import tempfile
from pathlib import Path

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "as_a_gpu", "mode", "prepare_a_launch", "python_header", "trial_kernel"]

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
