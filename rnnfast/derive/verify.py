"""Runs derived source in float64, as PyTorch, against the author's function and autograd.

Whatever was recorded, cut or printed wrongly shows here at the size of rounding errors. It takes milliseconds, so it is done
each time that a cell is derived.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnnfast.derive.definition import Cell
from rnnfast.derive.recording import SHAPE, CannotFuse, place

if TYPE_CHECKING:
    from rnnfast.derive.deriving import Derived

__all__ = ["ALLOWED", "check", "worst"]

ALLOWED = 1e-6  # of the largest entry. PyTorch's hardsigmoid has a sixth in float32, 3e-8 off; others differ by less than 1e-13


def check(cell: Cell, constants: dict[str, Any], derived: Derived) -> None:
    """Compare. To be called by `recording.alone`.

    Raises:
        CannotFuse: what was derived is not what autograd gives.
    """
    difference = worst(cell, constants, derived)
    if not difference <= ALLOWED:
        raise CannotFuse(
            f"{place(cell.function)}: what was derived from it differs from PyTorch's own result and gradients, by "
            f"{difference:.1e} of the largest entry. It may return something else at each call, or read a value that changes. "
            "If not, please report it with the cell"
        )


def worst(cell: Cell, constants: dict[str, Any], derived: Derived, rounds: int = 3) -> float:
    """The largest difference of a new state or a gradient, relative to the largest entry of its kind.

    What a kernel does not promise is NaN here: the states before the step that are there to be saved, and their gradients.
    """
    scope = _functions(derived.source)
    rows = (None, lambda tile, n, row: tile.mean(-1, keepdim=True).expand_as(tile)) if derived.rows else ()
    unread = (torch.full(SHAPE, torch.nan, dtype=torch.float64),) * len(derived.kept32)
    difference = 0.0
    for seed in range(rounds):
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn if seed + 1 < rounds else torch.rand  # the last round for functions of positive numbers

        def draw(names: tuple[str, ...], draws: Any = normal, generator: torch.Generator = generator) -> list[Tensor]:
            return [draws(SHAPE, generator=generator, dtype=torch.float64) for _ in names]

        hidden = cell.gates if cell.recurrent else ()
        x, h, states, held, d = (draw(names) for names in (cell.gates, hidden, cell.states, cell.held, cell.states))
        given = (*held, *draw(cell.noise, torch.rand))
        leaves = [tensor.requires_grad_() for tensor in (*x, *h, *states, *held)]
        new = cell.run(x, h if cell.recurrent else None, states, given, constants)
        pairs = [(a, b) for a, b in zip(new, d, strict=True) if a.requires_grad]
        grads = [None] * len(leaves)
        if pairs:
            grads = torch.autograd.grad([a for a, _ in pairs], leaves, [b for _, b in pairs], allow_unused=True)
        grads = [torch.zeros(SHAPE, dtype=torch.float64) if g is None else g for g in grads]
        with torch.no_grad():
            found, saved = scope["forward"](x, h, (*states, *unread), given, *rows)
            d_gates, d_states, d_held = scope["backward"](saved, (*states, *unread), found, given, (*d, *unread), *rows)
        k, G, S = derived.grads - derived.gates, derived.gates, len(cell.states)
        d_x, d_h = (*d_gates[k:G], *d_gates[:k]), d_gates[k:] if cell.recurrent else ()
        d_states = d_states[:S] if derived.direct else (grads[G + len(hidden)], *d_states[1:S])
        theirs = [*(tensor.detach() for tensor in new), *grads]
        ours = [*found[:S], *d_x, *d_h, *d_states, *d_held]
        difference = max([difference, *(_difference(a, b) for a, b in zip(ours, theirs, strict=True))])
    return difference


def _difference(a: Tensor, b: Tensor) -> float:
    """Relative to the largest finite entry of b. Infinities and NaNs have to be the same."""
    same = (a == b) | (a.isnan() & b.isnan())
    finite = torch.where(b.isfinite(), b, 0)
    error = torch.where(same, 0, (a.detach() - b).abs())
    return float("inf") if error.isnan().any() else float(error.max() / finite.abs().max().clamp(min=1e-3))


def _functions(source: str) -> dict[str, Any]:
    """The functions of this source, of tensors."""

    def tensor(value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)

    tl = SimpleNamespace(
        where=lambda condition, yes, no: torch.where(condition, tensor(yes), tensor(no)),
        maximum=lambda a, b, _: torch.maximum(tensor(a), tensor(b)),
        minimum=lambda a, b, _: torch.minimum(tensor(a), tensor(b)),
        PropagateNan=SimpleNamespace(ALL=None),
        **{
            n: getattr(torch, n)
            for n in ("abs", "cos", "erf", "floor", "full_like", "log", "rsqrt", "sin", "sqrt", "zeros_like")
        },
    )
    scope = {name: getattr(torch, name) for name in ("exp", "expm1", "log1p", "sigmoid", "tanh")}
    scope |= {"tl": tl, "triton": SimpleNamespace(jit=lambda function: function)}
    exec(source[source.index("@triton.jit") :], scope)
    return scope
