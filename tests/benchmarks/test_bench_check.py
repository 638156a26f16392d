"""The regression gate: what counts as worse, what it says, and that it names the commit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import check

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).parents[2]
BASE = {"a row": {"family": "persistent", "barriers": 10, "spills": 0, "instructions": 1000}}


def changed(**figures) -> check.Figures:
    return {"a row": BASE["a row"] | figures}


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (changed(barriers=11), "a row: barriers 10 -> 11 (+10.0%; none is allowed)"),
        (changed(spills=3), "a row: spills 0 -> 3 (+3; none is allowed)"),
        (changed(instructions=1011), "a row: instructions 1,000 -> 1,011 (+1.1%; +1% is allowed)"),
        (changed(family="step"), "a row: family was persistent, and is step"),
        ({}, "a row: barriers was 10, and is gone"),
    ],
)
def test_worse(now, says):
    worse, better = check.compare(BASE, now, check.TOLERANCES)
    assert says in [str(one) for one in worse] and not better


def test_not_worse():
    assert check.compare(BASE, changed(instructions=1010), check.TOLERANCES) == ([], [])
    worse, better = check.compare(BASE, changed(barriers=9, instructions=995), check.TOLERANCES)
    assert not worse and [one.name for one in better] == ["barriers"]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose kernels are a number of barriers, with a commit for each; the gate looks at it."""

    def git(*args):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
        subprocess.run(["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True)

    (tmp_path / "kernels").mkdir()
    (tmp_path / "rnnfast").mkdir()
    (tmp_path / "rnnfast/__init__.py").touch()
    git("init", "-q")

    def commit(barriers, subject):
        (tmp_path / "kernels/barriers").write_text(str(barriers))
        git("add", "-A")
        git("commit", "-qm", subject)

    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "BASELINES", tmp_path)
    figures = "lambda part: ({'a row': {'barriers': int(open('kernels/barriers').read())}}, {})"
    program = f"import sys; from benchmarks import check; check.figures_of = {figures}; sys.exit(check.main(sys.argv[1:]))"
    monkeypatch.setattr(
        check, "figures_of", lambda part: (changed(barriers=int((tmp_path / "kernels/barriers").read_text())), check.TOLERANCES)
    )
    monkeypatch.setattr(
        check, "probe_command", lambda part, wanted: [sys.executable, "-c", program, "--parts", part, "--probe", str(wanted)]
    )
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / ".git/info/exclude").write_text("benchmarks\n")
    return commit


COUNTS = ["--parts", "counts"]


@pytest.mark.parametrize("bad_from", range(1, 6))
def test_first_bad(bad_from, repository, capsys):
    """Whichever of five commits it is; the working trees are gone afterwards."""
    repository(10, "base")
    check.main([*COUNTS, "--update"])
    for n in range(1, 6):
        repository(10 + n if n >= bad_from else 10 - n, f"commit {n}")
    check.main([*COUNTS, "--bisect"])
    assert re_first_bad(capsys.readouterr().out) == f"commit {bad_from}"
    assert len(check.git("worktree", "list").splitlines()) == 1 and check.git("branch", "--show-current")


def test_gate_names_the_commit(repository, capsys):
    repository(10, "fast")
    assert check.main(COUNTS) == 2 and "--update writes one" in capsys.readouterr().err
    assert check.main([*COUNTS, "--update"]) == 0
    assert check.main(COUNTS) == 0 and "counts: 0 of 4 figures worse" in capsys.readouterr().out
    repository("?", "does not build")
    for barriers, subject in ((10, "still fast"), (12, "the slow one"), (13, "slower still"), (14, "slowest")):
        repository(barriers, subject)
    assert check.main([*COUNTS, "--bisect"]) == 1
    out = capsys.readouterr().out
    assert "worse: a row: barriers 10 -> 14 (+40.0%; none is allowed)" in out
    assert re_first_bad(out) == "the slow one"
    assert check.main([*COUNTS, "--update"]) == 0 and check.main([*COUNTS, "--bisect"]) == 0


def re_first_bad(out: str) -> str:
    (line,) = (line for line in out.splitlines() if line.startswith("first bad: "))
    return line.split(" ", 3)[3]


def test_gate_names_what_is_not_committed(repository, capsys):
    repository(10, "fast")
    check.main([*COUNTS, "--update"])
    (check.ROOT / "kernels/barriers").write_text("11")
    assert check.main([*COUNTS, "--bisect"]) == 1
    out = capsys.readouterr().out
    assert "(changes that are not committed)" in out and "no commit" in out


def test_gate_without_history(repository, capsys):
    """A baseline of a commit that is not in this history still fails, and says that git cannot help."""
    repository(10, "fast")
    path = check.baseline_path("counts")
    path.write_text(json.dumps({"schema": 1, "commit": "0123456789", "dirty": False, "figures": changed(barriers=9)}))
    assert check.main(COUNTS) == 1 and "git cannot say" in capsys.readouterr().out
    path.write_text('{"schema": 7}')
    assert check.main(COUNTS) == 2 and "schema version 7" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/baselines").glob("triton-*.json")), ids=lambda path: path.name)
def test_committed_baselines_are_whole(path):
    baseline = json.loads(path.read_text())
    assert baseline["schema"] == check.SCHEMA and not baseline["dirty"]
    assert len(baseline["figures"]) == 3 * len(check.JOBS)  # training, inference and backward
    for row, figures in baseline["figures"].items():
        assert figures.keys() == {"family", *check.TOLERANCES}, row
        assert figures["family"] in row, row


@pytest.mark.sweep
def test_a_slow_commit_is_caught(tmp_path):
    """A real one: chunks of half the size in the step kernels, after an innocent commit, in a clone of this repository."""
    clone = tmp_path / "clone"
    git = ["git", "-C", clone, "-c", "user.name=n", "-c", "user.email=e@example.com"]
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    shutil.copytree(ROOT / "benchmarks", clone / "benchmarks", dirs_exist_ok=True)
    gate_file = clone / "benchmarks/baselines/gate.json"
    gate_data = json.loads(gate_file.read_text())
    gate_data["jobs"] = [job for job in gate_data["jobs"] if job[0] == "step" and job[1] == 90]
    gate_file.write_text(json.dumps(gate_data))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(clone)}

    def gate(*options):
        command = [sys.executable, "-m", "benchmarks.check", "--parts", "counts", *options]
        return subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)

    assert gate("--update").returncode == 0
    for old, new, subject in (
        ("widest = 256 // itemsize", "widest = 2 * 128 // itemsize", "innocent"),
        ("num_stages=3", "num_stages=2", "one load less in flight"),
        ("Launch plans:", "The launch plans:", "innocent, too"),
    ):
        plan = clone / "kernels/step/plan.py"
        assert old in plan.read_text()
        plan.write_text(plan.read_text().replace(old, new))
        subprocess.run([*git, "commit", "-qam", subject], check=True)
    done = gate("--bisect")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re_first_bad(done.stdout) == "one load less in flight", done.stdout
