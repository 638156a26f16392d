"""What runs a cell of a user's own: a name of `rnnfast.reference.CELLS` that the kernels know, or its equations alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnfast.choice import kernel_plan
from rnnfast.choice.decide import Decision, decide, tell
from rnnfast.derive.definition import Cell
from rnnfast.reference import Cell as Spec
from rnnfast.torch_private import forward_level, innermost_transform

__all__ = ["Variant", "announce", "decided", "held", "variant"]


class Variant(NamedTuple):
    """A cell with its numbers.

    Attributes:
        cell: what `rnnfast.ops.group` and `rnnfast.reference.group` take: a name, or the equations, which the second alone
            takes.
        unfused: why there are no kernels of it; empty if there are.
    """

    cell: str | Spec
    unfused: str


def variant(cell: Cell, constants: Mapping[str, Any]) -> Variant:
    """The cell with these numbers. The first call derives and checks its kernels, which may take a second."""
    from rnnfast.derive import registry  # which those who import rnnfast do not all need

    try:
        return Variant(registry.fused(cell, **constants), "")
    except registry.CannotFuse as error:
        return Variant(registry.spec(cell, **constants), str(error))


def _own_layer(cell: Cell) -> str:
    return f"PyTorch has no layer of the cell `{cell.name}`"


def decided(cell: Cell, found: Variant, backend: str | None, tensor: Tensor, **facts: Any) -> Decision:
    """What `rnnfast.choice.decide.decide` makes of a well-formed call with the input `tensor`."""
    device, unchecked = tensor.device, ""
    # as of torch.nn's layers: not in compiled code, nor inside a transform
    if not torch.compiler.is_compiling() and innermost_transform() is None and forward_level() < 0:
        unchecked = kernel_plan.unchecked(found.cell, tensor) if isinstance(found.cell, str) else ""
    return decide(
        backend,
        device.type,
        device.index,
        tensor.dtype,
        own_layer=_own_layer(cell),
        obstacle=found.unfused,
        torch_wins=unchecked,
        **facts,
    )


def announce(cell: Cell, chosen: Decision) -> None:
    """Say that what was asked for does not run: see `rnnfast.choice.decide.tell`."""
    if chosen.gives_way:
        tell(chosen.asked, chosen.asked_by, chosen.gives_way, _own_layer(cell), chosen.unfused)


def checkpoints(recompute: bool, chosen: Decision) -> bool:
    """Whether a call with this ``recompute`` keeps less. torch.func refuses PyTorch's checkpoint, by which the equations do."""
    return recompute and (chosen.runner == "kernels" or (torch.is_grad_enabled() and not chosen.inside))


def held(learned: list[Tensor], rows: list[Tensor], place: int) -> Tensor | None:
    """The held tiles of one place, (B or 1, E*H), of learned vectors (H,) and rows (places or 1, B or 1, H)."""
    tiles = [vector[None] for vector in learned] + [row[place if row.shape[0] > 1 else 0] for row in rows]
    if not tiles:
        return None
    most = max([tile.shape[0] for tile in tiles])
    return torch.cat([tile.expand(most, -1) for tile in tiles], dim=-1)
