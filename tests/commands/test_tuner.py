"""`rnnfast tune` where there is no GPU: what it measures, what it makes of a process that hangs, crashes or is wrong, and what
it keeps."""

import json
import os
import sys
import time
from dataclasses import replace

import pytest
import torch
from support.side_by_side import together
from support.stand_ins import Event

import rnnfast.__main__
from rnnfast import check
from rnnfast.choice import child, kernel_plan, tuning_file
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.commands import measure, tune
from rnnfast.kernels import persistent
from rnnfast.kernels.persistent.plan import GPUS, persistent_plans

pytestmark = pytest.mark.same_everywhere

H100 = GPUS["H100"]
SHAPE = Shape("gru", "float32", "tf32", 3, 2, 4, 8, 1, 1, training=False)
TRAINING = replace(SHAPE, training=True)
MAIN = Shape("lstm", "float16", "half", 256, 16, 768, 768, 1, 1, training=False)

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="takes CPU tensors, in the interpreter")


@pytest.fixture
def pretend(monkeypatch):
    """CPU tensors pass for an H100's, whose programs run side by side, with a clock for device events."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with kernel_plan.pretend_gpu(H100), together(1):
        yield


# What is measured


def test_candidates():
    """PyTorch's, the step kernels, and the planner's best; in training with the forward kernels that won in inference."""
    plans = persistent_plans(4, 16, 768, 2, "half", False, H100)
    assert tune.candidates(MAIN, H100) == [
        Entry(MAIN, "torch"),
        Entry(MAIN, "triton"),
        *(Entry(MAIN, "triton", plan) for plan in plans),
    ]
    training = replace(MAIN, training=True)
    backward = persistent_plans(4, 16, 768, 2, "half", True, H100)
    found = tune.candidates(training, H100, Entry(MAIN, "torch", plans[1]))
    assert [(entry.winner, entry.forward, entry.backward) for entry in found] == [
        ("torch", None, None),
        ("triton", None, None),
        ("triton", plans[1], None),
        *(("triton", plans[1], plan) for plan in backward),
    ]
    for forward in (None, Entry(MAIN, "triton")):
        found = tune.candidates(training, H100, forward)
        assert [(entry.forward, entry.backward) for entry in found[2:]] == [(None, plan) for plan in backward]
    large = replace(MAIN, H=8192)
    assert tune.candidates(large, H100) == [Entry(large, "torch"), Entry(large, "triton")]


def shapes(options):
    return tune.shapes(tune._parser().parse_args(options.split()))


def test_shapes():
    """Every combination, inference before its training, the input as wide as the layer unless said."""
    found = shapes("--cell gru --hidden 8 16 --batch 2 --dtype tf32 --steps 5")
    first = Shape("gru", "float32", "tf32", 5, 2, 8, 8, 1, 1, False)
    wider = replace(first, H=16, I=16)
    assert found == [replace(shape, training=training) for shape in (first, wider) for training in (False, True)]
    found = shapes("--cell lstm --hidden 8 --batch 2 --input 3 4 --layers 2 --bidirectional")
    assert [(shape.I, shape.layers, shape.directions, shape.dtype) for shape in found[::2]] == [
        (3, 2, 2, "float16"),
        (4, 2, 2, "float16"),
    ]


# The process that measures


@on_cpu
@pytest.mark.parametrize("shape", [SHAPE, TRAINING], ids=["inference", "training"])
def test_work(shape, pretend, monkeypatch):
    """Each candidate runs as what it is, checked before any is timed, and then in turn."""
    ran = []

    def watched(name):
        inner = getattr(persistent, name)

        def run(*args, **options):
            ran.append((name, options["plan"]))
            inner(*args, **options)

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(persistent, name, watched(name))
    forward, backward = (persistent_plans(3, 2, 8, 4, "tf32", side, H100)[0] for side in (False, True))
    entries = [
        Entry(shape, "torch"),
        Entry(shape, "triton"),
        Entry(shape, "triton", forward, backward if shape.training else None),
    ]
    rows = list(measure.work(entries, "cpu", 512, 2))
    assert rows[:3] == [{"doing": 0}, {"doing": 1}, {"doing": 2}]
    turn = [{"doing": n} for n in range(3)]
    assert rows[3:9] == 2 * turn  # warm-up
    assert rows[9:] == 2 * [row for n in range(3) for row in ({"doing": n}, {"timed": n, "us": 1000 / 3})]
    once = [("forward", forward), ("backward", backward)] if shape.training else [("forward", forward)]
    assert ran == 5 * once  # the check, two to warm up, two that were timed


@on_cpu
def test_what_is_wrong_is_not_timed(pretend, monkeypatch):
    result = check.Result(check.Case("GRU", 1, 1, 1, 1, torch.float32), "output", 1.0, 0.1, 0.3)
    compared = iter([[], [result]])
    monkeypatch.setattr(check, "compare", lambda *args: next(compared))
    rows = list(measure.work([Entry(SHAPE, "torch"), Entry(SHAPE, "triton")], "cpu", 512, 2))
    assert rows[:3] == [{"doing": 0}, {"doing": 1}, {"wrong": 1, "why": "output: error 1.0e+00, allowed 3.0e-01"}]
    assert {row["timed"] for row in rows if "timed" in row} == {0}


@on_cpu
@pytest.mark.parametrize("cell", ["lstm", "rnn_relu"])
def test_work_of_other_cells(cell, pretend):
    shape = replace(SHAPE, cell=cell, layers=2, directions=2, dtype="bfloat16", precision="half")
    rows = list(measure.work([Entry(shape, "torch"), Entry(shape, "triton")], "cpu", 512, 2))
    assert not [row for row in rows if "wrong" in row] and len([row for row in rows if "timed" in row]) == 4


def test_worker(monkeypatch, capsys):
    """The candidates that it is given, for the GPU that it is on; a line a row."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr("rnnfast.choice.gpu.limits", lambda device: H100 if device == torch.device("cuda", 1) else None)
    monkeypatch.setattr(measure, "work", lambda *args: iter([{"doing": 0}, {"given": repr(args)}]))
    entries = tune.candidates(MAIN, H100)
    assert measure.worker(json.dumps([tuning_file.encode(entry) for entry in entries]), "1") == 0
    assert current == [1]
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [{"doing": 0}, {"given": repr((entries, "cuda:1", 512, 9))}]


# The command, with a stand-in for that process


def stand_in(tmp_path, body):
    """A program in place of the one that measures: gets the names of its candidates as `names`."""
    program = tmp_path / "worker.py"
    program.write_text(
        "import json, os, signal, sys, time\n"
        "def say(**row): print(json.dumps(row), flush=True)\n"
        "names = [raw['winner'] for raw in json.loads(sys.argv[1])]\n" + body
    )
    return (sys.executable, str(program))


TIMES = """
for n, name in enumerate(names):
    say(doing=n)
{}
for turn in range(3):
    for n, name in enumerate(names):
        say(doing=n)
        say(timed=n, us=float(len(name) + turn))
"""
ENTRIES = tune.candidates(MAIN, H100)[:4]


def test_measure(tmp_path):
    """Medians, and lines of other programs are passed over."""
    found = measure.measure(ENTRIES[:2], 30, stand_in(tmp_path, "print('a library speaks')\nprint('[1]')" + TIMES.format("")))
    assert found == {0: 6.0, 1: 7.0}


@pytest.mark.parametrize(
    "fault, message",
    [
        ("time.sleep(60)", "failed: nothing for 4 s"),
        ("sys.exit('CUDA error: an illegal memory access')", "failed: CUDA error: an illegal memory access"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "failed: its process ended with SIGSEGV"),
        ("say(wrong=n, why='output: error 1')", "wrong: output: error 1"),
    ],
)
def test_one_bad_candidate(fault, message, tmp_path):
    """It is dropped, whatever it does, and the others have their times."""
    bad = f"    if n == 2 and len(names) > 3: {fault}"
    found = measure.measure(ENTRIES, 4, stand_in(tmp_path, TIMES.format(bad)))
    assert found[2] == message
    assert isinstance(found[0], float) and isinstance(found[1], float) and isinstance(found[3], float)


def test_all_bad_candidates(tmp_path):
    """It ends, and nothing is best."""
    found = measure.measure(ENTRIES, 5, stand_in(tmp_path, "say(doing=0)\nsys.exit('no')"))
    assert set(found.values()) == {"failed: no"} and tune.best(ENTRIES, found) is None
    found = measure.measure(ENTRIES, 5, stand_in(tmp_path, "sys.exit('no such module')"))
    assert set(found.values()) == {"not run: no such module"}


def test_the_process_and_its_children_are_killed(tmp_path):
    """However it ends, nothing is left to use the GPU beside what is timed."""
    grandchild = tmp_path / "child"
    forks = f"if os.fork() == 0: open({str(grandchild)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    body = f"{forks}\nsay(doing=0)\ntime.sleep(60)"
    rows = child.rows([*stand_in(tmp_path, body), "[]"], 20)
    assert next(rows) == {"doing": 0}
    while not grandchild.exists() or not grandchild.read_text():
        time.sleep(0.01)
    rows.close()
    for _ in range(200):
        if not alive(int(grandchild.read_text())):
            break
        time.sleep(0.01)
    assert not alive(int(grandchild.read_text()))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_environment_of_the_process(tmp_path, monkeypatch):
    """The user's settings choose nothing there, and a refused launch is an error there."""
    for name, value in {"RNNFAST_BACKEND": "torch", "RNNFAST_KERNELS": "step", "TRITON_INTERPRET": "1"}.items():
        monkeypatch.setenv(name, value)
    body = "said = {k: v for k, v in os.environ.items() if k.startswith('RNNFAST_') or k == 'TRITON_INTERPRET'}\n"
    body += "said.pop('RNNFAST_TUNING_FILE')\nsay(doing=0)\nsys.exit(json.dumps(said))"
    assert measure.measure(ENTRIES[:1], 20, stand_in(tmp_path, body)) == {0: 'failed: {"RNNFAST_STRICT": "1"}'}


def test_best():
    """The fastest of our kernels, with who is the fastest of all."""
    chosen = tune.best(ENTRIES, {0: 2.0, 1: 9.0, 2: 3.0, 3: "wrong: output"})
    assert (chosen.winner, chosen.forward) == ("torch", ENTRIES[2].forward)
    assert chosen.times == {"torch.nn": 2.0, "step kernels": 9.0, ENTRIES[2].forward.words(16): 3.0}
    assert tune.best(ENTRIES, {0: 2.0, 1: 9.0, 2: 1.5}).winner == "triton"
    assert tune.best(ENTRIES, {0: "failed", 1: 9.0}) == Entry(MAIN, "triton", None, None, {"step kernels": 9.0})
    assert tune.best(ENTRIES, {0: 2.0, 1: "failed"}) == Entry(MAIN, "torch", None, None, {"torch.nn": 2.0})


def test_tune(tmp_path, capsys):
    """Every shape is stored as soon as it is measured; training takes the forward kernels that won; what failed is said."""
    path, asked = tmp_path / "tuning.json", []

    def run(entries):
        asked.append(entries)
        if len(asked) == 3:
            return dict.fromkeys(range(len(entries)), "failed: no")
        if len(asked) > 1:
            assert len(tuning_file.read(path, H100)) == 1
        return {n: 10.0 - n for n in range(len(entries))}

    training, other = replace(MAIN, training=True), replace(MAIN, H=512)
    assert tune.tune([MAIN, training, other], path, H100, run) == 1
    first, second = tuning_file.read(path, H100)
    assert first.shape == MAIN and first.forward == asked[0][-1].forward and first.winner == "triton"
    assert second.forward == first.forward and second.backward == asked[1][-1].backward is not None
    out = capsys.readouterr().out
    assert "[1/3] lstm float16 T=256 B=16 I=768 H=768, inference\n" in out and "s left" in out
    assert "       10.00 us/step   1.00 of torch.nn  torch.nn" in out and "failed: no: step kernels" in out
    assert f"  * {10.0 - len(asked[0]) + 1:9.2f} us/step" in out and f"2 of 3 measured, in {path}" in out


@pytest.fixture
def on_an_h100(monkeypatch, tmp_path):
    """As far as the command can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("rnnfast.choice.obstacles.device_obstacle", lambda kind, index: None)
    monkeypatch.setattr("rnnfast.choice.gpu.limits", lambda device: H100)
    monkeypatch.setenv("RNNFAST_TUNING_FILE", str(tmp_path / "tuning.json"))
    return tmp_path / "tuning.json"


def test_interrupted(on_an_h100, monkeypatch, capsys):
    """Ctrl-C: what was measured is kept, and the command says where."""

    def run(entries):
        if entries[0].shape.training:
            raise KeyboardInterrupt
        return {0: 1.0, 1: 2.0}

    monkeypatch.setattr(tune.tune, "__defaults__", (run,))
    assert rnnfast.__main__.main(["tune", "--cell", "gru", "--hidden", "64"]) == 130
    assert f"interrupted: what was measured is in {on_an_h100}" in capsys.readouterr().err
    assert [entry.shape.training for entry in tuning_file.read(on_an_h100, H100)] == [False]


def test_disk_full(on_an_h100, monkeypatch, capsys):
    def full(entries):
        monkeypatch.setattr(os, "fsync", fail)
        return {0: 1.0, 1: 2.0}

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tune.tune, "__defaults__", (full,))
    assert tune.main(["--cell", "gru", "--hidden", "64"]) == 1
    assert "cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert tuning_file.read(on_an_h100, H100) == []


def test_show_and_forget(on_an_h100, capsys):
    assert tune.main(["--show"]) == 0 and "there is no" in capsys.readouterr().out
    assert tune.main(["--forget"]) == 0 and "there is no" in capsys.readouterr().out
    tuning_file.store([tune.best(ENTRIES, {0: 2.0, 1: 9.0, 2: 3.0})], on_an_h100, H100)
    assert tune.main(["--show"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [f"{on_an_h100}: 1 shapes on H100", str(MAIN), "         2.00 us/step  torch.nn"] and len(out) == 5
    on_an_h100.write_text("{")
    assert tune.main(["--show"]) == 1 and "not used" in capsys.readouterr().err
    assert tune.main(["--forget"]) == 0 and not on_an_h100.exists()


def test_a_file_that_is_not_ours_is_left_alone(on_an_h100, capsys):
    on_an_h100.write_text('{"precious": 1}')
    assert tune.main([]) == 2
    assert "is no tuning file of rnnfast" in capsys.readouterr().err and on_an_h100.read_text() == '{"precious": 1}'


@pytest.mark.parametrize(
    "options", [["--hidden", "0"], ["--batch", "x"], ["--cell", "cubic"], ["--dtype", "float64"], ["--layers", "-1"]]
)
def test_bad_options(options, capsys):
    with pytest.raises(SystemExit) as caught:
        tune.main(options)
    assert caught.value.code == 2 and options[0] in capsys.readouterr().err


@on_cpu
def test_without_a_gpu(capsys):
    assert rnnfast.__main__.main(["tune"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("argv, code", [([], 2), (["sing"], 2), (["--help"], 0)])
def test_usage(argv, code, capsys):
    assert rnnfast.__main__.main(argv) == code
    printed = capsys.readouterr()
    assert "usage: rnnfast COMMAND" in (printed.out if code == 0 else printed.err)


def test_check_is_a_command_too(capsys):
    with pytest.raises(SystemExit):
        rnnfast.__main__.main(["check", "--help"])
    assert "--device" in capsys.readouterr().out


def test_a_row_for_the_worker_is_what_it_reads(tmp_path):
    """Candidates reach the other process as they are."""
    for entry in tune.candidates(replace(MAIN, training=True), H100, ENTRIES[2] and Entry(MAIN, "triton", ENTRIES[2].forward)):
        assert tuning_file.decode(json.loads(json.dumps(tuning_file.encode(entry))), H100) == entry
