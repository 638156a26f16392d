"""The runner: rows are kept as they are measured, whatever becomes of a provider, the disk or the user's patience."""

import os

import pytest

import benchmarks.__main__ as command
from benchmarks.timing import run
from benchmarks.timing.cases import Case
from benchmarks.timing.results import BadResults, load, new_row

pytestmark = pytest.mark.same_everywhere

CASE = Case("LSTM", 1, 1, 8, 8, dtype="float32", mode="inference")
WORK = [("quick", CASE, name) for name in ("torch.nn", "rnnfast", "loop")]
NOW = {"schema": 2, "environment": {"cpu": "x", "time": "now"}, "settings": {"device": "cpu"}, "ceilings": None}
TIMING = {"how": "eager", "l2": "warm", "p20": 1.0, "p50": 2.0, "p80": 3.0, "n": 5}


def row(case, set_name, name, status="ok", **values):
    return new_row(case, set_name, name, status, **{"timings": [TIMING] if status == "ok" else []} | values)


class InProcess:
    """In place of `isolated.rows`, without a process. `then` is called with the name of the provider before its row is made."""

    def __init__(self, then=lambda name: None):
        self.then, self.asked = then, []

    def __call__(self, function, jobs, quiet, until, env):
        assert function == "benchmarks.timing.run:measure_row"
        for number, (case, set_name, name, _) in enumerate(jobs):
            self.asked.append(name)
            yield number, self.then(name) or self.row(Case(**case), set_name, name)

    row = staticmethod(lambda case, set_name, name: row(case, set_name, name))


@pytest.fixture
def go(monkeypatch):
    def go(path, child, work=WORK, now=NOW):
        said = []
        monkeypatch.setattr(run.isolated, "rows", child)
        found, ended = run.run(work, now, path, 10, said.append)
        return found, ended, said

    return go


def test_rows_are_saved_as_they_are_measured(tmp_path, go):
    path = tmp_path / "out.json"
    held = []
    found, ended, said = go(path, InProcess(lambda name: held.append(len(load(path)["rows"]))))
    assert held == [0, 1, 2] and not ended and load(path) == found
    assert [kept["provider"] for kept in found["rows"]] == ["torch.nn", "rnnfast", "loop"]
    assert said[0].startswith("1/3 LSTM-T1-B1-I8-H8-float32-inference") and "left]" in said[0] and "2.0 us" in said[0]


def test_interruption_and_resumption(tmp_path, go):
    """Ctrl-C keeps what was measured; the same command goes on with the rest, and then with nothing."""

    def interrupt(name):
        if name == "loop":
            raise KeyboardInterrupt

    path = tmp_path / "out.json"
    _, ended, _ = go(path, InProcess(interrupt))
    assert ended == f"interrupted: 2 rows are in {path}; the same command goes on from there"
    assert [kept["provider"] for kept in load(path)["rows"]] == ["torch.nn", "rnnfast"]
    child = InProcess()
    found, ended, said = go(path, child, now=NOW | {"environment": {"cpu": "x", "time": "later"}})
    assert child.asked == ["loop"] and not ended and said[0] == f"{path} holds 2 rows; 1 to go"
    assert load(path) == found and len(found["rows"]) == 3
    child = InProcess()
    go(path, child)
    assert child.asked == []


@pytest.mark.parametrize("part, name", [("environment", "commit"), ("settings", "threads")])
def test_results_of_another_run_do_not_mix(part, name, tmp_path, go):
    path = tmp_path / "out.json"
    go(path, InProcess(), now=NOW | {part: NOW[part] | {name: "a"}})
    child = InProcess()
    with pytest.raises(BadResults, match=f"was measured with {name} 'a', and now it is 'b': name another file"):
        go(path, child, now=NOW | {part: NOW[part] | {name: "b"}})
    assert not child.asked


def test_no_space_left(tmp_path, monkeypatch, go):
    """The run ends with a line; what was saved before stays."""
    path = tmp_path / "out.json"
    fsync, left = os.fsync, iter([True, True, False, False])

    def full(descriptor):
        if not next(left):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    found, ended, _ = go(path, InProcess())
    assert ended == f"cannot write {path}: No space left on device; it holds what was saved before"
    assert len(load(path)["rows"]) == 1 and len(found["rows"]) == 2


def test_death_of_a_provider_is_a_row(tmp_path, go):
    def die(name):
        if name == "rnnfast":
            return {"error": "its process ended with SIGSEGV", "hung": False}

    found, _, said = go(tmp_path / "out.json", InProcess(die))
    assert [kept["status"] for kept in found["rows"]] == ["ok", "error", "ok"]
    assert found["rows"][1]["note"] == "its process ended with SIGSEGV"
    assert "error: its process ended with SIGSEGV" in said[1]


def test_why_something_is_unavailable_is_said_once(tmp_path, go):
    class Absent(InProcess):
        row = staticmethod(lambda case, set_name, name: row(case, set_name, name, "unavailable", note="not installed"))

    work = [("quick", Case("LSTM", T, 1, 8, 8), "haste") for T in (1, 2)]
    found, _, said = go(tmp_path / "out.json", Absent(), work)
    assert len(found["rows"]) == 2 and len(said) == 1


# The command


@pytest.fixture
def measured(monkeypatch):
    child = InProcess()
    monkeypatch.setattr(run.isolated, "rows", child)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return child


def test_command(measured, tmp_path, capsys):
    path = tmp_path / "out.json"
    options = ["--device", "cpu", "--json", str(path), "--only-case", "LSTM-T1-*"]
    assert command.main([*options, "--provider", "loop", "torch.nn", "loop"]) == 0
    assert measured.asked == ["torch.nn", "loop"] * 2, "the base first, each once"
    assert capsys.readouterr().out.splitlines()[-1] == f"{path}: 4 rows: 4 ok"
    assert load(path)["settings"]["device"] == "cpu" and load(path)["environment"]["torch"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--set", "fast"], "unknown set 'fast'; there are: cudnn-best"),
        (["--provider", "cudnn"], "unknown provider 'cudnn'; there are: torch.nn"),
        (["--only-case", "X*"], "unknown case 'X*'; there are: LSTM-T1"),
        (["--seconds", "0"], "--seconds and --limit must be positive"),
    ],
)
def test_bad_options(options, words, measured, tmp_path, capsys):
    assert command.main(["--device", "cpu", "--json", str(tmp_path / "out.json"), *options]) == 2
    assert capsys.readouterr().err.startswith(words) and not measured.asked


def test_damaged_results(measured, tmp_path, capsys):
    path = tmp_path / "out.json"
    path.write_text("{")
    assert command.main(["--device", "cpu", "--json", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{path} is damaged") and error.count("\n") == 1 and path.read_text() == "{"


def test_interrupted_command(measured, tmp_path, capsys):
    def interrupt(name):
        raise KeyboardInterrupt

    measured.then = interrupt
    assert command.main(["--device", "cpu", "--json", str(tmp_path / "out.json")]) == 130
    assert "interrupted: 0 rows" in capsys.readouterr().err


def test_a_wrong_row_fails_the_command(measured, tmp_path):
    measured.row = lambda case, set_name, name: row(case, set_name, name, "wrong", error={"worst": 2.0, "tensor": "output"})
    assert command.main(["--device", "cpu", "--json", str(tmp_path / "out.json"), "--only-case", "LSTM-T1-*"]) == 1


def test_list(capsys):
    assert command.main(["--device", "cpu", "--list", "--only-case", "RNN-*"]) == 0
    assert capsys.readouterr().out == "RNN-T32-B5-I39-H50-L2-bi-float32-training\n"
