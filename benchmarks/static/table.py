"""The rows of the static table: which kernels are compiled, for which shapes, and how each becomes a row."""

import contextlib
import itertools
import math
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from benchmarks.static import counts
from benchmarks.static.offline import compiled, limits_of, pretend_gpu, run_group, run_layer, settings
from benchmarks.timing.cases import DTYPES
from rnnfast.choice import kernel_plan
from rnnfast.kernels import cells

PHASES = {("forward", True): "training", ("forward", False): "inference", ("backward", True): "backward"}
SCHEMA = 1
CELLS = tuple(cells.CELLS)
HIDDEN = (128, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
BATCH = (1, 8, 16, 64, 128, 256)
HELPERS = ("clear_kernel", "pack_kernel")  # launched once a launch of a persistent kernel
STEPS = (3, 1)  # numbers of time steps: neither may make a kernel of its own


class Job(NamedTuple):
    """The shapes that one process compiles, one after another. A kernel that several batch sizes share is compiled once.

    `family` is the one asked for: the step kernels run where it has no plan. `marked`: for lengths and resets. `members`: of a
    group, the layers of a stack or with `directions` 2 the directions of a layer.
    """

    family: str
    arch: int
    cell: str
    dtype: str
    hidden: int
    batches: tuple[int, ...]
    marked: bool = False
    members: int = 1
    directions: int = 1


STANDARD = (  # family, cells, dtypes, hidden sizes, batch sizes
    ("persistent", ("lstm",), ("float16",), HIDDEN, BATCH),
    ("persistent", ("lstm",), ("float16",), (29, 50, 200), (3, 27)),
    ("persistent", ("gru", "rnn_tanh"), ("float16",), HIDDEN, (16, 128)),
    ("persistent", ("lstm",), ("bfloat16", "tf32", "float32"), (128, 512, 768, 1024, 2048), (16, 128)),
    ("persistent", ("gru", "rnn_tanh"), ("tf32",), (128, 512, 768, 1024), (16,)),
    ("persistent", ("gru", "rnn_tanh"), ("float16",), (29, 200), (3,)),
    ("step", CELLS, tuple(DTYPES), (29, 512), (16,)),
)


def jobs_of(table, archs: list[int], marked: bool = False, members: int = 1, directions: int = 1) -> list[Job]:
    """The jobs of a table like `STANDARD`, the longest first by a guess."""
    jobs = [
        Job(family, arch, *case, batches, marked, members, directions)
        for arch in archs
        for family, *axes, batches in table
        for case in itertools.product(*axes)
    ]
    return sorted(jobs, key=lambda job: -job.hidden * len(job.batches))


def rows_of(job: Job) -> tuple[list[dict], dict[str, float]]:
    """The rows of a job, and the seconds of compiling by kernel, without the kernels in Triton's cache."""
    cell, limits = cells.CELLS[job.cell], limits_of(job.arch)
    element, tf32 = DTYPES[job.dtype]
    precision = "tf32" if tf32 else "ieee"
    rows, codes = [], {}
    with settings(job.family, tf32), pretend_gpu(job.arch) as driver:
        for B in job.batches:
            choices = {
                phase: kernel_plan.choose(
                    job.family, cell.gates, B, job.hidden, element.itemsize, precision, direction == "backward", limits,
                    job.marked, job.members,
                )
                for (direction, _), phase in PHASES.items()
            }  # fmt: skip
            about = job.cell, element, job.hidden
            if job.members == 1:
                runs = [run_layer(driver, *about, T, B, job.marked) for T in STEPS]
            else:
                runs = [run_group(driver, choices, *about, T, B, job.members, job.directions, job.marked) for T in STEPS]
            built = compiled()
            for (direction, training), phase in PHASES.items():
                backward = direction == "backward"
                launches = [[each for each in run[phase] if each.kernel not in HELPERS] for run in runs]
                variants = {each.compiled for run in launches for each in run}
                first = launches[0][0]
                if first.compiled not in codes:
                    codes[first.compiled] = counts.code_of(built[first.compiled])
                code = codes[first.compiled]
                choice = choices[phase]
                family = next((name for name in ("persistent", "one_program") if first.kernel.startswith(name)), "step")
                if family != choice.family:
                    raise RuntimeError(f"{job}: {first.kernel} was launched, where the plan is {choice}")
                about = (code, cell, job.hidden, element.itemsize, backward)
                plan: Any = choice.plan
                programs = [math.prod(each.grid) for each in launches[0]]
                words = "" if family == "step" else plan.words(B, job.members)
                if family == "step":
                    made = counts.step_row(*about, choice.step, B, limits, job.members)
                    words = f"tiles of {plan.BLOCK_B} rows, {plan.BLOCK_H} units, chunks of {plan.BLOCK_K}"
                elif family == "persistent":
                    made = counts.persistent_row(*about, plan, programs, limits, B * job.members)
                else:
                    made = counts.one_program_row(*about, plan, programs[0], limits, B * job.members, training)
                row = {
                    "arch": job.arch, "gpu": limits.name, "sms": limits.sms,
                    "cell": job.cell, "dtype": job.dtype, "hidden": job.hidden, "batch": B,
                    "direction": direction, "training": training, "marked": job.marked,
                    "members": job.members, "directions": job.directions,
                    "family": family, "why_step": choice.reason,
                    "kernel": first.kernel, "variants": len(variants), "plan": words,
                    "launches": len(launches[0]) / (STEPS[0] if family == "step" else 1),  # a launch, or a step
                    "block_b": plan.BLOCK_B, "block_h": getattr(plan, "BLOCK_H", job.hidden),
                    "block_k": getattr(plan, "BLOCK_K", job.hidden),
                    "split": getattr(plan, "SPLIT", 1), "parts": getattr(plan, "PARTS", 1),
                    "in_registers": getattr(plan, "IN_REGISTERS", 0), "resident_programs": counts.resident(code, limits),
                }  # fmt: skip
                rows.append(row | code | made)
    seconds = {name[:12]: took for name, took in driver.seconds.items() if took is not None}
    return rows, seconds


def _begin() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # the launches say it


def _counted(results: Iterable, total: int) -> Iterator:
    """`results` as they come. On a terminal it shows how many have come."""
    for done, result in enumerate(results, 1):
        if sys.stderr.isatty():
            print(f"\r{done} of {total} jobs", end="\n" if done == total else "", file=sys.stderr, flush=True)
        yield result


@contextlib.contextmanager
def _cache(fresh: bool) -> Iterator[None]:
    """A temporary folder as Triton's cache, within the block, if `fresh` or if its own cannot be written (a read-only home)."""
    own = Path(triton.knobs.cache.dir)
    try:
        own.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=own).close()
    except OSError as error:
        print(f"{own} cannot be written ({error.strerror}): the kernels are compiled into a temporary folder", file=sys.stderr)
        fresh = True
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": folder} if fresh else {}):
        yield


def build(jobs: list[Job], workers: int, fresh: bool = False) -> list[dict]:
    """The rows of all jobs, each with the seconds that its kernel took to compile: None if Triton's cache had it.

    `fresh`: do not use that cache.
    """
    with _cache(fresh):
        if workers == 1:
            _begin()
            results = list(_counted(map(rows_of, jobs), len(jobs)))
        else:
            # not forked: a fork of a process with threads may hang
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin) as pool:
                results = list(_counted(pool.map(rows_of, jobs), len(jobs)))
    seconds: dict[str, float] = {}
    for _, took in results:
        for name, each in took.items():
            seconds[name] = min(each, seconds.get(name, each))
    rows: dict[tuple, dict] = {}  # keyed by what identifies a row: two jobs may both come to the step kernels
    for found, _ in results:
        for row in found:
            phase = list(PHASES).index((row["direction"], row["training"]))
            kind = CELLS.index(row["cell"]), list(DTYPES).index(row["dtype"])
            key = row["arch"], *kind, row["hidden"], row["batch"], phase, row["family"], row["marked"], row["members"]
            if key not in rows or row["why_step"]:
                rows[key] = row | {"compile_seconds": seconds.get(row["compiled"])}
    return [rows[key] for key in sorted(rows)]
