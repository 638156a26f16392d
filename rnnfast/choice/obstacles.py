"""Says in words why the kernels cannot run with this Triton or on a device. Each reason is looked for once.

`rnnfast.choice.decide` adds the reasons that lie in the call itself.
"""

from __future__ import annotations

import sys

import torch

from rnnfast.choice import gpu, launchable
from rnnfast.version import PACKAGE

__all__ = [
    "FallbackWarning",
    "autocast",
    "device_obstacle",
    "known",
    "triton_obstacle",
    "user_level",
]

TRITON_RANGE = ((3, 6), (3, 10))  # from the first, below the second

# The obstacle, or None, by "triton" or the name of a device. Not functools.cache, because Dynamo warns about it.
known: dict[str, str | None] = {}


class FallbackWarning(UserWarning):
    """The backend or the kernels that were chosen cannot run this call. The message says why, and what runs instead."""


def user_level() -> int:
    """The ``stacklevel`` with which a warning of the caller names the innermost line outside rnnfast and torch."""
    level, frame, inside = 1, sys._getframe(1), (f"{PACKAGE}.", "torch.")
    while frame.f_back and f"{frame.f_globals.get('__name__', '')}.".startswith(inside):
        level, frame = level + 1, frame.f_back
    return level


def autocast(kind: str) -> bool:
    """Whether autocast is on for devices of this kind. PyTorch raises an error for kinds without autocast, such as "meta"."""
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
        return f"the tensors are on a {kind!r} device: the kernels need an NVIDIA or AMD GPU"
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
        from rnnfast.kernels.persistent.limits import AMD_GPUS

        if gpu.limits(torch.device(kind, index)) is None:
            *some, last = AMD_GPUS
            return f"the kernels were compiled for the AMD GPUs {', '.join(some)} and {last}, and this is another"
    elif (capability := torch.cuda.get_device_capability(index))[0] < 8:
        return "the GPU is sm_{}{}: the kernels need sm_80 (Ampere) or newer".format(*capability)
    return launchable.obstacle(index) if mode == "compiled" else None
