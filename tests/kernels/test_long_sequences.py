"""The last steps of a sequence whose buffers have more than 2**32 elements: every address needs 64 bits."""

import math
import sys

import pytest
import torch
from support.diagonal import CELLS
from support.recurrence import Layer, steps_of

from rnnfast.kernels import one_program, runtime, scan, step
from rnnfast.kernels.groups import Group
from rnnfast.kernels.one_program.plan import OneProgramPlan
from rnnfast.kernels.scan.plan import ScanPlan

pytestmark = [
    pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes files with holes, which take no room"),
]
T, B, H, LAST = 1_000_000, 130, 17, 3


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("family", "plan", "cell"),
    [
        (step, steps_of(H, torch.float16), "lstm"),
        (one_program, OneProgramPlan(8, 32, 2, 100), "lstm"),
        (scan, ScanPlan(64, 32, 2, 4, 100), CELLS["quasi"]),
    ],
)
def test_last_steps(family, plan, cell, layers, tmp_path):
    """A million steps: forward in training and backward on the last three give the bits of a short sequence. As the second of
    two layers in a pipeline too, whose first one has no step then."""
    short = Layer(cell, torch.float16, LAST + 1, B, H)
    right_h, right_c, right_saved = short.forward(family, plan)
    cell = short.cell
    lag = LAST if layers > 1 else 0
    options = {"group": Group(layers, lag=lag), "precision": "ieee", "plan": plan}

    def sparse(width: int, dtype: torch.dtype, end: torch.Tensor | None) -> torch.Tensor:
        """(layers, T, B, width * H) whose last steps are `end` in the last layer. The rest is a hole in a file."""
        shape = layers, T, B, width * H
        name = str(tmp_path / f"{width}-{dtype}-{len(list(tmp_path.iterdir()))}")
        tensor = torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        if end is not None:
            tensor[-1, T - len(end) :] = end
        return tensor

    def members(tensor):
        """For the last layer, and NaN for those before it; None of None."""
        if tensor is None:
            return None
        return torch.stack([torch.full_like(tensor, float("nan"))] * (layers - 1) + [tensor])

    h = sparse(1, torch.float16, right_h[:1].expand(LAST + 1, B, H))
    c = sparse(1, torch.float32, right_c[:1].expand(LAST + 1, B, H))
    saved = sparse(cell.saved, torch.float16, None)
    assert saved[0].numel() > 1 << 32
    given = [members(each) for each in (short.w, short.bias_x, short.bias_h)]
    rounds = [(T - LAST + lag, LAST, members(short.x[1:]).roll(-1, 0).flatten(0, 1), 0)]  # the first layer's rows come last
    whole_h = h if layers > 1 else h[0]
    family.forward(cell, lambda: rounds, *given, None, None, whole_h, c, saved, **options)
    for found, right in ((h, right_h), (c, right_c), (saved, right_saved)):
        assert torch.equal(found[-1, T - LAST :], right[1:])

    dy = members(short.dy[1:]) if layers > 1 else sparse(1, torch.float16, short.dy)[0]
    d_gates = sparse(cell.grads, torch.float16, None)
    d_h, d_c = members(short.d_h), members(short.d_c)
    rounds = [(-lag, LAST, dy, members(right_saved[1:]))]
    family.backward(cell, lambda: rounds, whole_h, None, c, None, given[0], d_gates, d_h, d_c, **options)

    right_d_gates = torch.empty(1, LAST + 1, B, cell.grads * H, dtype=torch.float16)
    right_d_h, right_d_c = short.d_h[None].clone(), short.d_c[None].clone()
    rounds = [(0, LAST, short.dy, right_saved[None, 1:])]
    family.backward(
        cell, lambda: rounds, right_h, None, right_c[None], None, short.w[None], right_d_gates, right_d_h, right_d_c,
        **options | {"group": Group()},
    )  # fmt: skip
    assert torch.equal(d_gates[-1, T - LAST :], right_d_gates[0, 1:]) and torch.equal(d_c[-1], right_d_c[0])
