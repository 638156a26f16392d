"""Checks and times everything on a GPU machine, in one command.

    make gpu-check                      (or python -m benchmarks.gpu_check --out DIR)

1. Two jobs run at the same time, because they time nothing: the tests on the GPU, and the persistent kernels on many shapes
   against float64.
2. The others run one after another: both families of kernels are timed beside torch.nn, with the names of the kernels that
   cuDNN ran; the persistent kernels are launched thousands of times; `rnnfast tune` measures a few shapes.

Each job runs in a child process, which may hang or crash without loss of earlier results. The command ends within ten minutes.
The report names the jobs that it had no time for.

It installs nothing. While it runs, it writes gpu-check.json, gpu-check.md and gpu-check-times.json (for `python -m
benchmarks.report`) into DIR. They name the GPU, the versions and the commit. In a copy without .git, set the environment
variable RNNFAST_COMMIT to the commit. The exit code is 0 if everything ran and was right, else 1. It is 1 without a GPU.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu import summary
from benchmarks.gpu.jobs import CHECKS, STRESS, check_name, stress_name
from benchmarks.timing import isolated
from benchmarks.timing.cases import Case
from benchmarks.timing.run import environment, new_results, run
from rnnfast.choice import gpu, tuning_file
from rnnfast.choice.tuning_file import Shape
from rnnfast.commands import tune

MARK = "pytest.mark.same_everywhere"  # marks a test file that does not depend on the GPU, and may need what is not installed
TEST_SECONDS = CHECK_SECONDS = 240  # side by side
ENDS = {"time": 410, "stress": 460, "tune": 565}  # seconds from the start after which a part has no time left
QUIET = 60  # seconds that one case may take, compilation included
SECONDS = 0.1  # time for timing a provider in one way of calling
PROVIDERS = ("torch.nn", "rnnfast-step", "rnnfast-persistent")
PROCESSES = 8  # processes that check at the same time
AT_ONCE = 4  # cases of one child process: to start one takes as long as some of them
SHAPES = ((512, 16, 768, "float16"), (512, 64, 512, "bfloat16"), (256, 32, 512, "float32"), (128, 128, 1024, "float16"))
MODES = ("inference", "training")
TIMED = [
    Case(cell, T, B, H, H, dtype=dtype, mode=mode) for cell in ("LSTM", "GRU") for T, B, H, dtype in SHAPES for mode in MODES
]
TUNED = [
    Shape(cell, dtype, "half", 256, B, H, H, 1, 1, training)
    for cell, dtype, B, H in (("lstm", "float16", 16, 768), ("gru", "bfloat16", 64, 512))
    for training in (False, True)
]
EXPECTED = {
    "benchmark": [f"{case.id} {name}" for case in TIMED for name in PROVIDERS],
    "stress": [stress_name(*case) for case in STRESS],
    "tuned": [str(shape) for shape in TUNED],
}


class Report:
    """The results so far. Any thread may add to them, and every change is written to disk at once."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self.found: dict = {"environment": environment, "tests": {"exit_code": None, "closing_line": "not run"}}
        self.found |= {"checks": {}, "benchmark": {}, "stress": {}, "tuned": {}}
        self.write()

    def add(self, part: str, name: str, row: dict) -> None:
        """Add a row to a part. A name has a list of rows."""
        with self.lock:
            self.found[part].setdefault(name, []).append(row)
            print(json.dumps({part: name} | row), flush=True)
            self.write()

    def update(self, part: str, values: dict) -> None:
        with self.lock:
            self.found[part] |= values
            self.write()

    def write(self) -> None:
        with self.lock:
            (self.folder / "gpu-check.json").write_text(json.dumps(self.found, indent=1))
            (self.folder / "gpu-check.md").write_text(summary.table(self.found, EXPECTED))


def run_tests(folder: Path, seconds: float) -> dict[str, str | int]:
    """Run the tests that depend on the device. Returns their closing line and exit code."""
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
            os.killpg(tests.pid, signal.SIGKILL)  # its workers too: they would run beside what is timed
            code = -1
    text = log.read_text()
    ends = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    line = ends[-1].strip("= ") if ends and code != -1 else f"not finished in {seconds:.0f} s"
    return {"exit_code": code, "closing_line": line}


def child_env() -> dict[str, str]:
    """The environment of the child processes. In it, a call fails instead of falling back to another backend."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "RNNFAST_BACKEND")}
    return kept | {"RNNFAST_STRICT": "1"}


def run_jobs(function: str, numbers: list[int], until: float):
    """`isolated.rows` of a function of `benchmarks.gpu.jobs`, with the number of the case before each row."""
    for at, row in isolated.rows(f"benchmarks.gpu.jobs:{function}", [[n] for n in numbers], QUIET, until, child_env()):
        yield numbers[at], row


def check_all(report: Report, until: float) -> list[Future]:
    """Start all `CHECKS`, `PROCESSES` child processes at a time. Returns futures, one for each child process."""

    def work(numbers: list[int]) -> None:
        for number, row in run_jobs("check", numbers, until):
            report.add("checks", check_name(*CHECKS[number]), {"number": number} | row)

    pool, numbers = ThreadPoolExecutor(PROCESSES), list(range(len(CHECKS)))
    return [pool.submit(work, numbers[first : first + AT_ONCE]) for first in range(0, len(CHECKS), AT_ONCE)]


def time_all(report: Report, until: float) -> None:
    """Time both families beside torch.nn, shape by shape. If the persistent kernels hang, later shapes leave them out."""
    path, providers = report.folder / "gpu-check-times.json", list(PROVIDERS)
    path.unlink(missing_ok=True)
    now = new_results("cuda", {"seconds": SECONDS, "threads": 0, "interpret": False})
    for shape in dict.fromkeys(replace(case, mode="inference") for case in TIMED):
        work = [("gpu-check", replace(shape, mode=mode), name) for mode in MODES for name in providers]
        results, ended = run(work, now, path, QUIET, lambda line: print(line, flush=True), until, child_env())
        report.update("benchmark", {f"{Case(**row['case']).id} {row['provider']}": [row] for row in results["rows"]})
        if ended:
            print(ended, flush=True)
            return
        hung = {row["provider"] for row in results["rows"] if row["note"].startswith("nothing for")}
        providers = [name for name in providers if name not in hung & {"rnnfast-persistent"}]


def stress_all(report: Report, until: float) -> None:
    """Launch the persistent kernels thousands of times, alone and beside other work."""
    for number, row in run_jobs("stress", list(range(len(STRESS))), until):
        report.add("stress", stress_name(*STRESS[number]), row)


def tune_all(report: Report, until: float) -> None:
    """Run `rnnfast tune` on a few shapes. Its file stays in the folder of the report."""
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder for the results")
    parser.add_argument("--skip-tests", action="store_true", help="all but the tests")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU, and PyTorch sees none here; make test runs everything on a CPU", file=sys.stderr)
        return 1
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args.out, environment("cuda"))
    checks = check_all(report, start + CHECK_SECONDS)
    try:
        tests = {"exit_code": 0, "closing_line": "skipped"} if args.skip_tests else run_tests(args.out, TEST_SECONDS)
        print(f"tests: {tests['closing_line']}", flush=True)
        report.update("tests", tests)
    finally:
        for one in checks:
            one.result()
    time_all(report, start + ENDS["time"])
    stress_all(report, start + ENDS["stress"])
    tune_all(report, start + ENDS["tune"])
    print(f"\n{summary.table(report.found, EXPECTED)}\nwritten: {args.out / 'gpu-check.json'}, {args.out / 'gpu-check.md'}")
    return 1 if summary.problems(report.found, EXPECTED) else 0


if __name__ == "__main__":
    sys.exit(main())
