"""What a call is predicted to take, on each family of kernels and on cuDNN. No GPU is asked; nothing here is measured.

The kernels' times come from the families' own models (`rnnfast.kernels.families`), cuDNN's from `rnnfast.choice.cudnn`. What
both do alike is left out: the products over all steps, W_ih x and those of the weights' gradients.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnnfast.choice import cudnn
from rnnfast.reference import GATES

if TYPE_CHECKING:
    from rnnfast.choice.tuning_file import Shape
    from rnnfast.kernels.persistent.plan import GpuLimits

__all__ = ["MARGIN", "Forecast", "best_family", "forecast", "step_us"]

MARGIN = 1.4  # how many times faster than cuDNN the kernels have to be predicted, for the error of two models
CALL_US = 80.0, 70.0  # of the host for a layer and direction, besides the launches of steps: forward, and backward besides


@dataclass(frozen=True)
class Forecast:
    """Predicted microseconds of a time step, all layers and directions together, the host's work for a call included.

    Attributes:
        torch: of PyTorch's own layer.
        algorithm: what cuDNN runs it on (`rnnfast.choice.cudnn`).
        kernels: of the fastest of the families; infinite if there is none.
        families: that run forward and, in training, backward.
    """

    torch: float
    algorithm: str
    kernels: float
    families: tuple[str, ...]

    def __str__(self) -> str:
        kernels = f"{' and '.join(dict.fromkeys(self.families))} kernels {self.kernels:.2f}" if self.families else "no kernels"
        return f"{kernels}, cuDNN's {self.algorithm} algorithm {self.torch:.2f} us a time step"


def step_us(
    family: str, gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, gpu: GpuLimits, marked: bool = False
) -> float | None:
    """Predicted microseconds of a time step of one layer in one direction; None for a family that has no plan.

    Args:
        family: the name of one.
        gates, B, H, itemsize, precision, backward, marked: as in `rnnfast.kernels.persistent.plan.persistent_plan`.
        gpu: where it would run.
    """
    from rnnfast.kernels.families import FAMILIES
    from rnnfast.kernels.hardware import LAUNCH_HOST_US, gigahertz

    clocks = FAMILIES[family].clocks(gates, B, H, itemsize, precision, backward, gpu, marked)
    if clocks is None:
        return None
    us = clocks / gigahertz(gpu.name) / 1000
    return us if FAMILIES[family].many_steps else max(us, LAUNCH_HOST_US)


def best_family(
    families: Collection[str], gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, gpu: GpuLimits,
    marked: bool = False,
) -> tuple[str, float]:  # fmt: skip
    """The family with the least predicted time, and its microseconds a step; ("", infinity) if none of them has a plan."""
    best = "", float("inf")
    for family in families:
        us = step_us(family, gates, B, H, itemsize, precision, backward, gpu, marked)
        if us is not None and us < best[1]:
            best = family, us
    return best


def forecast(
    shape: Shape, gpu: GpuLimits, families: Collection[str], packed: bool = False, projected: bool = False
) -> Forecast:
    """The prediction for a call.

    Args:
        shape: the call.
        gpu: where it runs.
        families: those that may run.
        packed: its sequences have lengths of their own, for which cuDNN takes packed input.
        projected: the LSTM has a projection.
    """
    passes = (False, True) if shape.training else (False,)
    itemsize = 4 if shape.dtype == "float32" else 2
    sizes = GATES[shape.cell], shape.B, shape.H, itemsize, shape.precision
    found = [best_family(families, *sizes, backward, gpu, packed) for backward in passes]
    layers = shape.layers * shape.directions
    ours = layers * (sum(us for _, us in found) + sum(CALL_US[: len(passes)]) / shape.T)
    names = tuple(name for name, _ in found) if ours < float("inf") else ()
    theirs = cudnn.call_us(shape, gpu, packed, projected) / shape.T
    return Forecast(theirs, cudnn.algorithm(shape, gpu, packed=packed, projected=projected), ours, names)
