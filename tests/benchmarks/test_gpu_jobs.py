"""The jobs of `make gpu-check` where there is no GPU: on CPU tensors, and for GPUs that are not there."""

import json
import shlex
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support.side_by_side import together
from support.stand_ins import stand_in_gpu

from benchmarks import gpu_check
from benchmarks.floor import probes
from benchmarks.gpu import jobs
from benchmarks.static import offline
from benchmarks.timing import cases as timing
from benchmarks.timing.providers import all_providers, provider_of
from rnnfast.check import Case, Result
from rnnfast.choice import kernel_plan, tuning_file
from rnnfast.commands import canary, tune
from rnnfast.kernels import persistent
from rnnfast.kernels.families import OF_TORCH
from rnnfast.kernels.persistent.plan import GPUS

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).parents[2]
H200 = GPUS["H200"]
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


@on_cpu
@pytest.mark.parametrize(
    "case", [Case("GRU", 3, 2, 3, 20, torch.float16, bidirectional=True), Case("RNN", 3, 2, 3, 8, torch.float32)]
)
def test_check(case, on_an_h100, monkeypatch):
    """Really on the persistent kernels, against float64; wrong results and other bits are seen."""
    monkeypatch.setattr(jobs, "CHECKS", {"x": ("persistent", case, case.dtype == torch.float32)})
    ran, inner = [], persistent.forward
    monkeypatch.setattr(persistent, "forward", lambda *args, **options: ran.append(1) or inner(*args, **options))
    (row,) = jobs.check("x")
    assert row.keys() == {"share", "tensor", "figure"} and 0 < row["share"] <= 1
    assert len(ran) == 4  # both directions in one call
    bits = iter([torch.zeros(5), torch.tensor([0.0, 0, 1, 1, 0])])
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "bits", lambda layer, x: next(bits))
        patch.setattr(jobs, "compare", lambda *args, **options: [Result(case, "h_n", 0.1, 0.1, 0.2)])
        differ = {"share": 0.5, "tensor": "h_n", "figure": "rms", "error": "2 of 5 numbers differ from run to run"}
        assert list(jobs.check("x")) == [differ]
    monkeypatch.setattr(jobs, "compare", lambda *args, **options: [Result(case, "output", 0.9, 0.1, 0.3)])
    wrong = {"share": 3.0, "tensor": "output", "figure": "rms", "error": "training, output: error 9.0e-01, allowed 3.0e-01"}
    assert list(jobs.check("x")) == [wrong | {"share": pytest.approx(3.0)}]


@on_cpu
@pytest.mark.parametrize("job, names", [(jobs.check, jobs.CHECKS), (jobs.stress, jobs.STRESS)])
def test_without_a_plan(job, names, pretend):
    """Nothing is checked or stressed, and the reason is said."""
    (row,) = job(next(name for name in names if name.startswith("persistent")))
    assert "forward: on a CPU" in row["skipped"] and "backward: on a CPU" in row["skipped"]


@on_cpu
@pytest.mark.parametrize("beside", [False, True])
def test_stress(beside, on_an_h100, monkeypatch):
    """Launches and calls with other bits are counted as they go."""
    monkeypatch.setattr(jobs, "LAUNCHES", 1200)
    monkeypatch.setattr(jobs, "OTHER", 8)
    monkeypatch.setattr(jobs, "STRESS", {"x": ("persistent", Case("RNN", 2, 1, 3, 8, torch.float32), beside)})
    inner, kept = jobs.bits, []

    def bits(layer, x):
        kept.append(kept[0] if kept else inner(layer, x))
        return kept[0] + (len(kept) == 300)

    monkeypatch.setattr(jobs, "bits", bits)
    assert list(jobs.stress("x")) == [{"launches": n, "other bits": int(n > 500)} for n in (500, 1000, 1200)]


def test_what_is_run():
    """Every family but the step kernels is checked, those that wait are stressed, and all are timed."""
    assert {family for family, *_ in jobs.CHECKS.values()} == set(OF_TORCH) - {"step"}
    assert {family for family, *_ in jobs.STRESS.values()} == {name for name, family in OF_TORCH.items() if family.waits}
    assert {provider_of(family) for family in OF_TORCH} <= all_providers().keys()
    assert any(case.T * case.B > 8192 for _, case, _ in jobs.CHECKS.values()), "none crosses a chunk of the input side"
    assert [shape.training for shape in jobs.TUNED] == [False, True] * (len(jobs.TUNED) // 2)


def test_builds(monkeypatch):
    """What is compiled beforehand is what then runs: the cases on each family, and the plans that the tuner tries."""
    case, shape = jobs.TIMED[0], jobs.TUNED[0]
    found = jobs.builds([case], [shape], H200)
    assert [job for job in found.values() if job[0] != "auto"] == [
        [family, case.cell_name, case.dtype, case.H, case.B] for family in OF_TORCH
    ]
    candidates = [job[-1] for job in found.values() if job[0] == "auto"]
    for side, wanted in (("forward", shape), ("backward", replace(shape, training=True))):
        plans = {
            json.dumps(tuning_file.tiles(plan)) for entry in tune.candidates(wanted, H200) if (plan := getattr(entry, side))
        }
        both = [entry for entries in candidates for entry in entries]
        assert {json.dumps(entry[side]) for entry in both if entry[side]} == plans
    assert {(case.cell, case.H, case.B) for case in canary.CASES} == {(c.cell, c.H, c.B) for c in jobs.canary_cases()}


@pytest.mark.parametrize("name", ["step", "persistent", "auto"])
def test_build(name, monkeypatch):
    """A build launches the family that it names, or what the tuning entries say, on a GPU with these limits."""
    launched = []

    def run_layer(driver, cell, dtype, H, T, B):
        choices = [kernel_plan.pick(cell, T, B, H, dtype, "half", back, True, torch.device("cpu")) for back in (False, True)]
        launched.extend(choice.plan for choice in choices)
        driver.launches += [offline.Launch("a", (1, 1, 1), "x"), offline.Launch("a", (1, 1, 1), "x")]

    monkeypatch.setattr(offline, "run_layer", run_layer)
    monkeypatch.setattr(offline.runtime, "mode", lambda: "compiled")
    found = jobs.builds([timing.Case("LSTM", 9, 16, 768, 768)], [jobs.TUNED[0]], H200)
    job = [job for job in found.values() if job[0] == name][-1]
    threads = torch.get_num_threads()
    try:
        (row,) = jobs.build(asdict(H200), *job)
    finally:
        torch.set_num_threads(threads)
    assert row["kernels"] == 1
    if name == "auto":
        entry = job[-1][1]
        assert [tuning_file.tiles(plan) for plan in launched] == [entry["forward"], entry["backward"]]
    else:
        assert all(isinstance(plan, OF_TORCH[name].kind) for plan in launched)


def test_a_real_build(tmp_path):
    """In a process of its own, into Triton's cache, where the GPU's launches look."""
    env = gpu_check.child_env() | {"TRITON_CACHE_DIR": str(tmp_path)}
    job = [asdict(H200), "step", "rnn_tanh", "float16", 16, 4]
    ((number, row),) = gpu_check.isolated.rows("benchmarks.gpu.jobs:build", [job], 300, env=env)
    assert (
        number == 0
        and row["kernels"] == 3
        and {path.stem for path in tmp_path.rglob("*.cubin")}
        == {
            "forward_step_kernel",
            "backward_step_kernel",
        }
    )


def test_probe(monkeypatch):
    for name, function in (("hop", "hop_us"), ("clusters", "clusters"), ("ceilings", "measure")):
        monkeypatch.setattr(probes, function, lambda name=name: {name: 1.0})
    assert [list(jobs.probe(name)) for name in jobs.PROBES] == [[{name: 1.0}] for name in jobs.PROBES]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_paths_with_spaces(tmp_path):
    """`make gpu-check` in a folder, and for a folder, whose name has a space."""
    (tmp_path / "a b").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path / "a b")
    # `make test` may run this, and a make inside of another one says which folder it enters
    command = ["make", "-n", "--no-print-directory", "gpu-check", "PYTHON=python3", "OUT=c d/e", "ARGS=--plan"]
    done = subprocess.run(command, cwd=tmp_path / "a b", capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[0].startswith(f"PYTHONPATH={tmp_path}/a b") and words[-3:] == ["--out", "c d/e", "--plan"]
