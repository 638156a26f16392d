"""An AMD GPU: nobody has run the kernels there, so none runs before `rnnfast check` has found them right."""

import contextlib

import pytest
import torch
from support.stand_ins import stand_in_amd_gpu

import rnnfast
from rnnfast import check
from rnnfast.choice import child, decide, gpu, kernel_plan, obstacles, trust, tuned
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.commands import canary
from rnnfast.kernels.families import plans_to_measure
from rnnfast.kernels.persistent.limits import AMD_GPUS, NoPlan
from rnnfast.kernels.persistent.plan import persistent_plan

pytestmark = pytest.mark.same_everywhere

SHAPE = Shape("lstm", "float16", "half", 256, 16, 64, 64, 1, 1, training=True)
RIGHT = [row for family in ("step", "one_program") for row in ({"family": family}, {"family": family, "fault": ""})]
WRONG = [{"family": "step"}, {"family": "step", "fault": "output: error 1.0e+00, allowed 1.0e-03"}, *RIGHT[2:]]
cpu = torch.device("cpu")


@pytest.fixture
def amd(monkeypatch, tmp_path):
    """The device, and the rows that the canary's child prints."""
    monkeypatch.setenv("RNNFAST_CANARY", "auto")
    monkeypatch.setenv("RNNFAST_TUNING_FILE", str(tmp_path / "mi300x.json"))
    rows = []
    monkeypatch.setattr(child, "rows", lambda *command: (row for row in rows.pop(0)))
    return stand_in_amd_gpu(monkeypatch), rows


def refusals(asked):
    """Why the kernels do not run a call on the GPU, asked for or not."""
    return decide.decide(asked, "cuda", 0, torch.float16).obstacles


def forget():
    """As in a new process."""
    trust._verdicts.clear()
    obstacles.known.pop("cuda:0", None)


def test_limits(amd):
    """By the name of the architecture; the driver says how many CUs there are."""
    limits = gpu.limits(amd[0])
    assert (limits.name, limits.arch, limits.capability, limits.sms) == ("AMD Instinct MI300X", "gfx942", 0, 228)
    assert limits.shared_bytes == 64 << 10


def test_other_architectures_are_refused(monkeypatch):
    stand_in_amd_gpu(monkeypatch, "gfx906")
    assert refusals("triton") == ("the kernels were compiled for the AMD GPUs gfx942, gfx950 and gfx1100, and this is another",)


@pytest.mark.parametrize("asked", [None, "triton"])
def test_nothing_runs_unchecked(amd, asked):
    """No call runs the canary either: a user who asks for it does."""
    assert refusals(asked) == (trust.UNCHECKED,)
    assert trust.trusted(amd[0]) == () and trust.words(gpu.limits(amd[0])) == trust.UNCHECKED


def test_once_checked(amd):
    """The verdict counts at once, and in the next process. What was not measured runs on PyTorch's own layer, unless named."""
    device, rows = amd
    assert refusals("triton")
    rows.append(RIGHT)
    trust.examine(device)
    for _ in range(2):
        assert refusals("triton") == () and trust.trusted(device) == ("step", "one_program")
        assert kernel_plan.torch_wins(SHAPE, device) == kernel_plan.UNPREDICTED
        assert kernel_plan.torch_wins(SHAPE, device, kernels_only=True) == ""
        forget()


def test_measured(amd):
    """A measurement decides, and its plan runs. Without one the step kernels do, as nothing is predicted."""
    device, rows = amd
    rows.append(RIGHT)
    trust.examine(device)
    limits = gpu.limits(device)
    picked = lambda: kernel_plan.pick("lstm", 256, 16, 64, torch.float16, "half", False, True, device).family  # noqa: E731
    assert picked() == "step"
    plan = plans_to_measure(4, 16, 64, 2, "half", False, limits)[0]
    with tuned.override_tuning(limits, [Entry(SHAPE, "triton", plan, None)]):
        assert kernel_plan.torch_wins(SHAPE, device) == "" and picked() == "one_program"
    with tuned.override_tuning(limits, [Entry(SHAPE, "torch", plan, None)]):
        assert kernel_plan.torch_wins(SHAPE, device) == "measured as the fastest for this call"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(WRONG, "the check of the step kernels failed on it: output: error"), ([child.Failed("no GPU", hung=False)], "no GPU")],
)
def test_a_check_that_fails(amd, answer, reason, monkeypatch):
    def rows(*command):
        for row in answer:
            if isinstance(row, Exception):
                raise row
            yield row

    monkeypatch.setattr(child, "rows", rows)
    with pytest.warns(trust.CanaryWarning):
        trust.examine(amd[0])
    (refusal,) = refusals("triton")
    assert reason in refusal


def test_trusted_without_a_check(amd, monkeypatch):
    monkeypatch.setenv("RNNFAST_CANARY", "trust")
    assert refusals("triton") == ()


def test_the_canary_runs_what_has_no_verdict(amd, monkeypatch, capsys):
    """Its process would else check PyTorch's own layer, and find that right."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(canary, "examine", lambda family, device: [""])
    assert canary.main(["0", "step"]) == 0 and '"fault": ""' in capsys.readouterr().out
    monkeypatch.setattr(obstacles, "known", {"triton": None, "cuda:0": "no compiler"})
    with pytest.raises(SystemExit, match="no compiler"):
        canary.main(["0", "step"])


@pytest.mark.parametrize(("answer", "code"), [(RIGHT, 0), (WRONG, 2)])
def test_rnnfast_check_checks_it(amd, answer, code, monkeypatch, capsys):
    """The command gets past the refusal, and the kernels are compared only if the canary found them right."""
    device, rows = amd
    rows.append(answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "MI300X")
    monkeypatch.setattr(check, "gpu_cases", list)
    own = torch.empty
    on_device = lambda *size, device: own(*size, device="meta")  # noqa: E731 - stands in for a tensor on the GPU
    monkeypatch.setattr(check.torch, "empty", on_device)
    monkeypatch.setattr(check, "tensor_obstacles", lambda tensor: refusals("triton"))
    examine = trust.examine
    monkeypatch.setattr(trust, "examine", lambda tensors_device, again: examine(device, again))
    with pytest.warns(trust.CanaryWarning) if code else contextlib.nullcontext():
        assert check.main([]) == code
    assert ("the check of the step kernels failed" in capsys.readouterr().err) == bool(code)


def test_explained():
    """Nothing is predicted; float32 products are never TF32; MIOpen is PyTorch's own layer."""
    with gpu.pretend_gpu(AMD_GPUS["gfx1100"]):
        layer, x = rnnfast.LSTM(64, 64).half(), torch.zeros(256, 16, 64).half()
        told = rnnfast.explain(layer, x)
        assert told.backend == "torch" and "no model knows AMD GPUs" in told.asked
        assert told.predicted.startswith("nothing, because no model knows AMD GPUs")


def test_float32_products(monkeypatch):
    monkeypatch.setattr(kernel_plan, "rnn_precision", lambda: "tf32")
    assert kernel_plan.precision() == "tf32"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernel_plan.precision() == "ieee"


@pytest.mark.parametrize("arch", list(AMD_GPUS))
def test_plans(arch):
    """The persistent kernels have none, the step kernels take half of the shared memory, the one-program ones small layers."""
    limits = AMD_GPUS[arch]
    for backward in (False, True):
        assert isinstance(found := persistent_plan(4, 16, 128, 2, "half", backward, limits), NoPlan)
        assert "PTX" in found.reason and limits.name in found.reason
        chosen = kernel_plan.choose("step", 4, 16, 768, 2, "half", backward, limits)
        assert chosen.plan.BLOCK_K == 64
        assert kernel_plan.choose("one_program", 4, 16, 64, 2, "half", backward, limits).family == "one_program"
        larger = kernel_plan.choose("one_program", 4, 16, 65, 2, "half", backward, limits)
        assert larger.family == "step" and larger.reason == "on AMD GPUs a program has at most 64 units, and there are 65"
