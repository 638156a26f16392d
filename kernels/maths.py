"""Functions that the cells and the kernels share, in float32.

They use nothing but ``tl.exp``: inline assembly and libdevice do not run in Triton's interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); for x < -88 exp overflows to inf, which gives the right limit, 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """2 sigmoid(2x) - 1, which survives any x; below |x| = 0.5, where that difference cancels, a polynomial in x^2.

    The polynomial is a least-squares fit of tanh(x)/x at Chebyshev nodes of x^2 in [0, 0.25], with a relative error of
    3.6e-10 before rounding. ``tests/kernels/test_maths.py`` holds the whole function to four float32 roundings.
    """
    square = x * x
    series = -0.00664559835
    series = series * square + 0.0212966764
    series = series * square - 0.0538988644
    series = series * square + 0.133329609
    series = series * square - 0.333333268
    near_zero = x + x * square * series
    return tl.where(tl.abs(x) < 0.5, near_zero, 2.0 * sigmoid(2.0 * x) - 1.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a b + acc in float32. UPCAST is for Triton's interpreter, which multiplies bfloat16 operands as raw integers."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
