"""The model of cuDNN, the predictions of the kernels beside it, and what the automatic choice makes of both."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch

import rnnfast
from rnnfast.choice import cudnn, forecast, gpu, kernel_plan, pipeline, tuned
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.kernels.families import OF_TORCH
from rnnfast.kernels.hardware import gigahertz
from rnnfast.kernels.persistent.plan import GPUS

pytestmark = pytest.mark.same_everywhere

H100 = GPUS["H100"]
LSTM = Shape("lstm", "float16", "half", 1024, 16, 768, 768, 1, 1, training=False)
GRU = replace(LSTM, cell="gru")
SMALL = replace(LSTM, dtype="float32", precision="ieee", H=168, I=168, B=62)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "static"),
        ({"dtype": "bfloat16"}, "standard"),
        ({"dtype": "float32", "precision": "tf32"}, "standard"),
        ({"layers": 2}, "standard"),
        ({"directions": 2}, "standard"),
        ({"H": 896, "I": 100}, "standard"),
        ({"H": 800}, "standard"),
        ({"H": 1152}, "standard"),
        ({"B": 12}, "standard"),
        ({"B": 136}, "standard"),
        ({"cell": "gru"}, "standard"),
        ({"cell": "rnn_tanh", "B": 96, "H": 896}, "standard"),
        ({"cell": "rnn_tanh", "B": 96}, "static"),
        ({"H": 192}, "small"),
        ({"H": 192, "layers": 4, "directions": 2, "dtype": "float32", "precision": "ieee"}, "small"),
        ({"H": 193}, "standard"),
        ({"cell": "rnn_relu", "H": 384}, "small"),
    ],
)
def test_the_algorithm_that_pytorch_picks(changes, name):
    """By the rules in RNN.cpp."""
    assert cudnn.algorithm(replace(LSTM, **changes), H100) == name


def test_the_algorithm_depends_on_more_than_sizes():
    assert cudnn.algorithm(LSTM, H100, packed=True) == cudnn.algorithm(LSTM, H100, projected=True) == "standard"
    small = replace(LSTM, H=160)
    assert (cudnn.algorithm(small, H100), cudnn.algorithm(small, H100, backward=True)) == ("small", "standard")
    assert cudnn.algorithm(LSTM, GPUS["RTX 3090"]) == "standard"  # compute capability 8.6
    assert cudnn.algorithm(LSTM, replace(H100, sms=78)) == "standard"  # as an H20 has


@pytest.mark.parametrize(
    ("B", "H", "forward", "backward"),
    [(6, 40, 0.66, 1.6), (6, 72, 0.85, 1.7), (5, 64, 0.57, 1.04), (16, 128, 2.6, 3.6), (55, 112, 5.0, 7.6),
     (12, 192, 13.6, None), (44, 160, 32.8, None), (45, 152, 33.0, None), (62, 168, 75.1, None)],
)  # fmt: skip
def test_the_small_algorithm_is_fitted_to_what_was_published(B, H, forward, backward):
    """xwang233's measurements, in microseconds a step. The model may promise more of cuDNN than it had, and hardly less."""
    shape = replace(LSTM, B=B, H=H)
    assert 0.65 * forward < cudnn.step_us(shape, GPUS["A100"]) < 1.15 * forward
    if backward:
        assert 0.65 * backward < cudnn.step_us(shape, GPUS["A100"], backward=True) < 1.4 * backward


def test_the_other_algorithms_at_published_sizes():
    """FlashRNN's size, KernelBench's least (5.2 for an LSTM of two directions, 6.9 for a GRU)."""
    assert cudnn.step_us(LSTM, H100) == pytest.approx(1.96, rel=0.01)
    both = cudnn.step_us(LSTM, H100) + cudnn.step_us(LSTM, H100, backward=True)
    assert both == pytest.approx(5.07, rel=0.01)
    kernelbench = Shape("lstm", "float32", "tf32", 512, 10, 128, 256, 6, 1, training=False)
    assert cudnn.step_us(kernelbench, H100) == 5.2 and cudnn.step_us(replace(kernelbench, cell="gru"), H100) == 6.9
    assert cudnn.call_us(kernelbench, H100) == pytest.approx(cudnn.CALL_US + 512 * 6 * 5.2)
    # 2048 units are 32 MiB of weights, which take longer out of L2 than the launches of a step
    assert cudnn.step_us(replace(LSTM, H=2048), H100) > 5.2


def test_clocks_by_the_drivers_name():
    assert gigahertz("NVIDIA H100 80GB HBM3") == gigahertz("H100") == 1.98
    assert gigahertz("NVIDIA Thor") == 1.41


def test_each_family_predicts_where_it_has_a_plan():
    """And a step of the step kernels takes at least what its launch costs the host."""
    for gpu_limits in GPUS.values():
        for family in OF_TORCH:
            for H, members in itertools.product((8, 64, 768, 5000), (1, 2)):
                sizes = pipeline.Sizes(4, 16, H, 2, "half", True)
                run = pipeline.run(family, sizes, 100, members, 1, False, gpu_limits)
                plan = OF_TORCH[family].plan(*sizes[:6], gpu_limits, False, members)
                assert (run is not None) == isinstance(plan, OF_TORCH[family].kind)
                assert run is None or run.us > 100 * (0 if OF_TORCH[family].many_steps else 4)


def test_a_forecast_adds_up():
    """A stack is one call, forward and backward; what a call costs the host is spread over its steps."""
    families = "step", "persistent"
    found = forecast.forecast(replace(GRU, layers=3, training=True), H100, families)
    runs = [best_run(families, backward, 3, True) for backward in (False, True)]
    assert found.kernels == pytest.approx((sum(run.us for run in runs) + sum(forecast.CALL_US)) / 1024)
    assert found.families == ("persistent", "persistent") and found.algorithm == "standard"
    assert found.kernels < found.torch and "cuDNN's standard algorithm" in str(found)
    assert forecast.forecast(GRU, H100, ()).kernels == float("inf")
    assert forecast.forecast(GRU, H100, ("persistent",)).torch == forecast.forecast(GRU, H100, ()).torch


def best_run(families, backward, members, layers):
    sizes = pipeline.Sizes(3, 16, 768, 2, "half", backward)
    return pipeline.fastest(families, sizes, 1024, members, layers, H100)[1]


def test_a_call_is_predicted_as_it_runs():
    """Two directions as a group a layer, a stack with a projection or with all states layer by layer."""
    families, call = ("step", "persistent"), forecast.CALL_US[0]
    both, alone = best_run(families, False, 2, False), best_run(families, False, 1, False)
    assert both.us < 2 * alone.us
    found = forecast.forecast(replace(GRU, layers=3, directions=2), H100, families)
    assert found.kernels == pytest.approx(3 * (both.us + call) / 1024)
    for options in ({"projected": True}, {"by_layer": True}):
        found = forecast.forecast(replace(GRU, layers=3), H100, families, **options)
        assert found.kernels == pytest.approx(3 * (alone.us + call) / 1024)


# The automatic choice

cpu = torch.device("cpu")


def test_what_runs_where():
    """Nothing measured, every family right: the kernels from 1.4 times cuDNN on. cuDNN keeps what it is at its best at."""
    with gpu.pretend_gpu(H100):
        assert kernel_plan.torch_wins(LSTM, cpu) == "chosen for this call: the kernels are not predicted 1.4 times faster"
        assert kernel_plan.torch_wins(replace(LSTM, T=10), cpu) and kernel_plan.torch_wins(replace(GRU, T=4), cpu)
        for shape in (GRU, replace(LSTM, dtype="bfloat16"), SMALL, replace(SMALL, training=True)):
            assert kernel_plan.torch_wins(shape, cpu) == ""
        assert kernel_plan.pick("gru", 64, 16, 768, torch.float16, "ieee", False, False, cpu).family == "persistent"
        assert kernel_plan.pick("gru", 64, 16, 8000, torch.float16, "ieee", False, False, cpu).family == "step"


def test_a_measured_gpu_needs_no_margin():
    """Where something was measured on this GPU, a prediction that is better at all decides about the rest."""
    with gpu.pretend_gpu(H100), tuned.override_tuning(H100, [Entry(replace(GRU, H=64), "torch")]):
        assert kernel_plan.torch_wins(LSTM, cpu) == ""


def test_a_grid_that_cannot_be_resident_is_not_predicted():
    """Without cooperative launch the persistent kernels are no candidate."""
    with gpu.pretend_gpu(H100, cooperative=False):
        assert kernel_plan.torch_wins(GRU, cpu)
        assert kernel_plan.pick("gru", 64, 16, 768, torch.float16, "ieee", False, False, cpu).family == "step"


def test_the_choice_does_not_depend_on_what_was_asked_before():
    """Sequences of 16 to 31 steps are one case, whichever comes first."""
    with gpu.pretend_gpu(H100):
        call = functools.partial(kernel_plan.torch_wins_call, "gru", B=16, I=768, H=768, layers=1, directions=1)
        x = torch.empty(0, dtype=torch.float16)
        assert call(T=32, tensors=(x,)) == "" != call(T=16, tensors=(x,)) == call(T=31, tensors=(x,))
        gpu.known.clear()
        assert call(T=31, tensors=(x,)) == call(T=16, tensors=(x,)) != ""


@pytest.mark.parametrize("name", ["backend=", "RNNFAST_KERNELS", "RNNFAST_BACKEND"])
def test_what_is_asked_for_is_not_predicted(name, monkeypatch):
    """A backend or a family by name runs, however slow it is predicted."""
    layer = rnnfast.LSTM(8, 8, backend="triton" if name == "backend=" else None)
    if name != "backend=":
        monkeypatch.setenv(name, {"RNNFAST_KERNELS": "step", "RNNFAST_BACKEND": "triton"}[name])
    with gpu.pretend_gpu(H100):
        assert rnnfast.explain(layer, torch.zeros(2, 3, 8)).backend == "triton"


def test_explain_prints_prediction_and_evidence():
    with gpu.pretend_gpu(H100):
        told = rnnfast.explain(rnnfast.GRU(768, 768).half(), torch.zeros(256, 16, 768).half())
        assert told.backend == "triton" and told.predicted.startswith("persistent kernels ")
        assert "cuDNN's standard algorithm" in told.predicted and "RNNFAST_CANARY=trust" in told.predicted
        lengths = rnnfast.explain(rnnfast.GRU(768, 768).half(), torch.zeros(256, 16, 768).half(), lengths=[9] * 16)
        assert lengths.backend == "triton" and not lengths.tuning and "standard" in lengths.predicted
        gates = rnnfast.explain(rnnfast.LSTM(8, 8), torch.zeros(2, 3, 8), return_gates=True)
        assert gates.backend == "triton" and "cuDNN has no such call" in gates.predicted
        few = rnnfast.explain(rnnfast.LSTM(8, 8), torch.zeros(2, 3, 8))
        assert few.backend == "torch" and "not predicted 1.4 times faster" in str(few)


def test_a_cell_runs_on_pytorchs_own():
    """One step costs the host more on the kernels, whatever its size; but for a cell that is asked to take them."""
    x = torch.zeros(4, 64).half()
    with gpu.pretend_gpu(H100):
        assert rnnfast.explain(rnnfast.LSTMCell(64, 64).half(), x).backend == "torch"
        assert rnnfast.explain(rnnfast.GRUCell(64, 64).half(), x[0]).backend == "torch"
        assert rnnfast.explain(rnnfast.LSTMCell(64, 64, backend="triton").half(), x).backend == "triton"
