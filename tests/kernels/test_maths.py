"""The functions of the kernels against float64."""

import pytest
import torch
import triton
import triton.language as tl

from rnnfast.kernels.maths import exp, expm1, log1p, sigmoid, tanh

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


EPS = 2**-23


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("function, exact", [(exp, torch.exp), (log1p, torch.log1p), (expm1, torch.expm1)])
def test_accuracy_of_exponentials(function, exact, device):
    """The relative error in roundings of float32, by how each is made, near zero and far out.

    exp     3, as numpy states for its own; on a GPU 2 of ex2, and |x| of the product x log2(e)
    log1p   4 of the logarithm, as numpy states, and those of a quotient and a product, which are 2 more on a GPU
    expm1   below 1 the 3 of tanh, which 1 - t makes 6, and those of the quotient; then that of exp, at most 1.6 times
    """
    on_gpu = device != "cpu"
    x = torch.cat([torch.logspace(-12, 1.9, 4096), torch.linspace(0.95, 1.05, 1024), torch.linspace(0.3, 0.99, 1024)])
    x = torch.cat([x, -x]) if function is not log1p else torch.cat([x, -x[x < 1], 10 ** torch.linspace(2, 30, 512)])
    x = torch.cat([x, x.new_zeros(-len(x) % (1 << 14))]).to(device)
    right = exact(x.double())
    relative = (apply(function, x).double() - right).abs() / right.abs().clamp(min=1e-300)
    of_exp = 3 + on_gpu * x.double().abs()
    limit = {exp: of_exp, log1p: torch.full_like(of_exp, 5 + 2 * on_gpu), expm1: (1.6 * of_exp).clamp(min=8 + 6 * on_gpu)}
    assert (relative <= EPS * limit[function]).all(), float((relative / EPS).max())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize(
    "function, values",
    [(exp, [float("inf"), 0.0, 1.0]), (expm1, [float("inf"), -1.0, 0.0]), (log1p, [float("inf"), None, 0.0])],
)
def test_exponentials_far_out(function, values, device):
    """At +-infinity and zero, and NaN of NaN; log1p(-1) is -infinity, and below there is none."""
    inf, nan = float("inf"), float("nan")
    out = apply(function, torch.tensor([inf, -inf, 0.0, nan, -1.0, 1e4, -1e4, 0.5], device=device)).tolist()
    assert out[0] == values[0] and out[2] == values[2] and out[3] != out[3]
    if function is log1p:
        assert out[1] != out[1] and out[4] == -inf and out[5] == pytest.approx(9.21044, abs=1e-5) and out[6] != out[6]
    else:
        assert out[1] == out[6] == values[1] and out[5] == inf


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("function, low", [(sigmoid, 0.0), (tanh, -1.0)])
def test_far_out(function, low, device):
    """Saturates at +-1e4 and at infinity, keeps NaN."""
    huge = torch.tensor([1e4, float("inf"), -1e4, -float("inf"), 89.0, -89.0, 0.0, float("nan")], device=device)
    out = apply(function, huge).tolist()
    assert out[:6] == pytest.approx([1.0, 1.0, low, low, 1.0, low], abs=1e-30)
    assert out[6] == (0.5 if function is sigmoid else 0.0)
    assert out[7] != out[7]
