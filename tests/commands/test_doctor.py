"""The command line: `rnnfast doctor` on machines where much is missing or wrong, `--version`, `bench`, and commands unknown."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnnfast
from rnnfast import __main__ as command_line
from rnnfast import check
from rnnfast.choice import gpu, obstacles, trust
from rnnfast.commands import doctor
from rnnfast.kernels.persistent.plan import GPUS

pytestmark = [
    pytest.mark.same_everywhere,
    pytest.mark.skipif(torch.cuda.is_available(), reason="asks a machine without a GPU"),
]

ROOT = Path(__file__).resolve().parents[2]
BLOCK = "import sys; sys.modules['triton'] = None; "
RUN = "from rnnfast.__main__ import main; sys.exit(main(['doctor']))"


def asked(before="import sys; ", **variables):
    """`rnnfast doctor` in a process of its own: its exit status and lines by their names, and the verdict."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RNNFAST_", "TRITON_"))}
    env = kept | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run([sys.executable, "-c", before + RUN], capture_output=True, text=True, env=env)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    fence, *lines, end, verdict = done.stdout.splitlines()
    assert fence == end == "```" and verdict.startswith("verdict: ")
    found, name = {}, ""
    for line in lines:
        name = line[: doctor.WIDTH].strip() or name
        found[name] = found.get(name, "") + line[doctor.WIDTH :] + "\n"
    return done.returncode, found, verdict


def test_without_triton_and_a_home(tmp_path):
    """No Triton, no compiler, a home that cannot be written: torch.nn's own code runs, and nothing is broken."""
    (tmp_path / "file").touch()
    code, found, verdict = asked(BLOCK, PATH="/nowhere", CC="", HOME=str(tmp_path / "file"))
    assert code == 0 and verdict.startswith("verdict: works, on PyTorch's own layers.") and "pip install triton" in verdict
    assert "Triton is not installed" in found["Triton"] and "C compiler none" in found["compiler"]
    assert "on PyTorch's own layer: right" in found["check"] and found["caches"].count("CANNOT be written") == 3
    assert str(tmp_path) not in str(found["caches"])


def test_nonsense():
    """Every wrong value is told, and what looks like a variable and is none; the rest is asked without them."""
    wrong = {"RNNFAST_KERNELS": "fast", "RNNFAST_STRICT": "false", "RNNFAST_BACKEND": "cuda", "RNNFAST_CANARY": "x"}
    code, found, verdict = asked(RNNFAST_KERNLES="step", TRITON_INTERPRET="1", RNNFAST_COMMIT="any", **wrong)
    assert code == 1 and verdict.startswith("verdict: BROKEN: ")
    for name, value in wrong.items():
        assert f"{name}={value}: WRONG" in found["variables"] and f"got '{value}'" in verdict
    assert "RNNFAST_KERNLES=step: there is no such variable; did you mean RNNFAST_KERNELS?" in found["variables"]
    assert "RNNFAST_KERNLES has no effect" in verdict and "RNNFAST_COMMIT=any\n" in found["variables"]
    assert "on step kernels: right" in found["check"] and "can run on cpu, in Triton's interpreter" in found["kernels"]


def examined(capsys):
    one = doctor.Doctor()
    one.examine()
    return one, capsys.readouterr().out


def test_questions_that_raise(capsys, monkeypatch):
    """They are answered with the error, and the warnings, and the others follow."""

    def raises():
        raise RuntimeError("no driver\nat all")

    monkeypatch.setattr(torch.cuda, "is_available", raises)
    monkeypatch.setattr(doctor.Doctor, "one_check", lambda self, backend: "right")
    monkeypatch.setattr(gpu, "driver_version", lambda: doctor.warnings.warn("odd") or 13010)
    one, text = examined(capsys)
    assert (
        "GPU          could not be asked: RuntimeError: no driver\n" in text and "CUDA 13.1\n             warning: odd" in text
    )
    assert not one.broken and "tuning file" in text


def test_what_is_broken(capsys, monkeypatch):
    """A layer that is wrong or raises, and kernels that the canary found wrong."""
    monkeypatch.setattr(check, "compare", lambda case, device, backend: [check.Result(case, "h_n", 2.0, 0.1, 0.2)])
    monkeypatch.setattr(trust, "verdict", lambda limits: trust.Verdict({"step": "", "persistent": "hung"}))
    with gpu.pretend_gpu(GPUS["H100"]):
        one, text = examined(capsys)
    assert "WRONG: h_n" in text and "rnnfast tune makes it" in text
    assert [words.split()[1] for words in one.broken] == ["small", "persistent"] and "BROKEN" in one.verdict()
    monkeypatch.setattr(check, "Problem", lambda case, device: 1 / 0)
    one, text = examined(capsys)
    assert one.broken == ["a small layer raises an error: ZeroDivisionError: division by zero"]


def test_verdicts(monkeypatch):
    """What to do next, on each kind of machine on which nothing is broken."""
    monkeypatch.setattr(obstacles, "known", {"triton": None})
    one = doctor.Doctor()
    one.device = torch.device("cuda")
    assert "the kernels can run. Next: rnnfast.explain(model, x)" in one.verdict()
    one.why_not = "Triton found no C compiler: install gcc, or set CC"
    assert one.verdict().endswith("Next: mend what keeps the kernels off: Triton found no C compiler: install gcc, or set CC.")


def test_commands(capsys, monkeypatch, tmp_path):
    assert command_line.main(["--version"]) == 0 and capsys.readouterr().out == f"rnnfast {rnnfast.__version__}\n"
    assert command_line.main(["--help"]) == 0 and "doctor" in capsys.readouterr().out
    assert command_line.main([]) == 2 and capsys.readouterr().err.startswith("usage: ")
    for word, near in (("docter", ": did you mean `rnnfast doctor`?"), ("zzz", "")):
        assert command_line.main([word]) == 2
        assert capsys.readouterr().err.startswith(f"rnnfast has no command {word!r}{near}\n")
    with monkeypatch.context() as patch:
        patch.setenv("RNNFAST_STRICT", "false")
        assert command_line.main(["tune"]) == 2 and "RNNFAST_STRICT should be one of" in capsys.readouterr().err
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "rnnfast" / "__main__.py"))
    assert command_line.main(["bench"]) == 2 and "python -m benchmarks" in capsys.readouterr().err


def test_bench(monkeypatch):
    """The benchmarks of the checkout, wherever the user is: another package may have that name."""
    ran = []
    monkeypatch.setattr(os, "execve", lambda *call: ran.append(call))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    command_line.main(["bench", "--list"])
    ((program, command, env),) = ran
    assert command == [program, "-m", "benchmarks", "--list"] and program == sys.executable
    assert env["PYTHONPATH"] == f"{ROOT}{os.pathsep}elsewhere"
