"""Layers on the one-program kernels, as a user asks for them: RNNFAST_KERNELS=one_program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnnfast
from rnnfast.choice import kernel_plan
from rnnfast.kernels import one_program, step
from rnnfast.kernels.persistent.plan import GPUS
from rnnfast.numerics import Contract, words, worst
from tests.support import loops

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(torch.cuda.is_available(), reason="takes CPU tensors, in the interpreter"),
]


def watched(inner, family, calls):
    def run(*args, **options):
        calls.append(family.__name__.rpartition(".")[2])
        return inner(*args, **options)

    return run


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Asked for, and the calls of either family."""
    calls = []
    for family in (one_program, step):
        for direction in ("forward", "backward"):
            monkeypatch.setattr(family, direction, watched(getattr(family, direction), family, calls))
    monkeypatch.setenv("RNNFAST_KERNELS", "one_program")
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    return calls


SOME = [("LSTM", torch.float32), ("GRU", torch.float16), ("RNN", torch.bfloat16)]
REST = [(name, dtype) for name in ("LSTM", "GRU", "RNN") for dtype in (torch.float32, torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(
    ("name", "dtype"), [*SOME, *(pytest.param(*each, marks=pytest.mark.sweep) for each in REST if each not in SOME)]
)
def test_a_layer(name, dtype, counted):
    """Two layers, two directions, lengths, resets, every state returned: all outputs and gradients by the contract."""
    T, B, H = 4, 3, 20
    layer = getattr(rnnfast, name)(5, H, 2, bidirectional=True, backend="triton", dtype=dtype)
    options = {"lengths": [4, 2, 3], "resets": torch.rand(T, B) < 0.3, "return_all_states": True}
    tensors = loops.arguments(layer, T, B, reset_to=True)
    found = loops.everything(loops.by_module(layer, options), tensors, dtype)
    by_loop = loops.by_loop(layer, options)
    contract = Contract(
        lambda: loops.everything(by_loop, tensors, torch.float64), loops.everything(by_loop, tensors, dtype), dtype, False
    )
    assert not words(worst(contract.judge(found)))
    assert set(counted) == {"one_program"}


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_second_derivatives(name, counted):
    layer = getattr(rnnfast, name)(3, 18, backend="triton")
    tensors = loops.arguments(layer, 3, 2)
    ours = loops.second(loops.by_module(layer, {}), tensors, torch.float32)
    theirs = loops.second(loops.by_loop(layer, {}), tensors, torch.float64)
    for key, grad in ours.items():
        torch.testing.assert_close(grad.double(), theirs[key], rtol=1e-3, atol=1e-4)
    assert set(counted) == {"one_program"}


def test_vmap_and_recompute(counted):
    """torch.func over the batch, and gates computed again in backward: what the step kernels give."""
    layer = rnnfast.LSTM(3, 16, backend="triton", recompute=True)
    x = torch.randn(2, 4, 3, 3)
    found = []
    for family in ("one_program", "step"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RNNFAST_KERNELS", family)
            grads = torch.func.vmap(torch.func.grad(lambda one: layer(one)[0].square().sum()))(x)
            given = x[0].clone().requires_grad_()
            layer(given)[0].square().sum().backward()
            found.append((grads, given.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert set(counted) == {"one_program", "step"}


def test_explain_and_where_there_is_no_plan(counted):
    layer = rnnfast.LSTM(3, 64, dtype=torch.float16, backend="triton")
    x = torch.zeros(7, 5, 3, dtype=torch.float16)
    text = str(rnnfast.explain(layer, x))
    assert "one_program kernels, interpreted, one launch for 7 time steps" in text
    assert "3 programs of up to 64 units and 2 rows, 4 warps" in text
    large = rnnfast.LSTM(3, 300, dtype=torch.float16, backend="triton")
    assert "step kernels" in str(rnnfast.explain(large, x))
    assert "not one_program: a program has at most 256 units, and there are 300" in str(rnnfast.explain(large, x))
    large(x[:1, :1])
    assert counted == ["step"]


def test_chosen_by_itself(monkeypatch, counted):
    """Where it is predicted the fastest of the families that are trusted: here, of all."""
    monkeypatch.delenv("RNNFAST_KERNELS")
    with kernel_plan.pretend_gpu(GPUS["H100"]):
        assert (
            kernel_plan.pick("lstm", 9, 2, 64, torch.float16, "half", False, True, torch.device("cpu")).family == "one_program"
        )


PROGRAM = """
import json, torch
from benchmarks.static.offline import pretend_gpu, settings
from rnnfast import ops
from rnnfast.kernels.one_program import plan

plan.ROWS = 8 * 3
x, w_ih, w_hh = (torch.zeros(*shape, dtype=torch.float16) for shape in ((20, 3, 4), (64, 4), (64, 16)))
with settings("one_program", False), pretend_gpu(90) as driver:
    y, _ = ops.layer("lstm", x.requires_grad_(), None, w_ih, w_hh)
    y.sum().backward()
print(json.dumps([(launch.kernel, launch.grid) for launch in driver.launches]))
"""


def test_one_launch_a_chunk():
    """20 steps in chunks of 8: three launches forward, one backward, nothing beside them."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    forward, backward = (["one_program_" + name, [2, 1, 1]] for name in ("forward_kernel", "backward_kernel"))
    assert json.loads(done.stdout) == [forward] * 3 + [backward]
