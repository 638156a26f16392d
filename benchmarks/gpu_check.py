"""The whole check of a GPU machine in one command: is everything right there, and how fast.

    make gpu-check                      (or python -m benchmarks.gpu_check --out DIR)

First, side by side, what needs no quiet GPU: the tests on the real device, and the persistent kernels on many shapes against
float64. Then, one after another: both families of kernels beside torch.nn, and which kernels cuDNN ran; thousands of launches
of the persistent kernels; `rnnfast tune` on a few shapes. Each job has a process of its own (`benchmarks.gpu_jobs`), which may
hang or crash without taking along what was found; all is over within ten minutes, and what there was no time for says so.

Installs nothing. Writes gpu-check.json and gpu-check.md into DIR as it goes, with the GPU, the versions and the commit (of a
copy without its .git: RNNFAST_COMMIT in the environment). Exit code 0 if everything ran and was right, 1 if not or if there is
no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import torch

import rnnfast
from benchmarks.gpu_jobs import CASES, CHECKS, STRESS, check_name, stress_name
from rnnfast.choice import gpu, tuning_file
from rnnfast.choice.tuning_file import Shape
from rnnfast.commands import child, tune

SAME_EVERYWHERE = (
    "test_packaging",
    "test_layering",
    "test_static",
    "test_char_lm",
    "test_examples",
    "test_tuner",
    "test_gpu_check",
    "test_bench_check",
    "test_bench_providers",
    "test_bench_results",
    "test_bench_run",
    "test_bench_worker",
    "test_report",
    "test_roofline",
    "test_docs",
    "test_distributed",  # of these, three need packages of their own
    "test_module_db",
    "test_onnx",
    "test_third_party",
)
TEST_SECONDS = CHECK_SECONDS = 240  # side by side
ENDS = {"time": 410, "stress": 460, "tune": 565}  # seconds from the start after which a part has no time left
QUIET = 60  # seconds that one case may take, compilation included
FAMILIES = ("step", "persistent")
PROCESSES = 8  # that check side by side
AT_ONCE = 4  # cases that one of them takes: starting it takes as long as some of them
TUNED = [
    Shape(cell, dtype, "half", 256, B, H, H, 1, 1, training)
    for cell, dtype, B, H in (("lstm", "float16", 16, 768), ("gru", "bfloat16", 64, 512))
    for training in (False, True)
]


class Report:
    """What was found so far. Every change is written at once, from whatever thread."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self.found: dict = {"environment": environment, "tests": {"exit_code": None, "closing_line": "not run"}}
        self.found |= {"checks": {}, "benchmark": {}, "stress": {}, "tuned": {}}
        self.write()

    def add(self, part: str, name: str, row: dict) -> None:
        """A row of a part: the rows of a name are a list. A sign of life is none."""
        if "doing" in row:
            return
        with self.lock:
            self.found[part].setdefault(name, []).append(row)
            print(json.dumps({part: name} | row), flush=True)
            self.write()

    def write(self) -> None:
        with self.lock:
            (self.folder / "gpu-check.json").write_text(json.dumps(self.found, indent=1))
            (self.folder / "gpu-check.md").write_text(table(self.found))


def environment() -> dict[str, str]:
    """GPU, versions and commit: what a figure means nothing without."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "unknown",
        "cudnn": str(torch.backends.cudnn.version()),
        "rnnfast": rnnfast.__version__,
        "commit": said("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
        or os.environ.get("RNNFAST_COMMIT", "unknown"),
        "tf32": f"rnn {torch.backends.cudnn.rnn.fp32_precision}, matmul {torch.backends.cuda.matmul.fp32_precision}",
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def said(*command: str) -> str:
    """What a program prints; nothing where there is none, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def run_tests(folder: Path, seconds: float) -> dict[str, str | int]:
    """The test suite on the device, all but what no device changes; its closing line and exit code."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=25", "--tb=short"]
    command += [f"--ignore=tests/{name}.py" for name in SAME_EVERYWHERE]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with open(folder / "gpu-check-tests.txt", "w") as log:
        try:
            tests = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
            code = tests.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(tests.pid, signal.SIGKILL)  # its workers too: they would run beside what is timed
            with suppress(subprocess.TimeoutExpired):
                tests.wait(10)
            code = -1
    text = (folder / "gpu-check-tests.txt").read_text()
    ends = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    line = ends[-1].strip("= ") if ends and code != -1 else f"not finished in {seconds:.0f} s"
    return {"exit_code": code, "closing_line": line}


def job(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_jobs", *map(str, arguments)]


def run(command: list[str], until: float, take: Callable[[dict], object]) -> child.Failed | None:
    """Give each row that a job prints to `take`; how it failed, if it did."""
    if time.monotonic() >= until:
        return child.Failed("no time was left", hung=False)
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "RNNFAST_BACKEND")}
    env["RNNFAST_STRICT"] = "1"  # what is measured is what was asked for
    try:
        with closing(child.rows(command, QUIET, env, until)) as rows:
            for row in rows:
                take(row)
    except child.Failed as error:
        return error
    return None


def check_some(numbers: list[int], report: Report, until: float, command: Callable[..., list[str]] = job) -> None:
    """Check these cases, in a process that is started again without the case that it hangs or crashes at."""
    left, doing = list(numbers), None

    def take(row: dict) -> None:
        nonlocal doing
        if "doing" in row:
            doing = row["doing"]
        else:
            left.remove(row["number"])
            report.add("checks", row["case"], row)

    def give_up(number: int, why: str) -> None:
        left.remove(number)
        report.add("checks", check_name(*CHECKS[number]), {"number": number, "error": why})

    while left:
        doing = None
        failed = run(command("check", *left), until, take)
        if failed is not None and doing in left:
            give_up(doing, str(failed))
        else:  # done, or not a case's fault: it would fail again
            for number in list(left):
                give_up(number, f"not run: {failed}")


def check_all(report: Report, until: float) -> list[threading.Thread]:
    """`check_some` of all `CHECKS`, in `PROCESSES` threads, which are returned."""
    batches = [list(range(first, min(first + AT_ONCE, len(CHECKS)))) for first in range(0, len(CHECKS), AT_ONCE)]
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not batches:
                    return
                batch = batches.pop(0)
            check_some(batch, report, until)

    threads = [threading.Thread(target=work) for _ in range(PROCESSES)]
    for thread in threads:
        thread.start()
    return threads


def time_all(report: Report, until: float) -> None:
    """Both families beside torch.nn, case by case; the persistent kernels until they hang."""
    hung = None
    for number, case in enumerate(CASES):
        for family in FAMILIES:
            name = f"{case} {family}"
            failed = hung if family == "persistent" else None
            if failed is None:
                failed = run(job("time", family, number), until, lambda row, name=name: report.add("benchmark", name, row))
            if failed is not None:
                report.add("benchmark", name, {"error": str(failed)})
            if failed is not None and failed.hung and family == "persistent":
                hung = child.Failed("not run: the persistent kernels hung before", hung=True)


def stress_all(report: Report, until: float) -> None:
    """Thousands of launches, alone and beside other work."""
    for number, case in enumerate(STRESS):
        name = stress_name(*case)
        failed = run(job("stress", number), until, lambda row, name=name: report.add("stress", name, row))
        if failed is not None:
            report.add("stress", name, {"error": str(failed)})


def tune_all(report: Report, until: float) -> None:
    """What `rnnfast tune` finds for a few shapes; its file stays in the folder of the report."""
    limits = gpu.limits(torch.device("cuda", torch.cuda.current_device()))
    assert limits is not None
    path = report.folder / "gpu-check-tuning.json"
    path.unlink(missing_ok=True)

    def measure(entries: list[tuning_file.Entry]) -> dict[int, float | str]:
        left = until - time.monotonic()
        found = tune.measure(entries, min(QUIET, left), until=until) if left > 0 else {}
        for n, entry in enumerate(entries):
            result = found.get(n, "not run")
            key = "us/step" if isinstance(result, float) else "error"
            report.add("tuned", str(entry.shape), {"candidate": tune.name(entry), key: result})
        return found

    tune.tune(TUNED, path, limits, measure)


# The report


def benchmark_lines(found: dict) -> list[str]:
    lines = ["| case | mode | kernels | us/step | torch.nn | speed-up | MiB | torch.nn MiB | cuDNN's path |"]
    lines += ["|---|---|---|--:|--:|--:|--:|--:|---|"]
    for case in map(str, CASES):
        for family in FAMILIES:
            rows = found["benchmark"].get(f"{case} {family}", [{"error": "not run"}])
            for row in rows:
                if note := row.get("error") or row.get("skipped"):
                    lines.append(f"| {case} | not timed: {note} | {family} | | | | | | |")
                elif "speed_up" in row:
                    cells = [f"{row[f'{name} us/step']:.2f}" for name in ("rnnfast", "torch.nn")] + [f"{row['speed_up']:.2f}"]
                    cells += [f"{row[f'{name} peak MiB']:.0f}" for name in ("rnnfast", "torch.nn")]
                    note = f" (without {row['without']})" if "without" in row else ""
                    lines.append(
                        f"| {case} | {row['mode']} | {family}{note} | {' | '.join(cells)} | {cudnn_path(rows, row['mode'])} |"
                    )
    return lines


def cudnn_path(rows: list[dict], mode: str) -> str:
    """Whether cuDNN kept the weights on chip, told from the names of its kernels."""
    for row in rows:
        if row.get("kernels of") == "torch.nn" and row["mode"] == mode:
            return "persistent" if any("persist" in name.lower() for name in row["kernels"]) else "standard"
    return "not seen"


def kernel_lines(found: dict) -> list[str]:
    """The kernels behind each figure."""
    lines = []
    for name, rows in found["benchmark"].items():
        for row in rows:
            if "kernels of" in row:
                kernels = ", ".join(f"{count} x `{kernel}`" for kernel, count in row["kernels"].items())
                lines.append(f"- {name}, {row['mode']}, {row['kernels of']}: {kernels or 'none seen'}")
    return lines


def problems(found: dict) -> list[str]:
    """Everything that did not run, or was wrong, in words."""
    lines = [] if found["tests"]["exit_code"] == 0 else [f"tests: {found['tests']['closing_line']}"]
    expected = {
        "checks": [],
        "benchmark": [f"{case} {family}" for case in CASES for family in FAMILIES],
        "stress": [stress_name(*case) for case in STRESS],
        "tuned": [str(shape) for shape in TUNED],
    }
    for part, names in expected.items():
        lines += [f"{part}: {name}: not run" for name in names if name not in found[part]]
        for name, rows in found[part].items():
            lines += [f"{part}: {name}: {row['error']}" for row in rows if "error" in row]
            lines += [
                f"{part}: {name}: {row['other bits']} calls gave other bits" for row in rows[-1:] if row.get("other bits")
            ]
    if len(found["checks"]) == 0:
        lines.append("checks: not run")
    return lines


def table(found: dict) -> str:
    """The report as Markdown."""
    checked = [row for rows in found["checks"].values() for row in rows]
    skipped = [row for row in checked if "skipped" in row]
    right = len(checked) - len(skipped) - sum("error" in row for row in checked)
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in found["environment"].items()), ""]
    lines += [f"Tests: {found['tests']['closing_line']}", ""]
    lines += [f"Persistent kernels against float64: {right} of {len(CHECKS)} cases right, {len(skipped)} have no plan.", ""]
    lines += [f"- not right: {problem}" for problem in problems(found)] + [""]
    lines += ["One layer, one direction, input side included, eager. Medians of 10, in microseconds per time step.", ""]
    lines += [*benchmark_lines(found), "", "## Launches in a row", ""]
    for name, rows in found["stress"].items():
        last = [row for row in rows if "launches" in row][-1:] or [{"launches": 0, "other bits": 0}]
        lines.append(f"- {name}: {last[0]['launches']} launches, {last[0]['other bits']} calls with other bits than the first")
    lines += ["", "## rnnfast tune", ""]
    for name, rows in found["tuned"].items():
        for row in rows:
            result = row["error"] if "error" in row else f"{row['us/step']:.2f} us/step"
            lines.append(f"- {name}: {result}: {row['candidate']}")
    return "\n".join([*lines, "", "## Kernels that ran", "", *kernel_lines(found)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description="Is everything right on a GPU, and how fast."
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder for the results")
    parser.add_argument("--skip-tests", action="store_true", help="all but the tests")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU, and PyTorch sees none here; make test runs everything on a CPU", file=sys.stderr)
        return 1
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args.out, environment())
    threads = check_all(report, start + CHECK_SECONDS)
    try:
        tests = {"exit_code": 0, "closing_line": "skipped"} if args.skip_tests else run_tests(args.out, TEST_SECONDS)
        print(f"tests: {tests['closing_line']}", flush=True)
        with report.lock:
            report.found["tests"] = tests
            report.write()
    finally:
        for thread in threads:
            thread.join()
    time_all(report, start + ENDS["time"])
    stress_all(report, start + ENDS["stress"])
    tune_all(report, start + ENDS["tune"])
    print(f"\n{table(report.found)}\nwritten: {args.out / 'gpu-check.json'}, {args.out / 'gpu-check.md'}")
    return 1 if problems(report.found) else 0


if __name__ == "__main__":
    sys.exit(main())
