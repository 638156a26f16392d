"""Chooses the family of kernels that runs a layer, and its plan; and whether PyTorch's own layer is the faster.

    "step"         one launch for each time step; runs any size
    "persistent"   one launch for many time steps, with the recurrent weights on chip; runs sizes that have a plan on this GPU
    "one_program"  the same for a small layer, whole in one program for a few batch rows; runs sizes whose weights fit
    "scan"         one launch for many time steps of a cell without W_hh, of which no other family knows; runs any size
    "auto"         the fastest family, as measured or predicted, of those that this GPU's canary found right

RNNFAST_KERNELS names one of them. The default is "auto". Nothing is predicted for an AMD GPU: there "auto" takes the kernels
for any size, unless others were measured. `rnnfast.choice.trust` has the canary.

What the family that was asked for cannot run, the step kernels run; of a cell without W_hh, the scan kernels. This happens
silently for a cell or a size without a plan and on a GPU without cooperative launch; `rnnfast.explain` says why. If the driver
refuses a launch, it happens with a `FallbackWarning`. With RNNFAST_STRICT=1 such a GPU and such a launch raise a
`RuntimeError`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch

from rnnfast.choice import pipeline, trust, tuned, tuning_file
from rnnfast.choice.forecast import MARGIN, Forecast, forecast
from rnnfast.choice.gpu import cooperative, known, limits, pretend_gpu
from rnnfast.choice.launchable import refusal_of
from rnnfast.choice.obstacles import FallbackWarning, autocast, user_level
from rnnfast.reference import spec_of
from rnnfast.settings import CANARY, KERNELS, STRICT, strict
from rnnfast.torch_private import environment, rnn_precision

if TYPE_CHECKING:
    from types import ModuleType

    from rnnfast.kernels.families import Plan
    from rnnfast.kernels.persistent.limits import GpuLimits
    from rnnfast.kernels.persistent.plan import PersistentPlan

__all__ = [
    "FAMILIES",
    "Choice",
    "asked",
    "choose",
    "limits",
    "pick",
    "precision",
    "predict",
    "predicts",
    "pretend_gpu",
    "run",
    "shape",
    "torch_wins",
    "torch_wins_call",
    "unchecked",
    "why_fewer",
]

FAMILIES = KERNELS.choices
MOST_KNOWN = 4096  # choices that are kept; a program whose batch size varies asks for ever new ones
UNCOOPERATIVE = "the GPU has no cooperative launch, without which programs must not wait for each other"
UNPREDICTED = "nothing was measured for this call, and no model knows AMD GPUs; rnnfast tune measures it"
GAVE_UP = (
    "programs of the persistent kernels waited for one another in vain and gave up: in {} on {}. Results since then are NaN "
    "where they were not computed. This process runs the step kernels from now on; RNNFAST_KERNELS=step avoids the wait"
)

_refused: dict[tuple[torch.device, Plan], str] = {}  # the plans that were refused, and why
_waiting: dict[torch.device, ModuleType] = {}  # the kernels whose programs have waited for one another on each device
_gave_up: dict[torch.device, str] = {}  # devices on which they waited in vain, and which launch it was
_unannounced: list[str] = []  # reasons why other kernels run from then on, until a call has warned of it


@dataclass(frozen=True)
class Choice:
    """What runs a group of recurrences (`rnnfast.kernels.groups`): a layer, its directions, or the layers of a stack.

    Attributes:
        family: the name of the family of kernels.
        plan: its plan.
        step: the plan of the kernels that run the cell at any size: the step kernels, or without W_hh the scan kernels. They
            run if the driver refuses the launch.
        wanted: the family that was asked for and cannot run, else empty.
        reason: why it cannot run, else empty.
        strict: whether RNNFAST_STRICT is set. A plan that the driver refused is then launched again, so that the call raises.
        hindrance: why the device can launch no plan of the family. Set only if `strict`, else empty.
        members: how many of the group run at once, in one launch. The group runs in parts of so many, one after another.
        chunk: of layers, the time steps of a chunk of their pipeline, at least 1; else 0.
    """

    family: str
    plan: Plan
    step: Plan
    wanted: str = ""
    reason: str = ""
    strict: bool = False
    hindrance: str = ""
    members: int = 1
    chunk: int = 0

    @property
    def persistent(self) -> PersistentPlan | None:
        """The plan of the persistent kernels if those run."""
        return cast("PersistentPlan", self.plan) if self.family == "persistent" else None

    def without(self, reason: str) -> Choice:
        """The choice of the kernels for any size in place of this one. `reason` says why."""
        from rnnfast.kernels.families import family_of

        stands_in = family_of(self.step)
        return Choice(stands_in, self.step, self.step, self.family, reason, members=self.members, chunk=self.chunk)


def asked() -> str:
    """The family that RNNFAST_KERNELS names, or "auto"."""
    return KERNELS.get() or "auto"


def choose(
    family: str, gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, gpu: GpuLimits | None,
    marked: bool = False, members: int = 1, extra: int = 0, recurrent: bool = True, rows: bool = False,
) -> Choice:  # fmt: skip
    """Choose `family` if it has a plan, else the kernels that run the cell at any size. A pure function.

    Args:
        family: the name of a family, not "auto".
        gates, B, H, itemsize, precision, backward, marked, extra: as in `rnnfast.kernels.persistent.plan.persistent_plan`.
        gpu: what `limits` returns.
        members: that run at once.
        recurrent, rows: as in `rnnfast.kernels.cells.Cell`.
    """
    from rnnfast.kernels.families import FAMILIES, for_any_size
    from rnnfast.kernels.persistent.limits import NoPlan

    sizes = pipeline.Sizes(gates, B, H, itemsize, precision, backward, marked, extra, recurrent, rows)
    stands_in = for_any_size(recurrent)
    step = pipeline.plan_of(stands_in, sizes, members, gpu)
    assert not isinstance(step, NoPlan)
    if family == stands_in:
        return Choice(family, step, step, members=members)
    reason = FAMILIES[family].refusal(recurrent, rows)
    if not reason and gpu is None and FAMILIES[family].waits:
        reason = "on a CPU the programs of a grid run one after another, and these wait for each other"
    plan = NoPlan(reason) if reason else pipeline.plan_of(family, sizes, members, gpu)
    if isinstance(plan, NoPlan):
        return Choice(stands_in, step, step, family, plan.reason, members=members)
    return Choice(family, plan, step, members=members)


def pick(
    cell: str, T: int, B: int, H: int, dtype: torch.dtype, precision: str, backward: bool, training: bool, device: torch.device,
    marked: bool = False, members: int = 1, layers: bool = False,
) -> Choice:  # fmt: skip
    """The choice for this call. It follows the settings, what was measured, the device and what its driver has refused.

    Args:
        cell: a name in `rnnfast.reference.CELLS`, of a cell of a user's own too.
        marked: whether the call has lengths or resets.
        members: of the group: the directions and heads of a layer, or the layers of a stack.
        layers: whether they are the layers of a stack.
    """
    key = (
        cell, T.bit_length(), B, H, dtype, precision, backward, training, device, marked, members, layers,
        KERNELS.block.get(), environment.get(KERNELS.key), STRICT.block.get(), environment.get(STRICT.key),
        CANARY.block.get(), environment.get(CANARY.key), tuned.candidate.get(),
    )  # fmt: skip
    choice = known.get(key)
    if choice is None:
        if len(known) >= MOST_KNOWN:
            known.clear()
        sizes = pipeline.sizes_of(cell, B, H, dtype.itemsize, precision, backward, marked)
        names = cell, 1 << (T.bit_length() - 1), *tuning_file.names(dtype, precision), training
        choice = known[key] = _choice(names, sizes, members, layers, device)
    if _refused and not choice.strict and (refusal := _refused.get((device, choice.plan))):
        choice = choice.without(refusal)
    if layers and (chunk := pipeline.even(T, choice.chunk)) != choice.chunk:
        choice = replace(choice, chunk=chunk)
    return _without_waits(choice) if _gave_up else choice


def _without_waits(choice: Choice) -> Choice:
    """The choice where programs have waited for one another in vain: in this process none do so again."""
    from rnnfast.kernels.families import FAMILIES

    if not FAMILIES[choice.family].waits:
        return choice
    reason = f"they gave up waiting, in {next(iter(_gave_up.values()))}"
    return replace(choice, hindrance=reason) if choice.strict else choice.without(reason)


def _choice(
    call: tuple[str, int, str, str, bool], sizes: pipeline.Sizes, members: int, layers: bool, device: torch.device
) -> Choice:
    """`pick` without the launches that the driver has refused, for a power of two of time steps.

    Args:
        call: cell, T, dtype and precision by their names in a `tuning_file.Shape`, and whether it is training.
    """
    from rnnfast.kernels.families import FAMILIES, for_any_size
    from rnnfast.kernels.persistent.limits import GPUS

    gpu = limits(device)
    group = call[1], members, layers, gpu or GPUS["H100"]  # a CPU runs groups as that GPU does
    family, plan, at_once = asked(), None, 0
    if family == "auto":
        measured = _measured_plan(gpu, call, sizes, members, layers)
        if measured is not None:
            family, plan, at_once = measured
        else:
            families = () if gpu is None or gpu.arch else _able(device, trust.trusted(device))
            found = pipeline.fastest(families, sizes, *group)
            family = found[0] if found else for_any_size(sizes.recurrent)
        if sizes.marked:  # the plan was measured without marks, and may not have the shared memory for them
            plan = None
    if plan is not None:
        runs = pipeline.run(family, sizes, call[1], at_once, -(-members // at_once), layers, group[3])
        choice = replace(choose("step", *sizes[:6], gpu, members=at_once), family=family, plan=plan)
    else:
        runs = pipeline.best(family, sizes, *group)
        chosen = lambda name, at_once: choose(name, *sizes[:6], gpu, sizes.marked, at_once, *sizes[7:])  # noqa: E731
        choice = chosen(family, runs.members if runs else 1)
        if choice.family != family:
            runs = pipeline.best(choice.family, sizes, *group)
            assert runs is not None  # these kernels run any group
            choice = replace(chosen(choice.family, runs.members), wanted=family, reason=choice.reason)
    assert runs is not None
    choice = replace(choice, members=runs.members, chunk=runs.chunk if layers else 0)
    hindrance = UNCOOPERATIVE if FAMILIES[choice.family].waits and not cooperative(device) else ""
    if strict():  # `run` raises the hindrance
        return replace(choice, strict=True, hindrance=hindrance)
    return choice.without(hindrance) if hindrance else choice


def _measured_plan(
    gpu: GpuLimits | None, call: tuple[str, int, str, str, bool], sizes: pipeline.Sizes, members: int, layers: bool
) -> tuple[str, Plan | None, int] | None:
    """The family that was measured as the fastest, its plan, and for how many members at once. None if nothing was measured."""
    from rnnfast.kernels.families import family_of

    cell, T, dtype, precision, training = call
    trial = tuned.candidate.get()
    if trial is not None:
        entry = trial.entry
    elif gpu is None:
        return None
    else:
        entry = tuned.kernels(gpu, cell, T, sizes.B, sizes.H, dtype, precision, training, members, layers)
    if entry is None:
        return None
    plan = entry.backward if sizes.backward else entry.forward
    return ("step", None, 0) if plan is None else (family_of(plan), plan, min(members, entry.members[sizes.backward]))


def why_fewer(choice: Choice, sizes: pipeline.Sizes, T: int, members: int, layers: bool, device: torch.device) -> str:
    """Why fewer than all members of a group run at once, in words. Arguments as for `pick`, which gave the `choice`."""
    from rnnfast.kernels.persistent.limits import GPUS, NoPlan

    gpu = limits(device) or GPUS["H100"]
    plan = pipeline.plan_of(choice.family, sizes, members, gpu)
    if isinstance(plan, NoPlan):
        return f"{members} do not fit: {plan.reason}"
    found = pipeline.best(choice.family, sizes, 1 << (T.bit_length() - 1), members, layers, gpu)
    predicted = found is not None and found.members == choice.members
    return "more at once are not predicted faster" if predicted else "so it was measured as the fastest"


def _able(device: torch.device, families: Iterable[str]) -> tuple[str, ...]:
    """Those of `families` whose grids the device can launch, and whose programs have not waited for one another in vain."""
    from rnnfast.kernels.families import FAMILIES

    return tuple([family for family in families if not FAMILIES[family].waits or (cooperative(device) and not _gave_up)])


def predicts(x: torch.Tensor) -> bool:
    """Whether PyTorch's own layer may be the automatic choice for a call with an input like `x`.

    `known` keeps that a device is no GPU, so that callers need not ask again.
    """
    if limits(x.device) is None:
        known["no gpu", x.device] = True
        return False
    return x.dtype in tuning_file.DTYPES and asked() == "auto" and not torch.jit.is_tracing()  # whose sizes are tensors


def torch_wins_call(
    cell: str, T: int, B: int, I: int, H: int, layers: int, directions: int, tensors: Sequence[torch.Tensor | None],
    packed: bool = False, projected: bool = False, kernels_only: bool = False,
) -> str:  # fmt: skip
    """`torch_wins` of a call with these tensors, the input first. Asked at each call, so that it is looked up by plain values.

    Sequences of 64 to 127 steps count as one of 64, and likewise for other powers of two.
    """
    x = tensors[0]
    assert x is not None
    training = torch.is_grad_enabled() and any([tensor is not None and tensor.requires_grad for tensor in tensors])
    power = T.bit_length() - 1
    key = (
        "torch wins", cell, power, B, I, H, layers, directions, x.dtype, autocast(x.device.type), precision(), training,
        x.device, packed, projected, kernels_only, STRICT.block.get(), environment.get(STRICT.key),
        CANARY.block.get(), environment.get(CANARY.key),
    )  # fmt: skip
    words = known.get(key)
    if words is None:
        called = shape(cell, 1 << power, B, I, H, layers, directions, tensors)
        words = torch_wins(called, x.device, packed, projected, kernels_only)  # which may forget what is known
        known[key] = words
    return words


def torch_wins(
    shape: tuning_file.Shape, device: torch.device, packed: bool = False, projected: bool = False, kernels_only: bool = False
) -> str:
    """Why the automatic choice is PyTorch's own layer for this call, in words; empty if it is the kernels.

    What `rnnfast tune` measured counts first. Else the kernels run where the families that are trusted on this GPU are
    predicted faster than cuDNN, by `MARGIN` as long as nothing was measured on it. This may run the canary
    (`rnnfast.choice.trust`).

    Args:
        shape: the call.
        device: of its input.
        packed: its sequences have lengths of their own, for which cuDNN takes packed input.
        projected: the LSTM has a projection.
        kernels_only: the call has options that cuDNN does not know, so that nothing on the GPU competes with the kernels.
    """
    gpu = limits(device)
    if gpu is None:
        return ""
    winner = None if packed or projected or kernels_only else tuned.winner(gpu, shape)
    if winner is not None:
        return "measured as the fastest for this call" if winner == "torch" else ""
    if gpu.arch and not kernels_only:
        return UNPREDICTED
    margin = 1.0 if tuned.table(gpu).entries else MARGIN
    predicted = predict(shape, device, gpu, trust.families(), packed, projected)
    if kernels_only or predicted.kernels * margin <= predicted.torch:
        families = trust.trusted(device)
        if not families:
            return trust.words(gpu)
        predicted = predict(shape, device, gpu, families, packed, projected)
    if kernels_only or predicted.kernels * margin <= predicted.torch:
        return ""
    return f"chosen for this call: the kernels are not predicted {f'{margin} times ' if margin > 1 else ''}faster"


def unchecked(cell: str, x: torch.Tensor) -> str:
    """Why the kernels are not the automatic choice for a call with the input `x` of a cell that PyTorch has no layer of, in
    words; empty if they are.

    They are if a family that runs the cell is trusted on this GPU. This may run the canary, which has cells of torch.nn: a
    family that is right for them may run any other. The scan kernels, which run none of them, count as the step kernels do.
    """
    gpu = limits(x.device)
    if gpu is None or asked() != "auto" or x.dtype not in tuning_file.DTYPES:
        return ""
    from rnnfast.kernels.families import FAMILIES  # here, because there may be no Triton

    spec, families = spec_of(cell), trust.trusted(x.device)
    counted = (*families, "scan") if "step" in families else families
    able = any([not FAMILIES[family].refusal(spec.recurrent, spec.rows) for family in counted])
    return "" if able else trust.words(gpu)


def predict(
    shape: tuning_file.Shape, device: torch.device, gpu: GpuLimits, families: Iterable[str], packed: bool = False,
    projected: bool = False, by_layer: bool = False,
) -> Forecast:  # fmt: skip
    """The prediction for a call, on those of `families` that the device can launch."""
    return forecast(shape, gpu, _able(device, families), packed, projected, by_layer)


def shape(
    cell: str, T: int, B: int, I: int, H: int, layers: int, directions: int, tensors: Iterable[torch.Tensor | None]
) -> tuning_file.Shape:
    """The shape of a call with these tensors. The input comes first. Its dtype is one that the kernels take."""
    given = [tensor for tensor in tensors if tensor is not None]
    kind = given[0].device.type
    dtype = torch.get_autocast_dtype(kind) if autocast(kind) else given[0].dtype
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return tuning_file.Shape(cell, *tuning_file.names(dtype, precision()), T, B, I, H, layers, directions, training)


def precision() -> str:
    """The precision of a float32 layer's products, "tf32" or "ieee", of the input side and of the recurrence alike: PyTorch's
    setting for cuDNN's recurrent layers. It is "ieee" on AMD GPUs, not all of which multiply in TF32."""
    return "tf32" if rnn_precision() == "tf32" and not torch.version.hip else "ieee"


def run(direction: str, choice: Choice, device: torch.device, *args, **options) -> Choice:
    """Call `direction`, "forward" or "backward", of the chosen family. If the driver refuses, call the step kernels instead.

    A cooperative launch runs either all programs of the grid or none. No later launch has a larger grid than the first one, so
    only the first can be refused. Nothing has run then, and the step kernels can start from the beginning.

    Returns:
        The choice for the rest of the sequence.

    Raises:
        RuntimeError: RNNFAST_STRICT=1 is set and the driver refuses.
            It is also raised once if programs waited for one another in vain, in this call or one before it on the device. That
            is read without waiting for the GPU.
    """
    from rnnfast.kernels.families import FAMILIES, family_of

    if device in _waiting and device not in _gave_up and (launch := _waiting[device].gave_up(device)):
        _gave_up[device] = launch
        known.clear()
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
        refusal = refusal_of(error)
        if choice.family == family_of(choice.step) or not refusal:
            raise
        if strict():
            raise RuntimeError(f"{words}: {refusal}") from error
    _refused[device, choice.plan] = refusal
    instead = choice.without(refusal)
    message = f"the {choice.family} kernels were chosen, but the {instead.family} kernels run: {refusal}"
    warnings.warn(message, FallbackWarning, stacklevel=user_level())
    return run(direction, instead, device, *args, **options)
