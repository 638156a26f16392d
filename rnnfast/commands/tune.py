"""`rnnfast tune` measures which implementation is the fastest for given shapes on this GPU, and stores the result.

The candidates are PyTorch's own layer, the step kernels and the persistent kernels with several plans. A separate process
checks and times those of each shape (`rnnfast.commands.measure`). `rnnfast.tune` takes the shapes from a model instead
(`rnnfast.commands.tune_model`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rnnfast.choice import gpu, pipeline, tuned, tuning_file
from rnnfast.choice.decide import decide
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.commands.measure import MODULES, measure

if TYPE_CHECKING:
    from rnnfast.kernels.families import Plan
    from rnnfast.kernels.persistent.plan import GpuLimits

__all__ = [
    "NO_GPU",
    "Unready",
    "best",
    "candidates",
    "families",
    "main",
    "measure",
    "measure_and_store",
    "name",
    "ready",
    "time_left",
    "tune",
    "writable",
]

DTYPES = {"float16": "half", "bfloat16": "half", "float32": "ieee", "tf32": "tf32"}  # --dtype: the precision of `Shape`
MOST = 4  # plans of a family
NO_GPU = "rnnfast tune needs a GPU, and PyTorch sees none here: run it on the machine that has the GPU"


# Shapes and candidates


def shapes(args: argparse.Namespace) -> list[Shape]:
    """Every combination of the options, each for inference and then for training."""
    found = []
    for cell, dtype, T, B, H, layers in itertools.product(
        args.cell, args.dtype, args.steps, args.batch, args.hidden, args.layers
    ):
        for I, training in itertools.product(args.input or [H], (False, True)):
            name = "float32" if dtype == "tf32" else dtype
            directions = 2 if args.bidirectional else 1
            found.append(Shape(cell, name, DTYPES[dtype], T, B, I, H, layers, directions, training))
    return found


def candidates(shape: Shape, limits: GpuLimits, forward: Entry | None = None, most: int = MOST) -> list[Entry]:
    """PyTorch's own layer, the step kernels, and the plans worth measuring of the other families.

    The plans are for as many members of the shape's group at once as the family's model takes for the fastest. Where these are
    several, the family's best plan for one at a time is a candidate, too: the model of a group may be wrong.

    Args:
        forward: for training, the result for inference. All candidates use its forward kernels and vary the backward kernels.
        most: how many plans of each family, at most.
    """
    found = [Entry(shape, "torch"), Entry(shape, "triton")]
    plans = list(_plans(shape, limits, most))
    if shape.training:
        best, its = (forward.forward, forward.members[0]) if forward else (None, 1)
        found += [Entry(shape, "triton", best, members=(its, 1))] if best else []
        return found + [Entry(shape, "triton", best, plan, members=(its, at_once)) for plan, at_once in plans]
    return found + [Entry(shape, "triton", plan, members=(at_once, 1)) for plan, at_once in plans]


def _plans(shape: Shape, limits: GpuLimits, most: int) -> Iterator[tuple[Plan, int]]:
    """Each plan, and for how many members at once it is."""
    from rnnfast.kernels.families import FAMILIES

    itemsize = 4 if shape.dtype == "float32" else 2
    sizes = pipeline.sizes_of(shape.cell, shape.B, shape.H, itemsize, shape.precision, shape.training)
    members, layers, _ = pipeline.grouping(shape.layers, shape.directions)
    for name, family in FAMILIES.items():
        best = family.plans and pipeline.best(name, sizes, shape.T, members, layers, limits)
        if not family.plans or not best:
            continue
        for at_once, number in {best.members: most, 1: most if best.members == 1 else 1}.items():
            for plan in family.plans(*sizes[:6], limits, number, members=at_once):
                yield plan, at_once


def name(entry: Entry) -> str:
    """A candidate in words."""
    if entry.winner == "torch":
        return "torch.nn"
    B, group = entry.shape.B, pipeline.grouping(entry.shape.layers, entry.shape.directions)

    def words(plan: Plan | None, at_once: int) -> str:
        if plan is None:
            return "step kernels"
        return plan.words(B) + (f", {at_once} of {group.members} at once" if group.members > 1 else "")

    forward, backward = map(words, (entry.forward, entry.backward), entry.members)
    return f"{forward}; backward {backward}" if entry.shape.training else forward


def families(entry: Entry) -> set[str]:
    """The families of the kernels that a candidate runs. None for PyTorch's own layer."""
    from rnnfast.kernels.families import family_of

    if entry.winner == "torch":
        return set()
    plans = (entry.forward, entry.backward) if entry.shape.training else (entry.forward,)
    return {"step" if plan is None else family_of(plan) for plan in plans}


def best(entries: list[Entry], found: dict[int, float | str]) -> Entry | None:
    """The entry to store: the fastest of rnnfast's kernels, and whether PyTorch's own layer is faster. None without a time."""
    times = {n: time for n, time in found.items() if isinstance(time, float)}
    ours = min((n for n in times if entries[n].winner == "triton"), key=times.__getitem__, default=None)
    if not times:
        return None
    fastest = min(times, key=times.__getitem__)
    chosen = entries[fastest if ours is None else ours]
    return replace(chosen, winner=entries[fastest].winner, times={name(entries[n]): time for n, time in times.items()})


def report(entries: list[Entry], found: dict[int, float | str], chosen: Entry | None) -> Iterator[str]:
    """A line for each candidate: its time, the ratio to torch.nn's time, and a star if it is the fastest."""
    base = next((found.get(n) for n, entry in enumerate(entries) if entry.winner == "torch"), None)
    for n, entry in enumerate(entries):
        time = found.get(n, "not run")
        if isinstance(time, float):
            star = "*" if chosen and time == min(chosen.times.values()) else " "
            ratio = f"{time / base:6.2f}" if isinstance(base, float) else "     -"
            yield f"  {star} {time:9.2f} us/step {ratio} of torch.nn  {name(entry)}"
        else:
            yield f"    {time}: {name(entry)}"


def measure_and_store(
    shape: Shape, forward: Entry | None, path: Path, limits: GpuLimits, run: Callable[[list[Entry]], dict]
) -> tuple[list[Entry], dict[int, float | str], Entry | None]:
    """Measure one shape, store what was found, and follow it in this process.

    Args:
        forward: as in `candidates`.
        run: measures candidates, as `measure` does.

    Returns:
        The candidates, what `run` found, and the entry that was stored; None if nothing was found.
    """
    entries = candidates(shape, limits, forward if shape.training else None)
    found = run(entries)
    chosen = best(entries, found)
    if chosen is not None:
        tuning_file.store([chosen], path, limits)
        tuned.learn(limits, [chosen])
    return entries, found, chosen


def time_left(started: float, done: int, count: int) -> str:
    """In words, after `done` of `count` shapes, begun at `started` on `time.monotonic`'s clock."""
    seconds = (time.monotonic() - started) / done * (count - done)
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


def tune(wanted: list[Shape], path: Path, limits: GpuLimits, run: Callable[[list[Entry]], dict] = measure) -> int:
    """Measure each shape and store its result before the next. Returns the exit code: 1 if a shape gave no result, else 0."""
    started, missing = time.monotonic(), 0
    forward = None
    for number, shape in enumerate(wanted, 1):
        print(f"[{number}/{len(wanted)}] {shape}", flush=True)
        entries, found, chosen = measure_and_store(shape, forward, path, limits, run)
        forward = None if shape.training else chosen
        print("\n".join(report(entries, found, chosen)), flush=True)
        if chosen is None:
            missing += 1
            continue
        print(f"    stored; {time_left(started, number, len(wanted))}" if number < len(wanted) else "    stored", flush=True)
    print(f"{len(wanted) - missing} of {len(wanted)} measured, in {path}")
    return 1 if missing else 0


def show(path: Path, limits: GpuLimits) -> int:
    """Print the entries of a file. Returns the exit code."""
    try:
        entries = tuning_file.read(path, limits)
    except FileNotFoundError:
        print(f"there is no {path}: nothing has been tuned for {limits.name}")
        return 0
    except tuning_file.Unusable as error:
        print(f"not used: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {len(entries)} shapes on {limits.name}")
    for entry in entries:
        print(entry.shape)
        for candidate, us in sorted(entry.times.items(), key=lambda item: item[1]):
            print(f"    {us:9.2f} us/step  {candidate}")
    return 0


def forget(path: Path) -> int:
    """Remove a file. Returns the exit code."""
    try:
        path.unlink()
    except FileNotFoundError:
        print(f"there is no {path}")
    else:
        print(f"removed {path}")
    return 0


def _size(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rnnfast tune", description="Measures what is fastest for your layers on this GPU, and remembers it."
    )
    parser.add_argument("--cell", nargs="+", default=["lstm", "gru"], choices=list(MODULES))
    parser.add_argument("--hidden", nargs="+", type=_size, default=[256, 512, 1024])
    parser.add_argument("--batch", nargs="+", type=_size, default=[16, 64])
    parser.add_argument("--input", nargs="+", type=_size, help="input sizes; the hidden size, if not given")
    parser.add_argument("--steps", nargs="+", type=_size, default=[256], help="time steps of the sequence")
    parser.add_argument(
        "--dtype", nargs="+", default=["float16"], choices=list(DTYPES), help="tf32: float32 with TF32 products"
    )
    parser.add_argument("--layers", nargs="+", type=_size, default=[1])
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--show", action="store_true", help="print what is known of this GPU, and measure nothing")
    parser.add_argument("--forget", action="store_true", help="remove the file with what is known of this GPU")
    return parser


class Unready(RuntimeError):
    """Nothing can be measured here; the message says why and what to do."""


def ready(device: torch.device | None = None) -> GpuLimits:
    """The limits of the GPU `device`, or of the current one.

    Raises:
        Unready: if PyTorch sees no GPU, or the kernels cannot run on it.
    """
    if not torch.cuda.is_available():
        raise Unready(NO_GPU)
    device = device or torch.device("cuda", torch.cuda.current_device())
    obstacles = decide("triton", device.type, device.index, torch.float32).obstacles
    if obstacles:
        raise Unready(f"the Triton kernels cannot be tuned here: {'; '.join(obstacles)}")
    limits = gpu.limits(device)
    assert limits is not None
    return limits


def writable(path: Path, limits: GpuLimits) -> None:
    """Make sure, before anything is measured, that the tuning file can be written.

    Raises:
        Unready: if it cannot.
    """
    try:
        tuning_file.store([], path, limits)  # so that an error shows before the first measurement
    except (tuning_file.Unusable, OSError) as error:
        advice = "name another file in RNNFAST_TUNING_FILE, or remove it: rnnfast tune --forget"
        raise Unready(f"{error}\n{advice}") from error


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        limits = ready()
        path = tuning_file.where(limits)
        if args.show or args.forget:
            return forget(path) if args.forget else show(path, limits)
        writable(path, limits)
    except Unready as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return tune(shapes(args), path, limits)
    except OSError as error:
        print(f"{path} cannot be written: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was measured is in {path}", file=sys.stderr)
        return 130
