"""Finds out, before the first launch, whether Triton can launch a kernel on a GPU of this machine; and tells what error of a
launch means that it cannot be made.

At the first launch Triton compiles a module in C. That needs a C compiler, Python's header files and a cache folder that can be
written. Slim container images lack these, and PyTorch's own layer needs none of them. `obstacle` therefore does everything that
comes before a launch, once for each device, and says in words what failed. It takes a fraction of a second, or some
milliseconds with a filled cache.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess

import torch

__all__ = ["obstacle", "refusal_of"]

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
REFUSALS = {  # the texts of cuGetErrorString for the errors that mean: this GPU cannot make this launch
    "invalid argument": 1,  # CUDA_ERROR_INVALID_VALUE: the grid, the block or the shared memory is too large for the GPU
    "too many resources requested for launch": 701,  # CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: registers or threads
    "too many blocks in cooperative launch": 720,  # CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: not all would be resident
    "operation not supported": 801,  # CUDA_ERROR_NOT_SUPPORTED: this GPU or driver has no cooperative launch
}

NOT_COMPILED = "PassManager::run failed"  # Triton's error for a kernel that a pass of its compiler cannot take


def obstacle(index: int | None) -> str | None:
    """Why Triton cannot launch a kernel on CUDA device `index`, and what to do about it. None if it can."""
    from rnnfast.kernels import runtime

    try:
        with torch.cuda.device(index):
            runtime.prepare_a_launch()
    except Exception as error:  # a launch would raise the same error, whatever its type
        return _words(error)
    return None


def _words(error: Exception) -> str:
    from rnnfast.kernels import runtime

    text = str(error)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if "Failed to find C compiler" in text:
        return "Triton found no C compiler: install gcc, or set CC"
    if isinstance(error, OSError) and compiler and error.filename == compiler:
        return f"Triton cannot run the C compiler {compiler} ({error.strerror}): install gcc, or set CC"
    if text.startswith("libcuda.so") or "ldconfig" in text:
        return "Triton found no libcuda.so.1: set TRITON_LIBCUDA_PATH to the folder that holds it"
    if isinstance(error, subprocess.CalledProcessError):
        if not runtime.python_header().exists():
            return f"Triton found no {runtime.python_header()}: install Python's headers (python3-dev)"
        command = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        return f"Triton builds its launcher with a C compiler, and {command} failed with exit status {error.returncode}"
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        folder = os.environ.get("TRITON_CACHE_DIR") or "~/.triton"
        return f"Triton cannot write to its cache ({error}): make {folder} writable, or set TRITON_CACHE_DIR"
    first = text.strip().partition("\n")[0]
    return f"Triton cannot launch a kernel ({type(error).__name__}{': ' if first else ''}{first})"


def refusal_of(error: Exception) -> str:
    """In words, that the driver refused this launch, would refuse every launch of this plan, and left the GPU unchanged; or
    that Triton cannot compile the plan. Empty for any other error.

    Triton passes on the driver's text for an error, not its number. These errors are not refusals:

    - 700, 702, 719 and others in this range come from kernels that ran before. The GPU's memory may then be wrong.
    - 2, "out of memory", may come after some launches of the call have run.
    - 900 to 908 have ended the capture of a CUDA graph.
    """
    words = str(error).removeprefix("Triton Error [CUDA]: ")
    if isinstance(error, RuntimeError) and words == NOT_COMPILED:
        return f"this version of Triton cannot compile them: {error}"
    is_refusal = type(error).__name__ == "OutOfResources" or (isinstance(error, RuntimeError) and words in REFUSALS)
    return f"the driver refused the launch: {error}" if is_refusal else ""
