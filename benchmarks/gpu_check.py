"""The whole check of a GPU machine in one command: the tests on the real device, then a short benchmark against torch.nn.

    make gpu-check                      (or python -m benchmarks.gpu_check --out DIR)

Installs nothing. Writes gpu-check.json and gpu-check.md into DIR with the GPU, the versions and the commit (of a copy
without its .git: RNNFAST_COMMIT in the environment). The persistent kernels come last, each case in a process of its own with
a time limit: should one hang, all else is written already. Exit code 0 if the tests passed and every case was right, 1 if not
or if there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import rnnfast
from rnnfast.check import Case, compare

DEVICE = "cuda"
SAME_EVERYWHERE = (
    *("test_packaging", "test_layering", "test_offline", "test_char_lm", "kernels/test_persistent_compiled"),
    *("test_distributed", "test_module_db", "test_onnx", "test_third_party"),  # three of them need packages of their own
)
TEST_SECONDS = 240
PERSISTENT_SECONDS = 60  # a case, compilation included; after the first that takes longer no other is tried
LAST_START = 400  # seconds after which no other case is begun, so that all is over within 8 minutes
STRESS_LAUNCHES = 1000
CASES = [
    Case(cell, T, B, H, H, dtype, states=False)
    for cell in ("LSTM", "GRU")
    for T, B, H, dtype in (
        (512, 16, 768, torch.float16),
        (512, 64, 512, torch.bfloat16),
        (256, 32, 512, torch.float32),
        (128, 128, 1024, torch.float16),
    )
]


def environment() -> dict[str, str]:
    """GPU, versions and commit: what a figure means nothing without."""
    import triton

    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "unknown",
        "cudnn": str(torch.backends.cudnn.version()),
        "rnnfast": rnnfast.__version__,
        "commit": git.stdout.strip() or os.environ.get("RNNFAST_COMMIT", "unknown"),
        "tf32": f"rnn {torch.backends.cudnn.rnn.fp32_precision}, matmul {torch.backends.cuda.matmul.fp32_precision}",
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def run_tests(folder: Path) -> dict[str, str | int]:
    """The test suite on the device, all but what no device changes; its closing line and exit code."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=25", "--tb=short"]
    command += [f"--ignore=tests/{name}.py" for name in SAME_EVERYWHERE]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with open(folder / "gpu-check-tests.txt", "w") as log:
        try:
            tests = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
            code = tests.wait(TEST_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(tests.pid, signal.SIGKILL)  # its workers too: they would run beside what is timed
            tests.wait()
            code = -1
    text = (folder / "gpu-check-tests.txt").read_text()
    closing = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    line = closing[-1].strip("= ") if closing and code != -1 else f"not finished in {TEST_SECONDS} s"
    return {"exit_code": code, "closing_line": line}


def microseconds_per_step(function: Callable[[], object], steps: int, repeats: int) -> list[float]:
    """`repeats` timings of one call by device events, per time step."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / steps)
    return times


def calls(case: Case, layer: torch.nn.Module) -> dict[str, Callable[[], object]]:
    """One call forward in inference, and one training step (forward and backward) under a random upstream gradient."""
    x = torch.randn(case.T, case.B, case.I, device=DEVICE, dtype=case.dtype)
    dy = torch.randn(case.T, case.B, case.H, device=DEVICE, dtype=case.dtype)
    inputs = [x.clone().requires_grad_(), *layer.parameters()]

    def forward() -> object:
        with torch.no_grad():
            return layer(x)

    def training() -> object:
        return torch.autograd.grad(layer(inputs[0])[0], inputs, dy)

    return {"forward": forward, "training step": training}


def measure(case: Case, ours: str = "rnnfast") -> list[dict]:
    """The rows of one case, with rnnfast, as it is set up in this process, under the name `ours`. What is not right is not
    timed."""
    options = {"device": DEVICE, "dtype": case.dtype}
    layers = {
        ours: getattr(rnnfast, case.cell)(case.I, case.H, backend="triton", **options),
        "torch.nn": getattr(torch.nn, case.cell)(case.I, case.H, **options),
    }
    tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"  # as it is timed
    wrong = [result for result in compare(case, DEVICE, tf32=tf32) if not result.ok]
    row = {"case": str(case)}
    if wrong:
        worst = max(wrong, key=lambda result: result.ours - result.allowed)
        return [row | {"error": f"{worst.tensor}: error {worst.ours:.1e}, allowed {worst.allowed:.1e}"}]
    functions = {name: calls(case, layer) for name, layer in layers.items()}
    rows = []
    for mode in ("forward", "training step"):
        times: dict[str, list[float]] = {name: [] for name in layers}
        memory = {}
        for name in layers:
            microseconds_per_step(functions[name][mode], case.T, 2)  # warm-up: compiles, picks algorithms
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            microseconds_per_step(functions[name][mode], case.T, 1)
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        for _ in range(5):  # side by side, so that a change of clocks meets both
            for name in layers:
                times[name] += microseconds_per_step(functions[name][mode], case.T, 2)
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows.append(
            row
            | {"mode": mode, "speed_up": medians["torch.nn"] / medians[ours]}
            | {f"{name} us/step": median for name, median in medians.items()}
            | {f"{name} min-max": [min(values), max(values)] for name, values in times.items()}
            | {f"{name} peak MiB": value for name, value in memory.items()}
        )
    return rows


def stress(case: Case) -> str:
    """Launch the kernels again and again on a few steps, each time for the same bits; what went wrong, or nothing."""
    layer = getattr(rnnfast, case.cell)(case.I, case.H, backend="triton", device=DEVICE, dtype=case.dtype)
    x = torch.randn(8, case.B, case.I, device=DEVICE, dtype=case.dtype, requires_grad=True)
    first, wrong = None, torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(STRESS_LAUNCHES):
        y = layer(x)[0]
        found = torch.cat((y.detach().flatten(), torch.autograd.grad(y.sum(), x)[0].flatten()))
        first = found if first is None else first
        wrong += (found != first).any()
    return f"{wrong.item()} of {STRESS_LAUNCHES} runs gave other bits than the first" if wrong.item() else ""


def measure_persistent(number: int) -> list[dict]:
    """`measure` of a case on the persistent kernels, after a stress run; for a process with RNNFAST_KERNELS=persistent."""
    from rnnfast import families, ops

    case = CASES[number]
    gates = 4 if case.cell == "LSTM" else 3
    for backward in (False, True):
        device = torch.device("cuda", torch.cuda.current_device())
        choice = families.pick(gates, case.B, case.H, case.dtype, ops.precision(), backward, device)
        if choice.persistent is None:
            return [{"skipped": f"no persistent {'backward' if backward else 'forward'}: {choice.reason}"}]
    rows = measure(case, "persistent")
    if not any("error" in row for row in rows) and (wrong := stress(case)):
        return [{"error": wrong}]
    return rows


def run_persistent(number: int, folder: Path) -> list[dict]:
    """`measure_persistent` in a process that may hang."""
    out = folder / f"gpu-check-persistent-{number}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--persistent", str(number), "--out", str(folder)]
    env = os.environ | {"RNNFAST_KERNELS": "persistent", "RNNFAST_STRICT": "1"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PERSISTENT_SECONDS)
    except subprocess.TimeoutExpired:
        return [{"error": f"not finished in {PERSISTENT_SECONDS} s", "hung": True}]
    if not out.exists():
        return [{"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}]
    return json.loads(out.read_text())


def persistent_cell(report: dict, row: dict) -> str:
    """The persistent kernels' column in the table, beside a row of the benchmark: time and speed-up, or why there is none."""
    for other in report["persistent"].get(row["case"], []):
        if note := other.get("error") or other.get("skipped"):
            return note
        if other["mode"] == row.get("mode"):
            return f"{other['persistent us/step']:.2f} ({other['speed_up']:.2f})"
    return "not run"


def table(report: dict) -> str:
    """The report as Markdown."""
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in report["environment"].items()), ""]
    lines += [f"Tests: {report['tests']['closing_line']}", ""]
    lines += ["One layer, one direction, input side included, eager. Times in microseconds per time step, medians of 10.", ""]
    lines += ["Persistent: RNNFAST_KERNELS=persistent, beside torch.nn in another process, with that speed-up.", ""]
    lines += ["| case | mode | rnnfast | torch.nn | speed-up | rnnfast MiB | torch.nn MiB | persistent |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|--:|"]
    for row in report["benchmark"]:
        if "error" in row:
            lines.append(f"| {row['case']} | not timed: {row['error']} | | | | | | {persistent_cell(report, row)} |")
        else:
            cells = [f"{row[f'{name} us/step']:.2f}" for name in ("rnnfast", "torch.nn")] + [f"{row['speed_up']:.2f}"]
            cells += [f"{row[f'{name} peak MiB']:.0f}" for name in ("rnnfast", "torch.nn")]
            lines.append(f"| {row['case']} | {row['mode']} | {' | '.join(cells)} | {persistent_cell(report, row)} |")
    return "\n".join(lines) + "\n"


def write(report: dict, folder: Path) -> None:
    (folder / "gpu-check.json").write_text(json.dumps(report, indent=1))
    (folder / "gpu-check.md").write_text(table(report))


def attempt(function: Callable[..., list[dict]], *args) -> list[dict]:
    """The rows that `function` gives, or one with its error."""
    try:
        return function(*args)
    except Exception as error:  # whatever a compiler, a driver or a library raises is a row of the report
        return [{"error": f"{type(error).__name__}: {error}".splitlines()[0]}]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description="Tests and a short benchmark on a GPU.")
    parser.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder for the results")
    parser.add_argument("--skip-tests", action="store_true", help="only the benchmark")
    parser.add_argument("--persistent", type=int, metavar="CASE", help=argparse.SUPPRESS)  # see `run_persistent`
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU, and PyTorch sees none here; make test runs everything on a CPU", file=sys.stderr)
        return 1
    os.environ.pop("TRITON_INTERPRET", None)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.persistent is not None:
        rows = attempt(measure_persistent, args.persistent)
        (args.out / f"gpu-check-persistent-{args.persistent}.json").write_text(json.dumps(rows))
        return 0
    os.environ["RNNFAST_KERNELS"] = "step"
    started = time.monotonic()
    tests = {"exit_code": 0, "closing_line": "skipped"} if args.skip_tests else run_tests(args.out)
    print(f"tests: {tests['closing_line']}", flush=True)
    report: dict = {"environment": environment(), "tests": tests, "benchmark": [], "persistent": {}}
    write(report, args.out)
    for case in CASES:
        torch.cuda.empty_cache()
        for row in attempt(measure, case):
            report["benchmark"].append({"case": str(case)} | row)
            print(json.dumps(report["benchmark"][-1]), flush=True)
        write(report, args.out)
    for number, case in enumerate(CASES):
        if time.monotonic() > started + LAST_START:
            break
        rows = run_persistent(number, args.out)
        print(json.dumps({"case": str(case), "persistent": rows}), flush=True)
        report["persistent"][str(case)] = rows
        write(report, args.out)
        if rows[0].get("hung"):
            break
    print(f"\n{table(report)}\nwritten: {args.out / 'gpu-check.json'}, {args.out / 'gpu-check.md'}")
    rows = [row for found in (report["benchmark"], *report["persistent"].values()) for row in found]
    return 1 if tests["exit_code"] or any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
