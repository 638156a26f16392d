"""`rnnfast tune` measures which implementation is the fastest for given shapes on this GPU, and stores the result.

The candidates are PyTorch's own layer, the step kernels and the persistent kernels with several plans. For each shape:

1. A separate process runs all candidates.
2. It first compares each with the float64 reference, by the numerics contract. A wrong candidate is not timed.
3. It then times the others in turn, with device events. They alternate, so that a change of the GPU's clock affects all alike.
4. If the process hangs or crashes, the candidate that it was at is dropped, and a new process runs the others.

The process is ``python -m rnnfast.commands.tune JOB``. It prints JSON lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rnnfast.choice import gpu, tuned, tuning_file
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.commands import child
from rnnfast.reference import GATES

if TYPE_CHECKING:
    from rnnfast.kernels.persistent.plan import GpuLimits

__all__ = ["candidates", "main", "measure", "microseconds", "tune", "work"]

MODULES = {"lstm": ("LSTM", {}), "gru": ("GRU", {}), "rnn_tanh": ("RNN", {}), "rnn_relu": ("RNN", {"nonlinearity": "relu"})}
DTYPES = {"float16": "half", "bfloat16": "half", "float32": "ieee", "tf32": "tf32"}  # --dtype: the precision of `Shape`
QUIET = 120  # seconds that a candidate may take to compile, run and be checked
CHECK_STEPS = 512  # at most this many steps are checked, because the float64 reference is slow
ROUNDS = 9


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


def candidates(shape: Shape, limits: GpuLimits, forward: Entry | None = None) -> list[Entry]:
    """PyTorch's own layer, the step kernels, and the persistent plans worth measuring.

    Args:
        forward: for training, the result for inference. All candidates use its forward kernels and vary the backward kernels.
    """
    from rnnfast.kernels.persistent.plan import persistent_plans

    itemsize = 4 if shape.dtype == "float32" else 2
    sizes = (GATES[shape.cell], shape.B, shape.H, itemsize, shape.precision, shape.training, limits)
    found = [Entry(shape, "torch"), Entry(shape, "triton")]
    plans = persistent_plans(*sizes)
    if shape.training:
        best = forward.forward if forward else None
        pairs = [(best, plan) for plan in (None, *plans)]
        return found + [Entry(shape, "triton", *pair) for pair in pairs if pair != (None, None)]
    return found + [Entry(shape, "triton", plan) for plan in plans]


def name(entry: Entry) -> str:
    """A candidate in words."""
    if entry.winner == "torch":
        return "torch.nn"
    B = entry.shape.B
    forward, backward = (plan.words(B) if plan else "step kernels" for plan in (entry.forward, entry.backward))
    return f"{forward}; backward {backward}" if entry.shape.training else forward


def microseconds(call: Callable[[], object], steps: int) -> float:
    """The time of one call divided by its number of time steps, in microseconds, by device events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / steps


# The process that measures


def work(entries: list[Entry], device: str, limits: GpuLimits) -> Iterator[dict]:
    """Check and time the candidates of one shape.

    Yields:
        ``{"doing": n}`` before it starts on candidate n.
        ``{"wrong": n, "why": ...}`` if candidate n is wrong.
        ``{"timed": n, "us": ...}`` for each time of candidate n, in microseconds per time step.
    """
    from rnnfast import check

    shape = entries[0].shape
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if shape.precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    module, options = MODULES[shape.cell]
    dtype = getattr(torch, shape.dtype)
    sizes = {"T": min(shape.T, CHECK_STEPS), "B": shape.B, "I": shape.I, "H": shape.H, "dtype": dtype}
    sizes |= {"layers": shape.layers, "bidirectional": shape.directions == 2}
    case = check.Case(module, **sizes, **options)
    right = []
    for n, entry in enumerate(entries):
        yield {"doing": n}
        with _running(entry, limits):
            why = check.fault(check.compare(case, device, None, shape.precision == "tf32", shape.training))
        if why:
            yield {"wrong": n, "why": why}
        else:
            right.append(n)
    call = _call(shape, device)
    for turn, n in itertools.product(range(-2, ROUNDS), right):
        yield {"doing": n}
        with _running(entries[n], limits):
            us = microseconds(call, shape.T)
        if turn >= 0:  # the first two turns load compiled code and choose algorithms
            yield {"timed": n, "us": us}


def _running(entry: Entry, limits: GpuLimits) -> AbstractContextManager[None]:
    """A context in which the automatic choice is this candidate, whatever the number of steps."""
    return tuned.override_tuning(limits, [replace(entry, shape=replace(entry.shape, T=1))])


def _call(shape: Shape, device: str) -> Callable[[], object]:
    """A function that calls a layer, forward or forward and backward. The layer chooses its backend automatically."""
    import rnnfast

    module, options = MODULES[shape.cell]
    dtype = getattr(torch, shape.dtype)
    torch.manual_seed(0)
    layer = getattr(rnnfast, module)(
        shape.I, shape.H, shape.layers, bidirectional=shape.directions == 2, **options, device=device, dtype=dtype
    )
    x = torch.randn(shape.T, shape.B, shape.I, device=device, dtype=dtype)
    dy = torch.randn(shape.T, shape.B, shape.directions * shape.H, device=device, dtype=dtype)
    inputs = [x.clone().requires_grad_(), *layer.parameters()]

    def inference() -> object:
        with torch.no_grad():
            return layer(x)

    def training() -> object:
        return torch.autograd.grad(layer(inputs[0])[0], inputs, dy)

    return training if shape.training else inference


def worker(job: str) -> int:
    """Run `work` on a job from `measure`, and print what it yields as JSON lines."""
    asked = json.loads(job)
    limits = gpu.limits(torch.device("cuda", torch.cuda.current_device()))
    assert limits is not None
    for row in work([tuning_file.decode(raw, limits) for raw in asked], "cuda", limits):
        print(json.dumps(row), flush=True)
    return 0


# The command


def measure(
    entries: list[Entry], quiet: float = QUIET, command: tuple[str, ...] = (), until: float = math.inf
) -> dict[int, float | str]:
    """The median time of each candidate of one shape, in microseconds per time step, or the reason why it has none.

    Args:
        entries: the candidates.
        quiet: seconds without a word from the process, after which it counts as hung.
        command: the command that runs a job. The default runs this module.
        until: the time by which all has to end, on the clock of `time.monotonic`.
    """
    command = command or (sys.executable, "-m", "rnnfast.commands.tune")
    env = {k: v for k, v in os.environ.items() if k not in ("RNNFAST_BACKEND", "RNNFAST_KERNELS", "TRITON_INTERPRET")}
    env["PYTHONSAFEPATH"] = "1"  # not an rnnfast that happens to be in this folder
    env["RNNFAST_STRICT"] = "1"  # otherwise the step kernels would be timed in place of a launch that the driver refuses
    failed: dict[int, float | str] = {}
    while left := [n for n in range(len(entries)) if n not in failed]:
        times: dict[int, list[float]] = {}
        doing = None
        job = json.dumps([tuning_file.encode(entries[n]) for n in left])
        try:
            with closing(child.rows([*command, job], quiet, env, until)) as rows:
                for row in rows:
                    if "doing" in row:
                        doing = left[row["doing"]]
                    elif "wrong" in row:
                        failed[left[row["wrong"]]] = f"wrong: {row['why']}"
                    elif "timed" in row:
                        times.setdefault(left[row["timed"]], []).append(row["us"])
            return {n: statistics.median(each) for n, each in times.items()} | failed
        except child.Failed as error:
            if doing is None:  # it failed before the first candidate
                return failed | {n: f"not run: {error}" for n in left}
            failed[doing] = f"failed: {error}"
    return failed


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


def tune(wanted: list[Shape], path: Path, limits: GpuLimits, run: Callable[[list[Entry]], dict] = measure) -> int:
    """Measure each shape and store its result before the next. Returns the exit code: 1 if a shape gave no result, else 0."""
    started, missing = time.monotonic(), 0
    forward = None
    for number, shape in enumerate(wanted, 1):
        print(f"[{number}/{len(wanted)}] {shape}", flush=True)
        entries = candidates(shape, limits, forward if shape.training else None)
        found = run(entries)
        chosen = best(entries, found)
        forward = None if shape.training else chosen
        print("\n".join(report(entries, found, chosen)), flush=True)
        if chosen is None:
            missing += 1
            continue
        tuning_file.store([chosen], path, limits)
        left = (time.monotonic() - started) / number * (len(wanted) - number)
        print(f"    stored; about {left / 60:.0f} min left" if number < len(wanted) else "    stored", flush=True)
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


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("rnnfast tune needs an NVIDIA GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    from rnnfast.choice.decide import tensor_obstacles

    device = torch.device("cuda", torch.cuda.current_device())
    obstacles = tensor_obstacles(torch.empty(1, device=device))
    if obstacles:
        print(f"the Triton kernels cannot be tuned here: {'; '.join(obstacles)}", file=sys.stderr)
        return 2
    limits = gpu.limits(device)
    assert limits is not None
    path = tuning_file.where(limits)
    if args.show or args.forget:
        return forget(path) if args.forget else show(path, limits)
    try:
        tuning_file.store([], path, limits)  # so that an error shows before the first measurement
    except (tuning_file.Unusable, OSError) as error:
        print(f"{error}\nname another file in RNNFAST_TUNING_FILE, or remove it: rnnfast tune --forget", file=sys.stderr)
        return 2
    try:
        return tune(shapes(args), path, limits)
    except OSError as error:
        print(f"{path} cannot be written: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was measured is in {path}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1]))
