"""`make gpu-check` where there is no GPU: its jobs on CPU tensors, what it makes of jobs that hang or crash, and its report."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from support.side_by_side import together
from support.stand_ins import stand_in_gpu

import rnnfast
from benchmarks import gpu_check
from benchmarks.gpu import jobs, summary
from benchmarks.timing.results import new_row
from rnnfast.check import Case, Result
from rnnfast.choice import kernel_plan, tuning_file
from rnnfast.commands import tune
from rnnfast.kernels import persistent
from rnnfast.kernels.persistent.plan import GPUS

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).parents[2]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check itself runs it there")


@pytest.fixture
def pretend(monkeypatch):
    """The jobs on CPU tensors, with stand-ins for what only a GPU has."""
    monkeypatch.setattr(jobs, "DEVICE", "cpu")
    monkeypatch.setenv("RNNFAST_KERNELS", "")  # the jobs set it
    stand_in_gpu(monkeypatch)


@pytest.fixture
def on_an_h100(pretend):
    """With its persistent kernels, whose programs run side by side."""
    with kernel_plan.pretend_gpu(GPUS["H100"]), together(1):
        yield


# The jobs


@on_cpu
@pytest.mark.parametrize(
    "case", [Case("GRU", 3, 2, 3, 20, torch.float16, bidirectional=True), Case("RNN", 3, 2, 3, 8, torch.float32)]
)
def test_check(case, on_an_h100, monkeypatch):
    """Really on the persistent kernels, against float64; wrong results and other bits are seen."""
    monkeypatch.setattr(jobs, "CHECKS", [(case, case.dtype == torch.float32)])
    ran, inner = [], persistent.forward
    monkeypatch.setattr(persistent, "forward", lambda *args, **options: ran.append(1) or inner(*args, **options))
    assert list(jobs.check(0)) == [{}]
    assert len(ran) == 4 * (1 + case.bidirectional)
    bits = iter([torch.zeros(5), torch.tensor([0.0, 0, 1, 1, 0])])
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "bits", lambda layer, x: next(bits))
        patch.setattr(jobs, "compare", lambda *args, **options: [])
        assert list(jobs.check(0)) == [{"error": "2 of 5 numbers differ from run to run"}]
    monkeypatch.setattr(jobs, "compare", lambda *args, **options: [Result(case, "output", 1.0, 0.1, 0.3)])
    assert list(jobs.check(0)) == [{"error": "training, output: error 1.0e+00, allowed 3.0e-01"}]


@on_cpu
@pytest.mark.parametrize("job", [jobs.check, jobs.stress])
def test_without_a_plan(job, pretend):
    """Nothing is checked or stressed, and the reason is said."""
    (row,) = job(0)
    assert "forward: on a CPU" in row["skipped"] and "backward: on a CPU" in row["skipped"]


@on_cpu
@pytest.mark.parametrize("beside", [False, True])
def test_stress(beside, on_an_h100, monkeypatch):
    """Launches and calls with other bits are counted as they go."""
    monkeypatch.setattr(jobs, "LAUNCHES", 1200)
    monkeypatch.setattr(jobs, "OTHER", 8)
    monkeypatch.setattr(jobs, "STRESS", [(Case("RNN", 2, 1, 3, 8, torch.float32), beside)])
    inner, kept = jobs.bits, []

    def bits(layer, x):
        kept.append(kept[0] if kept else inner(layer, x))
        return kept[0] + (len(kept) == 300)

    monkeypatch.setattr(jobs, "bits", bits)
    assert list(jobs.stress(0)) == [{"launches": n, "other bits": int(n > 500)} for n in (500, 1000, 1200)]


def test_cases_are_told_apart():
    """A row of the report belongs to one case."""
    assert len({jobs.check_name(*case) for case in jobs.CHECKS}) == len(jobs.CHECKS)
    assert len({jobs.stress_name(*case) for case in jobs.STRESS}) == len(jobs.STRESS)
    assert any(case.T * case.B > 8192 for case, _ in jobs.CHECKS), "none crosses a chunk of the input side"


# Their processes


@pytest.fixture
def report(tmp_path):
    return gpu_check.Report(tmp_path, {"gpu": "none"})


@pytest.fixture
def child_jobs(monkeypatch):
    """`child_jobs.py` in place of the jobs on a GPU."""
    inner = gpu_check.isolated.rows

    def rows(function, *args):
        return inner(function.replace("benchmarks.gpu.jobs", "child_jobs"), *args)

    monkeypatch.setattr(gpu_check.isolated, "rows", rows)
    monkeypatch.setattr(gpu_check, "QUIET", 3)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [ROOT, ROOT / "tests"])))


@pytest.mark.parametrize(
    "fault, message", [("time.sleep(60)", "nothing for 3 s"), ("sys.exit('CUDA error: x')", "CUDA error: x")]
)
def test_a_case_that_hangs_or_crashes(fault, message, report, child_jobs, monkeypatch):
    """It is reported, and the others are checked."""
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setattr(gpu_check, "CHECKS", jobs.CHECKS[:6])
    for one in gpu_check.check_all(report, time.monotonic() + 100):
        one.result()
    rows = [row for rows in report.found["checks"].values() for row in rows]
    assert sorted(row["number"] for row in rows) == list(range(6))
    assert [row["error"] for row in rows if "error" in row] == [message]


def test_checks_that_cannot_begin(report, child_jobs, monkeypatch):
    monkeypatch.setattr(gpu_check, "CHECKS", jobs.CHECKS[:2])
    for one in gpu_check.check_all(report, time.monotonic() - 1):
        one.result()
    assert [row["error"] for rows in report.found["checks"].values() for row in rows] == ["not run: no time was left"] * 2


def test_stress_that_fails(report, monkeypatch):
    """Each part of the report has its error, and what had been found before stays."""
    found = [
        (0, {"launches": 500, "other bits": 0}),
        (0, {"error": "crashed", "hung": False}),
        (1, {"launches": 1, "other bits": 0}),
    ]
    monkeypatch.setattr(gpu_check.isolated, "rows", lambda *args: found)
    gpu_check.stress_all(report, 0)
    kept = json.loads((report.folder / "gpu-check.json").read_text())["stress"]
    assert kept[gpu_check.stress_name(*jobs.STRESS[0])] == [found[0][1], found[1][1]] and len(kept) == 2


def timed(work, hung=()):
    """The rows of `work`, a millisecond a step, ours twice as fast; where a provider in `hung` hung."""
    rows = []
    for set_name, case, name in work:
        us = case.T * (1000 if name == "torch.nn" else 500)
        time = {"how": "eager", "l2": "warm", "p20": us, "p50": us, "p80": us, "n": 5}
        ratio = None if name == "torch.nn" else {"to": "torch.nn", "p20": 0.5, "p50": 0.5, "p80": 0.5}
        values = {"timings": [time], "ratio": ratio, "peak_bytes": 3 << 20, "kernels": ["RNN_blockPersist_fp_LSTM"]}
        if name in hung:
            rows.append(new_row(case, set_name, name, "error", note="nothing for 60 s"))
        else:
            rows.append(new_row(case, set_name, name, "ok", **values))
    return rows


@pytest.mark.parametrize("hung", [(), ("rnnfast-persistent",)])
def test_times(hung, report, monkeypatch):
    """Both families and torch.nn on every case, by the runner. The persistent kernels are left out after they have hung."""
    asked, rows = [], []

    def run(work, now, path, limit, say, until, env):
        assert path.parent == report.folder and env["RNNFAST_STRICT"] == "1" and "RNNFAST_BACKEND" not in env
        asked.extend(work)
        rows.extend(timed(work, hung))
        return {"rows": rows}, ""

    monkeypatch.setenv("RNNFAST_BACKEND", "torch")
    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "new_results", lambda device, settings: {"device": device})
    gpu_check.time_all(report, 0)
    names = [f"{case.id} {name}" for _, case, name in asked]
    if hung:
        left = [name for name in names if name.endswith("persistent")]
        assert len(left) == 2 and set(names) >= {name for name in ALL if not name.endswith("persistent")}
    else:
        assert sorted(names) == sorted(ALL)
    assert list(report.found["benchmark"]) == names


@on_cpu
def test_jobs_are_what_the_module_runs():
    """The real program, which fails here for want of a GPU."""
    ((number, row),) = gpu_check.run_jobs("check", [5], time.monotonic() + 100)
    assert number == 5 and ("CUDA" in row["error"] or "NVIDIA" in row["error"]) and not row["hung"]


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


ALL = gpu_check.EXPECTED["benchmark"]


def whole():
    """A report of a run in which all went well."""
    work = [("gpu-check", case, name) for case in gpu_check.TIMED for name in gpu_check.PROVIDERS]
    return {
        "environment": {"gpu": "none"},
        "tests": {"exit_code": 0, "closing_line": "9 passed"},
        "checks": {"a": [{"number": 0}], "b": [{"number": 1, "skipped": "no tiles fit"}]},
        "benchmark": dict(zip(ALL, ([row] for row in timed(work)), strict=True)),
        "stress": {jobs.stress_name(*case): [{"launches": 10000, "other bits": 0}] for case in jobs.STRESS},
        "tuned": {str(shape): [{"candidate": "torch.nn", "us/step": 1.0}] for shape in gpu_check.TUNED},
    }


def problems(found):
    return summary.problems(found, gpu_check.EXPECTED)


def table(found):
    return summary.table(found, gpu_check.EXPECTED)


def test_a_whole_report():
    text = table(whole())
    assert problems(whole()) == [] and "not right" not in text
    case = gpu_check.TIMED[0].id
    assert f"| {case} | rnnfast-persistent | 500.00 | 1000.00 | 2.00 | 3 | 3 | persistent |" in text.splitlines()
    assert f"1 of {len(jobs.CHECKS)} cases right, 1 have no plan" in text
    assert "10000 launches, 0 calls with other bits than the first" in text
    assert f"- {gpu_check.TUNED[0]}: 1.00 us/step: torch.nn" in text
    assert f"- {case} torch.nn: `RNN_blockPersist_fp_LSTM`" in text


BASE, STEP, PERSISTENT = ALL[:3]
FAILED = new_row(gpu_check.TIMED[0], "", "rnnfast-step", "error", note="nothing for 60 s")
WRONG = new_row(gpu_check.TIMED[0], "", "torch.nn", "wrong", error={"worst": 3.0, "tensor": "y"})
STRESSED, TUNED = jobs.stress_name(*jobs.STRESS[0]), str(gpu_check.TUNED[0])


@pytest.mark.parametrize(
    "part, name, rows, problem",
    [
        ("benchmark", STEP, [FAILED], f"benchmark: {STEP}: nothing for 60 s"),
        ("benchmark", BASE, [WRONG], f"benchmark: {BASE}: y has 3 times the error allowed"),
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
    assert problems(found) == [problem]
    assert f"- not right: {problem}" in table(found).splitlines()


def test_an_empty_report():
    """As it is written before anything has run."""
    found = whole() | {"checks": {}, "benchmark": {}, "stress": {}, "tuned": {}}
    found["tests"] = {"exit_code": None, "closing_line": "not run"}
    assert len(problems(found)) == 2 + sum(map(len, gpu_check.EXPECTED.values()))
    assert table(found).count("not timed: not run") == len(ALL) * 2 // 3  # not torch.nn's own


@on_cpu
def test_without_a_gpu(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    assert "gpu-check needs an NVIDIA GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_main(tmp_path, monkeypatch, capsys):
    """All parts in their order, each until its own end; the exit code says whether all went well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "environment", lambda device: {"gpu": "none", "rnnfast": rnnfast.__version__})
    ends, started = {}, time.monotonic()
    for part in ("time_all", "stress_all", "tune_all"):
        monkeypatch.setattr(gpu_check, part, lambda report, until, part=part: ends.update({part: until}))

    monkeypatch.setattr(gpu_check, "run_jobs", lambda function, numbers, until: ((number, {}) for number in numbers))
    assert gpu_check.main(["--out", str(tmp_path), "--skip-tests"]) == 1
    assert list(ends) == ["time_all", "stress_all", "tune_all"] and sorted(ends.values()) == list(ends.values())
    assert started < ends["time_all"] and ends["tune_all"] < time.monotonic() + 600, "it must end within ten minutes"
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert sorted(row["number"] for rows in found["checks"].values() for row in rows) == list(range(len(jobs.CHECKS)))
    monkeypatch.setattr(summary, "problems", lambda found, expected: [])
    assert gpu_check.main(["--out", str(tmp_path), "--skip-tests"]) == 0
