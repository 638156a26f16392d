"""Which family of kernels runs a layer, and with what plan.

    "step"         one launch a time step, for any size
    "persistent"   one launch for many time steps, the recurrent weights on chip, where a plan exists on this GPU

RNNFAST_KERNELS names the family; "step" is the default as long as no GPU has run the persistent kernels. What "persistent"
cannot run goes to the step kernels: sizes without a plan silently (`rnnfast.explain` says why), a launch that the driver
refuses with a `FallbackWarning`, and with RNNFAST_STRICT=1 not at all.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rnnfast.backends import FallbackWarning, strict, user_level

if TYPE_CHECKING:
    from rnnfast.kernels.persistent.plan import GpuLimits, PersistentPlan
    from rnnfast.kernels.plan import StepPlan

__all__ = ["FAMILIES", "Choice", "asked", "assume", "choose", "limits", "pick", "run", "step_only"]

FAMILIES = ("step", "persistent")

_limits: dict[torch.device, GpuLimits | None] = {}
_refused: dict[tuple[torch.device, PersistentPlan], str] = {}  # plans that a driver would not launch, and its words


@dataclass(frozen=True)
class Choice:
    """What runs one direction of a layer.

    Attributes:
        step: the plan of the step kernels, which run any size.
        persistent: the plan of the persistent kernels if those run, else None.
        reason: why they do not though asked for, else empty.
    """

    step: StepPlan
    persistent: PersistentPlan | None = None
    reason: str = ""


def asked() -> str:
    """The family that RNNFAST_KERNELS names."""
    name = os.environ.get("RNNFAST_KERNELS") or "step"
    if name not in FAMILIES:
        raise ValueError(f"RNNFAST_KERNELS should be one of {', '.join(map(repr, FAMILIES))}, got {name!r}")
    return name


def limits(device: torch.device) -> GpuLimits | None:
    """Of the GPU `device`; None for a CPU, where Triton's interpreter runs a grid's programs one after another: the first
    program of a persistent kernel would wait for the others for ever."""
    if device not in _limits:
        _limits[device] = _find_limits(device) if device.type == "cuda" else None
    return _limits[device]


def _find_limits(device: torch.device) -> GpuLimits:
    from rnnfast.kernels.persistent.plan import GpuLimits

    gpu: Any = torch.cuda.get_device_properties(device)  # its stub lacks some of these
    return GpuLimits(
        name=gpu.name,
        capability=gpu.major * 10 + gpu.minor,
        sms=gpu.multi_processor_count,
        shared_bytes=gpu.shared_memory_per_block_optin,
        registers=gpu.regs_per_multiprocessor,
        l2_bytes=gpu.L2_cache_size,
    )


@contextmanager
def assume(gpu: GpuLimits) -> Iterator[None]:
    """Within the ``with`` block CPU tensors are taken to be on `gpu`: for launches that are compiled and counted, not run."""
    cpu = torch.device("cpu")
    _limits[cpu] = gpu
    try:
        yield
    finally:
        del _limits[cpu]


def choose(
    family: str, gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, gpu: GpuLimits | None
) -> Choice:
    """The family asked for where it has a plan, else the step kernels. A pure function.

    Args:
        family: as `asked`.
        gates, B, H, itemsize, precision, backward: as in `rnnfast.kernels.persistent.plan.persistent_plan`.
        gpu: as `limits`.
    """
    from rnnfast.kernels.persistent.plan import NoPlan, persistent_plan
    from rnnfast.kernels.plan import step_plan

    step = step_plan(H, itemsize, precision)
    if family == "step":
        return Choice(step)
    if gpu is None:
        return Choice(step, reason="on a CPU the programs of a grid run one after another, and these wait for each other")
    plan = persistent_plan(gates, B, H, itemsize, precision, backward, gpu)
    return Choice(step, reason=plan.reason) if isinstance(plan, NoPlan) else Choice(step, plan)


def pick(gates: int, B: int, H: int, dtype: torch.dtype, precision: str, backward: bool, device: torch.device) -> Choice:
    """`choose` as things stand: by the environment, the device, and what its driver has refused."""
    family = asked()
    gpu = None if family == "step" else limits(device)
    choice = choose(family, gates, B, H, dtype.itemsize, precision, backward, gpu)
    if choice.persistent is None or strict():  # strict: tried again, to be refused again
        return choice
    refusal = _refused.get((device, choice.persistent))
    return choice if refusal is None else Choice(choice.step, reason=refusal)


def step_only(choice: Choice) -> Choice:
    """For a call with what only the step kernels take: lengths, resets, or a gradient of all cell states."""
    if choice.persistent is None:
        return choice
    return Choice(choice.step, reason="lengths, resets and gradients of all cell states run on the step kernels")


def _is_refusal(error: Exception) -> bool:
    """Whether the launch did not happen at all: a grid that cannot be resident (CUDA's error 720), or a program too large."""
    return type(error).__name__ == "OutOfResources" or "cooperative launch" in str(error).lower().replace("_", " ")


def run(direction: str, choice: Choice, device: torch.device, *args, **options) -> Choice:
    """Call `direction`, "forward" or "backward", of the chosen family; where the driver refuses, of the step kernels.

    A grid whose programs wait for each other is launched whole or not at all, and none after the first is larger: if one is
    refused it is the first, and nothing has run.

    Returns:
        The choice for the rest of the sequence.

    Raises:
        RuntimeError: with RNNFAST_STRICT=1, if the driver refuses.
    """
    from rnnfast.kernels import persistent, step

    if choice.persistent is not None:
        try:
            getattr(persistent, direction)(*args, **options, plan=choice.persistent)
            return choice
        except Exception as error:
            if not _is_refusal(error):
                raise
            refusal = f"the driver refused the launch: {error}"
            if strict():
                raise RuntimeError(
                    f"RNNFAST_STRICT is set and the persistent kernels cannot run this call: {refusal}"
                ) from error
        _refused[device, choice.persistent] = refusal
        message = f"RNNFAST_KERNELS asks for the persistent kernels, but the step kernels run: {refusal}"
        warnings.warn(message, FallbackWarning, stacklevel=user_level())
        choice = Choice(choice.step, reason=refusal)
    getattr(step, direction)(*args, **options, plan=choice.step)
    return choice
