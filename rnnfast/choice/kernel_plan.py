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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch

from rnnfast.choice import tuned, tuning_file
from rnnfast.choice.gpu import cooperative, known, limits, pretend_gpu
from rnnfast.choice.obstacles import FallbackWarning, autocast, user_level
from rnnfast.reference import GATES
from rnnfast.settings import KERNELS, STRICT, strict
from rnnfast.torch_private import environment

if TYPE_CHECKING:
    from types import ModuleType

    from rnnfast.kernels.families import Plan
    from rnnfast.kernels.persistent.plan import GpuLimits, PersistentPlan
    from rnnfast.kernels.step.plan import StepPlan

__all__ = [
    "FAMILIES",
    "Choice",
    "asked",
    "choose",
    "limits",
    "measured",
    "pick",
    "precision",
    "pretend_gpu",
    "run",
    "shape",
    "torch_wins",
]

FAMILIES = KERNELS.choices
MOST_KNOWN = 4096  # choices kept: a program whose batches vary asks for new ones again and again
UNCOOPERATIVE = "the GPU has no cooperative launch, without which programs must not wait for each other"
GAVE_UP = (
    "programs of the persistent kernels waited for one another in vain and gave up: in {} on {}. Results since then are NaN "
    "where they were not computed. This process runs the step kernels from now on; RNNFAST_KERNELS=step avoids the wait"
)
REFUSALS = {  # what cuGetErrorString says of the errors that mean: this launch is not possible here
    "invalid argument": 1,  # CUDA_ERROR_INVALID_VALUE: the grid, the block or the shared memory is beyond what the GPU has
    "too many resources requested for launch": 701,  # CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: registers or threads
    "too many blocks in cooperative launch": 720,  # CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: not all would be resident
    "operation not supported": 801,  # CUDA_ERROR_NOT_SUPPORTED: no cooperative launch on this GPU, or not by this driver
}

_refused: dict[tuple[torch.device, Plan], str] = {}  # plans that a driver would not launch, and its words
_waiting: dict[torch.device, ModuleType] = {}  # the kernels whose programs have waited for one another on each device
_gave_up: dict[torch.device, str] = {}  # devices on which they waited in vain, and which launch it was
_unannounced: list[str] = []  # reasons why other kernels run from then on, until a call has warned of it


@dataclass(frozen=True)
class Choice:
    """What runs one direction of a layer.

    Attributes:
        family: the name of the family of kernels.
        plan: its plan.
        step: the plan of the step kernels, which run any size and stand in where a launch is refused.
        wanted: the family that should have run and cannot, else empty.
        reason: why it cannot, else empty.
        strict: whether a plan that the driver refused is tried again, to be refused again, for RNNFAST_STRICT is set.
        hindrance: why no plan of the family can be launched on the device, kept if `strict`, else empty.
    """

    family: str
    plan: Plan
    step: StepPlan
    wanted: str = ""
    reason: str = ""
    strict: bool = False
    hindrance: str = ""

    @property
    def persistent(self) -> PersistentPlan | None:
        """The plan of the persistent kernels if those run."""
        return cast("PersistentPlan", self.plan) if self.family == "persistent" else None

    def without(self, reason: str) -> Choice:
        """The step kernels instead, for this reason."""
        return Choice("step", self.step, self.step, self.family, reason)


def asked() -> str:
    """The family that RNNFAST_KERNELS names, or "auto"."""
    return KERNELS.get() or "auto"


def choose(
    family: str, gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, gpu: GpuLimits | None,
    marked: bool = False,
) -> Choice:  # fmt: skip
    """The family asked for where it has a plan, else the step kernels. A pure function.

    Args:
        family: the name of one, not "auto".
        gates, B, H, itemsize, precision, backward, marked: as in `rnnfast.kernels.persistent.plan.persistent_plan`.
        gpu: as `limits`.
    """
    from rnnfast.kernels.families import FAMILIES
    from rnnfast.kernels.persistent.plan import NoPlan
    from rnnfast.kernels.step.plan import step_plan

    step = step_plan(H, itemsize, precision)
    if family == "step":
        return Choice("step", step, step)
    if gpu is None and FAMILIES[family].waits:
        reason = "on a CPU the programs of a grid run one after another, and these wait for each other"
        return Choice("step", step, step, family, reason)
    plan = FAMILIES[family].plan(gates, B, H, itemsize, precision, backward, gpu, marked)
    if isinstance(plan, NoPlan):
        return Choice("step", step, step, family, plan.reason)
    return Choice(family, plan, step)


def pick(
    cell: str, T: int, B: int, H: int, dtype: torch.dtype, precision: str, backward: bool, training: bool, device: torch.device,
    marked: bool = False,
) -> Choice:  # fmt: skip
    """What runs as things stand: by the environment, what was measured, the device, and what its driver has refused. `marked`:
    the call has lengths or resets."""
    settings = KERNELS.block.get(), environment.get(KERNELS.key), STRICT.block.get(), environment.get(STRICT.key)
    key = (cell, T.bit_length(), B, H, dtype, precision, backward, training, device, marked, *settings)
    choice = known.get(key)
    if choice is None:
        if len(known) >= MOST_KNOWN:
            known.clear()
        choice = known[key] = _choice(cell, T, B, H, dtype, precision, backward, training, device, marked)
    if _refused and not choice.strict and (refusal := _refused.get((device, choice.plan))):
        return choice.without(refusal)
    return _without_waits(choice) if _gave_up else choice


def _without_waits(choice: Choice) -> Choice:
    """The choice where programs have waited for one another in vain: in this process none do so again."""
    from rnnfast.kernels.families import FAMILIES

    if not FAMILIES[choice.family].waits:
        return choice
    reason = f"they gave up waiting, in {next(iter(_gave_up.values()))}"
    return replace(choice, hindrance=reason) if choice.strict else choice.without(reason)


def _choice(
    cell: str, T: int, B: int, H: int, dtype: torch.dtype, precision: str, backward: bool, training: bool, device: torch.device,
    marked: bool,
) -> Choice:  # fmt: skip
    """`pick`, but for what the driver has refused."""
    from rnnfast.kernels.families import FAMILIES

    family, plan = asked(), None
    gpu = None if family == "step" else limits(device)
    if family == "auto":
        family, plan = _measured_plan(gpu, cell, T, B, H, dtype, precision, backward, training)
        if marked:  # what was measured was without marks, and may have no room for them
            plan = None
    choice = choose(family, GATES[cell], B, H, dtype.itemsize, precision, backward, gpu, marked)
    if plan is not None:
        choice = Choice(family, plan, choice.step)
    hindrance = UNCOOPERATIVE if FAMILIES[choice.family].waits and not cooperative(device) else ""
    if strict():  # strict: a plan that was refused is tried again, to be refused again
        return replace(choice, strict=True, hindrance=hindrance)
    return choice.without(hindrance) if hindrance else choice


def _measured_plan(
    gpu: GpuLimits | None, cell: str, T: int, B: int, H: int, dtype: torch.dtype, precision: str, backward: bool, training: bool
) -> tuple[str, Plan | None]:
    """The family that was measured as the fastest and its plan; the step kernels where nothing was measured."""
    from rnnfast.kernels.families import family_of

    names = tuning_file.names(dtype, precision)
    entry = None if gpu is None else tuned.kernels(gpu, cell, T, B, H, *names, training)
    plan = None if entry is None else entry.backward if backward else entry.forward
    return ("step", None) if plan is None else (family_of(plan), plan)


def measured(x: torch.Tensor) -> bool:
    """Whether `torch_wins` can be true of any call with an input like `x`."""
    gpu = limits(x.device)
    if gpu is not None and (x.dtype not in tuning_file.DTYPES or asked() != "auto"):
        return False
    key = "tuned", x.device
    if key not in known:
        known[key] = gpu is not None and bool(tuned.table(gpu).entries)
    return known[key]


def torch_wins(shape: tuning_file.Shape, device: torch.device) -> bool:
    """Whether the automatic choice is PyTorch's own layer, because `rnnfast tune` measured it as the fastest for this call."""
    gpu = limits(device)
    return gpu is not None and tuned.torch_wins(gpu, shape)


def shape(
    cell: str, T: int, B: int, I: int, H: int, layers: int, directions: int, tensors: Iterable[torch.Tensor | None]
) -> tuning_file.Shape:
    """The shape of a call with these tensors, the input first, which have one of the kernels' dtypes."""
    given = [tensor for tensor in tensors if tensor is not None]
    kind = given[0].device.type
    dtype = torch.get_autocast_dtype(kind) if autocast(kind) else given[0].dtype
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return tuning_file.Shape(cell, *tuning_file.names(dtype, precision()), T, B, I, H, layers, directions, training)


def precision() -> str:
    """The precision of a float32 recurrent product: "tf32" or "ieee", as PyTorch is set for cuDNN's recurrent layers."""
    return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def _is_refusal(error: Exception) -> bool:
    """Whether the launch did not happen, for a reason that holds for each launch of this plan and left the GPU as it was.

    Triton gives the driver's words for an error, not its number. cuLaunchKernelEx may also return errors of kernels that ran
    before it (700, 702, 719 and others of that range): after these the GPU's memory is not to be trusted, and nothing runs.
    "out of memory" (2) may come at any launch of a call, when some have run already. An error while a graph is captured
    (900 to 908) has ended the capture.
    """
    words = str(error).removeprefix("Triton Error [CUDA]: ")
    return type(error).__name__ == "OutOfResources" or (isinstance(error, RuntimeError) and words in REFUSALS)


def run(direction: str, choice: Choice, device: torch.device, *args, **options) -> Choice:
    """Call `direction`, "forward" or "backward", of the chosen family; where the driver refuses, of the step kernels.

    A grid whose programs wait for each other is launched whole or not at all, and none after the first is larger: if one is
    refused it is the first, and nothing has run.

    Returns:
        The choice for the rest of the sequence.

    Raises:
        RuntimeError: with RNNFAST_STRICT=1, if the driver refuses. And once if programs have waited for one another in vain, in
            this call or one before it on the device. That is read without waiting for the GPU.
    """
    from rnnfast.kernels.families import FAMILIES

    if device in _waiting and device not in _gave_up and (launch := _waiting[device].gave_up(device)):
        _gave_up[device] = launch
        _unannounced.append(
            f"the {choice.family} kernels were chosen, but the step kernels run: they gave up waiting, in {launch}"
        )
        raise RuntimeError(GAVE_UP.format(launch, device))
    if _unannounced and choice.wanted:
        warnings.warn(_unannounced.pop(), FallbackWarning, stacklevel=user_level())
    words = f"RNNFAST_STRICT is set and the {choice.family} kernels cannot run this call"
    if choice.hindrance:
        raise RuntimeError(f"{words}: {choice.hindrance}")
    try:
        family = FAMILIES[choice.family]
        if family.waits:
            _waiting[device] = family.package
        getattr(family.package, direction)(*args, **options, plan=choice.plan)
        return choice
    except Exception as error:
        if choice.family == "step" or not _is_refusal(error):
            raise
        refusal = f"the driver refused the launch: {error}"
        if strict():
            raise RuntimeError(f"{words}: {refusal}") from error
    _refused[device, choice.plan] = refusal
    message = f"the {choice.family} kernels were chosen, but the step kernels run: {refusal}"
    warnings.warn(message, FallbackWarning, stacklevel=user_level())
    return run(direction, choice.without(refusal), device, *args, **options)
