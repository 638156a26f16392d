"""`make gpu-check` where there is no GPU: its jobs on CPU tensors, what it makes of jobs that hang or crash, and its report."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from side_by_side import together
from torch.autograd import DeviceType

import rnnfast
from benchmarks import gpu_check, gpu_jobs
from rnnfast.check import Case, Result
from rnnfast.choice import kernel_plan, tuning_file
from rnnfast.commands import child, tune
from rnnfast.kernels import persistent
from rnnfast.kernels.persistent.plan import GPUS

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check itself runs it there")


class Clock:
    """In place of a device event: ticks a millisecond at each record."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Clock.now += 1.0
        self.time = Clock.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.time - self.time


class Profiler:
    """In place of PyTorch's: two kernels, one of them twice, and something on the CPU."""

    def __init__(self, activities):
        assert [activity.name for activity in activities] == ["CPU", "CUDA"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def events(self):
        names = ("RNN_blockPersist_fp_LSTM", DeviceType.CUDA), ("gemm", DeviceType.CUDA), ("aten::mm", DeviceType.CPU)
        return [SimpleNamespace(name=name, device_type=device) for name, device in (*names, names[1])]


@pytest.fixture
def pretend(monkeypatch):
    """The jobs on CPU tensors, with stand-ins for what only a GPU has."""
    monkeypatch.setattr(gpu_jobs, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated", "synchronize", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(
        torch.cuda,
        "stream",
        lambda stream: Profiler(list(torch.profiler.ProfilerActivity.__members__.values())[:0]) if False else torch.no_grad(),
    )


@pytest.fixture
def on_an_h100(pretend):
    """With its persistent kernels, whose programs run side by side."""
    with kernel_plan.pretend_gpu(GPUS["H100"]), together(1):
        yield


# The jobs


@on_cpu
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_time(cell, pretend, monkeypatch):
    """A right case gives a row a mode, with a time a step for both layers; then the kernels of each."""
    monkeypatch.setattr(gpu_jobs, "CASES", [Case(cell, 1, 1, 3, 3, torch.float16, states=False)])
    monkeypatch.setattr(gpu_jobs, "ROUNDS", 1)
    rows = [row for row in gpu_jobs.rows("time", ["step", "0"]) if "doing" not in row]
    assert [row["mode"] for row in rows[:2]] == ["forward", "training step"] and len(rows) == 6
    for row in rows[:2]:
        assert row["rnnfast us/step"] == row["torch.nn us/step"] == 1000 and row["speed_up"] == 1
    for row in rows[2:]:
        assert row["kernels"] == {"gemm": 2, "RNN_blockPersist_fp_LSTM": 1}
    assert {(row["kernels of"], row["mode"]) for row in rows[2:]} == {
        (name, mode) for name in ("rnnfast", "torch.nn") for mode in ("forward", "training step")
    }
    assert json.loads(json.dumps(rows)) == rows


@on_cpu
def test_a_wrong_layer_is_not_timed(pretend, monkeypatch):
    """A red check prints the error and no time."""

    def compare(case, device, tf32, training):
        return [Result(case, "output", 1.0, 0.1, 0.3)] if not training else []

    monkeypatch.setattr(gpu_jobs, "compare", compare)
    *_, row = gpu_jobs.measure(Case("GRU", 2, 1, 3, 3, torch.float32))
    assert row == {"error": "inference, output: error 1.0e+00, allowed 3.0e-01"}


@on_cpu
@pytest.mark.parametrize(
    "case", [Case("GRU", 3, 2, 3, 20, torch.float16, bidirectional=True), Case("RNN", 3, 2, 3, 8, torch.float32)]
)
def test_check(case, on_an_h100, monkeypatch):
    """Really on the persistent kernels, against float64; wrong results and other bits are seen."""
    monkeypatch.setenv("RNNFAST_KERNELS", "")  # to be restored
    monkeypatch.setattr(gpu_jobs, "CHECKS", [(case, case.dtype == torch.float32)])
    ran, inner = [], persistent.forward
    monkeypatch.setattr(persistent, "forward", lambda *args, **options: ran.append(1) or inner(*args, **options))
    doing, row = gpu_jobs.rows("check", ["0"])
    assert doing == {"doing": 0} and row == {"number": 0, "case": row["case"]} and str(case) in row["case"]
    assert len(ran) == 4 * (1 + case.bidirectional)
    bits = iter([torch.zeros(5), torch.tensor([0.0, 0, 1, 1, 0])])
    with monkeypatch.context() as patch:
        patch.setattr(gpu_jobs, "bits", lambda layer, x: next(bits))
        patch.setattr(gpu_jobs, "compare", lambda *args, **options: [])
        assert gpu_jobs.check(0)["error"] == "2 of 5 numbers differ from run to run"
    monkeypatch.setattr(gpu_jobs, "compare", lambda *args, **options: [Result(case, "output", 1.0, 0.1, 0.3)])
    assert gpu_jobs.check(0)["error"] == "training, output: error 1.0e+00, allowed 3.0e-01"


@on_cpu
def test_without_a_plan(pretend, monkeypatch):
    """Nothing is checked, timed or stressed, and the reason is said."""
    monkeypatch.setenv("RNNFAST_KERNELS", "persistent")
    for job, arguments in (("check", ["0"]), ("time", ["persistent", "0"]), ("stress", ["0"])):
        row = list(gpu_jobs.rows(job, arguments))[-1]
        assert "forward: on a CPU" in row["skipped"] and "backward: on a CPU" in row["skipped"]


@on_cpu
@pytest.mark.parametrize("beside", [False, True])
def test_stress(beside, on_an_h100, monkeypatch):
    """Launches and calls with other bits are counted as they go."""
    monkeypatch.setenv("RNNFAST_KERNELS", "")  # to be restored
    monkeypatch.setattr(gpu_jobs, "LAUNCHES", 1200)
    monkeypatch.setattr(gpu_jobs, "OTHER", 8)
    monkeypatch.setattr(gpu_jobs, "STRESS", [(Case("RNN", 2, 1, 3, 8, torch.float32), beside)])
    inner, kept = gpu_jobs.bits, []

    def bits(layer, x):
        kept.append(kept[0] if kept else inner(layer, x))
        return kept[0] + (len(kept) == 300)

    monkeypatch.setattr(gpu_jobs, "bits", bits)
    rows = list(gpu_jobs.rows("stress", ["0"]))
    assert rows == [{"launches": n, "other bits": int(n > 500)} for n in (500, 1000, 1200)]


def test_cases_are_told_apart():
    """A row of the report belongs to one case."""
    assert len({gpu_jobs.check_name(*case) for case in gpu_jobs.CHECKS}) == len(gpu_jobs.CHECKS)
    assert len({gpu_jobs.stress_name(*case) for case in gpu_jobs.STRESS}) == len(gpu_jobs.STRESS)
    assert any(case.T * case.B > 8192 for case, _ in gpu_jobs.CHECKS), "none crosses a chunk of the input side"


# Their processes


@pytest.fixture
def report(tmp_path):
    return gpu_check.Report(tmp_path, {"gpu": "none"})


def stand_in(body):
    """In place of a job: gets its arguments as `args`."""
    head = "import json, sys, time\nargs = sys.argv[1:]\ndef say(**row): print(json.dumps(row), flush=True)\n"
    return lambda *arguments: [sys.executable, "-c", head + body, *map(str, arguments)]


BAD_CASE = """
for n in map(int, args[1:]):
    say(doing=n)
    if n == 1: {}
    say(number=n, case=f"case {{n}}")
"""


@pytest.mark.parametrize(
    "fault, message", [("time.sleep(60)", "nothing for 3 s"), ("sys.exit('CUDA error: x')", "CUDA error: x")]
)
def test_a_case_that_hangs_or_crashes(fault, message, report, monkeypatch):
    """It is reported, and the others of its process are checked."""
    monkeypatch.setattr(gpu_check, "QUIET", 3)
    gpu_check.check_some([0, 1, 2], report, time.monotonic() + 60, stand_in(BAD_CASE.format(fault)))
    rows = [row for rows in report.found["checks"].values() for row in rows]
    assert sorted(row["number"] for row in rows) == [0, 1, 2]
    assert [row["error"] for row in rows if "error" in row] == [message]


@pytest.mark.parametrize(
    "body, seconds, message",
    [("sys.exit('no module')", 60, "not run: no module"), ("", -1, "not run: no time was left"), ("", 60, "not run: None")],
)
def test_a_process_that_cannot_check(body, seconds, message, report):
    gpu_check.check_some([3, 4], report, time.monotonic() + seconds, stand_in(body))
    assert [row["error"] for rows in report.found["checks"].values() for row in rows] == [message] * 2


def test_no_job_outlives_its_time(report):
    started = time.monotonic()
    taken = []
    failed = gpu_check.run(stand_in("say(a=1)\ntime.sleep(60)")(), started + 2, taken.append)
    assert str(failed) == "no time was left" and not failed.hung and taken == [{"a": 1}]


@on_cpu
def test_jobs_that_fail(report, monkeypatch):
    """Every part of the report has its error, and what had been found before stays."""
    report.add("benchmark", f"{gpu_jobs.CASES[0]} step", {"doing": "a check"})
    report.add("benchmark", f"{gpu_jobs.CASES[0]} step", {"mode": "kept"})
    monkeypatch.setattr(gpu_check, "run", lambda *args: child.Failed("crashed", hung=False))
    gpu_check.time_all(report, 0)
    gpu_check.stress_all(report, 0)
    found = json.loads((report.folder / "gpu-check.json").read_text())
    assert found["benchmark"][f"{gpu_jobs.CASES[0]} step"] == [{"mode": "kept"}, {"error": "crashed"}]
    assert len(found["benchmark"]) == 2 * len(gpu_jobs.CASES) and len(found["stress"]) == len(gpu_jobs.STRESS)


def test_persistent_kernels_are_not_timed_after_they_hung(report, monkeypatch):
    asked = []

    def run(command, until, take):
        asked.append(command[-2])
        return child.Failed("nothing for 60 s", hung=True) if command[-2] == "persistent" else None

    monkeypatch.setattr(gpu_check, "run", run)
    gpu_check.time_all(report, 0)
    assert asked.count("persistent") == 1 and asked.count("step") == len(gpu_jobs.CASES)
    second = list(report.found["benchmark"].values())[1]
    assert second == [{"error": "not run: the persistent kernels hung before"}]


@on_cpu
def test_jobs_are_what_the_module_runs():
    """The real program, which fails here for want of a GPU."""
    failed = gpu_check.run(gpu_check.job("check", 0), time.monotonic() + 100, print)
    assert failed is not None and not failed.hung and "CUDA" in str(failed)


def test_tune(report, monkeypatch):
    """The tuner's candidates, timed or not, one by one, and its file beside the report."""
    monkeypatch.setattr(gpu_check.gpu, "limits", lambda device: GPUS["H100"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def measure(entries, quiet, until):
        return {0: 2.0, 1: "failed: x"} | dict.fromkeys(range(2, len(entries)), 1.5)

    monkeypatch.setattr(tune, "measure", measure)
    gpu_check.tune_all(report, time.monotonic() + 100)
    for shape in gpu_check.TUNED:
        rows = report.found["tuned"][str(shape)]
        assert rows[0] == {"candidate": "torch.nn", "us/step": 2.0} and rows[1]["error"] == "failed: x" and len(rows) > 2
    entries = tuning_file.read(report.folder / "gpu-check-tuning.json", GPUS["H100"])
    assert [entry.shape for entry in entries] == gpu_check.TUNED and all(entry.winner == "triton" for entry in entries)
    gpu_check.tune_all(report, 0)
    assert report.found["tuned"][str(gpu_check.TUNED[0])][-1]["error"] == "not run"


# The report


TIMED = {"mode": "forward", "speed_up": 0.5, "rnnfast us/step": 2.0, "torch.nn us/step": 1.0}
TIMED |= {"rnnfast peak MiB": 3.0, "torch.nn peak MiB": 4.0}


def whole():
    """A report of a run in which all went well."""
    kernels = {"kernels of": "torch.nn", "mode": "forward", "kernels": {"RNN_blockPersist_fp_LSTM": 1}}
    return {
        "environment": {"gpu": "none"},
        "tests": {"exit_code": 0, "closing_line": "9 passed"},
        "checks": {"a": [{"number": 0, "case": "a"}], "b": [{"number": 1, "skipped": "no tiles fit"}]},
        "benchmark": {f"{case} {family}": [TIMED, kernels] for case in gpu_jobs.CASES for family in gpu_check.FAMILIES},
        "stress": {gpu_jobs.stress_name(*case): [{"launches": 10000, "other bits": 0}] for case in gpu_jobs.STRESS},
        "tuned": {str(shape): [{"candidate": "torch.nn", "us/step": 1.0}] for shape in gpu_check.TUNED},
    }


def test_a_whole_report():
    text = gpu_check.table(whole())
    assert gpu_check.problems(whole()) == [] and "not right" not in text
    assert f"| {gpu_jobs.CASES[0]} | forward | persistent | 2.00 | 1.00 | 0.50 | 3 | 4 | persistent |" in text.splitlines()
    assert f"1 of {len(gpu_jobs.CHECKS)} cases right, 1 have no plan" in text
    assert "10000 launches, 0 calls with other bits than the first" in text
    assert f"- {gpu_check.TUNED[0]}: 1.00 us/step: torch.nn" in text
    assert "forward, torch.nn: 1 x `RNN_blockPersist_fp_LSTM`" in text


STEP, PERSISTENT = (f"{gpu_jobs.CASES[0]} {family}" for family in gpu_check.FAMILIES)
STRESSED, TUNED = gpu_jobs.stress_name(*gpu_jobs.STRESS[0]), str(gpu_check.TUNED[0])


@pytest.mark.parametrize(
    "part, name, rows, problem",
    [
        ("benchmark", STEP, [TIMED, {"error": "nothing for 60 s"}], f"benchmark: {STEP}: nothing for 60 s"),
        ("benchmark", PERSISTENT, None, f"benchmark: {PERSISTENT}: not run"),
        ("stress", STRESSED, [{"launches": 500, "other bits": 2}], f"stress: {STRESSED}: 2 calls gave other bits"),
        ("stress", STRESSED, [{"launches": 500, "other bits": 0}, {"error": "hung"}], f"stress: {STRESSED}: hung"),
        ("stress", STRESSED, None, f"stress: {STRESSED}: not run"),
        ("tuned", TUNED, [{"candidate": "torch.nn", "error": "failed: x"}], f"tuned: {TUNED}: failed: x"),
        ("tuned", TUNED, None, f"tuned: {TUNED}: not run"),
        ("checks", "a", [{"number": 0, "error": "output: error 1"}], "checks: a: output: error 1"),
    ],
)
def test_every_problem_is_in_the_report(part, name, rows, problem):
    found = whole()
    if rows is None:
        del found[part][name]
    else:
        found[part][name] = rows
    assert gpu_check.problems(found) == [problem]
    assert f"- not right: {problem}" in gpu_check.table(found).splitlines()


def test_an_empty_report():
    """As it is written before anything has run."""
    found = whole() | {"checks": {}, "benchmark": {}, "stress": {}, "tuned": {}}
    found["tests"] = {"exit_code": None, "closing_line": "not run"}
    assert len(gpu_check.problems(found)) == 2 + 2 * len(gpu_jobs.CASES) + len(gpu_jobs.STRESS) + len(gpu_check.TUNED)
    assert "not timed: not run" in gpu_check.table(found)


@on_cpu
def test_without_a_gpu(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    assert "gpu-check needs an NVIDIA GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_main(tmp_path, monkeypatch, capsys):
    """All parts in their order, each until its own end; the exit code says whether all went well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "environment", lambda: {"gpu": "none", "rnnfast": rnnfast.__version__})
    ends, started = {}, time.monotonic()
    for part in ("time_all", "stress_all", "tune_all"):
        monkeypatch.setattr(gpu_check, part, lambda report, until, part=part: ends.update({part: until}))

    def check_some(numbers, report, until):
        for number in numbers:
            report.add("checks", str(number), {"number": number})

    monkeypatch.setattr(gpu_check, "check_some", check_some)
    assert gpu_check.main(["--out", str(tmp_path), "--skip-tests"]) == 1
    assert list(ends) == ["time_all", "stress_all", "tune_all"] and sorted(ends.values()) == list(ends.values())
    assert started < ends["time_all"] and ends["tune_all"] < time.monotonic() + 600, "it must end within ten minutes"
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert sorted(map(int, found["checks"])) == list(range(len(gpu_jobs.CHECKS)))
    monkeypatch.setattr(gpu_check, "problems", lambda found: [])
    assert gpu_check.main(["--out", str(tmp_path), "--skip-tests"]) == 0
