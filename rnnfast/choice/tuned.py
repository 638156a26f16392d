"""Looks up what `rnnfast tune` measured: which kernels run a call, or that PyTorch's own layer is faster.

A process reads the tuning file of a GPU (`rnnfast.choice.tuning_file`) once, at the first call on that GPU. It also reads the
table that the package may bring for this kind of GPU, for what the user's file does not have. A file that is damaged, or from
another GPU or other versions, is not used. One `TuningWarning` then says why. docs/tuning.md says which calls an entry serves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnfast.choice.gpu import known
from rnnfast.choice.obstacles import user_level
from rnnfast.choice.pipeline import grouping
from rnnfast.choice.tuning_file import Entry, Shape, Unusable, plan_with, read, slug, tiles, where

if TYPE_CHECKING:
    from rnnfast.kernels.persistent.limits import GpuLimits

__all__ = [
    "Candidate",
    "Table",
    "TuningWarning",
    "candidate",
    "has",
    "kernels",
    "learn",
    "only",
    "override_tuning",
    "shipped",
    "table",
    "winner",
]

_tables: dict[GpuLimits, Table] = {}


class TuningWarning(UserWarning):
    """The tuning file of this GPU, or the package's table for it, is not used. The message says why."""


@dataclass
class Table:
    """The entries for one GPU, and where they come from.

    Attributes:
        entries: the entries of the user's file, then those of the package's table, then those that this process measured. Empty
            if there are none.
        path: the path of the file that is used, or both paths in words.
        unused: why neither is used, else empty.
        own: the shapes that a first call in this process measured, or tried to measure without a result. No file has them.
    """

    entries: list[Entry]
    path: Path | str | None = None
    unused: str = ""
    own: frozenset[Shape] = frozenset()
    found: dict[tuple, Any] = field(default_factory=dict)  # results of lookups, by their arguments


def table(gpu: GpuLimits) -> Table:
    """The table for `gpu`. Its files are read at the first call."""
    if gpu not in _tables:
        own, ours = _read(where(gpu), gpu, False), _read(shipped(gpu), gpu, True)
        if own.unused and not ours.unused:
            own = Table([], ours.path)
        elif not ours.unused:
            own.path = f"{own.path} and {ours.path}"
        measured = {replace(entry.shape, T=1) for entry in own.entries}
        own.entries += [entry for entry in ours.entries if replace(entry.shape, T=1) not in measured]
        _tables[gpu] = own
    return _tables[gpu]


def shipped(gpu: GpuLimits) -> Path:
    """The table for this kind of GPU that comes with the package, there or not."""
    return Path(__file__).parents[1] / "tuned" / f"{slug(gpu)}.json"


def _read(path: Path, gpu: GpuLimits, is_shipped: bool) -> Table:
    try:
        return Table(read(path, gpu, is_shipped), path)
    except FileNotFoundError:
        return Table([], path, f"there is no {path}")
    except Unusable as error:
        warnings.warn(f"{error}; it is not used", TuningWarning, stacklevel=user_level())
        return Table([], path, str(error))


@contextmanager
def override_tuning(gpu: GpuLimits, entries: list[Entry]) -> Iterator[None]:
    """Use these entries for `gpu` in place of its file, within the ``with`` block."""
    before = _tables.get(gpu)
    _tables[gpu] = Table(entries)
    known.clear()
    try:
        yield
    finally:
        del _tables[gpu]
        known.clear()
        if before is not None:
            _tables[gpu] = before


@dataclass(frozen=True, eq=False)
class Candidate:
    """An entry that is being measured. Each is equal to itself alone, so that choices made for it are kept apart."""

    entry: Entry


candidate: ContextVar[Candidate | None] = ContextVar("rnnfast candidate", default=None)


@contextmanager
def only(trial: Candidate) -> Iterator[None]:
    """Run the kernels of this candidate, whatever was measured, within the ``with`` block and in this thread."""
    token = candidate.set(trial)
    try:
        yield
    finally:
        candidate.reset(token)


def learn(gpu: GpuLimits, entries: Iterable[Entry], own: Iterable[Shape] = ()) -> None:
    """Follow these entries from now on in this process, in place of those of the same shapes. Writes no file.

    Args:
        own: as in `Table`.
    """
    before = table(gpu)
    merged = {entry.shape: entry for entry in (*before.entries, *entries)}
    # a new table, because another thread may be adding to what lookups in the old one gave
    _tables[gpu] = Table([*merged.values()], before.path, "" if merged else before.unused, before.own.union(own))
    known.clear()


def has(gpu: GpuLimits, shape: Shape) -> bool:
    """Whether this very shape was measured, or tried in this process. T counts by powers of two."""
    here = table(gpu)
    key = "has", *_key(shape)
    if key not in here.found:
        shapes = (*(entry.shape for entry in here.entries), *here.own)
        here.found[key] = any(_distance(shape.T, each) == 0 and replace(each, T=shape.T) == shape for each in shapes)
    return here.found[key]


def _key(shape: Shape) -> tuple:
    """What a lookup depends on. `dataclasses.replace` would take ten times as long."""
    sizes = shape.T.bit_length(), shape.B, shape.I, shape.H, shape.layers, shape.directions
    return shape.cell, shape.dtype, shape.precision, *sizes, shape.training


def _long_enough(T: int, shape: Shape) -> bool:
    """Whether a measurement at `shape.T` steps serves `T` steps. It does not serve much shorter sequences.

    The time of a step includes a share of the fixed cost of a call. This share is larger in a short sequence.
    """
    return T.bit_length() >= shape.T.bit_length() - 2


def _distance(T: int, shape: Shape) -> int:
    return abs(T.bit_length() - shape.T.bit_length())


def winner(gpu: GpuLimits, shape: Shape) -> str | None:
    """What was the fastest for this shape: "torch", PyTorch's own layer, or "triton"; None if it was not measured.

    The entry may have another T, the nearest one counts.
    """
    here = table(gpu)
    if not here.entries:
        return None
    key = _key(shape)
    if key not in here.found:
        near = [e for e in here.entries if replace(e.shape, T=shape.T) == shape and _long_enough(shape.T, e.shape)]
        near.sort(key=lambda entry: _distance(shape.T, entry.shape))
        here.found[key] = near[0].winner if near else None
    return here.found[key]


def kernels(
    gpu: GpuLimits, cell: str, T: int, B: int, H: int, dtype: str, precision: str, training: bool, members: int = 1,
    layers: bool = False,
) -> Entry | None:  # fmt: skip
    """The entry whose kernels run a group of recurrences, with its plans made for `B` rows. None if nothing was measured.

    The group does not depend on the input size, nor on how many groups a module has. Entries with half to twice as many rows
    serve it if the planner has their tiles for `B` rows. The nearest of them is taken.

    Args:
        members, layers: the group, as in `rnnfast.choice.pipeline.grouping`.
        others: as in `Shape`.
    """
    here = table(gpu)
    if not here.entries:
        return None
    key = (cell, T.bit_length(), B, H, dtype, precision, training, members, layers)
    if key not in here.found:
        wanted = (cell, dtype, precision, H, training)
        near = []
        for entry in here.entries:
            shape = entry.shape
            same = (shape.cell, shape.dtype, shape.precision, shape.H, shape.training) == wanted
            same = same and grouping(shape.layers, shape.directions)[:2] == (members, layers)
            if same and B <= 2 * shape.B and shape.B <= 2 * B and _long_enough(T, shape):
                distance = (abs(math.log(B / shape.B)), _distance(T, shape), shape.layers, shape.directions, shape.I)
                near.append((distance, entry))
        fitting = (_for_rows(entry, B, gpu) for _, entry in sorted(near, key=lambda pair: pair[0]))
        here.found[key] = next(filter(None, fitting), None)
    return here.found[key]


def _for_rows(entry: Entry, B: int, gpu: GpuLimits) -> Entry | None:
    """The entry with its plans made for `B` rows, of as many members at once; None if the planner has no such plan."""
    found = []
    for plan, backward in ((entry.forward, False), (entry.backward, True)):
        made = plan and plan_with(tiles(plan), entry.shape, B, backward, gpu, entry.members[backward])
        if plan and not made:
            return None
        found.append(made)
    return replace(entry, forward=found[0], backward=found[1])
