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

from benchmarks.static import amd, counts
from benchmarks.static.offline import compiled, limits_of, pretend_gpu, run_group, run_layer, settings
from benchmarks.timing.cases import DTYPES
from rnnfast import cells as cells_library
from rnnfast.cells import loading
from rnnfast.choice import kernel_plan, pipeline
from rnnfast.derive import registry
from rnnfast.kernels import cells
from rnnfast.kernels.families import FAMILIES
from rnnfast.reference import spec_of

PHASES = {("forward", True): "training", ("forward", False): "inference", ("backward", True): "backward"}
SCHEMA = 1
CELLS = tuple(cells.CELLS)
HIDDEN = (128, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
BATCH = (1, 8, 16, 64, 128, 256)
HELPERS = ("clear_kernel", "pack_kernel")  # launched once a launch of a persistent kernel
USAGE = ("registers", "stack_bytes", "spills")  # of which a row has the most, where a step takes two kernels
STEPS = (3, 1)  # numbers of time steps: neither may make a kernel of its own


class Job(NamedTuple):
    """The shapes that one process compiles, one after another. A kernel that several batch sizes share is compiled once.

    `family` is the one asked for: the step kernels run where it has no plan. `cell` is one of torch.nn's by name, or what
    `rnnfast.cells.loading` makes a cell of. `marked`: for lengths and resets. `members`: of a
    group, the layers of a stack or with `directions` 2 the directions of a layer.
    """

    family: str
    arch: int | str
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


def jobs_of(table, archs: list[int] | list[str], marked: bool = False, members: int = 1, directions: int = 1) -> list[Job]:
    """The jobs of a table like `STANDARD`, the longest first by a guess."""
    jobs = [
        Job(family, arch, *case, batches, marked, members, directions)
        for arch in archs
        for family, *axes, batches in table
        for case in itertools.product(*axes)
    ]
    return sorted(jobs, key=lambda job: -job.hidden * len(job.batches))


def of_cells(texts: list[str], family: str | None, dtypes, hidden, batches) -> list[tuple]:
    """A table like `STANDARD` of other cells, each on the families that run it or on the one asked for.

    Args:
        texts: as `rnnfast.cells.loading` reads them.
        family: None for all.
        dtypes, hidden, batches: None for float16, 768 and 16.

    Raises:
        NoCell: there is no such cell.
        CannotFuse: the kernels cannot run it.
    """
    texts = [each for text in texts for each in (cells_library.__all__ if text == "library" else [text])]
    found = []
    for text in texts:
        spec = spec_of(registry.fused(loading.load(text)))
        runs = [name for name, each in FAMILIES.items() if not each.refusal(spec.recurrent, spec.rows)]
        about = ((text,), tuple(dtypes or ("float16",)), tuple(hidden or (768,)), tuple(batches or (16,)))
        found += [(name, *about) for name in runs if family in (None, "auto", name)]
    return found


def rows_of(job: Job) -> tuple[list[dict], dict[str, float]]:
    """The rows of a job, and the seconds of compiling by kernel, without the kernels in Triton's cache."""
    limits, named, title = limits_of(job.arch), job.cell, job.cell
    if job.cell not in CELLS:
        own = loading.load(job.cell)
        named, title = registry.fused(own), own.name
    cell = registry.kernel_cell(named)
    element, tf32 = DTYPES[job.dtype]
    precision = "tf32" if tf32 else "ieee"
    code_of, product = (amd.code_of, "matrix") if limits.arch else (counts.code_of, "multiplies_loop")
    rows, codes = [], {}
    with settings(job.family, tf32), pretend_gpu(job.arch) as driver:
        for B in job.batches:
            choices = {
                phase: kernel_plan.choose(job.family, *sizes[:6], limits, job.marked, job.members, *sizes[7:])
                for phase, sizes in sizes_of(named, B, job.hidden, element.itemsize, precision).items()
            }
            about = named, element, job.hidden
            if job.members == 1:
                runs = [run_layer(driver, *about, T, B, job.marked) for T in STEPS]
            else:
                runs = [run_group(driver, choices, *about, T, B, job.members, job.directions, job.marked) for T in STEPS]
            built = compiled()
            for (direction, training), phase in PHASES.items():
                backward = direction == "backward"
                launches = [[each for each in run[phase] if each.kernel not in HELPERS] for run in runs]
                choice = choices[phase]
                apart = 2 if cell.rows and choice.family == "step" else 1  # kernels of a step
                variants = [{each.compiled for run in launches for each in run[at::apart]} for at in range(apart)]
                for each in launches[0][:apart]:
                    if each.compiled not in codes:
                        codes[each.compiled] = code_of(built[each.compiled])
                first = max(launches[0][:apart], key=lambda each: codes[each.compiled][product])  # with the product
                most = {name: max(codes[each.compiled][name] for each in launches[0][:apart]) for name in USAGE}
                code = codes[first.compiled] | most
                family = next((name for name in ("persistent", "one_program", "scan") if first.kernel.startswith(name)), "step")
                if family != choice.family:
                    raise RuntimeError(f"{job}: {first.kernel} was launched, where the plan is {choice}")
                about = (code, cell, job.hidden, element.itemsize, backward)
                plan: Any = choice.plan
                programs = [math.prod(each.grid) for each in launches[0]]
                launched = len(launches[0]) / (STEPS[0] if family == "step" else 1)  # of a launch, or of a step
                words = "" if family == "step" else plan.words(B, job.members)
                if family == "step":
                    words = f"tiles of {plan.BLOCK_B} rows, {plan.BLOCK_H} units, chunks of {plan.BLOCK_K}"
                if limits.arch:
                    made = {"programs": programs[0]}
                elif family == "step":
                    made = counts.step_row(*about, choice.step, B, limits, job.members, launched)
                elif family == "persistent":
                    made = counts.persistent_row(*about, plan, programs, limits, B * job.members)
                elif family == "scan":
                    made = counts.scan_row(*about, plan, limits, B * job.members, training)
                else:
                    made = counts.one_program_row(*about, plan, programs[0], limits, B * job.members, training)
                if not limits.arch:
                    made["resident_programs"] = counts.resident(code, limits)
                row = {
                    "arch": job.arch, "gpu": limits.name, "sms": limits.sms,
                    "cell": title, "dtype": job.dtype, "hidden": job.hidden, "batch": B,
                    "direction": direction, "training": training, "marked": job.marked,
                    "members": job.members, "directions": job.directions,
                    "family": family, "why_step": choice.reason,
                    "kernel": first.kernel, "variants": max(map(len, variants)), "plan": words,
                    "launches": launched,
                    "block_b": plan.BLOCK_B, "block_h": getattr(plan, "BLOCK_H", job.hidden),
                    "block_k": getattr(plan, "BLOCK_K", job.hidden),
                    "split": getattr(plan, "SPLIT", 1), "parts": getattr(plan, "PARTS", 1),
                    "in_registers": getattr(plan, "IN_REGISTERS", 0),
                }  # fmt: skip
                rows.append(row | code | made)
    seconds = {name[:12]: took for name, took in driver.seconds.items() if took is not None}
    return rows, seconds


def sizes_of(cell: str, B: int, H: int, itemsize: int, precision: str) -> dict[str, pipeline.Sizes]:
    """What the plan of each phase depends on, for a name in `rnnfast.reference.CELLS`."""
    return {
        phase: pipeline.sizes_of(cell, B, H, itemsize, precision, direction == "backward")
        for (direction, _), phase in PHASES.items()
    }


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
    names = [*CELLS, *(row["cell"] for found, _ in results for row in found)]
    rows: dict[tuple, dict] = {}  # keyed by what identifies a row: two jobs may both come to the step kernels
    for found, _ in results:
        for row in found:
            phase = list(PHASES).index((row["direction"], row["training"]))
            kind = names.index(row["cell"]), list(DTYPES).index(row["dtype"])
            key = (
                isinstance(row["arch"], str),
                row["arch"],
                *kind,
                row["hidden"],
                row["batch"],
                phase,
                row["family"],
                row["marked"],
                row["members"],
            )
            if key not in rows or row["why_step"]:
                rows[key] = row | {"compile_seconds": seconds.get(row["compiled"])}
    return [rows[key] for key in sorted(rows)]
