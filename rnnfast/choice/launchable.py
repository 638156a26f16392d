"""Finds out, before the first launch, whether Triton can launch a kernel on a GPU of this machine.

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

__all__ = ["obstacle"]

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


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
