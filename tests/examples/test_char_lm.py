"""examples/char_lm.py at tiny sizes: what it writes, that resuming changes nothing, Ctrl-C, and every kind of bad input."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.same_everywhere

PROGRAM = Path(__file__).parents[2] / "examples" / "char_lm.py"
TINY = ["--hidden", "16", "--batch", "4", "--length", "16", "--device", "cpu", "--no-check"]
ENVIRONMENT = os.environ | {"RNNFAST_BACKEND": "torch"}  # also where TRITON_INTERPRET=1 would choose slow kernels


@pytest.fixture(scope="module")
def char_lm():
    """The program as a module: starting Python and torch anew for every case would take most of the time."""
    sys.path.insert(0, str(PROGRAM.parent))  # as Python does for a program that it runs
    spec = importlib.util.spec_from_file_location("char_lm", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["char_lm"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["char_lm"], sys.modules["char_lm_support"]
    sys.path.remove(str(PROGRAM.parent))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The cat sat on the mat; the dog did not. Who knows why?\n" * 100)
    return path


@pytest.fixture
def run(char_lm, capsys, monkeypatch):
    """Run the program's main function; its standard output."""
    monkeypatch.setenv("RNNFAST_BACKEND", "torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sizes this small are slower on more

    def run(*args, expect=0):
        code = char_lm.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert (code, captured.err) == (expect, ""), captured.out
        return captured.out

    yield run
    torch.set_num_threads(threads)


def start(*args):
    """The program as a process of its own"""
    command = [sys.executable, "-u", str(PROGRAM), *map(str, args)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses(folder):
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content["losses"], content["heldout"], content["model"]


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """Sixty steps on the default text, in a process of its own"""
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    with start(*TINY, "--steps", 60, "--out", folder) as process:
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, ""), output
    return folder, output


def test_full_run(full_run):
    folder, output = full_run
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "loss.png"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "backend: torch" in output
    assert "step 60/60" in output and "characters/s" in output
    values = re.findall(r"held-out loss with (?:rnnfast|torch\.nn)\.LSTM.*?: ([\d.]+)", output)
    assert len(values) == 2 and values[0] == values[1]
    assert "kernel check" not in output


def test_full_run_learns(full_run):
    history, heldout, _ = losses(full_run[0])
    assert len(history) == 60
    assert heldout[-1][0] == 60
    assert heldout[-1][1] < history[0] - 0.5


def test_resume_of_a_finished_run(full_run, run, tmp_path):
    folder, output = full_run
    again = run("--resume", folder / "checkpoint.pt", "--out", tmp_path, "--no-check", "--device", "cpu")
    assert losses(tmp_path)[:2] == losses(folder)[:2]
    assert "after step 60" in again
    loss = float(re.search(r"with rnnfast\.LSTM: ([\d.]+)", output)[1])
    assert float(re.search(r"with rnnfast\.LSTM: ([\d.]+)", again)[1]) == pytest.approx(loss, abs=1e-5)


def test_resume_for_more_steps(full_run, run, tmp_path):
    run("--resume", full_run[0] / "checkpoint.pt", "--steps", 70, "--out", tmp_path, "--no-check", "--device", "cpu")
    assert len(losses(tmp_path)[0]) == 70
    assert len(losses(full_run[0])[0]) == 60


def test_python_prose_repeats_nothing(char_lm):
    paragraphs = sys.modules["char_lm_support"].python_prose().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))


@pytest.mark.parametrize("cell,dtype", [("gru", "bfloat16"), ("lstm", "float16")])
def test_low_precision(cell, dtype, run, text, tmp_path):
    output = run(*TINY, "--steps", 50, "--lr", 0.02, "--text", text, "--cell", cell, "--dtype", dtype, "--out", tmp_path)
    history, heldout, weights = losses(tmp_path)
    assert heldout[-1][1] < history[0] - 1
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert ", the same" in output


def test_one_step(run, text, tmp_path):
    run(*TINY, "--steps", 1, "--text", text, "--out", tmp_path)
    assert len(losses(tmp_path)[0]) == 1


def test_kernel_check_is_run_and_its_verdict_is_ours(char_lm, monkeypatch, capfd):
    for code in (0, 1):
        monkeypatch.setattr(char_lm.sys, "executable", "/bin/true" if code == 0 else "/bin/false")
        assert char_lm.check_kernels(torch.device("cpu")) == (code == 0)
    assert "kernel check" in capfd.readouterr().out


@pytest.mark.parametrize("cell,dtype", [("lstm", "float32"), ("gru", "float32"), ("lstm", "bfloat16")])
def test_resume_equals_the_whole_run(cell, dtype, char_lm, run, monkeypatch, text, tmp_path):
    """The text is read about twice; Ctrl-C comes in the midst of it."""
    args = [*TINY, "--steps", 150, "--cell", cell, "--dtype", dtype, "--text", text, "--seed", 5]
    whole = run(*args, "--out", tmp_path / "whole")

    def interrupted_step(self, chunk):
        step(self, chunk)
        if self.step == 100:
            os.kill(os.getpid(), signal.SIGINT)

    step = char_lm.Run.train_step
    with monkeypatch.context() as patch:
        patch.setattr(char_lm.Run, "train_step", interrupted_step)
        assert "step 100 of 150 is saved" in run(*args, "--out", tmp_path / "parts", expect=130)
    parts = run("--resume", "--out", tmp_path / "parts", "--no-check", "--device", "cpu")

    (losses_a, heldout_a, model_a), (losses_b, heldout_b, model_b) = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert losses_a == losses_b
    assert heldout_a == heldout_b
    assert all(torch.equal(model_a[name], model_b[name]) for name in model_a)
    samples = [re.split(r"a sample:\n", output)[1].split("wrote")[0] for output in (whole, parts)]
    assert samples[0] == samples[1]


def test_interrupt(run, text, tmp_path):
    """Ctrl-C while a process trains; then the very command that it prints."""
    with start(*TINY, "--steps", 4000, "--text", text, "--out", tmp_path / "a folder") as process:
        output = ""
        while not re.search(r"step \d+/4000", output):
            line = process.stdout.readline()
            assert line, output + process.stderr.read()
            output += line
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, ""), output + rest
    assert [path.name for path in (tmp_path / "a folder").iterdir()] == ["checkpoint.pt"]
    done = len(losses(tmp_path / "a folder")[0])
    assert f"step {done} of 4000 is saved" in rest
    resume = shlex.split(rest.splitlines()[-1])
    assert resume[:2] == [sys.executable, str(PROGRAM)]
    output = run(*resume[2:], "--steps", done + 1)
    assert f"after step {done}" in output and f"step {done + 1}/{done + 1}" in output


def bad(char_lm, capsys, args):
    """The one line that the program says about `args`, which it must refuse."""
    try:
        code = char_lm.main([str(arg) for arg in args])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("char_lm.py: error: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


@pytest.mark.parametrize(
    "args,complaint",
    [
        (["--cell", "rnn"], "--cell"),
        (["--dtype", "float8"], "--dtype"),
        (["--device", "abacus"], "'abacus'"),
        (["--device", "cuda:99"], "'cuda:99'"),
        (["--device", "meta"], "'meta'"),
        (["--steps", "0"], "--steps"),
        (["--hidden", "-4"], "--hidden"),
        (["--layers", "0"], "--layers"),
        (["--batch", "-1"], "--batch"),
        (["--length", "1.5"], "--length"),
        (["--lr", "0"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "fast"], "--lr"),
        (["--seed", "-1"], "--seed"),
        (["--hidden", "400000000"], "no memory for --hidden 400000000"),
        (["--unknown"], "--unknown"),
    ],
)
def test_bad_options(args, complaint, char_lm, capsys, tmp_path):
    assert complaint in bad(char_lm, capsys, [*args, "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_bad_texts(char_lm, capsys, tmp_path):
    out = ["--out", tmp_path / "out"]
    binary, latin, short = (tmp_path / name for name in ("binary", "latin", "short"))
    binary.write_bytes(b"abc\0def" * 1000)
    latin.write_bytes("déjà vu".encode("latin-1") * 1000)
    short.write_text("too short")
    assert "No such file" in bad(char_lm, capsys, ["--text", tmp_path / "missing", *out])
    assert "Is a directory" in bad(char_lm, capsys, ["--text", tmp_path, *out])
    assert "binary" in bad(char_lm, capsys, ["--text", binary, *out])
    assert "not UTF-8" in bad(char_lm, capsys, ["--text", latin, *out])
    assert "at least 72 characters" in bad(char_lm, capsys, ["--text", short, "--batch", 4, "--length", 16, *out])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("batch,length", [(1, 1), (2, 9), (4, 16), (3, 37)])
def test_the_shortest_text_suffices(batch, length, char_lm, tmp_path):
    config = char_lm.Config(batch=batch, length=length, text=str(tmp_path / "text"))
    Path(config.text).write_text("ab")
    with pytest.raises(char_lm.UserError) as caught:
        char_lm.read_corpus(config)
    needed = int(re.search(r"at least (\d+) characters", str(caught.value))[1])
    Path(config.text).write_text("a" * (needed - 1))
    with pytest.raises(char_lm.UserError):
        char_lm.read_corpus(config)
    Path(config.text).write_text("a" * needed)
    corpus = char_lm.read_corpus(config)
    assert char_lm.streams(corpus.train, batch).shape[0] > length
    assert char_lm.streams(corpus.heldout, min(16, len(corpus.heldout) - 1)).shape[0] > 1


def test_bad_folder(char_lm, capsys, text):
    assert "cannot write to the folder" in bad(char_lm, capsys, [*TINY, "--text", text, "--out", text / "below"])
    assert "cannot write to the folder" in bad(char_lm, capsys, [*TINY, "--text", text, "--out", text])


def test_bad_checkpoints(full_run, char_lm, capsys, text, tmp_path):
    checkpoint = full_run[0] / "checkpoint.pt"
    content = checkpoint.read_bytes()
    resume = ["--no-check", "--device", "cpu", "--out", tmp_path / "out", "--resume"]
    assert "there is no checkpoint" in bad(char_lm, capsys, resume)
    damaged = tmp_path / "damaged.pt"
    for some in (b"", b"not a checkpoint", content[: len(content) // 2], content[:-100]):
        damaged.write_bytes(some)
        assert "damaged" in bad(char_lm, capsys, [*resume, damaged])
    for other in ([1, 2], {"model": {}}, torch.load(checkpoint, weights_only=True) | {"optimizer": {}}):
        torch.save(other, damaged)
        assert "damaged" in bad(char_lm, capsys, [*resume, damaged])
    assert "trained with --hidden 16, not 32" in bad(char_lm, capsys, [*resume, checkpoint, "--hidden", 32])
    assert "trained with --layers 2, not 1" in bad(char_lm, capsys, [*resume, checkpoint, "--layers", 1])
    assert "trained with --cell lstm, not gru" in bad(char_lm, capsys, [*resume, checkpoint, "--cell", "gru"])
    assert "another text" in bad(char_lm, capsys, [*resume, checkpoint, "--text", text])
    assert not (tmp_path / "out").exists()
    assert checkpoint.read_bytes() == content


def test_a_failed_write_leaves_the_old_file(char_lm, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(char_lm.UserError, match="No space left"):
        char_lm.write_atomically(path, fail)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("file", "old")]


def test_bad_input_to_a_process(tmp_path):
    with start("--text", tmp_path / "missing") as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors.count("\n")) == (2, "", 1)
    assert "Traceback" not in errors
