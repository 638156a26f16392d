"""The floor of a case against counts by hand and against published times; the probes of a GPU's ceilings without one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton.language as tl
from support import made_up_results
from support.side_by_side import Fault, together

from benchmarks import roofline
from benchmarks.floor import ceilings
from benchmarks.floor import work as floors
from benchmarks.floor.ceilings import STATED
from benchmarks.floor.published import PUBLISHED
from benchmarks.timing import cases, results
from benchmarks.timing.cases import Case
from rnnfast.kernels.persistent.plan import GPUS

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).parents[2]
SMALL = Case("LSTM", 2, 3, 5, 4, dtype="float32", mode="forward")


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: f"{p.provider} {p.case.id} {p.gpu}")
def test_no_floor_lies_above_a_published_time(published):
    floor = floors.floor(published.case, STATED[published.gpu])
    assert 0 < floor.seconds * 1e6 / published.case.T < published.us_per_step
    # nobody's program overlaps nothing, so the sum holds too wherever the source timed what the case says
    assert floor.no_overlap * 1e6 / published.case.T < published.us_per_step


def test_work_by_hand():
    work = floors.work(SMALL)
    recurrent, input_side = 2 * 2 * 3 * 4 * 4 * 4, 2 * 2 * 3 * 4 * 4 * 5
    parameters = 16 * (5 + 4 + 2) * 4
    assert (work.flops, work.loop_flops) == (recurrent + input_side, recurrent)
    assert work.bytes == 2 * 3 * (5 + 4) * 4 + parameters
    assert (work.weight_bytes, work.chain, work.passes) == (16 * 4 * 4, 2, 1)
    assert work.saved == 2 * 3 * 4 * (4 * 4 + 4)
    training = floors.work(dataclasses.replace(SMALL, mode="training"))
    assert (training.flops, training.loop_flops) == (3 * work.flops, 2 * recurrent)
    assert training.bytes == 2 * (2 * 3 * (5 + 4) * 4 + parameters)
    stack = floors.work(dataclasses.replace(SMALL, layers=2, directions=2))
    assert stack.flops == 4 * recurrent + 2 * input_side + 2 * 2 * 2 * 3 * 4 * 4 * 8
    assert stack.chain == 3
    packed = dataclasses.replace(SMALL, T=9, packed=True)
    assert floors.work(packed).flops == work.flops * sum(packed.lengths) / 6


def bound_by(floor):
    return max(floor.terms, key=floor.terms.get)


def test_terms_of_the_floor():
    h100 = STATED["H100"]
    fits_one_sm, does_not = Case("LSTM", 100, 16, 128, 128), Case("LSTM", 100, 16, 1024, 1024)
    assert floors.floor(fits_one_sm, h100).exchange == 0 == floors.floor(fits_one_sm, h100).l2
    exchange = floors.floor(does_not, h100).exchange
    assert exchange == pytest.approx(2 * 100 * h100.exchange_us * 1e-6)  # forward and backward
    # a small batch is bound by latency; a large one by arithmetic; weights beyond the chip by L2, beyond both by HBM
    assert bound_by(floors.floor(dataclasses.replace(does_not, B=1), h100)) == "exchange"
    assert bound_by(floors.floor(dataclasses.replace(does_not, B=128), h100)) == "compute"
    assert bound_by(floors.floor(Case("LSTM", 100, 1, 3584, 3584), h100)) == "l2"
    assert bound_by(floors.floor(Case("LSTM", 100, 1, 4096, 4096), h100)) == "hbm"
    assert floors.floor(does_not, h100, cold=True).hbm > floors.floor(does_not, h100).hbm
    assert floors.floor(dataclasses.replace(does_not, dtype="float32"), h100).compute > exchange
    assert floors._words_per_element(4, 1) == 0


def test_ceilings_of_a_gpu_by_name():
    names = {
        "NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA B200": "B200", "NVIDIA TITAN Xp": "Titan Xp",
    }  # fmt: skip
    assert {name: ceilings.stated(name).name for name in names} == names
    for other in ("NVIDIA RTX A1000", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GH200 480GB", ""):
        assert ceilings.stated(other) is None
    assert STATED.keys() >= GPUS.keys()
    made_up = made_up_results.gpu(sets=("long",))
    measured = ceilings.of_results(made_up)
    assert (measured.name, measured.exchange_us, measured.sms) == ("H100", 0.66, 132)
    assert ceilings.of_results(made_up | {"ceilings": None}) == STATED["H100"]
    assert ceilings.of_results(made_up_results.cpu()) is None


def test_every_case_is_found_by_its_id():
    for name in cases.SETS:
        for case in (*cases.named_set(name, "cuda"), *cases.named_set(name, "cpu")):
            assert Case.parse(case.id) == case
    for wrong in ("", "LSTM", "LSTM-T2-B3-I5-H4-float32", "LSTM-T2-B3-I5-H4-float32-sideways"):
        with pytest.raises(ValueError):
            Case.parse(wrong)


def test_command(tmp_path, capsys):
    made_up = made_up_results.gpu(sets=("long",))
    results.save(made_up, tmp_path / "made-up.json")
    case = made_up["rows"][0]["case"]
    assert roofline.main(["--results", str(tmp_path / "made-up.json"), "--no-prediction", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert first["case"] == Case(**case).id and first["floor"]["compute"] > 0
    assert any(name.startswith("rnnfast-persistent, measured") for name in first["times"])
    assert roofline.main(["--no-prediction"]) == 0
    out = capsys.readouterr().out
    assert "1.960   cuDNN, published" in out and "13.300   FlashRNN fused, published" in out
    (tmp_path / "empty.json").touch()
    assert roofline.main(["--results", str(tmp_path / "empty.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        roofline.main(["--case", "LSTM-T1"])
    assert "is no case; one looks like LSTM-T1024" in capsys.readouterr().err


def compiled(program: str) -> str:
    """What `program` prints in a process that compiles."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prediction(monkeypatch):
    """Forward and backward of the static analysis for each layer and direction, and the other products at the peak rate."""
    from benchmarks.static import table

    def build(jobs, workers):
        assert (jobs, workers) == ([table.Job("persistent", 90, "gru", "bfloat16", 64, (8,))], 1)
        passes = (("forward", True, 2.0), ("forward", False, 1.0), ("backward", True, 4.0))
        return [{"direction": d, "training": t, "predicted_us": us, "family": "persistent"} for d, t, us in passes]

    monkeypatch.setattr(table, "build", build)
    case = Case("GRU", 16, 8, 64, 64, layers=3, directions=2, dtype="bfloat16")
    work, h100 = floors.work(case), STATED["H100"]
    others = (work.flops - work.loop_flops) / h100.flops_per_s["bfloat16"] * 1e6 / 16
    us, how = roofline.predict(case, h100)
    assert us == pytest.approx(6 * (2 + 4) + others) and "persistent backward 4.00" in how
    assert roofline.predict(dataclasses.replace(case, mode="inference"), h100)[0] < 6.1
    with pytest.raises(LookupError, match="not compiled for Titan Xp"):
        roofline.predict(case, STATED["Titan Xp"])


@pytest.mark.sweep
def test_prediction_from_compiled_code():
    out = compiled("from benchmarks import roofline as r; r.main(['--case', 'RNN-T64-B8-I64-H64-float16-inference', '--json'])")
    line = json.loads(out)[0]
    assert line["predicted"] > sum(line["floor"].values()) * 1e6 / 64
    assert "persistent forward" in line["how"]


def test_probes_compile():
    """For a GPU that is not here: the ping-pong as the persistent kernels exchange, the reader without a copy ahead."""
    out = compiled(
        "import torch, triton\n"
        "from benchmarks.floor import probes\n"
        "from benchmarks.static.offline import pretend_gpu\n"
        "with pretend_gpu(90):\n"
        "    probes.ping_pong('cpu', 8)\n"
        "    x = torch.zeros(4 * probes.READ_BLOCK)\n"
        "    probes.read_kernel[(2,)](x, x, 4, 2, BLOCK=probes.READ_BLOCK, num_warps=8)\n"
        "    for kernel in (probes.ping_pong_kernel, probes.read_kernel):\n"
        "        (built,) = [one for cache in kernel.device_caches.values() for one in cache[0].values()]\n"
        "        ptx, copies = built.asm['ptx'], built.asm['ttgir'].count('async_copy')\n"
        "        accesses = 'ld.relaxed.gpu.global.', 'st.relaxed.gpu', 'st.global.cg', 'ld.global.cg'\n"
        "        counts = [ptx.count(one) for one in accesses]\n"
        "        print(kernel.__name__, *counts, copies, built.metadata.launch_cooperative_grid)\n"
    )  # fmt: skip
    ping_pong, read = (line.split() for line in out.splitlines())
    # loads of a word and of the one of programs that gave up, and a store of each
    relaxed = hasattr(tl, "atomic_store")
    assert ping_pong == ["ping_pong_kernel", "2", str(1 + relaxed), str(1 - relaxed), "0", "0", "True"]
    assert read[0] == "read_kernel" and int(read[4]) > 0 and read[5] == "0"


@pytest.mark.parametrize("seed", range(3))
def test_ping_pong(seed, device):
    """Side by side on a CPU; for real on a GPU, where it is what `measure` times."""
    from benchmarks.floor import probes

    with together(seed) if device == "cpu" else contextlib.nullcontext():
        out = probes.ping_pong(device, 9)
    assert (out == 9).all()
    if device == "cpu":
        with together(seed, Fault("skipped store", (1, 0, 0), step=3)) as happened:
            assert not (probes.ping_pong(device, 9) == 9).any()
        assert happened.stuck and happened.gave_up
