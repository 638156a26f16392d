"""The numerical tests pass on CPUs other than this one: a sample of them; `make sweep` runs all."""

import os
import subprocess

import instruction_sets
import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or any(name in os.environ for name in instruction_sets.VARIABLES),
    reason="the kernels run on a GPU, or the instruction set is chosen already",
)


@pytest.mark.parametrize("name", list(instruction_sets.SETS)[:-1])
def test_sample(name):
    """With two threads. The other tests run with the newest set that this CPU has, so here only older ones do."""
    if name not in instruction_sets.available()[:-1]:
        pytest.skip(f"this CPU has no set newer than {name}")
    done = instruction_sets.run(name, 2, "--sample", "160", "-p", "no:xdist")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"; {name}, threads: 2" in done.stdout and " passed" in done.stdout.splitlines()[-1]


def test_a_set_that_the_cpu_lacks(monkeypatch, capsys):
    """is named, and no test runs with it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("it was run"))
    assert instruction_sets.main(["--sets", "AVX512", "--threads", "2"]) == 0
    printed = "ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_CBWR=AVX512, threads: 2: this CPU has no AVX512\n"
    assert capsys.readouterr().out == printed


def test_a_failure_is_shown(monkeypatch, capsys):
    failing = subprocess.CompletedProcess([], 1, "E   0.5 != 0.25\n1 failed in 0.1s\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failing)
    assert instruction_sets.main(["--sets", "DEFAULT", "--threads", "1"]) == 1
    shown = capsys.readouterr().out
    assert "E   0.5 != 0.25" in shown and shown.endswith("threads: 1: 1 failed in 0.1s\n")
