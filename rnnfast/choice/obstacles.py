"""What keeps the Triton kernels from running a call, in words. What is found of Triton and of a device is found once."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rnnfast import torch_private
from rnnfast.choice import launchable
from rnnfast.torch_private import constant

__all__ = [
    "DTYPES",
    "FallbackWarning",
    "autocast",
    "call_obstacles",
    "device_obstacle",
    "known",
    "tensor_obstacles",
    "triton_obstacle",
    "user_level",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_RANGE = ((3, 6), (3, 10))  # from, below
EXPANDED = "the weights are those of call_for_per_sample_grads, which the kernels do not know"

known: dict[str, str | None] = {}  # what was found of Triton and of each device; functools.cache would make Dynamo warn


class FallbackWarning(UserWarning):
    """A backend that was asked for by name cannot run this call; PyTorch's own layer runs it instead."""


def user_level() -> int:
    """The ``stacklevel`` at which its caller's warning points at the innermost frame outside rnnfast and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("rnnfast", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def autocast(kind: str) -> bool:
    """Whether autocast is on for devices of this kind. (PyTorch raises where it knows no autocast, on "meta" say.)"""
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def triton_obstacle() -> str | None:
    """Why the kernels cannot be imported, or None."""
    if "triton" not in known:
        known["triton"] = _find_triton_obstacle()
    return known["triton"]


def _find_triton_obstacle() -> str | None:
    try:
        import triton
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return "Triton is not installed (pip install triton)" if missing else f"Triton does not import: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not TRITON_RANGE[0] <= version < TRITON_RANGE[1]:
        return f"Triton {triton.__version__} is not supported: rnnfast knows 3.6 to 3.9"
    return None


def device_obstacle(kind: str, index: int | None) -> str | None:
    """Why the kernels cannot run on this device, or None."""
    device = f"{kind}:{index}"
    if device not in known:
        known[device] = _find_device_obstacle(kind, index)
    return known[device]


def _find_device_obstacle(kind: str, index: int | None) -> str | None:
    if kind not in ("cpu", "cuda"):
        return f"the tensors are on a {kind!r} device: the kernels need an NVIDIA GPU"
    if triton_obstacle():
        return None if kind == "cuda" else "the tensors are on the CPU"
    from rnnfast.kernels import runtime

    mode = runtime.mode()
    if mode == "mixed":
        return "TRITON_INTERPRET was changed after Triton had been imported: set it before Python starts"
    if kind == "cpu":
        wanted = "the tensors are on the CPU, where the kernels run only in Triton's interpreter (TRITON_INTERPRET=1)"
        return None if mode == "interpreted" else wanted
    if torch.version.hip:
        return "the kernels are not validated on AMD GPUs"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the GPU is sm_{major}{minor}: the kernels need sm_80 (Ampere) or newer"
    return launchable.obstacle(index) if mode == "compiled" else None


def traced() -> str | None:
    """The tracer that records PyTorch's own operators only, in words, or None."""
    if torch.jit.is_tracing():
        return "torch.jit.trace is on: a trace should hold PyTorch's own operators only"
    onnx: Any = sys.modules.get("torch.onnx")
    if onnx is not None and onnx.is_in_onnx_export():
        return "the model is being exported to ONNX, which knows PyTorch's own operators only"
    return None


def _transform_obstacle() -> str | None:
    """What the kernels' operators have no rule for, or None."""
    found = torch_private.inside()
    if "forward" in found:
        return "forward-mode differentiation is on, for which the kernels have no rule"
    if found and torch_private.tracing():
        return "a torch.func transform is being compiled, for which the kernels have no rule"
    if "functionalize" in found:
        return "the call is inside torch.func.functionalize, for which the kernels have no rule"
    return traced()


@constant
def call_obstacles(kind: str, index: int | None, dtype: torch.dtype) -> tuple[str, ...]:
    """All that keeps the kernels from taking tensors of this dtype on this device, here and now; empty if nothing does."""
    autocast = "autocast is on: on the CPU, PyTorch's own layer decides what it casts"
    return tuple(
        reason
        for reason in (
            triton_obstacle(),
            device_obstacle(kind, index),
            None if dtype in DTYPES else f"the dtype is {dtype}: the kernels take float16, bfloat16 and float32",
            autocast if kind == "cpu" and torch.is_autocast_enabled("cpu") else None,
            _transform_obstacle(),
        )
        if reason
    )


def tensor_obstacles(tensor: Tensor, weights: Iterable[Any] = ()) -> tuple[str, ...]:
    """`call_obstacles` of an input like `tensor`, and what keeps the kernels from taking `weights`."""
    found = call_obstacles(tensor.device.type, tensor.device.index, tensor.dtype)
    return (*found, EXPANDED) if torch_private.is_expanded(weights) else found
