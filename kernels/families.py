"""The families of kernels, each an entry of `FAMILIES`. A family is a way to run the recurrence of cells.

"step" runs every cell that has a W_hh, "scan" every cell without, at any size: one of the two stands in where another family
has no plan.

To add one, write a package with host functions `forward` and `backward`, which take what those of `rnnfast.kernels.step` take,
and a class of plans. Then add its entry here and its name to `rnnfast.settings.KERNELS`.

Both functions run a group of members (`rnnfast.kernels.groups`), each a recurrence of its own, all of them in each launch. A
plan is for a number of members, because they share the GPU. A member comes out bit by bit as alone with the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Protocol

from rnnfast.kernels import one_program, persistent, scan, step
from rnnfast.kernels.one_program.plan import OneProgramPlan, one_program_clocks, one_program_plan, one_program_plans
from rnnfast.kernels.persistent.limits import GpuLimits, NoPlan
from rnnfast.kernels.persistent.plan import PersistentPlan, persistent_clocks, persistent_plans
from rnnfast.kernels.scan.plan import ScanPlan, scan_clocks, scan_plan
from rnnfast.kernels.step.plan import StepPlan, step_clocks, step_plan

__all__ = ["FAMILIES", "OF_TORCH", "Family", "Plan", "family_of", "for_any_size", "plans_to_measure"]


class Plan(Protocol):
    """What every family's plans, which are dataclasses, have.

    Attributes:
        BLOCK_B: batch rows of a program.
        steps: the most time steps of a launch, that is N of what `rounds` gives (`rnnfast.kernels.step.forward`); 0 if it may
            be any number.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def BLOCK_B(self) -> int: ...

    @property
    def steps(self) -> int: ...

    def launch_words(self, T: int) -> str:
        """How many launches there are, for T steps."""
        ...

    def words(self, B: int, members: int = 1) -> str:
        """The launch in words, for a batch of B rows of each of `members`."""
        ...


@dataclass(frozen=True)
class Family:
    """A family of kernels.

    Attributes:
        package: has the host functions `forward` and `backward`, which take a group and a plan.
        kind: of its plans.
        plan: (gates, B, H, itemsize, precision, backward, limits of the GPU, marked, members=1, extra=0) to a plan, or to why
            there is none. Arguments as in `rnnfast.kernels.persistent.plan.persistent_plan`. On a CPU, which has no limits, a
            family that does not wait gets None.
        plans: (gates, B, H, itemsize, precision, backward, limits of the GPU, how many at most), and `members` and `extra` by
            name, to the plans worth measuring, the fastest by the family's model first. None for a family that has one plan
            for each size.
        waits: whether the programs of a grid wait for one another. Such a grid has to be resident as a whole, which takes a GPU
            with cooperative launch. The package then has `gave_up`, which says whether a wait on a device was in vain.
        many_steps: whether a launch runs many time steps; if not, a step takes at least what its launch costs the host.
        clocks: predicted SM clocks of a time step of all members, from the arguments of `plan` for a GPU; None without a plan.
        recurrent: whether it runs the cells that have a W_hh; else it runs those that have none.
        rows: whether it runs cells that need means over whole rows.
    """

    package: ModuleType
    kind: type[Plan]
    plan: Callable[..., Plan | NoPlan]
    plans: Callable[..., Sequence[Plan]] | None
    waits: bool
    many_steps: bool
    clocks: Callable[..., float | None]
    recurrent: bool = True
    rows: bool = True

    def refusal(self, recurrent: bool, rows: bool) -> str:
        """Why the family does not run cells like this one, whatever the size, in words; empty if it does. Arguments as in
        `rnnfast.kernels.cells.Cell`."""
        if self.recurrent != recurrent:
            return "the cell has no W_hh, so that the scan kernels run it" if self.recurrent else "the cell has a W_hh"
        return "the cell needs means over whole rows, and a program has a part of a row" if rows and not self.rows else ""


def for_any_size(recurrent: bool) -> str:
    """The family that runs a cell with a W_hh, or without, at any size."""
    return "step" if recurrent else "scan"


def _any_size(gates, B, H, itemsize, precision, backward, limits, marked, members: int = 1, extra: int = 0) -> StepPlan:
    return step_plan(H, itemsize, precision, extra, limits is not None and bool(limits.arch))


def _by_limits(*sizes) -> PersistentPlan | NoPlan:
    return persistent.plan.persistent_plan(*sizes)


def _step_clocks(gates, B, H, itemsize, precision, backward, limits, marked, members: int = 1, extra: int = 0) -> float:
    return step_clocks(gates, B, H, itemsize, precision, backward, limits.sms, members, extra)


FAMILIES = {
    "step": Family(
        step, kind=StepPlan, plan=_any_size, plans=None, clocks=_step_clocks, waits=False, many_steps=False,
    ),
    "persistent": Family(
        persistent, kind=PersistentPlan, plan=_by_limits, plans=persistent_plans, clocks=persistent_clocks, waits=True,
        many_steps=True, rows=False,
    ),
    "one_program": Family(
        one_program, kind=OneProgramPlan, plan=one_program_plan, plans=one_program_plans, clocks=one_program_clocks,
        waits=False, many_steps=True,
    ),
    "scan": Family(
        scan, kind=ScanPlan, plan=scan_plan, plans=None, clocks=scan_clocks, waits=False, many_steps=True, recurrent=False,
        rows=False,
    ),
}  # fmt: skip

OF_TORCH = {name: family for name, family in FAMILIES.items() if family.recurrent}
"""The families that run the cells of torch.nn, each of which has a W_hh."""


def plans_to_measure(
    gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, limits: GpuLimits, most: int = 4,
    members: int = 1,
) -> list[Plan]:  # fmt: skip
    """The plans of all families for `members` at once that are worth measuring for torch.nn's cells, at most `most` of each."""
    sizes = gates, B, H, itemsize, precision, backward, limits, most
    return [plan for family in FAMILIES.values() if family.plans for plan in family.plans(*sizes, members=members)]


def family_of(plan: Plan) -> str:
    """The name of the family that `plan` belongs to."""
    return next(name for name, family in FAMILIES.items() if isinstance(plan, family.kind))
