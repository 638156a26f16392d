"""What PyTorch's operators are as expressions, and which have no place in a cell, in words for its author."""

from __future__ import annotations

import math
from typing import Any

import torch

from rnnfast.derive.expressions import COMPARE, Expr, Pool

__all__ = ["BRANCH", "CAPTURED", "IN_PLACE", "TRANSLATED", "Refused", "from_operator", "refusal"]


class Refused(Exception):
    """Why an operator cannot be part of a kernel. `recording` adds the file and the line."""


SAME = {
    "clone", "detach", "alias", "view", "_unsafe_view", "expand", "lift_fresh_copy", "lift_fresh", "contiguous", "reshape",
    "_reshape_alias", "unsqueeze", "squeeze", "slice", "view_as", "expand_as",
}  # fmt: skip
UNARY = {
    "neg": "neg", "exp": "exp", "log": "log", "log1p": "log1p", "expm1": "expm1", "sigmoid": "sigmoid", "tanh": "tanh",
    "abs": "abs", "sqrt": "sqrt", "rsqrt": "rsqrt", "sin": "sin", "cos": "cos", "erf": "erf", "floor": "floor",
    "logical_not": "not", "bitwise_not": "not",
}  # fmt: skip
BINARY = {
    "maximum": "maximum", "minimum": "minimum", "logical_and": "and", "bitwise_and": "and", "logical_or": "or",
    "bitwise_or": "or", "mul": "mul", **{name: name for name in COMPARE},
}  # fmt: skip
EMPTY = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
OTHERS = {
    "copy", "_to_copy", "add", "sub", "rsub", "div", "reciprocal", "relu", "sign", "sgn", "where", "clamp", "clamp_min",
    "clamp_max", "pow", "hardsigmoid", "hardsigmoid_backward",
}  # fmt: skip
ZEROS, ONES = {"zeros_like", "zeros", "new_zeros"}, {"ones_like", "ones", "new_ones"}
FULL = {"full", "full_like", "new_full", "scalar_tensor"}
TRANSLATED = {*SAME, *UNARY, *BINARY, *OTHERS, *EMPTY, *ZEROS, *ONES, *FULL}  # all others by PyTorch's rules first

PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv", "dot", "vdot", "matmul", "einsum", "convolution", "t",
    "transpose", "permute", "numpy_T", "outer", "ger", "addr",
}  # fmt: skip
OVER_UNITS = {
    "sum", "mean", "var", "var_mean", "std", "std_mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "cumsum",
    "cumprod", "logcumsumexp", "logsumexp", "all", "any", "layer_norm", "native_layer_norm", "native_group_norm",
    "native_batch_norm", "_fused_rms_norm", "_softmax", "_log_softmax", "linalg_vector_norm", "norm", "sort", "topk", "median",
    "nansum", "aminmax", "cummax", "cummin", "count_nonzero",
}  # fmt: skip
MOVES = {
    "roll", "cat", "stack", "split", "chunk", "select", "index", "index_select", "gather", "scatter", "flip", "unfold", "pad",
    "constant_pad_nd", "repeat", "diagonal", "tril", "triu", "unbind", "narrow", "take", "slice", "as_strided",
}  # fmt: skip
DECIDES = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "allclose"}
RANDOM = {
    "rand_like", "randn_like", "rand", "randn", "bernoulli", "native_dropout", "uniform", "normal", "randint", "randperm",
    "randint_like", "exponential", "dropout", "rrelu_with_noise", "multinomial", "cauchy", "geometric", "log_normal", "random",
}  # fmt: skip

BRANCH = (
    "a decision by the value of a tensor, which would be taken once, for all units. Write torch.where(condition, a, b), which "
    "decides for each unit; a number of the cell may decide in Python"
)
IN_PLACE = "changes {} in place, which the kernels still need. Write a new value instead, as in c = s.c + 1"
CAPTURED = (
    "uses a tensor {} that is not among its arguments. It would be a constant of the kernel, and a parameter would get no "
    "gradient. Make it an argument after the *: without annotation a vector that the layer learns, `Row` for a tensor given at "
    "the call, or a number with a default"
)


def refusal(name: str, text: str) -> str | None:
    """Why an operator that the author wrote has no place in a cell, and what to write instead; None if it has one.

    Args:
        name: the operator's, without overload.
        text: the author's line.
    """
    decides = text.startswith(("if ", "elif ", "while ", "assert ")) or " if " in text
    if name in DECIDES or (decides and (name in MOVES or name in OVER_UNITS)):
        return BRANCH
    if name in PRODUCTS:
        return (
            "a matrix product. The kernels compute W_hh h before the cell runs; another product needs all units of a row in "
            "the middle of a step, where each program has a part of them. Take it from the hidden side of a gate: a GRU with "
            "the reset before the product, W (r h), is written with the reset after it, as torch.nn.GRU's: "
            "n = tanh(x.n + r * h.n). A product with a diagonal matrix is one with a learned vector"
        )
    if name in OVER_UNITS:
        return (
            f"`{name}` needs all units of a row, where each program has a part of them. rnnfast.row_mean(v) is the mean over "
            "all units, and rnnfast.row_norm(v) layer normalisation without gain and offset; a sum is row_mean times the size"
        )
    if name in MOVES or name.startswith(("split", "unsafe_split", "unsafe_chunk")):
        return (
            f"`{name}` moves or picks units, where each program has a part of them. Make the part a gate or a state of its "
            "own: each has all H units"
        )
    if name in RANDOM:
        return (
            f"random numbers of its own (`{name}`), which backward could not make again. Take them as an argument annotated "
            "Noise, uniform in [0, 1): torch.where(u < p, 0, v / (1 - p)) is dropout"
        )
    return None


def from_operator(pool: Pool, name: str, args: list, kwargs: dict, value: torch.Tensor, shape: tuple[int, int]) -> Any:
    """The expression of an operator's result `value`; the arguments are expressions and numbers.

    Raises:
        Refused: there is none.
    """
    if tuple(value.shape) not in (shape, (), (1,), (1, 1)):
        raise Refused(
            f"`{name}` gives {tuple(value.shape)} where all tiles are {shape}: a cell computes with tiles (B, H) and numbers"
        )
    exact = name in ("where", *FULL)  # whole numbers that PyTorch's own rules select
    if not exact and value.dim() and value.dtype not in (torch.float32, torch.bool, torch.get_default_dtype()):
        raise Refused(f"`{name}` in {value.dtype}: the tiles of a kernel are float32. Leave the conversion out")
    try:
        found = _translated(pool, name, args, kwargs, value)
    except (ArithmeticError, ValueError) as error:
        raise Refused(f"`{name}` of the numbers {args}: {error}") from error
    if found is None:
        raise Refused(
            f"`{name}`, which has no translation to Triton. Write it by operators that have one, such as + - * /, exp, log, "
            "sigmoid, tanh, sqrt, sin, cos, erf, floor, clamp and torch.where"
        )
    return found


def _translated(pool: Pool, name: str, args: list, kwargs: dict, value: torch.Tensor) -> Any:
    a, b, c = (*args, None, None, None)[:3]
    if name in SAME:
        return a
    if name == "copy":
        return b
    if name == "_to_copy":
        if kwargs.get("dtype") not in (None, torch.float32, torch.bool):
            raise Refused(f"a conversion to {kwargs['dtype']}: the tiles of a kernel are float32. Leave the conversion out")
        return pool("where", a, 1.0, 0.0) if isinstance(a, Expr) and a.is_bool and value.dtype != torch.bool else a
    if name in ("add", "sub", "rsub"):
        alpha = kwargs.get("alpha", 1)
        a, b = (b, a) if name == "rsub" else (a, b)
        a, b = (pool("mul", a, alpha), b) if name == "rsub" else (a, pool("mul", b, alpha))
        return pool("add" if name == "add" else "sub", a, b)
    if name == "div" and kwargs.get("rounding_mode") is None:
        return pool("div", a, b)
    if name == "reciprocal":
        return pool("div", 1.0, a)
    if name in UNARY:
        return pool(UNARY[name], a)
    if name in BINARY:
        return pool(BINARY[name], a, b)
    if name == "relu":
        return pool("where", pool("lt", a, 0.0), 0.0, a)  # a NaN stays a NaN
    if name in ("sign", "sgn"):
        return pool("where", pool("gt", a, 0.0), 1.0, pool("where", pool("lt", a, 0.0), -1.0, 0.0))
    if name == "where":
        return pool("where", a, b, c)
    if name in ("clamp", "clamp_min", "clamp_max"):
        least, most = (b, c) if name == "clamp" else (b, None) if name == "clamp_min" else (None, b)
        return _clamped(pool, a, kwargs.get("min", least), kwargs.get("max", most))
    if name == "hardsigmoid":
        return pool("div", _clamped(pool, pool("add", a, 3.0), 0.0, 6.0), 6.0)
    if name == "hardsigmoid_backward":
        return pool("where", pool("and", pool("gt", b, -3.0), pool("lt", b, 3.0)), pool("div", a, 6.0), 0.0)
    if name == "pow" and not isinstance(b, Expr):
        return _power(pool, a, b)
    if name in EMPTY:
        return math.nan  # to be written over; if it is not, it will show
    if name in ZEROS or name in ONES:
        return float(name in ONES)
    if name in FULL:
        return next(arg for arg in reversed(args) if isinstance(arg, (int, float)))
    return None


def _clamped(pool: Pool, a: Any, least: Any, most: Any) -> Any:
    clamped = a if least is None else pool("where", pool("lt", a, least), least, a)
    clamped = clamped if most is None else pool("where", pool("gt", clamped, most), most, clamped)
    if isinstance(a, Expr):
        bounds = {(a, "ge", least): ("gt", clamped), (a, "le", most): ("lt", clamped)}
        pool.clamped.update({key: value for key, value in bounds.items() if not isinstance(key[2], Expr)})
    return clamped


def _power(pool: Pool, a: Any, exponent: Any) -> Any:
    if exponent == 0.5:
        return pool("sqrt", a)
    if exponent < 0:
        return pool("div", 1.0, _power(pool, a, -exponent))
    if exponent != int(exponent) or exponent > 8:
        return pool("exp", pool("mul", exponent, pool("log", a)))
    result: Any = 1.0
    for _ in range(int(exponent)):
        result = pool("mul", result, a)
    return result
