"""Pointwise functions that the cells share, in float32.

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
    """1 - 2 / (exp(2|x|) + 1) with the sign of x, which survives any x; below 0.5, where that cancels, a polynomial in x^2.

    The polynomial is a least-squares fit of tanh(x)/x at Chebyshev nodes of x^2 in [0, 0.25], with a relative error of
    3.6e-10 before rounding. ``tests/kernels/test_maths.py`` holds the whole function to three float32 roundings.
    """
    square = x * x
    series = -0.00664559835
    series = series * square + 0.0212966764
    series = series * square - 0.0538988644
    series = series * square + 0.133329609
    series = series * square - 0.333333268
    near_zero = x + x * square * series
    size = tl.abs(x)
    beyond = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.5, near_zero, tl.where(x < 0.0, -beyond, beyond))
