"""The kernels of dropout and of recomputing, for several members at once: the bits of each alone, and no row beyond."""

import pytest
import torch

from rnnfast.kernels import dropout, recompute
from rnnfast.kernels.cells import CELLS
from rnnfast.kernels.given import Given

pytestmark = pytest.mark.numerical

UNTOUCHED = 77.0


def dropped(x, seeds, total, begin=0, lag=0, p=0.4):
    out = torch.full_like(x, UNTOUCHED)
    dropout.apply(x, out, seeds, p, total, begin, lag)
    return out


@pytest.mark.parametrize("dtype, W", [(torch.float32, 1030), (torch.float16, 7), (torch.bfloat16, 7)])
def test_dropout_of_a_pipeline(dtype, W, device):
    """Chunks of several layers give the masks of each whole layer. Rows before its first and after its last are neither read
    nor written."""
    members, rows, n = 3, 10, 4
    seeds = torch.tensor([3, -5, 1 << 40], device=device)
    x = torch.randn(members, rows, W, device=device).to(dtype)
    whole = torch.cat([dropped(x[k : k + 1], seeds[k : k + 1], rows) for k in range(members)])
    assert 0 < int((whole == 0).sum()) < whole.numel()
    for lag in (n, -n):
        for begin in range(-n * members, rows + n * members, n):
            firsts = [begin + k * lag for k in range(members)]
            chunk = torch.full((members, n, W), float("nan"), dtype=dtype, device=device)
            right = torch.full_like(chunk, UNTOUCHED)
            for k, first in enumerate(firsts):
                low, high = max(0, first), max(0, min(rows, first + n))
                if low < high:
                    chunk[k, low - first : high - first] = x[k, low:high]
                    right[k, low - first : high - first] = whole[k, low:high]
            assert torch.equal(dropped(chunk, seeds, rows, begin, lag), right)


def test_dropout_in_place_and_strided(device):
    """`out` may be `x`, and both may be parts of larger tensors."""
    x = torch.randn(3, 8, 5, device=device)
    seeds = torch.tensor([1, 2, 3], device=device)
    right = dropped(x, seeds, 100, 20, 8)
    larger = torch.full((3, 12, 5), UNTOUCHED, device=device)
    part = larger[:, 2:10]
    dropout.apply(x, part, seeds, 0.4, 100, 20, 8)
    assert torch.equal(part, right)
    assert (larger[:, :2] == UNTOUCHED).all() and (larger[:, 10:] == UNTOUCHED).all()
    part.copy_(x)
    dropout.apply(part, part, seeds, 0.4, 100, 20, 8)
    assert torch.equal(part, right)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.saved])
def test_recompute_of_members(cell, dtype, bias, device):
    """Each member has the biases of its own."""
    spec, members, n, B, H = CELLS[cell], 3, 2, 3, 300
    x, h = (torch.randn(members, n, B, spec.gates * H, device=device) for _ in range(2))
    states = x[..., :H].to(dtype).contiguous()  # the built-in cells save nothing that follows from them
    biases = [torch.randn(members, spec.gates * H, device=device).to(dtype) if bias else None for _ in range(2)]

    def saved(part: slice):
        out = torch.full((members, n, B, spec.saved * H), UNTOUCHED, device=device).to(dtype)[part]
        own = [None if each is None else each[part] for each in biases]
        recompute.compute(spec, x[part], h[part], *own, out, states[part], None, Given(), [0] * len(out))
        return out

    together = saved(slice(None))
    assert not (together == UNTOUCHED).any()
    assert torch.equal(together, torch.cat([saved(slice(m, m + 1)) for m in range(members)]))
