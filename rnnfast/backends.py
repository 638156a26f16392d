"""Which executor runs a call, and why not another.

    "triton"     the fused kernels of rnnfast, on a GPU, or interpreted on the CPU with TRITON_INTERPRET=1
    "torch"      PyTorch's own layer on the same parameters: cuDNN on a GPU, ATen elsewhere
    "reference"  the equations in plain PyTorch (`rnnfast.reference`)

Asked for, in this order: by `use_backend` around the call, by ``backend=`` on the module or function, by RNNFAST_BACKEND in
the environment; else chosen for each call: "triton" where it can run, unless `rnnfast tune` measured "torch" as faster
(see `rnnfast.choice.tuned`), and "torch" where not. A backend that was asked for but cannot run gives way to "torch" with a
`FallbackWarning`; with RNNFAST_STRICT=1, nothing gives way: a `RuntimeError` says why.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, _guards
from torch.autograd import forward_ad

from rnnfast import transforms
from rnnfast.choice import launchable
from rnnfast.transforms import innermost

__all__ = [
    "BACKENDS",
    "FallbackWarning",
    "asked",
    "check_name",
    "check_recompute",
    "cpu_is_torchs",
    "settle",
    "tensor_obstacles",
    "use_backend",
    "user_level",
]

BACKENDS = ("triton", "torch", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_RANGE = ((3, 6), (3, 10))  # from, below

_known: dict[str, str | None] = {}  # what was found of Triton and of each device; functools.cache would make Dynamo warn
_in_context: ContextVar[str | None] = ContextVar("rnnfast_backend", default=None)


class FallbackWarning(UserWarning):
    """A backend that was asked for by name cannot run this call; PyTorch's own layer runs it instead."""


def check_name(name: str | None, source: str = "backend") -> str | None:
    """`name` if it is a backend's or None, else a `ValueError` that names the choices. "auto" stands for None."""
    if name in (None, "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source} should be one of {', '.join(map(repr, BACKENDS))} or 'auto', got {name!r}")
    return name


def check_recompute(value: bool) -> None:
    """A `TypeError`, as torch.nn's of its sizes, for a ``recompute`` that is no bool: "False" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"recompute should be of type bool, got: {type(value).__name__}")


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the ``with`` block, and in this thread, every rnnfast layer runs on the backend `name`.

    It wins over ``backend=`` and RNNFAST_BACKEND. "auto" or None: the choice per call. Raises `ValueError` for another name.
    A layer that is computed again by ``torch.utils.checkpoint`` may be so in a thread of autograd's, which the block does not
    reach: give such a layer its ``backend=``.

    Example:
        >>> layer = rnnfast.GRU(3, 4)
        >>> with rnnfast.use_backend("reference"):
        ...     output, h_n = layer(torch.zeros(5, 2, 3))
    """
    token = _in_context.set(check_name(name) or "auto")
    try:
        yield
    finally:
        _in_context.reset(token)


@transforms.constant
def asked(own: str | None) -> tuple[str | None, str]:
    """The backend asked for by name, or None, and by whom. `own` is the module's or function's ``backend=``."""
    for name, source in (
        (_in_context.get(), "rnnfast.use_backend"),
        (own, "backend="),
        (os.environ.get("RNNFAST_BACKEND") or None, "RNNFAST_BACKEND"),
    ):
        if name is not None:
            return check_name(name, source), source
    return None, "nobody"


def strict() -> bool:
    return os.environ.get("RNNFAST_STRICT", "0") not in ("", "0")


# os.environ encodes each name that is looked up in it, and raises where there is none: microseconds, of a call that may take 30
_environment = os.environ._data  # type: ignore[attr-defined]
_thread = _guards._TLS  # of which TracingContext.try_get makes an exception where there is none: half a microsecond
_settings = tuple(os.environ.encodekey(name) for name in ("RNNFAST_BACKEND", "RNNFAST_STRICT"))


@transforms.constant
def cpu_is_torchs(own: str | None) -> bool:
    """Whether PyTorch's own layer runs any call on CPU tensors, as far as can be told in a fraction of a microsecond.

    `own` is the module's ``backend=``. If False, the call is to be looked at as a whole. Settings may change at any time; what
    hinders the kernels on the CPU is known from the first call that asked, see `device_obstacle`.
    """
    if _in_context.get() is not None:
        return False
    if own is None:
        backend, strict_setting = _settings
        if backend in _environment or strict_setting in _environment or not _known.get("cpu:None"):
            return False
    elif own != "torch":
        return False
    if _thread.__dict__.get("tracing_context") is not None:  # being compiled or exported
        return False
    return innermost() is None and forward_ad._current_level < 0


def triton_obstacle() -> str | None:
    """Why the kernels cannot be imported, or None."""
    if "triton" not in _known:
        _known["triton"] = _find_triton_obstacle()
    return _known["triton"]


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
    if device not in _known:
        _known[device] = _find_device_obstacle(kind, index)
    return _known[device]


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


def autocast(kind: str) -> bool:
    """Whether autocast is on for devices of this kind. (PyTorch raises where it knows no autocast, on "meta" say.)"""
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def user_level() -> int:
    """The ``stacklevel`` at which its caller's warning points at the innermost frame outside rnnfast and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("rnnfast", "torch"):
        level, frame = level + 1, frame.f_back
    return level


@transforms.constant
def _tensor_obstacles(kind: str, index: int | None, dtype: torch.dtype) -> tuple[str, ...]:
    autocast = "autocast is on: on the CPU, PyTorch's own layer decides what it casts"
    return tuple(
        reason
        for reason in (
            triton_obstacle(),
            device_obstacle(kind, index),
            None if dtype in DTYPES else f"the dtype is {dtype}: the kernels take float16, bfloat16 and float32",
            autocast if kind == "cpu" and torch.is_autocast_enabled("cpu") else None,
            transforms.obstacle(),
        )
        if reason
    )


def tensor_obstacles(tensor: Tensor, weights: Iterable[Any] = ()) -> tuple[str, ...]:
    """All that keeps the Triton kernels from taking a tensor like this and `weights`, here and now; empty if nothing does."""
    found = _tensor_obstacles(tensor.device.type, tensor.device.index, tensor.dtype)
    if transforms.expanded(weights):
        found += ("the weights are those of call_for_per_sample_grads, which the kernels do not know",)
    return found


@transforms.constant
def settle(name: str | None, source: str, obstacles: tuple[str, ...]) -> str:
    """The backend that runs: `name` if asked for and free of obstacles, "triton" where possible, else "torch".

    Args:
        name, source: from `asked`.
        obstacles: what keeps the backend asked for, "triton" if none was, from running.

    Raises:
        RuntimeError: with RNNFAST_STRICT=1, if "torch" would have to stand in.
    """
    if name == "torch":
        return "torch"
    if not obstacles:
        return name or "triton"
    if strict():
        wanted = name or "triton"
        raise RuntimeError(f"RNNFAST_STRICT is set and the {wanted!r} backend cannot run this call: {'; '.join(obstacles)}")
    if name is not None:
        message = f"{name!r} was asked for by {source}, but PyTorch's own layer runs: {'; '.join(obstacles)}"
        warnings.warn(message, FallbackWarning, stacklevel=user_level())
    return "torch"
