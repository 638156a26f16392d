"""Gives each derived cell a name, by which the operators and the kernels know it."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

from rnnfast import reference
from rnnfast.cells import builtin
from rnnfast.derive import cache
from rnnfast.derive.definition import Cell
from rnnfast.derive.deriving import Derived, derive
from rnnfast.derive.recording import CannotFuse
from rnnfast.torch_private import constant

if TYPE_CHECKING:
    from rnnfast.kernels.cells import Cell as KernelCell

__all__ = ["CannotFuse", "derived", "fused", "kernel_cell", "spec"]

_turn = threading.RLock()
_found: dict[tuple, Derived | CannotFuse] = {}  # of each cell and its numbers
_names: dict[tuple, str] = {}
_sources: dict[str, Derived] = {}
_kernels: dict[str, KernelCell] = {}


def _key(cell: Cell, numbers: dict[str, Any]) -> tuple:
    return (cell, *((name, type(value), value) for name, value in sorted(numbers.items())))


@constant
def derived(cell: Cell, **constants: Any) -> Derived:
    """What becomes of the cell with these numbers, and its defaults for the others. It is derived once in a process.

    Raises:
        CannotFuse: why the kernels cannot run it.
        TypeError: the cell has no such number, or a value is none.
    """
    numbers = cell.numbers(**constants)
    key = _key(cell, numbers)
    with _turn:
        if key not in _found:
            try:
                _found[key] = derive(cell, numbers)
            except CannotFuse as error:
                _found[key] = error
        found = _found[key]
    if isinstance(found, CannotFuse):
        raise CannotFuse(*found.args)
    return found


@constant
def fused(cell: Cell, **constants: Any) -> str:
    """The name in `rnnfast.reference.CELLS` of the cell with these numbers. It is derived, verified and added when first asked
    for. The cells of torch.nn have been: their kernels are in `rnnfast.kernels.cells`.

    Raises:
        CannotFuse, TypeError: as for `derived`.
    """
    if getattr(builtin, cell.name, None) is cell:
        return cell.name
    numbers = cell.numbers(**constants)
    key = _key(cell, numbers)
    if (name := _names.get(key)) is not None:
        return name
    found = derived(cell, **constants)
    name = f"{cell.name}_{cache.digest(found.source)}"
    with _turn:
        _sources[name] = found
        reference.CELLS[name] = _spec(cell, numbers, found)
        _names[key] = name
    return name


def spec(cell: Cell, **constants: Any) -> reference.Cell:
    """What `rnnfast.reference` has to know of a cell that the kernels cannot run: its equations in plain PyTorch.

    Raises:
        TypeError: the cell has no such number, or a value is none.
    """
    return _spec(cell, cell.numbers(**constants), None)


def _spec(cell: Cell, numbers: dict[str, Any], found: Derived | None) -> reference.Cell:
    gates, states = len(cell.gates), len(cell.states)
    return reference.Cell(
        functools.partial(cell.step, constants=numbers), states=states, gates=gates, saved=len(found.saved) if found else 0,
        grads=found.grads if found else gates, held=len(cell.held), noise=len(cell.noise), recurrent=cell.recurrent,
        rows=bool(found and found.rows), kept32=len(found.kept32) if found else 0,
        reads_h_before=bool(found and found.reads_h_before),
    )  # fmt: skip


def kernel_cell(name: str) -> KernelCell:
    """What the kernels have to know of the cell of this name: one that `fused` gave, or one of torch.nn's. Imports Triton.

    Raises:
        KeyError: there is none in this process.
    """
    from rnnfast.kernels import cells

    if name in cells.CELLS:
        return cells.CELLS[name]
    with _turn:
        if name not in _kernels:
            found = _sources[name]
            module = cache.load(name, found.source)
            _kernels[name] = cells.Cell(
                gates=found.gates, saved=len(found.saved), grads=found.grads, carried=found.carried, direct=found.direct,
                forward=module.forward, backward=module.backward, held=found.held, noise=found.noise,
                recurrent=found.recurrent, rows=found.rows,
            )  # fmt: skip
        return _kernels[name]
