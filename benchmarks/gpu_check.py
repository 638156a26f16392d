"""Checks and times everything on a GPU machine, in one command.

    make gpu-check                      (or python -m benchmarks.gpu_check --out DIR)

`PLAN` has its parts in the order of value, with their seconds: nine minutes in all. `--plan` prints it, on any machine.

Each job runs in a child process that may hang or crash. That costs this job, or in the timing this layer. Kernels whose
programs wait for one another do not run if the canary finds them wrong, and are not timed any more after one has hung.

Every finding is written at once: gpu-check.json, gpu-check.md, gpu-check-times.json (for `python -m benchmarks.report`) and the
tuning table of this kind of GPU, ready to ship (docs/tuning.md). A second call goes on where the first stopped. The report
names what there was no time for.

It installs nothing. The report names the GPU, the versions and the commit. In a copy without .git, set the environment variable
RNNFAST_COMMIT to the commit. The exit code is 0 if everything ran and was right, else 1. It is 1 without a GPU, and 2 if DIR
holds the findings of another GPU, version or commit.
"""

import argparse
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import torch

from benchmarks.gpu import jobs, summary
from benchmarks.gpu.findings import Report
from benchmarks.timing import isolated
from benchmarks.timing.cases import Case
from benchmarks.timing.providers import BASE, provider_of
from benchmarks.timing.results import BadResults
from benchmarks.timing.run import environment, new_results, run
from rnnfast.choice import gpu, trust, tuned, tuning_file
from rnnfast.choice.tuning_file import Shape
from rnnfast.commands import tune
from rnnfast.kernels.families import OF_TORCH

CANARY = 20  # seconds
LAYERS: dict[Case, list[Case]] = {}  # the cases that are timed, by their layer
for _case in jobs.TIMED:
    LAYERS.setdefault(replace(_case, mode="inference", model=""), []).append(_case)
PLAN = {  # the parts, their seconds, and what they are
    "start": (10, "PyTorch, the driver"),
    "compile": (90, "the kernels of all cases, side by side on the CPUs; beside it the canary, at most"
                    f" {CANARY} s, and the probes: the hop through L2, clusters that fit, ceilings"),
    "benchmark": (23 * len(LAYERS), f"{len(LAYERS)} layers, one process each: torch.nn and every family, forward and training,"
                                    " eager and CUDA graph, device time by kernel"),
    "tuned": (66, f"rnnfast tune on {len(jobs.TUNED) // 2} layers, the last ones in a second run: the table to ship"),
    "checks": (38, f"{len(jobs.CHECKS)} cases against float64, side by side: error / allowed"),
    "stress": (20, f"{jobs.LAUNCHES} launches of a persistent kernel, {len(jobs.STRESS)} times: the same bits"),
    "tests": (30, "the tests on the real device, with all time that is left; for most of them run it again"),
    "end": (10, "the last child processes go"),
}  # fmt: skip
ENDS = dict(zip(PLAN, accumulate(seconds for seconds, _ in PLAN.values()), strict=True))  # seconds from the start
BUDGET = ENDS["end"]
MARK = "pytest.mark.same_everywhere"  # marks a test file that does not depend on the GPU, and may need what is not installed
QUIET = 30  # seconds without a finding after which a child process is taken to hang
CASE = 45  # seconds that a layer may take, all contestants together, and a check, compilation included
SECONDS = 0.1  # time for timing a provider in one way of calling
CHECK_STEPS = 64  # of what is timed, against float64
PROCESSES = min(14, max(1, len(os.sched_getaffinity(0)) - 2))  # that compile or check side by side


def child_env() -> dict[str, str]:
    """The environment of the child processes. In it, a call fails instead of falling back to another backend."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "RNNFAST_BACKEND")}
    return kept | {"RNNFAST_STRICT": "1"}


def do(
    report: Report, part: str, function: str, work: dict[str, list], until: float, processes: int = 1, quiet: float = QUIET
) -> list[Future]:
    """Do a function of `benchmarks.gpu.jobs` for all arguments, by name, in child processes. Returns what to wait for."""
    names = list(work)

    def some(first: int) -> None:
        mine = names[first::processes]
        rows = isolated.rows(f"benchmarks.gpu.jobs:{function}", [work[name] for name in mine], quiet, until, child_env())
        for at, row in rows:
            report.add(part, mine[at], row)

    pool = ThreadPoolExecutor(processes)
    found = [pool.submit(some, first) for first in range(min(processes, len(names)))]
    pool.shutdown(wait=False)
    return found


def finish(work: list[Future]) -> None:
    for one in work:
        one.result()


def do_left(report: Report, part: str, function: str, until: float, processes: int = 1, quiet: float = QUIET) -> None:
    """Do what is left of a part, whose jobs have their names as argument."""
    finish(do(report, part, function, {name: [name] for name in report.left(part)}, until, processes, quiet))


def prepare(report: Report, until: float) -> None:
    """Compile what is left to run, the canary's first; beside the rest run the canary and then the probes."""

    def compiling(builds: dict[str, list], until: float) -> list[Future]:
        work = {name: [asdict(report.limits), *one] for name, one in builds.items()}
        return do(report, "compile", "build", work, until, PROCESSES, math.inf)

    report.found["compile"] = {}
    needs_canary = bool(report.found["canary"]["why"])
    if needs_canary:
        finish(compiling(jobs.builds(jobs.canary_cases(), [], report.limits), until - CANARY))
    left = {name.partition(" ")[0] for name in report.left("benchmark")}
    cases = [case for case in jobs.TIMED if case.id in left]
    work = compiling(jobs.builds(cases, shapes_left(report)[::2], report.limits), until)
    try:
        if needs_canary:
            device = torch.device("cuda", torch.cuda.current_device())
            verdict = trust.examine(device, again=True, seconds=CANARY)
            report.update("canary", asdict(verdict))
            print(f"canary: {verdict}", flush=True)
        do_left(report, "probes", "probe", until)
    finally:
        finish(work)


def time_all(report: Report, until: float) -> None:
    """Time every family beside torch.nn, layer by layer, each in a process of its own. If a family whose programs wait for one
    another hangs, later layers leave such families out."""
    path = report.folder / "gpu-check-times.json"
    now = new_results("cuda", {"seconds": SECONDS, "threads": 0, "interpret": False, "check_steps": CHECK_STEPS})
    now["ceilings"] = next((row for row in report.found["probes"].get("ceilings", ()) if "error" not in row), None)
    waits = {provider_of(name) for name, family in OF_TORCH.items() if family.waits}
    providers = sorted([BASE, *map(provider_of, report.families)], key=waits.__contains__)  # what may hang comes last
    left = report.left("benchmark")
    for cases in LAYERS.values():
        rows = [row for each in report.found["benchmark"].values() for row in each]
        if any(row["provider"] in waits and row["note"].startswith("nothing for") for row in rows):
            providers = [name for name in providers if name not in waits]
        work = [("gpu-check", case, name) for case in cases for name in providers]
        work = [item for item in work if f"{item[1].id} {item[2]}" in left]
        end = min(until, time.monotonic() + CASE)
        if not work or end < time.monotonic():
            continue
        results, ended = run(work, now, path, QUIET, lambda line: print(line, flush=True), end, child_env())
        report.update("benchmark", {f"{Case(**row['case']).id} {row['provider']}": [row] for row in results["rows"]})
        if ended:  # interrupted, or the disk is full
            sys.exit(ended)


def shapes_left(report: Report) -> list[Shape]:
    """The shapes still to be tuned. Training takes forward's kernels from inference: a layer is tuned in both or in none."""
    found = tuning_file.read(report.table, report.limits) if report.table.exists() else []
    done = {replace(entry.shape, training=False) for entry in found if entry.shape.training}
    return [shape for shape in jobs.TUNED if replace(shape, training=False) not in done]


def tune_all(report: Report, until: float) -> None:
    """Run `rnnfast tune` on a few shapes. Its file stays in the folder of the report."""

    def measure(entries: list[tuning_file.Entry]) -> dict[int, float | str]:
        name = str(entries[0].shape)
        report.found["tuned"].pop(name, None)
        left = until - time.monotonic()
        found = tune.measure(entries, min(QUIET, left), until=until) if left > 0 else {}
        for n, entry in enumerate(entries):
            result = found.get(n, "no time was left")
            key = "us/step" if isinstance(result, float) else "error"
            report.add("tuned", name, {"candidate": tune.name(entry), key: result})
        return found

    left = shapes_left(report)
    if left and time.monotonic() < until:
        tune.tune(left, report.table, report.limits, measure)


def test_all(report: Report, until: float) -> None:
    """The tests that depend on the device, unless they have come to an end before."""
    seconds = until - time.monotonic()
    if report.found["tests"]["exit_code"] in (None, -1) and seconds > 0:
        report.update("tests", run_tests(report.folder, seconds))
        print(f"tests: {report.found['tests']['closing_line']}", flush=True)


def run_tests(folder: Path, seconds: float) -> dict[str, str | int]:
    """Run the tests. Returns their closing line and exit code, -1 if they were not finished in so many seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=25", "--tb=short"]
    command += [f"--ignore={path}" for path in sorted(Path("tests").rglob("test_*.py")) if MARK in path.read_text()]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    log = folder / "gpu-check-tests.txt"
    with open(log, "w") as out:
        tests = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            code = tests.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(tests.pid, signal.SIGKILL)  # its workers too
            code = -1
    text = log.read_text()
    ends = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    line = ends[-1].strip("= ") if ends and code != -1 else f"not finished in {seconds:.0f} s"
    return {"exit_code": code, "closing_line": line}


WORK: dict[str, Callable[[Report, float], None]] = {
    "compile": prepare,
    "benchmark": time_all,
    "tuned": tune_all,
    "checks": lambda report, until: do_left(report, "checks", "check", until, PROCESSES, CASE),
    "stress": lambda report, until: do_left(report, "stress", "stress", until),
    "tests": test_all,
}


def plan() -> str:
    """The plan in words."""
    lines = [f"{'part':9} {'seconds':>7} {'ends at':>7}"]
    lines += [f"{part:9} {seconds:>7} {ENDS[part]:>7}  {words}" for part, (seconds, words) in PLAN.items()]
    layers = []
    for layer, cases in LAYERS.items():
        models = ", ".join(filter(None, dict.fromkeys(case.model for case in cases)))
        layers.append(layer.id.removesuffix("-inference") + f" ({models})" * bool(models))
    lines += ["", f"contestants: {', '.join([BASE, *map(provider_of, OF_TORCH)])}", f"benchmark: {', '.join(layers)}"]
    return "\n".join([*lines, f"tuned: {'; '.join(str(shape).removesuffix(', inference') for shape in jobs.TUNED[::2])}"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder for the results")
    parser.add_argument("--again", action="store_true", help="start anew, whatever the folder holds")
    parser.add_argument("--skip-tests", action="store_true", help="all but the tests")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="for everything; default %(default)s")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop; needs no GPU")
    args = parser.parse_args(argv)
    if args.plan:
        print(plan())
        return 0
    if args.budget < ENDS["compile"]:
        parser.error(f"--budget should be at least {ENDS['compile']}, which is what it takes to begin")
    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU, and PyTorch sees none here; make test runs everything on a CPU", file=sys.stderr)
        return 1
    start = time.monotonic() - PLAN["start"][0]  # which has passed
    limits = gpu.limits(torch.device("cuda", torch.cuda.current_device()))
    assert limits is not None
    args.out.mkdir(parents=True, exist_ok=True)
    if args.again:
        for path in (*args.out.glob("gpu-check*"), args.out / tuned.shipped(limits).name):
            path.unlink(missing_ok=True)
    try:
        report = Report(args.out, environment("cuda"), limits)
    except BadResults as error:
        print(error, file=sys.stderr)
        return 2
    if args.skip_tests:
        report.update("tests", {"exit_code": 0, "closing_line": "skipped"})
    last = args.budget - PLAN["end"][0]
    for part, work in WORK.items():
        work(report, start + (last if part == "tests" else min(ENDS[part], last)))
    print(f"\n{report.text()}\nwritten: {report.path}, {report.path.with_suffix('.md')}")
    return 1 if summary.problems(report.found, report.expected) else 0


if __name__ == "__main__":
    sys.exit(main())
