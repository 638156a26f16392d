"""From a cell to its two Triton functions, and to what the kernels have to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rnnfast.derive import printing, saving
from rnnfast.derive.definition import Cell
from rnnfast.derive.expressions import Expr, inputs_of, is_zero, may_overflow
from rnnfast.derive.printing import Argument
from rnnfast.derive.recording import CannotFuse, Recorded, alone, place, record
from rnnfast.derive.verify import check

__all__ = ["MOST_GATES", "MOST_NOISE", "Derived", "derive"]

MOST_GATES, MOST_NOISE = 8, 4  # of a kernel: a power of two, and the words that one call of Philox gives


@dataclass(frozen=True)
class Derived:
    """What became of a cell with these numbers. `rnnfast.kernels.cells` explains what is counted.

    Attributes:
        source: a Python file with the ``@triton.jit`` functions ``forward`` and ``backward``.
        saved: what forward saves in the dtype of the input, in order: names, or texts where there is none.
        kept32: what it saves in float32, as carried states after the cell's own.
        gates, grads, carried, held, noise: counts.
        direct, recurrent, rows: see there.
        reads_h_before: whether backward reads h_{t-1}.
    """

    source: str
    saved: tuple[str, ...]
    kept32: tuple[str, ...]
    gates: int
    grads: int
    carried: int
    held: int
    noise: int
    direct: bool
    recurrent: bool
    rows: bool
    reads_h_before: bool


def derive(cell: Cell, constants: dict[str, Any]) -> Derived:
    """Derive the cell, and compare what was derived with autograd in float64.

    Args:
        cell: the cell.
        constants: all its numbers.

    Raises:
        CannotFuse: why the kernels cannot run it.
    """
    for count, most, what in ((len(cell.gates), MOST_GATES, "gates"), (len(cell.noise), MOST_NOISE, "noise arguments")):
        if count > most:
            raise CannotFuse(
                f"{place(cell.function)}: {count} {what}, and the kernels take {most} at most. Split it in two layers"
            )
    return alone(_derive, cell, constants)


def _derive(cell: Cell, constants: dict[str, Any]) -> Derived:
    recorded = record(cell, constants)
    d_x, d_h, G = recorded.d_x, recorded.d_h, len(cell.gates)
    differ = [g for g in range(len(d_h)) if d_x[g] is not d_h[g] and not (is_zero(d_x[g]) and is_zero(d_h[g]))]
    apart = G - differ[0] if differ else 0
    d_gates = [*d_x[G - apart :], *d_h] if cell.recurrent else d_x
    kept, kept32 = _saved(cell, recorded, [*d_gates, *recorded.d_states, *recorded.d_held])
    about = f"The cell `{cell.name}`, made by rnnfast.derive. Forward saves {_listed(kept, 'nothing')}"
    about += f", and in float32 {_listed(kept32, '')}." if kept32 else "."
    if constants:
        about += f" Numbers: {', '.join(f'{name} = {value!r}' for name, value in constants.items())}."
    _name_gradients(cell, recorded)
    functions, rows, reads = _functions(recorded, kept, kept32, d_gates)
    found = Derived(
        printing.module(cell.function, about, functions), tuple(_named(e) for e in kept), tuple(_named(e) for e in kept32),
        G, G + apart, len(cell.states) - 1 + len(kept32), len(cell.held), len(cell.noise), not is_zero(recorded.d_states[0]),
        cell.recurrent, rows, recorded.leaves[G + len(d_h)] in reads,
    )  # fmt: skip
    check(cell, constants, found)
    return found


def _saved(cell: Cell, recorded: Recorded, backward: list[Any]) -> tuple[list[Expr], list[Expr]]:
    """The tiles to save in the dtype of the input and in float32: what the author said first, then the minimum cut."""
    kept: dict[Expr, bool] = {}
    for value, float32 in recorded.kept:
        if not isinstance(value, Expr) or value.is_bool:
            raise CannotFuse(
                f"{place(cell.function)}: keep() was given a constant or a comparison, where it saves tiles of numbers"
            )
        kept[value] = kept.get(value, False) or float32 or may_overflow(value)
    free = {leaf for leaf in recorded.leaves if leaf.args[0] in ("state", "given", "noise")}
    free |= {new for new in recorded.new_states if isinstance(new, Expr)} | set(kept)
    for expr in saving.saved(backward, free):
        kept[expr] = may_overflow(expr)
    late = saving.of_gradients(inputs_of([*kept, *recorded.new_states]), set())
    if late:
        raise AssertionError(f"{place(cell.function)}: forward would need the gradient {_named(next(iter(late)))}")
    return [expr for expr in kept if not kept[expr]], [expr for expr in kept if kept[expr]]


def _name_gradients(cell: Cell, recorded: Recorded) -> None:
    """Names for the reader: d_f of both sides of gate f, d_x_f and d_h_f where they differ, d_c_before of a state."""
    d_x, d_h = recorded.d_x, recorded.d_h
    titles = [(value, f"d_{name}") for value, name in zip(d_x, cell.gates, strict=True) if not d_h or value in d_h]
    titles += [(value, f"d_x_{name}") for value, name in zip(d_x, cell.gates, strict=True)]
    titles += [(value, f"d_h_{name}") for value, name in zip(d_h, cell.gates, strict=False)]
    titles += [(value, f"d_{name}_before") for value, name in zip(recorded.d_states, cell.states, strict=True)]
    titles += [(value, f"d_{name}") for value, name in zip(recorded.d_held, cell.held, strict=True)]
    for value, title in titles:
        if isinstance(value, Expr) and value.op != "leaf":
            value.name = value.name or title


def _named(expr: Expr) -> str:
    return f"{expr.args[0]}.{expr.args[2]}" if expr.op == "leaf" else expr.name or expr.op


def _listed(kept: list[Expr], nothing: str) -> str:
    return ", ".join(_named(expr) for expr in kept) or nothing


def _functions(
    recorded: Recorded, kept: list[Expr], kept32: list[Expr], d_gates: list[Any]
) -> tuple[list[str], bool, set[Expr]]:
    """The texts of forward and backward, whether they need whole rows, and what backward needs."""
    of = {
        kind: [leaf for leaf in recorded.leaves if leaf.args[0] == kind] for kind in ("x", "h", "state", "given", "noise", "d")
    }
    names = [leaf.args[2] for leaf in of["state"]]
    wide = [expr.name or f"kept{n}" for n, expr in enumerate(kept32)]
    given = [*of["given"], *of["noise"]]
    nothing = [None] * len(kept32)  # a state that is there to be saved: nobody reads it before the step, or its gradient
    states = Argument("states", [*of["state"], *nothing], names + wide)
    givens = Argument("given", given, [leaf.args[2] for leaf in given])
    forward = [
        Argument("x_gates", of["x"], [f"x_{leaf.args[2]}" for leaf in of["x"]]),
        Argument("h_gates", of["h"], [f"h_{leaf.args[2]}" for leaf in of["h"]]),
        states,
        givens,
    ]
    after = [new if isinstance(new, Expr) and new.op != "leaf" else None for new in recorded.new_states]
    titles = [f"{expr.args[0]}_{expr.args[2]}" if expr.op == "leaf" else expr.name or f"s{n}" for n, expr in enumerate(kept)]
    backward = [
        Argument("saved", kept, titles),
        states,
        Argument("new_states", [*after, *kept32], [f"new_{name}" for name in names] + wide),
        givens,
        Argument("d_states", [*of["d"], *nothing], [f"d_{name}" for name in names + wide]),
    ]
    gradients = [d_gates, [*recorded.d_states, *[0.0] * len(kept32)], recorded.d_held]
    results = [[*recorded.new_states, *kept32], kept]
    roots = [root for group in gradients for root in group]
    rows = any(expr.op == "row_mean" for expr in inputs_of([*results[0], *kept, *roots]))
    texts = [
        printing.function("forward", forward, results, "states[0]", rows),
        printing.function("backward", backward, gradients, "d_states[0]", rows),
    ]
    known = {expr for argument in backward for expr in argument.tiles if expr is not None}
    return texts, rows, set(inputs_of(roots, known))
