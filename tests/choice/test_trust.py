"""The canary's verdict: when it is asked for, what it leads to, where it is kept; and the canary itself."""

import json
import os
import threading
import warnings

import pytest
import torch
from support.stand_ins import stand_in_gpu

import rnnfast
from rnnfast.choice import child, gpu, kernel_plan, obstacles, trust
from rnnfast.choice.trust import CanaryWarning, Verdict
from rnnfast.commands import canary
from rnnfast.kernels import step
from rnnfast.kernels.persistent.plan import GPUS
from rnnfast.settings import KERNELS

pytestmark = pytest.mark.same_everywhere

H100 = GPUS["H100"]
cpu = torch.device("cpu")
ALL = trust.families()


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """CPU tensors pass for an H100's, with a folder of its own. Each run of the canary that a test wants takes the next of the
    answers: rows, and then a `child.Failed` or nothing. Holds the families that each child was asked for."""
    monkeypatch.setenv("RNNFAST_CANARY", "auto")
    monkeypatch.setenv("RNNFAST_TUNING_FILE", str(tmp_path / "cache" / "h100.json"))
    monkeypatch.setattr(obstacles, "known", dict(obstacles.known))
    answers, asked = [], []

    def rows(command, quiet, env, until):
        asked.append(command[command.index("0") + 1 :])
        assert not any(name.startswith("RNNFAST_") for name in env)
        for row in answers.pop(0):
            if isinstance(row, Exception):
                raise row
            yield row

    monkeypatch.setattr(child, "rows", rows)
    asked_and_answers = asked, answers
    with gpu.pretend_gpu(H100):
        yield asked_and_answers


def right(*families):
    return [row for family in families for row in ({"family": family}, {"family": family, "fault": ""})]


def wrong(family):
    return [{"family": family}, {"family": family, "fault": "output: error 1.0e+00, allowed 1.0e-03"}]


def forget():
    """As in a new process."""
    trust._verdicts.clear()
    gpu.known.clear()


def test_once_for_a_gpu(runs, capsys):
    """The verdict is announced in one line, kept for the process, and in the file for the next."""
    asked, answers = runs
    answers.append(right(*ALL))
    for _ in range(2):
        assert trust.trusted(cpu) == ALL
    assert capsys.readouterr().err.count("\n") == 1 and asked == [list(ALL)]
    forget()
    assert trust.trusted(cpu) == ALL and len(asked) == 1 and capsys.readouterr().err == ""


def test_kernels_that_are_asked_for_by_backend_run_it_too(runs):
    """Which family is left to the choice."""
    asked, answers = runs
    answers.append(right(*ALL))
    assert kernel_plan.pick("gru", 256, 16, 768, torch.float16, "half", False, False, cpu).family == "persistent"
    assert asked == [list(ALL)]


def test_wrong(runs):
    """A family that computes wrong results is not used, in this process and the next, and each says so once."""
    asked, answers = runs
    answers.append(right("step") + wrong("persistent"))
    for _ in range(2):
        with pytest.warns(CanaryWarning, match="not used on H100, as its check failed: the persistent kernels: output: error"):
            assert trust.trusted(cpu) == ("step",)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert trust.trusted(cpu) == ("step",)
        assert kernel_plan.pick("gru", 256, 16, 768, torch.float16, "ieee", False, False, cpu).family == "step"
        forget()
    assert len(asked) == 1


@pytest.mark.parametrize("words", ["nothing for 60 s", "its process ended with SIGSEGV"])
def test_silent_or_crashed(runs, words):
    """At a family that hangs or crashes the child is ended; the others run in another, without it."""
    asked, answers = runs
    answers.append([*right("step"), {"family": "persistent"}, child.Failed(words, hung="nothing" in words)])
    answers.append(right(*ALL[2:]))
    with pytest.warns(CanaryWarning, match=f"the persistent kernels: {words}"):
        assert trust.trusted(cpu) == tuple(family for family in ALL if family != "persistent")
    assert asked[0] == list(ALL) and asked[1:] in ([], [list(ALL[2:])])


def test_cannot_run(runs):
    """Where the child has no GPU, in exclusive mode say, PyTorch's own layers run, with one warning and the child's last words;
    the next process tries again."""
    asked, answers = runs
    for _ in range(2):
        answers.append([child.Failed("CUDA error: all CUDA-capable devices are busy or unavailable", hung=False)])
        with pytest.warns(CanaryWarning, match="could not run: CUDA error: all CUDA-capable devices are busy"):
            assert trust.trusted(cpu) == ()
        assert trust.trusted(cpu) == ()
        layer, x = rnnfast.GRU(768, 768).half(), torch.zeros(256, 16, 768).half()
        told = rnnfast.explain(layer, x)
        assert told.backend == "torch" and "busy or unavailable" in str(told)
        assert rnnfast.explain(layer, x, return_gates=True).backend == "torch"
        forget()
    assert len(asked) == 2


def test_step_kernels_that_are_wrong_hinder_every_call(runs):
    """They run what no other family can. So the GPU counts as one that the kernels cannot run on."""
    _, answers = runs
    answers.append(wrong("step") + right(*ALL[1:]))
    with pytest.warns(CanaryWarning):
        trust.trusted(cpu)
    layer, x = rnnfast.GRU(768, 768, backend="triton").half(), torch.zeros(2, 3, 768).half()
    with pytest.warns(rnnfast.FallbackWarning, match="the check of the step kernels failed on it: output: error"):
        layer(x)


def test_unwritable_folder(runs, monkeypatch, tmp_path):
    """The canary works, and says once that the next process will run it again."""
    asked, answers = runs
    (tmp_path / "file").touch()
    monkeypatch.setenv("RNNFAST_TUNING_FILE", str(tmp_path / "file" / "h100.json"))
    answers.append(right(*ALL))
    with pytest.warns(CanaryWarning, match="will run again in the next process, as .* cannot be written"):
        assert trust.trusted(cpu) == ALL
    assert trust.trusted(cpu) == ALL and len(asked) == 1


@pytest.mark.parametrize("change", ["gpu", "versions", "schema", "faults", "text"])
def test_a_file_that_does_not_hold_is_replaced(runs, change):
    """Of another GPU, other versions, another schema, or damaged: the canary runs again."""
    asked, answers = runs
    answers += [right(*ALL)] * 2
    trust.trusted(cpu)
    path = trust.where(H100)
    data = json.loads(path.read_text())
    data[change] = {"gpu": {"name": "A100"}, "versions": {}, "schema": 0, "faults": {"step": None}}.get(change)
    path.write_text("{" if change == "text" else json.dumps(data))
    forget()
    assert trust.trusted(cpu) == ALL and len(asked) == 2
    forget()
    assert trust.trusted(cpu) == ALL and len(asked) == 2


def test_several_processes_share_one_run(runs):
    """Those that come while one runs it wait for its verdict. (The lock is a file's; threads stand for processes.)"""
    asked, answers = runs
    answers.append(right(*ALL))
    found = []
    threads = [threading.Thread(target=lambda: found.append(trust.examine(cpu))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [Verdict(dict.fromkeys(ALL, ""))] * 4 and len(asked) == 1


def test_it_never_runs_where_it_must_not(runs, monkeypatch):
    """Switched off, while code is compiled, while a CUDA graph is captured, and for what cuDNN is predicted to win anyway."""
    asked, _ = runs
    with monkeypatch.context() as here:
        here.setattr(torch.compiler, "is_compiling", lambda: True)
        assert trust.trusted(cpu) == ()
    with monkeypatch.context() as here:
        here.setattr(trust, "_capturing", lambda device: True)
        assert trust.trusted(cpu) == ()
    layer, x = rnnfast.LSTM(8, 8), torch.zeros(2, 3, 8)
    layer(x)
    big, long = rnnfast.GRU(768, 768).half(), torch.zeros(256, 16, 768).half()
    told = str(rnnfast.explain(big, long))  # explain runs nothing
    assert "were not checked on this GPU yet" in told
    monkeypatch.setenv("RNNFAST_CANARY", "off")
    assert trust.trusted(cpu) == () and rnnfast.explain(big, long).backend == "torch"
    monkeypatch.setenv("RNNFAST_CANARY", "trust")
    assert trust.trusted(cpu) == ALL and rnnfast.explain(big, long).backend == "triton"
    assert asked == []
    monkeypatch.setenv("RNNFAST_CANARY", "on")
    with pytest.raises(ValueError, match="RNNFAST_CANARY should be one of 'auto', 'off' or 'trust', got 'on'"):
        trust.trusted(cpu)


# The canary itself


@pytest.fixture
def one_layer(monkeypatch):
    """It runs one small layer, on the CPU."""
    stand_in_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(obstacles, "known", {**obstacles.known, "triton": None, "cuda:0": None})
    monkeypatch.setattr(canary, "CASES", (canary.Case("LSTM", 4, 3, 5, 18, torch.float16),))
    monkeypatch.setattr(canary, "STREAMS", 1)


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="takes CPU tensors, in the interpreter")


@on_cpu
@pytest.mark.numerical
def test_canary_finds_the_kernels_right(one_layer):
    assert list(canary.examine("step", "cpu")) == [""]
    assert list(canary.examine("persistent", "cpu")) == []  # no plan: the programs of a grid would wait for one another


@on_cpu
@pytest.mark.numerical
def test_canary_runs_groups(one_layer, monkeypatch):
    """A layer of two directions, and a stack as a pipeline of several chunks."""
    cases = (
        canary.Case("GRU", 3, 3, 5, 18, torch.float16, bidirectional=True),
        canary.Case("LSTM", 16, 3, 5, 18, torch.float16, 2),
    )
    monkeypatch.setattr(canary, "CASES", cases)
    with KERNELS.within("step"):
        forward, backward = canary._choices(cases[1], "cpu")
        assert forward.members == backward.members == 2 and max(forward.chunk, backward.chunk) < 16
    assert list(canary.examine("step", "cpu")) == ["", ""]


@on_cpu
@pytest.mark.numerical
def test_canary_finds_a_fault(one_layer, monkeypatch):
    """One element of the output is wrong by a quarter."""
    inner = step.forward

    def forward(*args, **options):
        inner(*args, **options)
        args[7][0, 0, 0] += 0.25

    monkeypatch.setattr(step, "forward", forward)
    (fault,) = canary.examine("step", "cpu")
    assert "output: error" in fault


@on_cpu
def test_canary_prints_rows(one_layer, monkeypatch, capsys):
    monkeypatch.setattr(canary, "examine", lambda family, device: {"step": ["", ""], "persistent": ["", "bad"]}.get(family, []))
    assert canary.main(["0", "step", "persistent", "third"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        {"family": "step"}, {"family": "step", "fault": ""}, {"family": "persistent"},
        {"family": "persistent", "fault": "bad"}, {"family": "third"},
    ]  # fmt: skip


def test_a_real_child_without_a_gpu(monkeypatch, tmp_path):
    """The command line is right: the child starts, and fails for want of a GPU, which is no verdict."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("RNNFAST_CANARY", "auto")
    monkeypatch.setenv("RNNFAST_TUNING_FILE", os.fspath(tmp_path / "h100.json"))
    with gpu.pretend_gpu(H100), pytest.warns(CanaryWarning, match="could not run"):
        assert trust.trusted(cpu) == ()
    assert not trust.where(H100).exists()
