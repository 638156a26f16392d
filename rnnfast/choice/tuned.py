"""Looks up what `rnnfast tune` measured: which kernels run a call, or that PyTorch's own layer is faster.

A process reads the tuning file of a GPU (`rnnfast.choice.tuning_file`) once, at the first call on that GPU. A file that is
damaged, or from another GPU or other versions, is not used. One `TuningWarning` then says why. docs/tuning.md says which calls
an entry serves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnfast.choice.gpu import known
from rnnfast.choice.obstacles import user_level
from rnnfast.choice.tuning_file import Entry, Shape, Unusable, plan_with, read, tiles, where

if TYPE_CHECKING:
    from rnnfast.kernels.persistent.plan import GpuLimits

__all__ = ["Table", "TuningWarning", "kernels", "override_tuning", "table", "torch_wins"]

_tables: dict[GpuLimits, Table] = {}


class TuningWarning(UserWarning):
    """The tuning file of this GPU is not used. The message says why."""


@dataclass
class Table:
    """The entries for one GPU, and where they come from.

    Attributes:
        entries: the entries of the file. Empty if no file is used.
        path: the path of the file.
        unused: why the file is not used, else empty.
    """

    entries: list[Entry]
    path: Path | None = None
    unused: str = ""
    found: dict[tuple, Any] = field(default_factory=dict)  # results of lookups, by their arguments


def table(gpu: GpuLimits) -> Table:
    """The table for `gpu`. Its file is read at the first call."""
    if gpu not in _tables:
        path = where(gpu)
        try:
            _tables[gpu] = Table(read(path, gpu), path)
        except FileNotFoundError:
            _tables[gpu] = Table([], path, f"there is no {path}")
        except Unusable as error:
            _tables[gpu] = Table([], path, str(error))
            warnings.warn(f"{error}; it is not used", TuningWarning, stacklevel=user_level())
    return _tables[gpu]


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


def _long_enough(T: int, shape: Shape) -> bool:
    """Whether a measurement at `shape.T` steps serves `T` steps. It does not serve much shorter sequences.

    The time of a step includes a share of the fixed cost of a call. This share is larger in a short sequence.
    """
    return T.bit_length() >= shape.T.bit_length() - 2


def _distance(T: int, shape: Shape) -> int:
    return abs(T.bit_length() - shape.T.bit_length())


def torch_wins(gpu: GpuLimits, shape: Shape) -> bool:
    """Whether PyTorch's own layer was the fastest for this shape. The entry may have another T, the nearest one counts."""
    here = table(gpu)
    if not here.entries:
        return False
    key = replace(shape, T=1), shape.T.bit_length()
    if key not in here.found:
        near = [e for e in here.entries if replace(e.shape, T=shape.T) == shape and _long_enough(shape.T, e.shape)]
        near.sort(key=lambda entry: _distance(shape.T, entry.shape))
        here.found[key] = bool(near) and near[0].winner == "torch"
    return here.found[key]


def kernels(gpu: GpuLimits, cell: str, T: int, B: int, H: int, dtype: str, precision: str, training: bool) -> Entry | None:
    """The entry whose kernels run a recurrence, with its plans made for `B` rows. None if nothing was measured.

    The recurrence does not depend on the input size, the layer and the direction. Entries with half to twice as many rows serve
    it, and the nearest of them is taken. The arguments are those of `Shape`.
    """
    here = table(gpu)
    if not here.entries:
        return None
    key = (cell, T.bit_length(), B, H, dtype, precision, training)
    if key not in here.found:
        wanted = (cell, dtype, precision, H, training)
        near = []
        for entry in here.entries:
            shape = entry.shape
            same = (shape.cell, shape.dtype, shape.precision, shape.H, shape.training) == wanted
            if same and B <= 2 * shape.B and shape.B <= 2 * B and _long_enough(T, shape):
                distance = (abs(math.log(B / shape.B)), _distance(T, shape), shape.layers, shape.directions, shape.I)
                near.append((distance, entry))
        here.found[key] = _for_rows(min(near, key=lambda pair: pair[0])[1], B, gpu) if near else None
    return here.found[key]


def _for_rows(entry: Entry, B: int, gpu: GpuLimits) -> Entry:
    plans = [
        plan and plan_with(tiles(plan), entry.shape, B, backward, gpu)
        for plan, backward in ((entry.forward, False), (entry.backward, True))
    ]
    return replace(entry, forward=plans[0], backward=plans[1])
