"""Says which families of kernels may run on a GPU without having been asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rnnfast.choice import tuned

if TYPE_CHECKING:
    from rnnfast.kernels.persistent.plan import GpuLimits

__all__ = ["trusted"]


def trusted(gpu: GpuLimits, family: str) -> bool:
    """Whether the kernels of `family` may run on `gpu` in the user's process.

    A family whose programs wait for one another may hang on a GPU that has never run it, and a hang ends the process. It is
    trusted where the tuning file of this GPU has an entry with a plan of the family: such a plan ran there, in another process.
    """
    from rnnfast.kernels.families import FAMILIES, family_of

    if not FAMILIES[family].waits:
        return True
    plans = [plan for entry in tuned.table(gpu).entries for plan in (entry.forward, entry.backward)]
    return any(plan is not None and family_of(plan) == family for plan in plans)
