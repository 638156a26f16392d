"""Several programs that share the sums of their units, weights in registers, and chunks joined: against the step kernels."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl  # noqa: F401 - the interpreter wants it in sight of every jit function
from support.recurrence import TOLERANCE, Layer, assert_close, steps_of
from support.side_by_side import Fault, together

from rnnfast.kernels import persistent, runtime, step
from rnnfast.kernels.persistent.plan import PersistentPlan

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1"),
]


def parts(H: int, count: int, *, steps: int = 64, **options):
    """Programs of 8 units and 8 rows; K is cut into chunks of 16, the least that a product takes."""
    whole = max(64, 8 * count)
    return PersistentPlan(8, 8, 16, 1, -(-H // whole) * whole, 4, steps, 1 << 20, PARTS=count, **options)


CASES = [
    # cell, dtype, H, parts, and whether the last row tile is masked, as B says
    ("lstm", torch.float16, 64, 4, 3),
    ("gru", torch.float32, 29, 4, 11),
    ("rnn_tanh", torch.bfloat16, 29, 2, 11),
    *(
        pytest.param(cell, dtype, H, count, 11, marks=pytest.mark.sweep)
        for cell in ("lstm", "gru", "rnn_relu")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for H in (29, 64)
        for count in (2, 4)
    ),
]


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.sweep)])
@pytest.mark.parametrize(("cell", "dtype", "H", "count", "B"), CASES)
def test_parts(cell, dtype, H, count, B, reverse):
    """Launches of two steps of three; weights of one operand in registers and of none: the same bits in any order."""
    layer = Layer(cell, dtype, 3, B, H, reverse=reverse)
    forward = layer.forward(step, steps_of(H, dtype))
    theirs = [tensor for tensor in layer.backward(step, steps_of(H, dtype), *forward) if tensor is not None]
    found = []
    for seed, in_registers in enumerate((0, 1)):
        with together(seed):
            gradients = layer.backward(persistent, parts(H, count, IN_REGISTERS=in_registers), *forward, chunk=2)
        found.append([tensor for tensor in gradients if tensor is not None])
        assert_close(found[-1], theirs, dtype)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("cell", "dtype", "H"),
    [("lstm", torch.float16, 96), pytest.param("gru", torch.float32, 90, marks=pytest.mark.sweep)],
)
@pytest.mark.parametrize("in_registers", [0, 1])
def test_joined_chunks(cell, dtype, H, in_registers):
    """Chunks joined 2 and 1 forward, 4 and 4 and 1 or so backward, the summed axis split: forward and backward."""
    layer = Layer(cell, dtype, 3, 3, H)
    plan = PersistentPlan(8, 16, 16, 2, 96, 4, 64, 1 << 20, JOIN=4, IN_REGISTERS=in_registers)
    with together(1):
        ours = layer.both(persistent, plan)
    assert_close(ours, layer.both(step, steps_of(H, dtype)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.sweep)], ids=str)
def test_bad_numbers_do_not_hang(dtype):
    """NaN, also of the pattern that means empty, and infinities, in the partial sums too: what the step kernels give."""
    layer = Layer("lstm", dtype, 3, 3, 64)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    layer.dy.view(bits)[2, 0, 5] = -1
    layer.dy[1, 1, :40] = float("inf")
    layer.w.view(bits)[3, 7] = -1
    forward = layer.forward(step, steps_of(64, dtype))
    with together(2):
        ours = layer.backward(persistent, parts(64, 2, IN_REGISTERS=2), *forward)
    for a, b in zip(ours, layer.backward(step, steps_of(64, dtype), *forward), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


def test_lost_sum_is_caught():
    """A program that publishes nothing in a step, gate gradients or sums, holds its partners up at that step."""
    layer = Layer("lstm", torch.float16, 3, 2, 64)
    forward = layer.forward(step, steps_of(64, torch.float16))
    with together(3, Fault("skipped store", (1, 0, 0), step=1)) as happened:
        layer.backward(persistent, parts(64, 2), *forward)
    assert "at step 1" in happened.stuck and happened.gave_up
