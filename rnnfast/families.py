"""Which family of kernels runs a layer, and with what plan.

    "step"         one launch a time step, for any size
    "persistent"   one launch for many time steps, the recurrent weights on chip, where a plan exists on this GPU
    "auto"         what `rnnfast tune` found faster at this size; the step kernels where nothing was measured

RNNFAST_KERNELS names one of them; "auto" is the default. It takes no persistent kernels by itself, because no GPU has run them
yet. What "persistent" cannot run goes to the step kernels: sizes without a plan and GPUs without cooperative launch silently
(`rnnfast.explain` says why), a launch that the driver refuses with a `FallbackWarning`. With RNNFAST_STRICT=1 such a GPU and
such a launch raise.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rnnfast import tuning
from rnnfast.choice.obstacles import FallbackWarning, autocast, user_level
from rnnfast.gpu import assume, cooperative, limits
from rnnfast.reference import GATES
from rnnfast.settings import KERNELS, strict

if TYPE_CHECKING:
    from rnnfast.kernels.persistent.plan import GpuLimits, PersistentPlan
    from rnnfast.kernels.plan import StepPlan

__all__ = [
    "FAMILIES",
    "Choice",
    "asked",
    "assume",
    "choose",
    "limits",
    "measured",
    "pick",
    "precision",
    "run",
    "shape",
    "torch_wins",
]

FAMILIES = KERNELS.choices
UNCOOPERATIVE = "the GPU has no cooperative launch, without which programs must not wait for each other"

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

    @property
    def tile(self) -> int:
        """Batch rows of a program."""
        return (self.persistent or self.step).BLOCK_B


def asked() -> str:
    """The family that RNNFAST_KERNELS names, or "auto"."""
    return KERNELS.get() or "auto"


def choose(
    family: str, gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, gpu: GpuLimits | None,
    marked: bool = False,
) -> Choice:  # fmt: skip
    """The family asked for where it has a plan, else the step kernels. A pure function.

    Args:
        family: "step" or "persistent".
        gates, B, H, itemsize, precision, backward, marked: as in `rnnfast.kernels.persistent.plan.persistent_plan`.
        gpu: as `limits`.
    """
    from rnnfast.kernels.persistent.plan import NoPlan, persistent_plan
    from rnnfast.kernels.plan import step_plan

    step = step_plan(H, itemsize, precision)
    if family == "step":
        return Choice(step)
    if gpu is None:
        return Choice(step, reason="on a CPU the programs of a grid run one after another, and these wait for each other")
    plan = persistent_plan(gates, B, H, itemsize, precision, backward, gpu, marked)
    return Choice(step, reason=plan.reason) if isinstance(plan, NoPlan) else Choice(step, plan)


def pick(
    cell: str, T: int, B: int, H: int, dtype: torch.dtype, precision: str, backward: bool, training: bool, device: torch.device,
    marked: bool = False,
) -> Choice:  # fmt: skip
    """What runs as things stand: by the environment, what was measured, the device, and what its driver has refused. `marked`:
    the call has lengths or resets."""
    family, plan = asked(), None
    gpu = None if family == "step" else limits(device)
    if family == "auto":
        family = "step"
        if gpu is not None and (tuned := tuning.kernels(gpu, cell, T, B, H, *tuning.names(dtype, precision), training)):
            plan = tuned.backward if backward else tuned.forward
            if plan is not None and marked:  # what was measured was without, and may have no room for them
                family, plan = "persistent", None
    choice = choose(family, GATES[cell], B, H, dtype.itemsize, precision, backward, gpu, marked)
    if plan is not None:
        choice = Choice(choice.step, plan)
    if choice.persistent is None or strict():  # strict: tried again, to be refused again
        return choice
    refusal = _refusal(choice.persistent, device)
    return choice if refusal is None else Choice(choice.step, reason=refusal)


def _refusal(plan: PersistentPlan, device: torch.device) -> str | None:
    """Why the driver would not launch `plan`, as far as is known."""
    if not cooperative(device):
        return UNCOOPERATIVE
    return _refused.get((device, plan))


def measured(device: torch.device) -> bool:
    """Whether `torch_wins` can be true of any call on `device`."""
    gpu = limits(device)
    return gpu is not None and asked() == "auto" and bool(tuning.table(gpu).entries)


def torch_wins(shape: tuning.Shape, device: torch.device) -> bool:
    """Whether the automatic choice is PyTorch's own layer, because `rnnfast tune` measured it as the fastest for this call."""
    gpu = limits(device)
    return gpu is not None and tuning.torch_wins(gpu, shape)


def shape(
    cell: str, T: int, B: int, I: int, H: int, layers: int, directions: int, tensors: Iterable[torch.Tensor | None]
) -> tuning.Shape:
    """Of a call with these tensors, the input first, of one of the kernels' dtypes."""
    given = [tensor for tensor in tensors if tensor is not None]
    kind = given[0].device.type
    dtype = torch.get_autocast_dtype(kind) if autocast(kind) else given[0].dtype
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return tuning.Shape(cell, *tuning.names(dtype, precision()), T, B, I, H, layers, directions, training)


def precision() -> str:
    """The precision of a float32 recurrent product: "tf32" or "ieee", as PyTorch is set for cuDNN's recurrent layers."""
    return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


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

    if choice.persistent is None:
        getattr(step, direction)(*args, **options, plan=choice.step)
        return choice
    refusal, cause = "" if cooperative(device) else UNCOOPERATIVE, None
    if not refusal:
        try:
            getattr(persistent, direction)(*args, **options, plan=choice.persistent)
            return choice
        except Exception as error:
            if not _is_refusal(error):
                raise
            cause, refusal = error, f"the driver refused the launch: {error}"
    if strict():
        raise RuntimeError(f"RNNFAST_STRICT is set and the persistent kernels cannot run this call: {refusal}") from cause
    _refused[device, choice.persistent] = refusal
    message = f"the persistent kernels were chosen, but the step kernels run: {refusal}"
    warnings.warn(message, FallbackWarning, stacklevel=user_level())
    choice = Choice(choice.step, reason=refusal)
    getattr(step, direction)(*args, **options, plan=choice.step)
    return choice
