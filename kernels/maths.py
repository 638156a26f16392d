"""Functions that the cells and the kernels share.

The pointwise ones are in float32 and use nothing but `_exp` and `_reciprocal`. On an NVIDIA GPU each is one instruction of the
special function unit (and a product), which PTX bounds: ex2.approx.ftz by 2 units in the last place, rcp.approx.ftz by 1. What
Triton makes of ``tl.exp`` and of a division takes three and four instructions more, to keep denormal results that nothing here
needs. Triton's interpreter, which runs no inline assembly, and AMD GPUs take this plain form.

EMULATE_BF16 is for that interpreter too, which gets bfloat16 wrong; it is never set on a GPU.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

INTERPRETED = tl.constexpr(not isinstance(tl.zeros, triton.JITFunction))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def has_ptx():
    """Whether kernels are compiled for an NVIDIA GPU, whose assembly PTX is."""
    return not INTERPRETED and is_cuda()


@triton.jit
def _exp(x):
    if has_ptx():
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp(x)


@triton.jit
def _reciprocal(x):
    if has_ptx():
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); for x < -88 exp overflows to inf, which gives the right limit, 0."""
    return _reciprocal(1.0 + _exp(-x))


@triton.jit
def tanh(x):
    """1 - 2 / (exp(2|x|) + 1) with the sign of x, which survives any x; below 0.5, where that cancels, a polynomial in x^2.

    The polynomial is a least-squares fit of tanh(x)/x at Chebyshev nodes of x^2 in [0, 0.25], with a relative error of
    3.6e-10 before rounding. ``tests/kernels/test_maths.py`` holds the whole function to three float32 roundings,
    plus those of a GPU's approximate exp and division.
    """
    square = x * x
    series = -0.00664559835
    series = series * square + 0.0212966764
    series = series * square - 0.0538988644
    series = series * square + 0.133329609
    series = series * square - 0.333333268
    near_zero = x + x * square * series
    size = tl.abs(x)
    beyond = 1.0 - 2.0 * _reciprocal(_exp(2.0 * size) + 1.0)
    return tl.where(size < 0.5, near_zero, tl.where(x < 0.0, -beyond, beyond))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """a b + acc in float32. Triton's interpreter multiplies bfloat16 operands as raw integers, so there they are widened."""
    if EMULATE_BF16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to(x, TYPE: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """float32 to TYPE, to nearest even. Triton's interpreter truncates to bfloat16, so there the bits are rounded first."""
    if EMULATE_BF16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(TYPE)


@triton.jit
def exp(x):
    """exp(x), to the approximation that `_exp` is."""
    return _exp(x)


@triton.jit
def log1p(x):
    """log(1 + x), to a few roundings near 0 too."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.where(u > 1e7, tl.log(u), tl.log(u) * (x / (u - 1.0))))


@triton.jit
def expm1(x):
    """exp(x) - 1; where that cancels by 2 t / (1 - t) with t = tanh(x / 2)."""
    t = tanh(0.5 * x)
    return tl.where(tl.abs(x) < 1.0, 2.0 * t / (1.0 - t), _exp(x) - 1.0)
