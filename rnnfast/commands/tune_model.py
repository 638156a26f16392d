"""Tunes for the recurrent calls of a model: `rnnfast.tune`."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnnfast import run_once
from rnnfast.choice import gpu, tuned, tuning_file
from rnnfast.choice.calls import Seen
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.commands import tune as command
from rnnfast.commands.measure import MODULES, measure
from rnnfast.nn.layer import Layer
from rnnfast.nn.sequence import Sequence
from rnnfast.torch_private import tree_leaves

if TYPE_CHECKING:
    from rnnfast.kernels.persistent.plan import GpuLimits

__all__ = ["Row", "TuningReport", "tune"]


@dataclass(frozen=True)
class Row:
    """What is known of one shape.

    Attributes:
        shape: what was measured.
        calls: the names of the modules that call it; "rnnfast.functional" for its functions.
        times: microseconds a time step of the fastest candidate, by what it runs: "torch.nn", a family of kernels, or two
            families, one forward and one backward.
        new: whether it was measured just now, else the tuning file had it.
        why: why there are no times, else empty.
    """

    shape: Shape
    calls: tuple[str, ...]
    times: dict[str, float]
    new: bool = True
    why: str = ""

    @property
    def winner(self) -> str:
        """What runs these calls from now on."""
        return min(self.times, key=self.times.__getitem__) if self.times else "-"

    @property
    def ratio(self) -> float | None:
        """Its time over torch.nn's; None if one is missing."""
        theirs = self.times.get("torch.nn")
        return self.times[self.winner] / theirs if theirs else None


@dataclass(frozen=True)
class TuningReport:
    """What `rnnfast.tune` found. ``print`` it.

    Attributes:
        rows: one for each shape.
        skipped: the names of the recurrent calls that were not measured, each with its reason.
        paths: the tuning files, one for each kind of GPU.
    """

    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...]
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        lines = [*_table(self.rows), *(f"{row.shape}: {row.why}" for row in self.rows if row.why)]
        lines += [f"not measured: {name}: {reason}" for name, reason in self.skipped]
        new = sum(row.new and not row.why for row in self.rows)
        known = sum(not row.new for row in self.rows)
        where = ", ".join(map(str, self.paths))
        lines += [f"{new} measured, {known} known before; in {where}" if self.rows else "there was nothing to measure"]
        return "\n".join(lines)


def _table(rows: tuple[Row, ...]) -> list[str]:
    """The lines of a table. Columns in which each row would say 1 are left out."""
    if not rows:
        return []
    kinds = sorted({kind for row in rows for kind in row.times}, key=lambda kind: (kind != "torch.nn", kind != "step", kind))
    columns = {"cell": [row.shape.cell for row in rows]}
    columns["dtype"] = ["tf32" if row.shape.precision == "tf32" else row.shape.dtype for row in rows]
    for size in tuning_file.SIZES:
        column = [str(getattr(row.shape, size)) for row in rows]
        if size not in ("layers", "directions") or set(column) != {"1"}:
            columns[size] = column
    columns["mode"] = ["training" if row.shape.training else "inference" for row in rows]
    for kind in kinds:
        columns[kind] = [f"{row.times[kind]:.2f}" if kind in row.times else "-" for row in rows]
    columns["winner"] = [row.winner for row in rows]
    columns["of torch.nn"] = ["-" if row.ratio is None else f"{row.ratio:.2f}" for row in rows]
    columns["calls"] = [", ".join(row.calls) for row in rows]
    texts = []
    for title, column in columns.items():
        width = max(map(len, (title, *column)))
        left = title in ("cell", "dtype", "mode", "winner", "calls")
        texts.append([text.ljust(width) if left else text.rjust(width) for text in (title, *column)])
    lines = ["  ".join(line).rstrip() for line in zip(*texts, strict=True)]
    return ["microseconds a time step, of each kind of kernels the fastest", *lines]


# The calls of a model


def look(
    model: torch.nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Seen], list[tuple[str, torch.nn.Module, Any]]]:
    """Run a model forward, and leave it as it was.

    Returns:
        The recurrent calls of rnnfast; and of the recurrent modules that ran otherwise the name, the module, and the device of
        its input.
    """
    ran: dict[int, tuple[str, torch.nn.Module, Any]] = {}

    def called(name: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        ran[id(module)] = name, module, None if tensor is None else tensor.device

    seen: list[Seen] = []
    run_once.run(model, inputs, kwargs, called, lambda call: seen.append(replace(call, given=())))
    known = {id(call.layer) for call in seen}
    return seen, [each for number, each in ran.items() if number not in known]


def _reason(call: Seen) -> str:
    """Why a call of rnnfast is not measured; empty if it is."""
    if gpu.limits(call.device) is None:
        return f"it ran on {call.device}, where there is no choice: move the model and its inputs to the GPU"
    if call.chosen.obstacles:
        return "; ".join(call.chosen.obstacles)
    if call.chosen.asked not in (None, "triton"):
        return f"{call.chosen.asked!r} is asked for by {call.chosen.asked_by}, so there is nothing to choose"
    return "" if call.cell in MODULES else f"rnnfast.tune has no module of a {call.cell} to measure"


def _other(module: torch.nn.Module, device: Any) -> str:
    """Why a module is not measured that ran without rnnfast's decision."""
    if isinstance(module, torch.nn.RNNCellBase):
        return "a cell, which runs one step a call: there is nothing to choose"
    if isinstance(module, Layer):
        return f"a layer of the cell `{module.cell.name}`: only layers that torch.nn has are measured"
    if isinstance(module, Sequence):
        return f"torch.nn itself serves a call of this form, on {device}"
    return "not rnnfast's: rnnfast.accelerate(model) exchanges it, or says why not"


# What is measured, and how it is shown


@dataclass
class _Wanted:
    """One shape to measure: on which GPU, and for which calls."""

    shape: Shape
    device: torch.device
    limits: GpuLimits
    calls: list[str]


def _wanted(seen: list[Seen], names: dict[int, str]) -> tuple[list[_Wanted], list[tuple[str, str]]]:
    """The shapes of these calls, inference before its training, each once; and the calls that are not measured."""
    found: dict[Any, _Wanted] = {}
    skipped: dict[tuple[str, str], None] = {}
    for call in seen:
        name = run_once.FUNCTION if call.layer is None else names.get(id(call.layer), type(call.layer).__name__)
        if reason := _reason(call):
            skipped[name, reason] = None
            continue
        assert call.shape is not None
        limits = command.ready(call.device)
        name += "" if call.plain else " (measured without its lengths, resets or projection)"
        for training in (False, True) if call.shape.training else (False,):
            shape = replace(call.shape, training=training)
            one = found.setdefault((shape, limits), _Wanted(shape, call.device, limits, []))
            if name not in one.calls:
                one.calls.append(name)
    return list(found.values()), list(skipped)


class _Progress:
    """One line on stderr. At a terminal it is rewritten in place, elsewhere there is a line for each shape."""

    def __init__(self, count: int) -> None:
        self.count, self.done, self.started = count, 0, time.monotonic()
        self.in_place = sys.stderr.isatty()
        self.words = ""

    def begin(self, shape: Shape) -> None:
        left = f"; {command.time_left(self.started, self.done, self.count)}" if self.done else ""
        self.words = f"[{self.done + 1}/{self.count}] {shape}{left}"
        self.done += 1
        if self.in_place:
            self._rewrite(self.words)
        else:
            print(self.words, file=sys.stderr, flush=True)

    def told(self, entry: Entry) -> None:
        """A candidate is being measured."""
        if self.in_place:
            self._rewrite(f"{self.words}: {command.name(entry)}")

    def end(self) -> None:
        if self.in_place:
            self._rewrite("")

    def _rewrite(self, words: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{words[:width]}", end="", file=sys.stderr, flush=True)


def _row(one: _Wanted, entry: Entry, forward: Entry | None, new: bool) -> Row:
    """The best time of each kind of kernels in an entry, which names candidates."""
    kinds = {command.name(each): command.families(each) for each in command.candidates(one.shape, one.limits, forward)}
    times: dict[str, float] = {}
    for name, us in entry.times.items():
        families = kinds.get(name, {"other kernels"})
        kind = " + ".join(sorted(families, reverse=True)) or "torch.nn"
        times[kind] = min(us, times.get(kind, us))
    return Row(one.shape, tuple(one.calls), times, new)


def tune(
    model: torch.nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], again: bool, run: Callable[..., dict] = measure
) -> TuningReport:
    """`rnnfast.tune`. `run` measures the candidates of a shape, as `rnnfast.commands.measure.measure` does."""
    run_once.check(model, "rnnfast.tune")
    if not torch.cuda.is_available():
        raise command.Unready(command.NO_GPU)
    seen, others = look(model, inputs, kwargs)
    names = {id(module): name or run_once.ITSELF for name, module in model.named_modules()}
    wanted, skipped = _wanted(seen, names)
    skipped += [(name, _other(module, device)) for name, module, device in others]
    known: dict[GpuLimits, dict[Shape, Entry]] = {}
    paths = {one.limits: tuning_file.where(one.limits) for one in wanted}
    for limits, path in paths.items():
        command.writable(path, limits)
        known[limits] = {entry.shape: entry for entry in tuning_file.read(path, limits)}
        tuned.learn(limits, known[limits].values())  # another process may have added to the file since it was read
    rows: list[Row] = []
    progress = _Progress(sum(again or one.shape not in known[one.limits] for one in wanted))
    try:
        for one in wanted:
            have = known[one.limits]
            forward = have.get(replace(one.shape, training=False)) if one.shape.training else None
            new = again or one.shape not in have
            if new:
                progress.begin(one.shape)
                runs = partial(run, device=one.device.index or 0, told=progress.told)
                entries, found, chosen = command.measure_and_store(one.shape, forward, paths[one.limits], one.limits, runs)
                if chosen is None:
                    why = dict.fromkeys(f"{command.name(entries[n])}: {words}" for n, words in found.items())
                    rows.append(Row(one.shape, tuple(one.calls), {}, why="; ".join(why)))
                    continue
                have[one.shape] = chosen
            rows.append(_row(one, have[one.shape], forward, new))
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept, and the same call goes on from there", file=sys.stderr)
        raise
    finally:
        progress.end()
        report = TuningReport(tuple(rows), tuple(skipped), tuple(dict.fromkeys(paths.values())))
        print(report, flush=True)
    return report
