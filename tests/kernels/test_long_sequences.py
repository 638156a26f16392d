"""The last steps of a sequence whose buffers have more than 2**32 elements: every address needs 64 bits."""

import math
import sys

import pytest
import torch
from support.recurrence import Layer, steps_of

from rnnfast.kernels import one_program, runtime, step
from rnnfast.kernels.one_program.plan import OneProgramPlan

pytestmark = [
    pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes files with holes, which take no room"),
]
T, B, H, LAST = 1_000_000, 130, 17, 3


@pytest.mark.parametrize(("family", "plan"), [(step, steps_of(H, torch.float16)), (one_program, OneProgramPlan(8, 32, 2, 100))])
def test_last_steps(family, plan, tmp_path):
    """A million steps: forward in training and backward on the last three give the bits of a short sequence."""
    short = Layer("lstm", torch.float16, LAST + 1, B, H)
    right_h, right_c, right_saved = short.forward(family, plan)
    cell = short.cell

    def sparse(width: int, dtype: torch.dtype, end: torch.Tensor | None) -> torch.Tensor:
        """(T, B, width * H) whose last steps are `end`. The rest is a hole in a file."""
        shape = T, B, width * H
        name = str(tmp_path / f"{width}-{dtype}-{len(list(tmp_path.iterdir()))}")
        tensor = torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        if end is not None:
            tensor[T - len(end) :] = end
        return tensor

    h = sparse(1, torch.float16, right_h[:1].expand(LAST + 1, B, H))
    c = sparse(1, torch.float32, right_c[:1].expand(LAST + 1, B, H))
    saved = sparse(cell.saved, torch.float16, None)
    assert saved.numel() > 1 << 32
    chunks = [(T - LAST, short.x[1:])]
    family.forward(
        cell, lambda: chunks, short.w, short.bias_x, short.bias_h, None, None, h, c, saved,
        reverse=False, precision="ieee", plan=plan,
    )  # fmt: skip
    for found, right in ((h, right_h), (c, right_c), (saved, right_saved)):
        assert torch.equal(found[T - LAST :], right[1:])

    dy = sparse(1, torch.float16, short.dy)
    results = []
    for steps, begin, all_steps in ((T, T - LAST, (h, c, dy)), (LAST + 1, 1, (right_h, right_c, short.dy))):
        d_gates = sparse(cell.grads, torch.float16, None) if steps == T else torch.empty(steps, B, cell.grads * H).half()
        d_h, d_c = short.d_h.clone(), short.d_c.clone()
        family.backward(
            cell, all_steps[2], right_saved[1:], all_steps[0], None, all_steps[1], None, short.w, d_gates, d_h, d_c,
            reverse=False, precision="ieee", plan=plan, begin=begin, steps=LAST,
        )  # fmt: skip
        results.append((d_gates[-LAST:].clone(), d_c))
    for found, right in zip(*results, strict=True):
        assert torch.equal(found, right)
