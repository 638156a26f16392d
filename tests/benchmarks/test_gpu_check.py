"""`make gpu-check` where there is no GPU: its plan, jobs that hang or crash, how it goes on, and its report."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import findings, jobs, summary
from benchmarks.timing.providers import provider_of
from benchmarks.timing.results import new_row
from rnnfast.choice import trust, tuned
from rnnfast.commands import canary, tune
from rnnfast.kernels.families import OF_TORCH
from rnnfast.kernels.persistent.plan import GPUS

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).parents[2]
H200 = GPUS["H200"]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check itself runs it there")


# The plan


def test_the_plan(capsys):
    """It takes nine minutes at most, and needs no GPU."""
    assert sum(seconds for seconds, _ in gpu_check.PLAN.values()) <= 540 and gpu_check.ENDS["end"] <= 540
    assert [part for part in gpu_check.PLAN if part in gpu_check.WORK] == list(gpu_check.WORK)
    assert gpu_check.main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1]) for line in lines[1 : 1 + len(gpu_check.PLAN)]] == [s for s, _ in gpu_check.PLAN.values()]
    assert all(any(provider_of(family) in line for line in lines) for family in OF_TORCH)
    (layers,) = (line for line in lines if line.startswith("benchmark: "))
    assert "LSTM-T512-B10-I128-H256-L6-tf32 (kb35, kb36, kb37)" in layers and layers.count("L6-bi-tf32") == 2


# Its processes


@pytest.fixture
def report(tmp_path):
    """In which the canary found all right."""
    found = findings.Report(tmp_path, {"gpu": "none"}, H200)
    found.update("canary", {"faults": dict.fromkeys(OF_TORCH, ""), "why": ""})
    return found


@pytest.fixture
def child_jobs(monkeypatch):
    """`child_jobs.py` in place of the jobs on a GPU."""
    inner = gpu_check.isolated.rows

    def rows(function, *args):
        return inner(function.replace("benchmarks.gpu.jobs", "child_jobs"), *args)

    monkeypatch.setattr(gpu_check.isolated, "rows", rows)
    monkeypatch.setattr(gpu_check, "CASE", 3)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [ROOT, ROOT / "tests"])))


def few_checks(monkeypatch, number):
    few = dict(list(jobs.CHECKS.items())[:number])
    monkeypatch.setattr(jobs, "CHECKS", few)
    monkeypatch.setattr(gpu_check, "PROCESSES", 2)
    return list(few)


@pytest.mark.parametrize(
    "fault, message", [("time.sleep(60)", "nothing for 3 s"), ("sys.exit('CUDA error: x')", "CUDA error: x")]
)
def test_a_case_that_hangs_or_crashes(fault, message, report, child_jobs, monkeypatch):
    """It is reported, and the others are checked."""
    names = few_checks(monkeypatch, 4)
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("FAULTY", names[1])
    gpu_check.WORK["checks"](report, time.monotonic() + 100)
    assert report.found["checks"].keys() == set(names)
    assert [row["error"] for rows in report.found["checks"].values() for row in rows if "error" in row] == [message]


def test_no_time_left(report, child_jobs, monkeypatch):
    """What could not begin is no finding: the next call does it."""
    names = few_checks(monkeypatch, 2)
    for part, work in gpu_check.WORK.items():
        if part in ("checks", "stress", "tests"):
            work(report, time.monotonic() - 1)
    assert not report.found["checks"] and report.left("checks") == names and not report.found["stress"]
    assert report.found["tests"]["closing_line"] == "not run"


def test_stress_that_fails(report, monkeypatch):
    """Each part of the report has its error, what had been found before stays, and what was cut off begins anew."""
    whole = {"launches": jobs.LAUNCHES, "other bits": 0}
    found = [
        (0, {"launches": 500, "other bits": 0}), (0, {"error": "crashed", "hung": False}), (1, whole),
        (2, {"launches": 500, "other bits": 0}), (2, {"error": "no time was left", "hung": False}),
    ]  # fmt: skip
    monkeypatch.setattr(gpu_check.isolated, "rows", lambda *args: found)
    gpu_check.WORK["stress"](report, 0)
    kept = json.loads((report.folder / "gpu-check.json").read_text())["stress"]
    names = list(jobs.STRESS)
    assert [kept[name] for name in names[:3]] == [[row for _, row in found[:2]], [whole], [found[3][1]]]
    assert report.left("stress") == names[2:]


# Timing


def timed(work, hung=()):
    """The rows of `work`, a millisecond a step, ours twice as fast; where a provider in `hung` hung."""
    rows = []
    for set_name, case, name in work:
        us = case.T * (1000 if name == "torch.nn" else 500)
        times = [{"how": how, "l2": "warm", "p20": us, "p50": us, "p80": us, "n": 5} for how in ("eager", "cuda graph")]
        ratio = None if name == "torch.nn" else {"to": "torch.nn", "p20": 0.5, "p50": 0.5, "p80": 0.5}
        kernels = [{"name": "RNN_blockPersist_fp_LSTM", "us": us, "launches": 1}]
        values = {"timings": times, "ratio": ratio, "peak_bytes": 3 << 20, "kernels": kernels}
        if name in hung:
            rows.append(new_row(case, set_name, name, "error", note="nothing for 30 s"))
        else:
            rows.append(new_row(case, set_name, name, "ok", **values))
    return rows


class Runner:
    """In place of the runner: its calls, what each was asked for, and the rows so far. `cut`: calls that find nothing."""

    def __init__(self, monkeypatch, hung=(), cut=()):
        self.asked, self.rows, self.hung, self.cut, self.limits = [], [], hung, cut, []
        monkeypatch.setenv("RNNFAST_BACKEND", "torch")
        monkeypatch.setattr(gpu_check, "run", self)
        monkeypatch.setattr(gpu_check, "new_results", lambda device, settings: {"settings": settings})

    def __call__(self, work, now, path, limit, say, until, env):
        assert env["RNNFAST_STRICT"] == "1" and "RNNFAST_BACKEND" not in env and now["settings"]["check_steps"]
        self.limits.append(until - time.monotonic())
        self.asked.append(work)
        if len(self.asked) not in self.cut:
            self.rows.extend(timed(work, self.hung))
        return {"rows": self.rows}, ""


def names(asked):
    return [f"{case.id} {name}" for work in asked for _, case, name in work]


def test_times(report, monkeypatch):
    """All families and torch.nn, one process a layer, that may take a part of the time; the ceilings are in the file."""
    runner = Runner(monkeypatch)
    report.add("probes", "ceilings", {"exchange_us": 1.0})
    gpu_check.time_all(report, time.monotonic() + 1000)
    assert len(runner.asked) == len(gpu_check.LAYERS) and max(runner.limits) <= gpu_check.CASE
    assert sorted(names(runner.asked)) == sorted(report.expected["benchmark"])
    for work in runner.asked:
        assert len({replace(case, mode="training", model="") for _, case, _ in work}) == 1
        assert work[len(OF_TORCH)][2] == "rnnfast-persistent", "what may hang comes last"
    assert not report.left("benchmark")
    gpu_check.time_all(report, time.monotonic() + 1000)
    assert len(runner.asked) == len(gpu_check.LAYERS), "nothing is left"


def test_a_hang_costs_one_layer(report, monkeypatch):
    """Then, and in later calls, the family is left out, if its programs wait for one another; another is not."""
    runner = Runner(monkeypatch, hung=("rnnfast-persistent", "rnnfast-step"))
    gpu_check.time_all(report, time.monotonic() + 1000)
    assert len([name for name in names(runner.asked) if name.endswith("-persistent")]) == 2
    assert len([name for name in names(runner.asked) if name.endswith("-step")]) == len(jobs.TIMED)
    before = len(runner.asked)
    gpu_check.time_all(report, time.monotonic() + 1000)
    assert len(runner.asked) == before


def test_times_go_on(report, monkeypatch):
    """What a call had no time for, another does, in a report read from the folder."""
    runner = Runner(monkeypatch, cut=(2,))
    gpu_check.time_all(report, time.monotonic() - 1)
    assert not runner.asked
    gpu_check.time_all(report, time.monotonic() + 1000)
    again = findings.Report(report.folder, {"gpu": "none", "time": "later"}, H200)
    left = again.left("benchmark")
    assert left and {name.partition(" ")[0] for name in left} == {case.id for _, case, _ in runner.asked[1]}
    gpu_check.time_all(again, time.monotonic() + 1000)
    assert names(runner.asked[-1:]) == names(runner.asked[1:2]) and not again.left("benchmark")


def test_another_commit(report):
    with pytest.raises(
        gpu_check.BadResults, match="another commit: name another folder with --out, or start anew with --again"
    ):
        findings.Report(report.folder, {"gpu": "none", "commit": "x"}, H200)


# The canary, the probes and what is compiled


class Children:
    """In place of child processes and of the canary, where all is right. `happened`: function and number of jobs of each."""

    def __init__(self, monkeypatch, verdict):
        self.happened, self.verdict = [], verdict
        monkeypatch.setattr(gpu_check.isolated, "rows", self.rows)
        monkeypatch.setattr(gpu_check, "PROCESSES", 1)
        monkeypatch.setattr(trust, "examine", self.examine)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def rows(self, function, arguments, quiet, until, env):
        kind = function.rpartition(":")[2]
        self.happened.append((kind, len(arguments)))
        row = {"build": {"kernels": 3}, "probe": {"of 2": 1.5}, "stress": {"launches": 10000, "other bits": 0}}
        row["check"] = {"share": 0.25, "tensor": "h_n", "figure": "rms"}
        return ((number, row[kind]) for number in range(len(arguments)))

    def examine(self, device, again, seconds):
        assert again and seconds == gpu_check.CANARY
        self.happened.append(("canary", 1))
        return self.verdict


@pytest.mark.parametrize("verdict", [
    trust.Verdict(dict.fromkeys(OF_TORCH, "")), trust.Verdict({"step": "", "persistent": "h_n: error 1"}),
    trust.Verdict(why="no time was left"),
])  # fmt: skip
def test_prepare(verdict, tmp_path, monkeypatch):
    """The canary's kernels are compiled before it runs, all others beside it; what waits runs only if it is right."""
    report = findings.Report(tmp_path, {"gpu": "none"}, H200)
    happened = Children(monkeypatch, verdict).happened
    gpu_check.prepare(report, time.monotonic() + 100)
    assert happened[0] == ("build", len(canary.CASES) * len(OF_TORCH))
    assert sorted(kind for kind, _ in happened[1:]) == ["build", "canary", "probe"]
    assert report.found["canary"] == {"faults": verdict.faults, "why": verdict.why} and not report.left("probes")
    runs = "persistent" in verdict.right
    assert ("persistent" in report.families) == runs and "step" in report.families
    expected = report.expected
    assert any("persistent" in name for name in expected["benchmark"]) == runs == bool(expected["stress"])
    assert any(name.startswith("persistent") for name in expected["checks"]) == runs
    assert any(problem.startswith("canary") for problem in summary.problems(report.found, expected)) != runs
    happened.clear()
    gpu_check.prepare(report, time.monotonic() + 100)
    assert ("canary", 1) in happened if verdict.why else [kind for kind, _ in happened] == ["build"]


# Tuning


def test_tune(report, monkeypatch):
    """The tuner's candidates, timed or not, one by one, and the table, which is what the package would bring."""

    def measure(entries, quiet, until):
        return {0: 2.0, 1: "failed: x"} | dict.fromkeys(range(2, len(entries)), 1.5)

    monkeypatch.setattr(tune, "measure", measure)
    gpu_check.tune_all(report, time.monotonic() + 100)
    for shape in jobs.TUNED:
        rows = report.found["tuned"][str(shape)]
        assert rows[0] == {"candidate": "torch.nn", "us/step": 2.0} and rows[1]["error"] == "failed: x" and len(rows) > 2
    assert report.table.name == "h200.json" and not gpu_check.shapes_left(report)
    monkeypatch.setattr(tuned, "shipped", lambda gpu: report.table)
    monkeypatch.setattr(tuned, "where", lambda gpu: report.folder / "none.json")
    monkeypatch.setattr(tuned, "_tables", {})
    here = tuned.table(H200)
    assert [entry.shape for entry in here.entries] == jobs.TUNED and all(entry.winner == "triton" for entry in here.entries)


def test_tuning_goes_on(report, monkeypatch):
    """From the first layer that was not tuned in training, too; what there was no time for is no finding."""
    asked = []

    def measure(entries, quiet, until):
        asked.append(entries[0].shape)
        late = len(asked) > 3
        return dict.fromkeys(range(len(entries)), "not run: no time was left" if late else 1.5)

    monkeypatch.setattr(tune, "measure", measure)
    gpu_check.tune_all(report, time.monotonic() + 100)
    assert list(report.found["tuned"]) == list(map(str, jobs.TUNED[:3])) and gpu_check.shapes_left(report) == jobs.TUNED[2:]
    asked.clear()
    gpu_check.tune_all(report, time.monotonic() - 1)
    assert not asked
    gpu_check.tune_all(report, time.monotonic() + 100)
    assert asked == jobs.TUNED[2:]


# The report


def whole(report):
    """What a run finds in which all went well."""
    work = [("gpu-check", case, name) for case in jobs.TIMED for name in ["torch.nn", *map(provider_of, OF_TORCH)]]
    checks = {name: [{"share": 0.25, "tensor": "h_n", "figure": "rms"}] for name in report.expected["checks"]}
    first, second, *_ = checks
    checks |= {first: [{"share": 0.5, "tensor": "output", "figure": "rms"}], second: [{"skipped": "no tiles fit"}]}
    return report.found | {
        "tests": {"exit_code": 0, "closing_line": "9 passed"},
        "probes": {name: [{"of 2": 1.5}] for name in jobs.PROBES},
        "checks": checks,
        "benchmark": dict(zip(report.expected["benchmark"], ([row] for row in timed(work)), strict=True)),
        "stress": {name: [{"launches": 10000, "other bits": 0}] for name in jobs.STRESS},
        "tuned": {str(shape): [{"candidate": "torch.nn", "us/step": 1.0}] for shape in jobs.TUNED},
    }


def test_a_whole_report(report):
    text = summary.table(whole(report), report.expected)
    assert summary.problems(whole(report), report.expected) == [] and "not right" not in text
    case, total = jobs.TIMED[0].id, len(jobs.CHECKS)
    kernels = "RNN_blockPersist_fp_LSTM (1: 500.00)"
    assert f"| {case} | rnnfast-persistent | 500.00 | 500.00 | 2.00 | 2.00 | 3 | {kernels} |" in text.splitlines()
    assert f"{total - 1} of {total} cases right, 1 have no plan" in text
    assert f"- 0.50 {next(iter(jobs.CHECKS))}: output, rms" in text.splitlines()
    assert "10000 launches, 0 calls with other bits than the first" in text
    assert f"- {jobs.TUNED[0]}: 1.00 us/step: torch.nn" in text and "- hop, of 2: 1.5" in text
    assert "Canary: step right; persistent right" in text


BASE, STEP = (f"{jobs.TIMED[0].id} {name}" for name in ("torch.nn", "rnnfast-step"))
FAILED = new_row(jobs.TIMED[0], "", "rnnfast-step", "error", note="nothing for 30 s")
WRONG = new_row(jobs.TIMED[0], "", "torch.nn", "wrong", error={"worst": 3.0, "tensor": "y"})
STRESSED, TUNED, CHECKED = next(iter(jobs.STRESS)), str(jobs.TUNED[0]), next(iter(jobs.CHECKS))


@pytest.mark.parametrize(
    "part, name, rows, problem",
    [
        ("benchmark", STEP, [FAILED], f"benchmark: {STEP}: nothing for 30 s"),
        ("benchmark", BASE, [WRONG], f"benchmark: {BASE}: y has 3 times the error allowed"),
        ("benchmark", STEP, None, f"benchmark: 1 not run, the first: {STEP}"),
        ("stress", STRESSED, [{"launches": 10000, "other bits": 2}], f"stress: {STRESSED}: 2 calls gave other bits"),
        ("stress", STRESSED, [{"launches": 500, "other bits": 0}, {"error": "hung"}], f"stress: {STRESSED}: hung"),
        ("stress", STRESSED, [{"launches": 500, "other bits": 0}], f"stress: {STRESSED}: not finished"),
        ("stress", STRESSED, None, f"stress: 1 not run, the first: {STRESSED}"),
        ("tuned", TUNED, [{"candidate": "torch.nn", "error": "failed: x"}], f"tuned: {TUNED}: failed: x"),
        ("tuned", TUNED, None, f"tuned: 1 not run, the first: {TUNED}"),
        ("checks", CHECKED, [{"share": 2.0, "tensor": "y", "figure": "rms", "error": "y: 1"}], f"checks: {CHECKED}: y: 1"),
        ("compile", "x", [{"error": "crashed"}], "compile: x: crashed"),
        ("probes", "hop", [{"error": "crashed"}], "probes: hop: crashed"),
        ("canary", "faults", {"step": "", "persistent": "h_n: 1"}, "canary: persistent: h_n: 1"),
    ],
)
def test_every_problem_is_in_the_report(part, name, rows, problem, report):
    found, expected = whole(report), report.expected
    if rows is None:
        del found[part][name]
    else:
        found[part] = found[part] | {name: rows}
    assert summary.problems(found, expected) == [problem]
    assert f"- not right: {problem}" in summary.table(found, expected).splitlines()


def test_an_empty_report(tmp_path):
    """As it is written before anything has run: a line for each part. The persistent kernels are not expected yet."""
    report = findings.Report(tmp_path, {"gpu": "none"}, H200)
    found = summary.problems(report.found, report.expected)
    assert [line.partition(":")[0] for line in found][:3] == ["tests", "canary", "probes"]
    assert report.text().count("not timed: not run") == len(jobs.TIMED) * (1 + len(report.families))


@on_cpu
def test_without_a_gpu(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    assert "gpu-check needs an NVIDIA GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_check.gpu, "limits", lambda device: H200)
    monkeypatch.setattr(gpu_check, "environment", lambda device: {"gpu": "none"})


def test_a_run(fake_gpu, tmp_path, monkeypatch, capsys):
    """Everything but the GPU's own work: interrupted in the middle, and a second call that goes on from there."""
    children, runner = Children(monkeypatch, trust.Verdict(dict.fromkeys(OF_TORCH, ""))), Runner(monkeypatch)
    monkeypatch.setattr(tune, "measure", lambda entries, quiet, until: dict.fromkeys(range(len(entries)), 1.5))
    monkeypatch.setattr(gpu_check, "run_tests", lambda folder, seconds: {"exit_code": 0, "closing_line": "9 passed"})

    def interrupted(*args):
        results, _ = runner(*args)
        return results, "interrupted: 4 rows" if len(runner.asked) == 3 else ""

    monkeypatch.setattr(gpu_check, "run", interrupted)
    with pytest.raises(SystemExit, match="interrupted: 4 rows"):
        gpu_check.main(["--out", str(tmp_path)])
    kinds = [kind for kind, _ in children.happened]
    assert sorted(kinds) == ["build", "build", "canary", "probe"] and len(runner.asked) == 3
    children.happened.clear()
    assert gpu_check.main(["--out", str(tmp_path)]) == 0, capsys.readouterr().out
    assert [kind for kind, _ in children.happened] == ["build", "check", "stress"]
    assert len(runner.asked) == len(gpu_check.LAYERS)
    text = (tmp_path / "gpu-check.md").read_text()
    assert "not right" not in text and "not run" not in text and (tmp_path / "h200.json").exists()
    children.happened.clear()
    assert gpu_check.main(["--out", str(tmp_path)]) == 0 and not children.happened, "nothing is left"


@pytest.fixture
def parts(fake_gpu, monkeypatch):
    """The parts stand-ins that say until when they may run; returned as a list."""
    called = []
    began = time.monotonic() - gpu_check.PLAN["start"][0]
    for part in gpu_check.WORK:
        work = lambda report, until, part=part: called.append((part, round(until - began)))  # noqa: E731
        monkeypatch.setitem(gpu_check.WORK, part, work)
    return called


@pytest.mark.parametrize("budget", [540, 200])
def test_main(budget, parts, tmp_path, monkeypatch):
    """All parts in their order, each until its own end, the tests until the last; the exit code says whether all went well."""
    assert gpu_check.main(["--out", str(tmp_path), "--budget", str(budget)]) == 1
    wanted = [min(gpu_check.ENDS[part], budget - 10) for part in gpu_check.WORK]
    assert [part for part, _ in parts] == list(gpu_check.WORK) and wanted[-1] == budget - 10
    assert [until for _, until in parts] == pytest.approx(wanted, abs=2)
    monkeypatch.setattr(summary, "problems", lambda found, expected: [])
    assert gpu_check.main(["--out", str(tmp_path), "--skip-tests"]) == 0
    assert json.loads((tmp_path / "gpu-check.json").read_text())["tests"] == {"exit_code": 0, "closing_line": "skipped"}


def test_again(parts, tmp_path, capsys):
    """Another commit's findings are not mixed with these; --again removes them, the table too, and nothing else."""
    for name in ("gpu-check-times.json", "h200.json", "mine.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "gpu-check.json").write_text(json.dumps({"environment": {"gpu": "another"}}))
    assert gpu_check.main(["--out", str(tmp_path)]) == 2 and not parts
    assert "found with another gpu" in capsys.readouterr().err
    assert gpu_check.main(["--out", str(tmp_path), "--again"]) == 1 and parts
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-check.json", "gpu-check.md", "mine.json"}


def test_a_budget_too_small(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--budget", "20"])
    assert "--budget should be at least 100" in capsys.readouterr().err
