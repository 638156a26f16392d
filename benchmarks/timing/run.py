"""Runs cases with providers, one row after another. A child process, which may crash or hang, checks and measures each row."""

import datetime
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

import rnnfast
from benchmarks.timing import isolated, measure
from benchmarks.timing.cases import Case
from benchmarks.timing.measure import Call
from benchmarks.timing.problem import Problem, tf32
from benchmarks.timing.providers import BASE, OWN_LAYER, Provider, Unavailable, all_providers, installed, named_provider
from benchmarks.timing.results import SCHEMA, BadResults, key, load, new_row, save

GPU_WARM_UP = 0.2  # seconds, for clocks to rise
CPU_WARM_UP = 0.05
Work, Say = list[tuple[str, Case, str]], Callable[[str], None]


def environment(device: str) -> dict[str, str]:
    """The machine, the versions and the commit. A figure is stated only together with these."""
    found = {
        "cpu": processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton") or "not installed",
        "rnnfast": rnnfast.__version__,
        "commit": printed("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
        or os.environ.get("RNNFAST_COMMIT", "unknown"),
        "tf32": "as each case says",
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
            "cuda": torch.version.cuda or "unknown",
            "cudnn": str(torch.backends.cudnn.version()),
        }
    return found


def printed(*command: str) -> str:
    """The output of a program. Empty if the program does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def processor() -> str:
    with suppress(OSError):
        if named := re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return named[1].strip()
    return platform.processor() or platform.machine()


@lru_cache(maxsize=2)  # of a case, and of its first steps
def problem_of(case: Case, device: str) -> tuple[Problem, Call]:
    """The problem of a case, and torch.nn's call. The next provider of the same case uses them again."""
    problem = Problem(case, device)
    return problem, problem.call(named_provider(BASE).ready(problem))


def row_of(case: Case, set_name: str, provider: Provider, settings: dict) -> dict:
    """The row of `provider` for `case`: checked, then measured. An error of a library becomes the status of the row."""
    if settings["device"] == "cuda":
        torch.cuda.empty_cache()
    try:
        if obstacle := provider.obstacle(case, settings["device"]):
            return new_row(case, set_name, provider.name, "unavailable", note=obstacle)
        with tf32(case.tf32), provider.settings():
            status, values = measured(case, provider, settings)
    except Unavailable as error:
        status, values = "unavailable", {"note": str(error)}
    except Exception as error:
        problem_of.cache_clear()  # it may hold all of the memory
        words = " ".join(str(error).split())[:500]
        short = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in words
        status, values = "out of memory" if short else "error", {"note": f"{type(error).__name__}: {words}"}
    return new_row(case, set_name, provider.name, status, **values)


def measured(case: Case, provider: Provider, settings: dict) -> tuple[str, dict]:
    """The status of `provider` on `case`, and the values of its row.

    The results are checked for the whole sequence; with "check_steps" in `settings` for a sequence of so many steps, those of
    all layers and directions counted: the float64 reference takes seconds for a thousand.
    """
    device, seconds = settings["device"], settings["seconds"]
    problem, base = problem_of(case, device)
    ready = provider.ready(problem)
    checked, to_check, notes = problem, ready, [ready.note]
    if 0 < (steps := settings.get("check_steps", 0) // (case.layers * case.directions)) < case.T:
        checked, _ = problem_of(replace(case, T=steps), device)
        to_check, notes = provider.ready(checked), [ready.note, f"checked on {steps} steps"]
    _, oracle = checked.answers()
    start = time.perf_counter()
    error = checked.check(to_check)
    first = time.perf_counter() - start
    values: dict = {"note": "; ".join(filter(None, (*notes, oracle))), "error": error}
    if error["worst"] > 1:
        return "wrong", values
    call = problem.call(ready)
    watch = measure.stopwatch(call, device)
    took = measure.warm_up(watch, GPU_WARM_UP if device == "cuda" else CPU_WARM_UP)
    if provider.compiles:
        values["compile_s"] = max(0.0, first - took / 1e6)
    if provider.name == BASE:
        (times,) = measure.alternate([watch], seconds)
    else:
        base_watch = measure.stopwatch(base, device)
        measure.warm_up(base_watch, 0)
        times, base_times = measure.alternate([watch, base_watch], 2 * seconds)
        values["ratio"] = {"to": BASE, **measure.ratio_of(times, base_times)}
    values["timings"] = [timing("eager", "warm", times)]

    def add_time(how: str, l2: str, call: Call) -> None:
        watch = measure.stopwatch(call, device, l2)
        measure.warm_up(watch, 0)
        values["timings"].append(timing(how, l2, *measure.alternate([watch], seconds)))

    if device == "cuda":
        add_time("eager", "cold", call)
        values["kernels"] = measure.kernels_of(call)
    values["peak_bytes"] = measure.peak_bytes(call, device) if provider.counts_memory else None
    if case.mode != "inference":
        values["saved_bytes"] = problem.kept(ready)["activations"]
    if device == "cuda" and case.mode != "backward":  # last: a capture that fails can leave the process unfit for more
        try:
            graph = measure.captured(call)
            for l2 in ("warm", "cold"):
                add_time("cuda graph", l2, graph)
        except RuntimeError as failure:
            words = " ".join(str(failure).split())[:200]
            values["note"] = "; ".join(filter(None, (values["note"], f"no CUDA graph: {words}")))
    return "ok", values


def timing(how: str, l2: str, times: list[float]) -> dict:
    return {"how": how, "l2": l2, **measure.percentiles(times), "n": len(times)}


def measure_row(case: dict, set_name: str, name: str, settings: dict) -> Iterator[dict]:
    """`row_of` with arguments that JSON can hold, for the child process."""
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    yield row_of(Case(**case), set_name, all_providers()[name], settings)


def same_run(results: dict, now: dict, path: Path) -> None:
    """Raise `BadResults` if `results`, from `path`, have another environment or other settings than the run `now`."""
    for part in ("environment", "settings"):
        for name in sorted(results[part].keys() | now[part].keys()):
            before, after = results[part].get(name), now[part].get(name)
            if name != "time" and before != after:
                raise BadResults(f"{path} was measured with {name} {before!r}, and now it is {after!r}: name another file")


def new_results(device: str, settings: dict) -> dict:
    """Results without rows: environment and settings of this run, no ceilings."""
    return {"schema": SCHEMA, "environment": environment(device), "settings": {"device": device, **settings}, "ceilings": None}


def run(
    work: Work, now: dict, path: Path, limit: float, say: Say, until: float = math.inf, env: dict[str, str] | None = None
) -> tuple[dict, str]:
    """Measure the rows that `path` lacks, and save after each. Returns the results, and why the run ended early, or "".

    Args:
        work: (set, case, provider) of every wanted row.
        now: `new_results` of this run.
        limit: seconds for a row.
        say: gets a line of progress after each row.
        until, env: those of `isolated.rows`.

    Raises:
        BadResults: `path` holds something else, or results that were measured otherwise.
    """
    results = {**now, "rows": []}
    if path.exists():
        results = load(path)
        same_run(results, now, path)
    done = {key(row) for row in results["rows"]}
    work = [item for item in work if item[1:] not in done]
    if done:
        say(f"{path} holds {len(done)} rows; {len(work)} to go")
    start = time.monotonic()
    told: set[tuple[str, str]] = set()
    jobs = [[case.as_dict(), set_name, name, results["settings"]] for set_name, case, name in work]
    try:
        save(results, path)  # a path that cannot be written is told at once
        found = isolated.rows("benchmarks.timing.run:measure_row", jobs, limit, until, env)
        for number, (job, row) in enumerate(found, 1):
            set_name, case, name = work[job]
            if isolated.out_of_time(row):
                continue  # no result: the next run measures it
            if "error" in row and "status" not in row:  # the child crashed or hung
                row = new_row(case, set_name, name, "error", note=row["error"])
            results["rows"].append(row)
            took = time.monotonic() - start
            left = clock(took / number * (len(work) - number))
            if row["status"] != "unavailable" or (name, row["note"]) not in told:
                say(f"{number:>{len(str(len(work)))}}/{len(work)} {words(row)}  [{clock(took)}, about {left} left]")
            told.add((name, row["note"]))
            save(results, path)
    except KeyboardInterrupt:
        return results, f"interrupted: {len(results['rows'])} rows are in {path}; the same command goes on from there"
    except OSError as error:
        return results, f"cannot write {path}: {error.strerror or error}; it holds what was saved before"
    return results, ""


def clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def words(row: dict) -> str:
    """A row in one line."""
    text = f"{Case(**row['case']).id:45} {row['provider']:20} "
    if row["status"] == "wrong":
        return text + f"wrong: {row['error']['tensor']} has {row['error']['worst']:.3g} times the error allowed; not timed"
    if row["status"] != "ok":
        return text + f"{row['status']}: {row['note'][:120]}"
    text += f"{row['timings'][0]['p50']:>10.1f} us"
    own = f", {BASE}'s own code" if OWN_LAYER in row.get("note", "") else ""
    return text + (f" {row['ratio']['p50']:>7.3f} of {BASE}'s time{own}" if row["ratio"] else "")
