"""Which family of kernels runs: the environment, the device, the plan, and a driver that refuses."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.side_by_side import together

import rnnfast
from rnnfast import ops, reference
from rnnfast.choice import gpu, kernel_plan, obstacles, tuned, tuning_file
from rnnfast.choice.launchable import refusal_of
from rnnfast.kernels import cells, families, persistent, step
from rnnfast.kernels.persistent.plan import GPUS, PersistentPlan, persistent_plans
from rnnfast.kernels.step import plan
from rnnfast.settings import KERNELS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
REFUSAL = "Triton Error [CUDA]: too many blocks in cooperative launch"


@pytest.fixture(autouse=True)
def tf32(_clean_settings):
    """Allowed, as is PyTorch's default."""
    torch.backends.cudnn.rnn.fp32_precision = "tf32"


@pytest.fixture
def layer():
    return rnnfast.GRU(3, 48, backend="triton")  # whose directions have a plan each


@pytest.fixture
def refusing(monkeypatch):
    """CPU tensors pass for an H100's, and its driver refuses every cooperative launch; the calls of each family."""
    called = []

    def refuse(*args, **options):
        called.append("persistent")
        raise RuntimeError(REFUSAL)

    def counted(direction):
        own = getattr(step, direction)

        def run(*args, **options):
            called.append("step")
            own(*args, **options)

        return run

    for direction in ("forward", "backward"):
        monkeypatch.setattr(step, direction, counted(direction))
        monkeypatch.setattr(persistent, direction, refuse)
    monkeypatch.setattr(kernel_plan, "_refused", {})
    monkeypatch.setenv("RNNFAST_KERNELS", "persistent")
    with kernel_plan.pretend_gpu(GPUS["H100"]):
        yield called


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="takes CPU tensors, in the interpreter")


@pytest.mark.parametrize("name", ["Persistent", "torch"])
def test_other_names_are_refused(name, layer, device, monkeypatch):
    monkeypatch.setenv("RNNFAST_KERNELS", name)
    x = torch.zeros(2, 1, 3, device=device)
    first, *others = (repr(choice) for choice in KERNELS.choices)
    known = f"{', '.join((first, *others[:-1]))} or {others[-1]}"
    with pytest.raises(ValueError, match=f"RNNFAST_KERNELS should be one of {known}, got '{name}'"):
        layer.to(device)(x)
    with pytest.raises(ValueError, match="RNNFAST_KERNELS"):
        rnnfast.explain(layer, x)


@pytest.mark.parametrize("name", [None, "", *KERNELS.choices])
def test_known_names(name, monkeypatch):
    if name is not None:
        monkeypatch.setenv("RNNFAST_KERNELS", name)
    assert kernel_plan.asked() == (name or "auto")


def test_another_family(monkeypatch):
    """A family whose programs do not wait for one another runs on CPU tensors, too."""
    monkeypatch.setitem(families.FAMILIES, "twin", families.FAMILIES["step"])
    choice = kernel_plan.choose("twin", 4, 3, 32, 4, "ieee", False, None)
    assert choice.family == "twin" and choice.plan == choice.step and not choice.reason


def test_choice_is_a_pure_function():
    """Persistent only if asked for, on a GPU, where there is a plan; else the step kernels, with the reason."""
    main, step_plan = (4, 16, 768, 2, "ieee", False), plan.step_plan(768, 2, "ieee")
    assert kernel_plan.choose("step", *main, GPUS["H100"]) == kernel_plan.Choice("step", step_plan, step_plan)
    chosen = kernel_plan.choose("persistent", *main, GPUS["H100"])
    assert isinstance(chosen.persistent, PersistentPlan) and chosen.step == plan.step_plan(768, 2, "ieee")
    assert chosen == kernel_plan.choose("persistent", *main, GPUS["H100"])
    too_large = kernel_plan.choose("persistent", 4, 16, 8192, 2, "ieee", False, GPUS["H100"])
    assert too_large.persistent is None and "programs, where there are 132 SMs" in too_large.reason
    on_a_cpu = kernel_plan.choose("persistent", *main, None)
    assert on_a_cpu.persistent is None and "on a CPU" in on_a_cpu.reason


@on_cpu
@pytest.mark.parametrize("cell", list(reference.GATES))
def test_never_on_cpu_tensors(cell, monkeypatch):
    """In the plain interpreter the first program would wait for the others for ever."""

    def never(*args, **options):
        raise AssertionError("a persistent kernel on a CPU")

    monkeypatch.setattr(persistent, "forward", never)
    monkeypatch.setattr(persistent, "backward", never)
    rows = reference.GATES[cell] * 4
    x, w_ih, w_hh = torch.randn(3, 2, 5, requires_grad=True), torch.randn(rows, 5), torch.randn(rows, 4)
    expected = ops.layer(cell, x, None, w_ih, w_hh)[0]
    monkeypatch.setenv("RNNFAST_KERNELS", "persistent")
    y = ops.layer(cell, x, None, w_ih, w_hh)[0]
    y.sum().backward()
    assert torch.equal(y, expected) and kernel_plan.limits(CPU) is None


@on_cpu
def test_refused_launch_falls_back_once(refusing, layer):
    """The step kernels run, with one warning a plan; afterwards the driver is not asked again, and explain says why."""
    x = torch.randn(3, 2, 3)
    assert "persistent kernels" in str(rnnfast.explain(layer, x))
    with pytest.warns(rnnfast.FallbackWarning, match="step kernels run: the driver refused the launch") as caught:
        y = layer(x)[0]
        y.sum().backward()
    ours = [warning for warning in caught if warning.category is rnnfast.FallbackWarning]
    assert len(ours) == 2  # forward and backward have a plan each
    assert ours[0].filename == __file__
    assert refusing == ["persistent", "step"] * 2
    refusing.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", rnnfast.FallbackWarning)
        assert torch.equal(layer(x)[0], y)
    assert refusing == ["step"]
    assert f"not persistent: the driver refused the launch: {REFUSAL}" in str(rnnfast.explain(layer, x))


class OutOfResources(Exception):
    """As Triton's own, which it raises before it asks the driver."""


CUDA = "Triton Error [CUDA]: "


@pytest.mark.parametrize(
    "error, refused",
    [
        (RuntimeError(f"{CUDA}invalid argument"), True),
        (RuntimeError(f"{CUDA}too many resources requested for launch"), True),
        (RuntimeError(REFUSAL), True),
        (RuntimeError(f"{CUDA}operation not supported"), True),
        (OutOfResources("shared memory"), True),
        (RuntimeError("PassManager::run failed"), True),
        (RuntimeError(f"{CUDA}out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError(f"{CUDA}an illegal memory access was encountered"), False),
        (RuntimeError(f"{CUDA}the launch timed out and was terminated"), False),
        (RuntimeError(f"{CUDA}unspecified launch failure"), False),
        (RuntimeError(f"{CUDA}operation not permitted when stream is capturing"), False),
        (RuntimeError("Failed to find C compiler"), False),
        (ValueError("invalid argument"), False),
    ],
)
def test_what_is_a_refusal(error, refused):
    """A launch that did not happen, for a reason that stays: not an error of a kernel before it, nor one that may pass."""
    assert bool(refusal_of(error)) == refused


@on_cpu
def test_refused_launch_in_strict_mode(refusing, layer, monkeypatch):
    monkeypatch.setenv("RNNFAST_STRICT", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="RNNFAST_STRICT is set and the persistent kernels cannot run this call"):
            layer(torch.randn(3, 2, 3))
    assert refusing == ["persistent"] * 2


@on_cpu
@pytest.mark.parametrize("family", ["persistent", "auto"])
def test_tuned_plan_that_is_refused(refusing, layer, family, monkeypatch):
    """As one that was asked for: fewer SMs are usable than when it was measured, say."""
    monkeypatch.setenv("RNNFAST_KERNELS", family)
    plans = persistent_plans(3, 2, 48, 4, "tf32", False, GPUS["H100"])
    shape = tuning_file.Shape("gru", "float32", "tf32", 3, 2, 3, 48, 1, 1, False)
    with tuned.override_tuning(GPUS["H100"], [tuning_file.Entry(shape, "triton", plans[0])]), torch.no_grad():
        with pytest.warns(rnnfast.FallbackWarning, match="persistent kernels were chosen, but the step kernels run"):
            layer(torch.randn(3, 2, 3))
        assert "not persistent: the driver refused the launch" in str(rnnfast.explain(layer, torch.randn(3, 2, 3)))
        monkeypatch.setenv("RNNFAST_STRICT", "1")
        with pytest.raises(RuntimeError, match="RNNFAST_STRICT is set and the persistent kernels"):
            layer(torch.randn(3, 2, 3))
    assert refusing == ["persistent", "step", "persistent"]


@on_cpu
def test_without_cooperative_launch(refusing, layer, monkeypatch):
    """The step kernels run without a launch being tried, explain says why, and strict mode raises."""
    x = torch.randn(3, 2, 3)
    with kernel_plan.pretend_gpu(GPUS["H100"], cooperative=False):
        layer(x)[0].sum().backward()
        assert refusing == ["step"] * 2
        assert f"not persistent: {kernel_plan.UNCOOPERATIVE}" in str(rnnfast.explain(layer, x))
        monkeypatch.setenv("RNNFAST_STRICT", "1")
        with pytest.raises(RuntimeError, match=r"RNNFAST_STRICT is set .* the GPU has no cooperative launch"):
            layer(x)
    assert refusing == ["step"] * 2


class Driver:
    """In place of libcuda: a GPU with ordinal 1 and handle 7."""

    def __init__(self, says, status=0):
        self.says, self.status = says, status

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = 7
        return 0 if ordinal == 1 else 101

    def cuDeviceGetAttribute(self, value, number, device):
        assert (number, device.value) == (95, 7)
        value._obj.value = self.says
        return self.status

    def cuDriverGetVersion(self, value):
        value._obj.value = 13000
        return self.status


@pytest.mark.parametrize("says, status, expected", [(1, 0, True), (0, 0, False), (0, 999, True)])
def test_the_driver_is_asked_once(says, status, expected, monkeypatch):
    """For cooperative launch; where it does not say, the launch itself will."""
    loaded = []
    monkeypatch.setattr(gpu, "_cooperative", {})
    monkeypatch.setattr("ctypes.CDLL", lambda name: loaded.append(name) or Driver(says, status))
    for _ in range(3):
        assert gpu.cooperative(torch.device("cuda", 1)) == expected
    assert loaded == ["libcuda.so.1"] * 2  # for the handle and the attribute
    assert gpu.cooperative(torch.device("cuda", 0))  # which this driver does not know
    assert gpu.driver_version() == (13000 if status == 0 else None)


def test_no_driver_to_ask(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    monkeypatch.setattr(gpu, "_cooperative", {})
    assert gpu.cooperative(torch.device("cuda", 0)) and gpu.driver_version() is None


@pytest.mark.parametrize("family", ["persistent", "auto"])
def test_too_old_triton(family, device, monkeypatch):
    """PyTorch's own layer runs, explain says why, and strict mode raises."""
    monkeypatch.setattr(obstacles, "known", {})
    monkeypatch.setattr(sys.modules["triton"], "__version__", "3.5.1")
    monkeypatch.setenv("RNNFAST_KERNELS", family)
    layer, x = rnnfast.GRU(3, 4, device=device), torch.zeros(3, 2, 3, device=device)
    torch.testing.assert_close(layer(x)[0], torch.nn.GRU.forward(layer, x)[0])
    explained = rnnfast.explain(layer, x)
    assert explained.backend == "torch" and "Triton 3.5.1 is not supported" in explained.obstacles[0]
    monkeypatch.setenv("RNNFAST_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"Triton 3\.5\.1 is not supported"):
        layer(x)


@on_cpu
def test_other_errors_pass(refusing, layer, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(persistent, "forward", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        layer(torch.randn(3, 2, 3))
    assert not refusing and not kernel_plan._refused


@on_cpu
@pytest.mark.parametrize("reverse", [False, True])
def test_operators_on_persistent_kernels(reverse, monkeypatch):
    """The whole layer, forward in chunks of 2 steps and backward, with the programs of an H100's plan side by side."""
    made = [torch.randn(*shape) * 0.3 for shape in ((5, 3, 4), (3, 40), (120, 4), (120, 40), (120,), (120,))]
    found = []
    for family in ("step", "persistent"):
        x, h0, *weights = (tensor.clone().requires_grad_() for tensor in made)
        monkeypatch.setenv("RNNFAST_KERNELS", family)
        monkeypatch.setattr(persistent.plan, "ROWS", 2 * 3)
        with kernel_plan.pretend_gpu(GPUS["H100"]), together(1):
            y, (h_n,) = ops.layer("gru", x, (h0,), *weights, reverse=reverse)
            found.append([y, h_n, *torch.autograd.grad(y.square().sum() + h_n.sum(), (x, h0, *weights))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@on_cpu
def test_marked_calls_have_plans_of_their_own(monkeypatch):
    """With room for the marks, where others were measured as the fastest too; where there is none, the step kernels."""
    call = ("lstm", 100, 16, 768, torch.float16, "half", True, True, CPU)
    plans, marked = (persistent_plans(4, 16, 768, 2, "half", True, GPUS["H100"], marked=marked) for marked in (False, True))
    assert marked and plans[0] != marked[0]
    shape = tuning_file.Shape("lstm", "float16", "half", 100, 16, 8, 768, 1, 1, True)
    monkeypatch.setenv("RNNFAST_KERNELS", "auto")
    with (
        kernel_plan.pretend_gpu(GPUS["H100"]),
        tuned.override_tuning(GPUS["H100"], [tuning_file.Entry(shape, "triton", None, plans[0])]),
    ):
        assert kernel_plan.pick(*call).persistent == plans[0]
        assert kernel_plan.pick(*call, marked=True).persistent == marked[0]
        monkeypatch.setattr(persistent.plan, "MARKS", 1000)
        persistent.plan._rank.cache_clear()
        gpu.known.clear()
        choice = kernel_plan.pick(*call, marked=True)
        assert choice.persistent is None and "fit in registers" in choice.reason
    persistent.plan._rank.cache_clear()


@on_cpu
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_marked_calls_on_persistent_kernels(name, monkeypatch):
    """Both directions of a layer with lengths, resets, states to restart from and a loss of every state, on an H100's plans:
    the step kernels' outputs and gradients, and no step kernel runs."""
    T, B, H = 4, 10, 40
    module = getattr(rnnfast, name)(3, H, bidirectional=True, backend="triton")
    given = [torch.randn(T, B, 3), *(torch.randn(2, B, H) for _ in range(4))]
    options = {"lengths": [0, 4, 1, 3, 2, 1, 4, 0, 2, 1], "resets": torch.rand(T, B) < 0.3, "return_all_states": True}
    monkeypatch.setattr(persistent.plan, "ROWS", 2 * 3 * B)  # three steps of both directions a launch
    found = []
    for family in ("step", "persistent"):
        x, *states = (tensor.clone().requires_grad_() for tensor in given)
        hx, reset_to = ((states[0], states[1]), (states[2], states[3])) if name == "LSTM" else (states[0], states[2])
        monkeypatch.setenv("RNNFAST_KERNELS", family)
        with kernel_plan.pretend_gpu(GPUS["H100"]), together(2) as happened:
            y, _, (every,) = module(x, hx, reset_to=reset_to, **options)
            loss = sum(tensor.square().sum() for tensor in (y, *every))
            used = [x, *(states if name == "LSTM" else states[::2]), *module.parameters()]
            found.append([y, *every, *torch.autograd.grad(loss, used)])
    assert {kernel for kernel, _ in happened.grids} == {
        "pack_kernel", "clear_kernel", "persistent_forward_kernel", "persistent_backward_kernel",
    }  # fmt: skip
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@on_cpu
def test_explain(layer, monkeypatch):
    """The family, its plan in words for either direction, or why there is none."""
    x = torch.zeros(7, 2, 3)
    monkeypatch.setenv("RNNFAST_KERNELS", "persistent")
    assert "step kernels" in str(rnnfast.explain(layer, x))
    assert "not persistent: on a CPU" in str(rnnfast.explain(layer, x))
    with kernel_plan.pretend_gpu(GPUS["H100"]):
        text = str(rnnfast.explain(layer, x))
        assert "forward: persistent kernels" in text and "backward: persistent kernels" in text
        assert "programs of 16 units and 8 rows" in text
        large = rnnfast.RNN(1, 2200, backend="triton")
        assert "not persistent: no tiles fit" in str(rnnfast.explain(large, torch.zeros(1, 1, 1)))
    monkeypatch.delenv("RNNFAST_KERNELS")
    assert "persistent" not in str(rnnfast.explain(layer, x))


PROGRAM = """
import json, torch
from benchmarks.static.offline import pretend_gpu, settings
from rnnfast import ops
from rnnfast.kernels.persistent import plan

plan.ROWS = 8 * 3
x, w_ih, w_hh = (torch.zeros(*shape, dtype=torch.float16) for shape in ((20, 3, 4), (64, 4), (64, 16)))
found = {}
for reverse in (False, True):
    with settings("persistent", False), pretend_gpu(90) as driver:
        y, _ = ops.layer("lstm", x.requires_grad_(), None, w_ih, w_hh, reverse=reverse)
        y.sum().backward()
    found[str(reverse)] = [launch.kernel for launch in driver.launches]
print(json.dumps(found))
"""


def test_one_launch_a_chunk():
    """20 steps in chunks of 8: three launches forward, each after its rows were cleared; one backward."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    forward, backward = ["clear_kernel", "persistent_forward_kernel"], ["clear_kernel", "persistent_backward_kernel"]
    assert json.loads(done.stdout) == {"False": forward * 3 + backward, "True": forward * 3 + backward}


@pytest.fixture
def waiting(monkeypatch):
    """CPU tensors pass for an H100's. In place of persistent kernels step kernels run, so that none really waits; the words by
    which a launch on the CPU would give up."""

    def stand_in(direction):
        own = getattr(step, direction)

        def run(cell, *args, plan, **options):
            assert isinstance(plan, persistent.plan.PersistentPlan)
            own(cell, *args, plan=step.plan.step_plan(48, 4, "ieee"), **options)

        return run

    for name, empty in (("_waiting", {}), ("_gave_up", {}), ("_unannounced", [])):
        monkeypatch.setattr(kernel_plan, name, empty)
    monkeypatch.setattr(persistent.give_up, "_words", {})
    for direction in ("forward", "backward"):
        monkeypatch.setattr(persistent, direction, stand_in(direction))
    monkeypatch.setenv("RNNFAST_KERNELS", "persistent")
    with kernel_plan.pretend_gpu(GPUS["H100"]):
        yield persistent.give_up.for_launch(torch.zeros(1))


@on_cpu
@pytest.mark.parametrize("when", ["backward", "the next call"])
def test_programs_that_gave_up(waiting, layer, monkeypatch, when):
    """One error, in backward or at the next call; from then on step kernels, with one warning."""
    x = torch.randn(3, 2, 3)
    expected = layer(x)[0]
    waiting.told.fill_(persistent.give_up.name_of("forward", cells.CELLS["gru"], 48, torch.float32))
    words = "gave up: in forward of gru with 48 hidden units in float32 on cpu.*RNNFAST_KERNELS=step"
    with pytest.raises(RuntimeError, match=words):
        expected.sum().backward() if when == "backward" else layer(x)
    with pytest.warns(rnnfast.FallbackWarning, match="step kernels run: they gave up waiting, in forward of gru"):
        assert torch.equal(layer(x)[0], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rnnfast.FallbackWarning)
        layer(x)[0].sum().backward()
    assert "not persistent: they gave up waiting, in forward of gru" in str(rnnfast.explain(layer, x))
    monkeypatch.setenv("RNNFAST_STRICT", "1")
    with pytest.raises(
        RuntimeError, match="RNNFAST_STRICT is set and the persistent kernels cannot run this call: they gave up"
    ):
        layer(x)
