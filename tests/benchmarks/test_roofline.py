"""The floor of a case against counts by hand and against published times; the probes of a GPU's ceilings without one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
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


WITH_FLOOR = [one for one in PUBLISHED if one.us_per_step and ceilings.stated(one.gpu)]


@pytest.mark.parametrize("published", WITH_FLOOR, ids=lambda p: f"{p.provider} {p.case.id} {p.gpu}")
def test_no_floor_lies_above_a_published_time(published):
    floor = floors.floor(published.case, ceilings.stated(published.gpu))
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
    """Forward and backward of the static analysis for each layer and direction, of the faster family each, and the other
    products at the peak rate."""
    from benchmarks.static import table

    def build(jobs, workers):
        families = ("persistent", "one_program")
        assert (jobs, workers) == ([table.Job(family, 90, "gru", "bfloat16", 64, (8,)) for family in families], 1)
        passes = (("forward", True, (2.0, 3.0)), ("forward", False, (1.5, 1.0)), ("backward", True, (4.0, 5.0)))
        return [
            {"direction": d, "training": t, "predicted_us": us, "family": family}
            for d, t, each in passes
            for family, us in zip(families, each, strict=True)
        ]

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
    assert "one_program forward" in line["how"]


def test_probes_compile():
    """For a GPU that is not here: the hop as the persistent kernels exchange, the reader without a copy ahead; clusters."""
    out = compiled(
        "import torch, triton\n"
        "from benchmarks.floor import probes\n"
        "from benchmarks.static.offline import pretend_gpu\n"
        "with pretend_gpu(90):\n"
        "    probes.hop('cpu', 8)\n"
        "    for ctas in probes.CLUSTERS:\n"
        "        words = torch.empty(1024).int()\n"
        "        built = probes.clear_kernel[(1,)](words, *probes._all_of(words), **probes.CLEARING, num_ctas=ctas)\n"
        "        assert built.metadata.num_ctas == ctas\n"
        "    x = torch.zeros(4 * probes.READ_BLOCK)\n"
        "    probes.read_kernel[(2,)](x, x, 4, 2, BLOCK=probes.READ_BLOCK, num_warps=8)\n"
        "    for kernel in (probes.hop_kernel, probes.read_kernel):\n"
        "        (built,) = [one for cache in kernel.device_caches.values() for one in cache[0].values()]\n"
        "        ptx, copies = built.asm['ptx'], built.asm['ttgir'].count('async_copy')\n"
        "        accesses = 'ld.relaxed.gpu.global.', 'st.relaxed.gpu', 'st.global.cg', 'ld.global.cg'\n"
        "        counts = [ptx.count(one) for one in accesses]\n"
        "        print(kernel.__name__, *counts, copies, built.metadata.launch_cooperative_grid)\n"
    )  # fmt: skip
    hop, read = (line.split() for line in out.splitlines())
    # strong loads and stores; Triton before 3.9 has only the store that goes to L2
    assert hop[0] == "hop_kernel" and int(hop[1]) >= 1 and int(hop[2]) + int(hop[3]) >= 1 and hop[4:] == ["0", "0", "True"]
    assert read[0] == "read_kernel" and int(read[4]) > 0 and read[5] == "0"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("programs, words", [(2, 32), (4, 8)])
def test_hop(programs, words, seed, device):
    """Side by side on a CPU; for real on a GPU, where it is what `measure` times."""
    from benchmarks.floor import probes

    with together(seed) if device == "cpu" else contextlib.nullcontext():
        out = probes.hop(device, 9, programs, words)
    assert out.shape == (programs, programs * words) and (out == 9).all()
    if device == "cpu":
        with together(seed, Fault("skipped store", (1, 0, 0), step=3)) as run:
            probes.hop(device, 9, programs, words)
        assert run.gave_up.startswith("hop of")


def test_hop_us(monkeypatch):
    """The difference of two runs, over the steps by which they differ; the rows of all steps fit L2."""
    from benchmarks.floor import probes

    ran = []
    monkeypatch.setattr(probes, "hop", lambda device, steps, *kind: ran.append((steps, kind)))
    monkeypatch.setattr(probes, "_seconds", lambda function: function() or [1.0, 3e-6 * ran[-1][0] + 7e-6, 0.0])
    found = probes.hop_us()
    assert list(found.values()) == pytest.approx([3.0] * len(probes.HOPS)) and "2 programs, 128 bytes each" in found
    assert all(steps * programs * words <= probes.BUFFER_WORDS for steps, (programs, words, _) in ran)
    ran.clear()
    assert len(probes.hop_us(1)) == 1 and [kind for _, kind in ran] == [probes.HOPS[0]] * 2


def test_clusters(monkeypatch):
    """Asked of the driver for each size, with all shared memory of an SM; nothing before compute capability 9.0."""
    from benchmarks.floor import probes

    asked, launched = [], []
    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 1000})
    utils.cuOccupancyMaxActiveClusters = lambda *of: asked.append(of) or 132 // of[2]

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, num_ctas, **options: launched.append(num_ctas) or SimpleNamespace(function=7)

    class Capability:
        now = (9, 0)

    monkeypatch.setattr(probes, "clear_kernel", Kernel())
    monkeypatch.setattr(probes.triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: Capability.now)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(probes.torch, "empty", lambda *shape, device, dtype: torch.zeros(*shape, dtype=dtype))
    assert probes.clusters() == {"of 2 CTAs": 66, "of 4 CTAs": 33, "of 8 CTAs": 16, "of 16 CTAs": 8}
    assert asked == [(7, 1000, ctas) for ctas in probes.CLUSTERS] and launched == list(probes.CLUSTERS)
    monkeypatch.setattr(Capability, "now", (8, 0))
    assert probes.clusters() == {}
