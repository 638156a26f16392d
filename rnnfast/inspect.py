"""`inspect` shows what becomes of a cell: its equations, the Triton derived from them, and what the kernels save."""

from __future__ import annotations

import ast
import inspect as sources
import textwrap
from dataclasses import dataclass
from typing import Any

import torch

from rnnfast.derive.definition import Cell
from rnnfast.derive.recording import CannotFuse, alone, place, record
from rnnfast.derive.registry import Derived, derived

__all__ = ["Inspection", "Saved", "inspect"]


@dataclass(frozen=True)
class Saved:
    """A tile that forward saves for backward.

    Attributes:
        name: the author's variable, or the side of a gate as ``x.f``; an operator where it has no name.
        float32: whether it is saved in float32; else in the dtype of the input.
        by_keep: whether the author asked for it by `rnnfast.keep`; else the derivation chose it.
        needed_for: the gradients that backward computes from it: ``x.f``, ``h.f``, a state or a learned vector.
    """

    name: str
    float32: bool
    by_keep: bool
    needed_for: tuple[str, ...]

    def bytes(self, dtype: torch.dtype) -> int:
        """Of a unit and step, for an input of this dtype."""
        return 4 if self.float32 else dtype.itemsize


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. ``print`` shows it.

    Attributes:
        cell: the cell.
        numbers: its numbers.
        equations: the source of its function.
        refusal: why the kernels cannot run it; empty if they can. What follows is empty otherwise.
        forward, backward: the derived Triton.
        saved: what forward saves besides the states.
        carried: the states besides h, which the kernels keep in float32, of every step.
        apart: the gates whose two sides have gradients of their own, so that one block more is stored for each.
        direct: whether h reaches the next h by a way other than W_hh.
        rows: whether the cell needs means of whole rows.
        families: of kernels that can run it, where they have a plan for the size.
        runs: whether the equations run, in plain PyTorch. False if the function itself raises an error.
    """

    cell: Cell
    numbers: dict[str, Any]
    equations: str
    refusal: str = ""
    forward: str = ""
    backward: str = ""
    saved: tuple[Saved, ...] = ()
    carried: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    direct: bool = False
    rows: bool = False
    families: tuple[str, ...] = ()
    runs: bool = True

    def bytes(self, dtype: torch.dtype) -> int:
        """What training keeps of a unit and step for backward besides the output, for an input of this dtype: what is saved,
        and the carried states."""
        return sum(tile.bytes(dtype) for tile in self.saved) + 4 * len(self.carried)

    def __str__(self) -> str:
        cell = self.cell
        lines = [place(cell.function), f"  gates      {', '.join(cell.gates)}", f"  states     {self._states()}"]
        told = {
            "learned": ", ".join(f"{name} ({_began(learned.init)})" for name, learned in cell.learned.items()),
            "rows": ", ".join(cell.rows),
            "noise": ", ".join(cell.noise),
            "numbers": ", ".join(f"{name} = {value!r}" for name, value in self.numbers.items()),
        }
        lines += [f"  {title:10} {text}" for title, text in told.items() if text]
        if self.refusal:
            what = "not fused: it runs by its equations in plain PyTorch" if self.runs else "it runs nowhere"
            lines += ["", what, textwrap.indent(self.refusal, "  ")]
        else:
            lines += self._fused()
        lines += ["", "equations", textwrap.indent(self.equations, "  ")]
        for title in ("forward", "backward") if not self.refusal else ():
            lines += ["", f"{title} in Triton", textwrap.indent(getattr(self, title), "  ")]
        return "\n".join(lines)

    def _states(self) -> str:
        cell = self.cell
        product = f"{cell.states[0]} is what W_hh multiplies" if cell.recurrent else "no W_hh"
        return f"{', '.join(cell.states)}; {cell.states[cell.output]} is the output; {product}"

    def _fused(self) -> list[str]:
        lines = [f"  kernels    {', '.join(self.families)}"]
        if self.rows:
            lines += ["  means      of whole rows: a second launch a step, or a sum within a program"]
        if self.apart:
            lines += [f"  apart      {', '.join(self.apart)}: the two sides have gradients of their own"]
        if self.direct:
            lines += [f"  direct     {self.cell.states[0]} reaches the next step without W_hh, too"]
        half, full = (self.bytes(dtype) for dtype in (torch.float16, torch.float32))
        lines += ["", f"kept for backward besides the output: {half} bytes a unit and step in float16, {full} in float32"]
        for tile in self.saved:
            size = "4" if tile.float32 else "2 or 4"
            why = "by keep()" if tile.by_keep else "chosen"
            lines += [f"  {tile.name:10} {size:6} bytes  saved, {why}; for the gradients of {', '.join(tile.needed_for)}"]
        return lines + [f"  {name:10} 4      bytes  a state, carried in float32" for name in self.carried]


def _began(init: float | None) -> str:
    return "uniform in +-1 / sqrt(H)" if init is None else f"begins at {init:g}"


def inspect(cell: Cell, **constants: Any) -> Inspection:
    """Show what becomes of a cell in the kernels. Runs the function a few times on small CPU tensors, and needs neither a GPU
    nor Triton.

    Args:
        cell: what `rnnfast.cell` made of a function.
        constants: numbers of the cell other than its defaults.

    Returns:
        An `Inspection`; its ``str`` is for people. Of a cell that cannot be fused it has the equations and the refusal.

    Raises:
        TypeError: `cell` is no cell, or has no such number.

    Example:
        >>> found = rnnfast.inspect(rnnfast.cells.cifg)
        >>> [tile.name for tile in found.saved], found.bytes(torch.float16)
        (['f', 'o', 'z'], 10)
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"cell should be what rnnfast.cell makes of a function, got: {type(cell).__name__}")
    numbers = cell.numbers(**constants)
    try:
        equations = textwrap.dedent(sources.getsource(cell.function)).rstrip()
    except OSError:  # typed in, not in a file
        equations = "(its source is not in a file)"
    try:
        found = derived(cell, **constants)
    except CannotFuse as error:
        return Inspection(cell, numbers, equations, str(error), runs=_runs(cell, numbers))
    forward, backward = (_function(found.source, name) for name in ("forward", "backward"))
    families = (
        ("scan",) if not cell.recurrent else ("step", "one_program") if found.rows else ("step", "persistent", "one_program")
    )
    apart = cell.gates[len(cell.gates) - (found.grads - found.gates) :] if cell.recurrent else ()
    return Inspection(
        cell, numbers, equations, "", forward, backward, _saved(cell, numbers, found, backward), cell.states[1:], apart,
        found.direct, found.rows, families,
    )  # fmt: skip


def _runs(cell: Cell, numbers: dict[str, Any]) -> bool:
    """Whether the function runs on tensors (2, 3), as the equations run it."""
    tile = torch.zeros(2, 3)
    hidden = [tile] * len(cell.gates) if cell.recurrent else None
    given = [tile] * (len(cell.held) + len(cell.noise))
    try:
        cell.run([tile] * len(cell.gates), hidden, [tile] * len(cell.states), given, numbers)
    except Exception:  # whatever the author's code raises
        return False
    return True


def _function(source: str, name: str) -> str:
    """The text of one function of a file."""
    node = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    return "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])


def _saved(cell: Cell, numbers: dict[str, Any], found: Derived, backward: str) -> tuple[Saved, ...]:
    asked: dict[Any, bool] = {}
    for value, float32 in alone(record, cell, numbers).kept:
        asked[value] = asked.get(value, False) or float32
    needs = _needs(cell, found, backward)
    tiles = []
    for float32, names in ((False, found.saved), (True, found.kept32)):
        own = sum(wide == float32 for wide in asked.values())
        for position, name in enumerate(names):
            where = ("saved", position) if not float32 else ("new_states", len(cell.states) + position)
            tiles.append(Saved(name, float32, position < own, needs.get(where, ())))
    return tuple(tiles)


def _needs(cell: Cell, found: Derived, backward: str) -> dict[tuple[str, int], tuple[str, ...]]:
    """For each argument of the derived backward, such as ("saved", 0), the gradients that depend on it."""
    function = ast.parse(backward).body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = {argument.arg for argument in function.args.args}
    known: dict[str, set[tuple[str, int]]] = {}

    def of(node: ast.AST) -> set[tuple[str, int]]:
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in arguments:
            assert isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int)
            return {(node.value.id, node.slice.value)}
        names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        return set().union(*(known.get(name, set()) for name in names))

    result: ast.expr | None = None
    for line in function.body:
        if isinstance(line, ast.Return):
            result = line.value
        elif isinstance(line, ast.Assign):
            target, value = line.targets[0], line.value
            if isinstance(target, ast.Tuple):
                assert isinstance(value, ast.Name)
                for position, each in enumerate(target.elts):
                    known[each.id] = {(value.id, position)}  # type: ignore[attr-defined]
            else:
                known[target.id] = of(value)  # type: ignore[attr-defined]
    assert isinstance(result, ast.Tuple)
    k = found.grads - found.gates
    gates = [
        *(f"x.{name}" for name in cell.gates[found.gates - k :] if k),
        *(f"h.{name}" if k else name for name in cell.gates),
    ]
    titles = [gates, [f"s.{name}" for name in cell.states], list(cell.held)]
    needs: dict[tuple[str, int], tuple[str, ...]] = {}
    for group, names in zip(result.elts, titles, strict=True):
        assert isinstance(group, ast.Tuple)
        for node, name in zip(group.elts, names, strict=False):
            for argument in of(node):
                needs[argument] = (*needs.get(argument, ()), name)
    return needs
