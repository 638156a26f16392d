"""What a call is predicted to take, on each family of kernels and on cuDNN. No GPU is asked; nothing here is measured.

The kernels' times come from `rnnfast.choice.pipeline`, which groups layers and directions as the call will run, cuDNN's from
`rnnfast.choice.cudnn`. What both do alike is left out: the arithmetic of W_ih x and of the weights' gradients.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnnfast.choice import cudnn
from rnnfast.choice.pipeline import fastest, grouping, sizes_of

if TYPE_CHECKING:
    from rnnfast.choice.tuning_file import Shape
    from rnnfast.kernels.persistent.limits import GpuLimits

__all__ = ["CALL_US", "MARGIN", "Forecast", "forecast"]

MARGIN = 1.4  # how many times faster than cuDNN the kernels have to be predicted, for the error of two models
CALL_US = 80.0, 70.0  # of the host for a group, besides its rounds: forward, and backward besides; an estimate


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


def forecast(
    shape: Shape, gpu: GpuLimits, families: Collection[str], packed: bool = False, projected: bool = False,
    by_layer: bool = False,
) -> Forecast:  # fmt: skip
    """The prediction for a call.

    Args:
        shape: the call.
        gpu: where it runs.
        families: those that may run.
        packed: its sequences have lengths of their own, for which cuDNN takes packed input.
        projected: the LSTM has a projection.
        by_layer: the layers run one after another though they have one direction, as those with a projection do.
    """
    passes = (False, True) if shape.training else (False,)
    itemsize = 4 if shape.dtype == "float32" else 2
    members, layers, calls = grouping(shape.layers, shape.directions, by_layer or projected)
    found = [
        fastest(
            families, sizes_of(shape.cell, shape.B, shape.H, itemsize, shape.precision, backward, packed),
            shape.T, members, layers, gpu,
        )
        for backward in passes
    ]  # fmt: skip
    able = [each for each in found if each is not None]
    names = tuple(name for name, _ in able) if len(able) == len(found) else ()
    ours = calls * (sum(run.us for _, run in able) + sum(CALL_US[: len(passes)])) / shape.T if names else float("inf")
    theirs = cudnn.call_us(shape, gpu, packed, projected) / shape.T
    return Forecast(theirs, cudnn.algorithm(shape, gpu, packed=packed, projected=projected), ours, names)
