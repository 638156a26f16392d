"""sigmoid and tanh of the kernels against float64."""

import pytest
import torch
import triton
import triton.language as tl

from rnnfast.kernels.maths import sigmoid, tanh

pytestmark = pytest.mark.numerical


@triton.jit
def _apply(x_ptr, out_ptr, N: tl.constexpr, FUNCTION: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, FUNCTION(tl.load(x_ptr + offs)))


def apply(function, x):
    out = torch.full_like(x, float("nan"))
    _apply[(1,)](x, out, N=x.numel(), FUNCTION=function)
    return out


@pytest.mark.parametrize("function, exact", [(sigmoid, torch.sigmoid), (tanh, torch.tanh)])
def test_accuracy(function, exact, device):
    """At most three float32 roundings of relative error, near zero, around the polynomial's edge and far out."""
    x = torch.cat([torch.logspace(-12, 1.2, 4096), torch.linspace(0.45, 0.55, 4096)]).to(device)
    for signed in (x, -x):
        right = exact(signed.double())
        relative = ((apply(function, signed).double() - right) / right).abs().max().item()
        # exp alone has a relative error of eps |x|: it enters sigmoid(x) in full for negative x
        limit = 3 * 2**-23 + (16 * 2**-23 if function is sigmoid else 0)
        limit += 0 if device == "cpu" else 3 * 2**-23  # a GPU's exp and division are approximate, 2 units each
        assert relative < limit


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("function, low", [(sigmoid, 0.0), (tanh, -1.0)])
def test_far_out(function, low, device):
    """Saturates at +-1e4 and at infinity, keeps NaN."""
    huge = torch.tensor([1e4, float("inf"), -1e4, -float("inf"), 89.0, -89.0, 0.0, float("nan")], device=device)
    out = apply(function, huge).tolist()
    assert out[:6] == pytest.approx([1.0, 1.0, low, low, 1.0, low], abs=1e-30)
    assert out[6] == (0.5 if function is sigmoid else 0.0)
    assert out[7] != out[7]
