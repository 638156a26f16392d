"""Triton's real driver and launcher on a CUDA driver that does nothing (`stub_driver.c`), on a machine without a GPU.

All that a launch does before it calls the driver is real: Triton's binding, specialisation and launcher, and rnnfast's code.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import triton

from rnnfast.choice import obstacles

SOURCE = Path(__file__).with_name("stub_driver.c")


def unavailable() -> str:
    """Why there can be no stub driver in this process; empty if there can."""
    if sys.platform != "linux":
        return "the stub of the CUDA driver is for Linux"
    if shutil.which("cc") is None:
        return "no C compiler (cc) to build a stub of the CUDA driver"
    return "there is a GPU, whose driver the stub would stand in for" if torch.cuda.is_available() else ""


def build(folder: str | Path) -> Path:
    """The stub, compiled into `folder`, where Triton finds it by the environment variable TRITON_LIBCUDA_PATH."""
    library = Path(folder) / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, SOURCE], check=True)
    return library


def load(folder: str | Path) -> ctypes.CDLL:
    """The stub, loaded in place of the CUDA driver of this process."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(Path(folder) / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)


class OneStream:
    """What a launch asks of torch.cuda, which a build of PyTorch for CPUs cannot say: there is one stream, its default."""

    is_current_stream_capturing = staticmethod(lambda: False)
    current_stream = staticmethod(lambda device: None)


def driver():
    """Triton's CUDA driver, which takes CPU tensors and whose one GPU is an sm_90."""
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=None: (9, 0)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_device_interface(self):
            return OneStream

    return Driver()


class Later:
    """A driver that is made when it is first asked for something."""

    def __getattr__(self, name):
        triton.runtime.driver.set_active(driver())
        return getattr(triton.runtime.driver.active, name)


def pretend() -> None:
    """Have CPU tensors run on the stub from now on."""
    triton.runtime.driver.set_active(Later())  # type: ignore[arg-type]
    torch.cuda.get_device_capability = lambda index=None: (9, 0)
    torch.cuda.device = lambda index: contextlib.nullcontext()
    obstacles.known["cpu:None"] = obstacles._find_device_obstacle("cuda", 0)
