"""The families of kernels, each an entry of `FAMILIES`. A family is a way to run the recurrence of every cell.

To add one, write a package with host functions `forward` and `backward`, which take what those of `rnnfast.kernels.step` take,
and a class of plans. Then add its entry here and its name to `rnnfast.settings.KERNELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from rnnfast.kernels import persistent, step
from rnnfast.kernels.persistent.plan import GpuLimits, NoPlan, PersistentPlan
from rnnfast.kernels.step.plan import StepPlan, step_plan

__all__ = ["FAMILIES", "Family", "Plan", "family_of"]


class Plan(Protocol):
    """What every family's plans have.

    Attributes:
        BLOCK_B: batch rows of a program.
        steps: time steps of a launch, whose input side is computed by one GEMM; 0 if it may be any number.
    """

    @property
    def BLOCK_B(self) -> int: ...

    @property
    def steps(self) -> int: ...

    def launch_words(self, T: int) -> str:
        """How many launches there are, for T steps."""
        ...

    def words(self, B: int) -> str:
        """The launch in words, for a batch of B rows."""
        ...


@dataclass(frozen=True)
class Family:
    """A family of kernels.

    Attributes:
        package: has the host functions `forward` and `backward`, which take a plan.
        kind: of its plans.
        plan: (gates, B, H, itemsize, precision, backward, limits of the GPU, marked) to a plan, or to why there is none.
            Arguments as in `rnnfast.kernels.persistent.plan.persistent_plan`. On a CPU, which has no limits, a family that
            does not wait gets None.
        waits: whether the programs of a grid wait for one another. Such a grid has to be resident as a whole, which takes a GPU
            with cooperative launch. The package then has `gave_up`, which says whether a wait on a device was in vain.
    """

    package: ModuleType
    kind: type[Plan]
    plan: Callable[[int, int, int, int, str, bool, GpuLimits | None, bool], Plan | NoPlan]
    waits: bool


def _any_size(gates, B, H, itemsize, precision, backward, limits, marked) -> StepPlan:
    return step_plan(H, itemsize, precision)


def _by_limits(*sizes) -> PersistentPlan | NoPlan:
    return persistent.plan.persistent_plan(*sizes)


FAMILIES = {
    "step": Family(package=step, kind=StepPlan, plan=_any_size, waits=False),
    "persistent": Family(package=persistent, kind=PersistentPlan, plan=_by_limits, waits=True),
}


def family_of(plan: Plan) -> str:
    """The name of the family that `plan` belongs to."""
    return next(name for name, family in FAMILIES.items() if isinstance(plan, family.kind))
