"""What each arithmetic instruction does to the 32 lanes of a warp: opcode -> function, types of operands, type of result.

Registers hold unsigned integers of their width; the types say how an instruction looks at them. Sums of products and the
special functions are rounded once from the exact result, where a GPU may be off by two units in the last place; PTX leaves
that open. Opcodes that the kernels do not use are not here: they raise, and can then be added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TYPES = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
BITS = {name: 1 if name == "pred" else np.dtype(dtype).itemsize * 8 for name, dtype in TYPES.items()}
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


class Operation(NamedTuple):
    function: Callable[..., np.ndarray]
    operands: tuple[str, ...]
    result: str


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even; a NaN to the canonical one."""
    bits = x.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), nearest).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def flushed(x: np.ndarray) -> np.ndarray:
    """Denormal numbers as zeros."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) * y + z).astype(np.float32)


def _shift(function: Callable, bits: int) -> Callable:
    """A shift by more than all bits is by all of them."""

    def shift(x: np.ndarray, by: np.ndarray) -> np.ndarray:
        first = by >= bits
        if not first.any():
            return function(x, by.astype(x.dtype))
        most = function(function(x, x.dtype.type(bits - 1)), x.dtype.type(1))
        return np.where(first, most, function(x, np.where(first, 0, by).astype(x.dtype)))

    return shift


def _bit_field(kind: str) -> Callable:
    def extract(x: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
        up = (32 - first - length).astype(x.dtype)  # the kernels take fields of 1 to 32 bits that end inside the word
        return (x.view(np.uint32) << up.view(np.uint32)).view(TYPES[kind]) >> (32 - length).astype(x.dtype)

    return extract


def _permute(x: np.ndarray, y: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each byte of the result is one of the eight, or eight times its sign."""
    pool = np.concatenate([part.view(np.uint8).reshape(-1, 4) for part in (x, y)], 1)
    out = np.empty((len(x), 4), np.uint8)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(0xF)
        byte = pool[np.arange(len(x)), nibble & 7]
        out[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    return out.view(np.uint32)[:, 0]


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _not_equal(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x < y) | (x > y)  # false of a NaN


def _build() -> dict[str, Operation]:
    table: dict[str, Operation] = {}

    def add(name: str, function: Callable, operands: tuple[str, ...], result: str) -> None:
        table[name] = Operation(function, operands, result)

    for t in INTEGERS:
        add(f"add.{t}", np.add, (t, t), t)
        add(f"sub.{t}", np.subtract, (t, t), t)
        add(f"mul.lo.{t}", np.multiply, (t, t), t)
        add(f"mad.lo.{t}", lambda x, y, z: x * y + z, (t, t, t), t)
        add(f"min.{t}", np.minimum, (t, t), t)
        add(f"max.{t}", np.maximum, (t, t), t)
        add(f"shr.{t}", _shift(np.right_shift, BITS[t]), (t, "u32"), t)
        if t.startswith("s"):
            add(f"neg.{t}", np.negative, (t,), t)
        for name, compare in COMPARISONS.items():
            add(f"setp.{name}.{t}", compare, (t, t), "pred")
    for t, wide in WIDE.items():
        dtype = TYPES[wide]
        add(f"mul.wide.{t}", lambda x, y, d=dtype: x.astype(d) * y.astype(d), (t, t), wide)
        add(f"mad.wide.{t}", lambda x, y, z, d=dtype: x.astype(d) * y.astype(d) + z, (t, t, wide), wide)
    for t in ("pred", "b16", "b32", "b64"):
        add(f"and.{t}", np.bitwise_and, (t, t), t)
        add(f"or.{t}", np.bitwise_or, (t, t), t)
        add(f"xor.{t}", np.bitwise_xor, (t, t), t)
        add(f"not.{t}", np.invert, (t,), t)
        if t != "pred":
            add(f"shl.{t}", _shift(np.left_shift, BITS[t]), (t, "u32"), t)
            add(f"setp.eq.{t}", np.equal, (t, t), "pred")
            add(f"setp.ne.{t}", np.not_equal, (t, t), "pred")
    for t in ("b16", "b32", "b64", "f32"):
        add(f"selp.{t}", lambda x, y, choice: np.where(choice, x, y), (t, t, "pred"), t)
    for source in TYPES:
        for to in TYPES:
            if source[0] in "us" and to[0] in "us":
                convert = lambda x, a=TYPES[source], b=TYPES[to]: x.astype(a).astype(b)  # noqa: E731
                add(f"cvt.{to}.{source}", convert, ("any",), to)
    for name, compare in COMPARISONS.items():
        add(f"setp.{name}.f32", _not_equal if name == "ne" else compare, ("f32", "f32"), "pred")
        add(f"setp.{name}u.f32", lambda x, y, c=compare: c(x, y) | np.isnan(x) | np.isnan(y), ("f32", "f32"), "pred")
    for rounding in ("", ".rn"):
        add(f"add{rounding}.f32", np.add, ("f32", "f32"), "f32")
        add(f"sub{rounding}.f32", np.subtract, ("f32", "f32"), "f32")
        add(f"mul{rounding}.f32", np.multiply, ("f32", "f32"), "f32")
    add("fma.rn.f32", _fma, ("f32", "f32", "f32"), "f32")
    add("neg.f32", np.negative, ("f32",), "f32")
    add("abs.f32", np.abs, ("f32",), "f32")
    add("max.f32", np.fmax, ("f32", "f32"), "f32")
    add("min.f32", np.fmin, ("f32", "f32"), "f32")
    add("ex2.approx.ftz.f32", lambda x: flushed(np.exp2(flushed(x))), ("f32",), "f32")
    add("rcp.approx.ftz.f32", lambda x: flushed(np.float32(1) / flushed(x)), ("f32",), "f32")
    add("cvt.f32.f16", lambda x: x.astype(np.float32), ("f16",), "f32")
    add("cvt.f32.bf16", from_bf16, ("bf16",), "f32")
    add("cvt.rn.f16.f32", to_f16, ("f32",), "b16")
    add("cvt.rn.bf16.f32", to_bf16, ("f32",), "b16")
    add("cvt.rn.f16x2.f32", lambda high, low: _pair(to_f16(low), to_f16(high)), ("f32", "f32"), "b32")
    add("cvt.rn.bf16x2.f32", lambda high, low: _pair(to_bf16(low), to_bf16(high)), ("f32", "f32"), "b32")
    add("bfe.u32", _bit_field("u32"), ("u32", "u32", "u32"), "u32")
    add("bfe.s32", _bit_field("s32"), ("s32", "u32", "u32"), "s32")
    add("prmt.b32", _permute, ("b32", "b32", "b32"), "b32")
    return table


TABLE = _build()


class Shape(NamedTuple):
    """A product of tensor cores, 16 rows by 8 columns: where each element of A, B and C lies among a warp's registers, as
    indices into (registers, lanes, elements of a register) flattened. PTX ISA, "Matrix Fragments for mma"."""

    a: np.ndarray  # (16, K)
    b: np.ndarray  # (K, 8)
    c: np.ndarray  # (16, 8)
    elements: Callable[[np.ndarray], np.ndarray]  # of registers, as float32


def _shape(K: int, per_register: int, elements: Callable) -> Shape:
    lane, group, four = np.arange(32), np.arange(32) >> 2, np.arange(32) & 3
    a, b, c = (np.empty(shape, np.int64) for shape in ((16, K), (K, 8), (16, 8)))
    for i in range(per_register):
        for register in range(4):
            k = four * per_register + i + (K // 2) * (register >> 1)
            a[group + 8 * (register & 1), k] = (register * 32 + lane) * per_register + i
        for register in range(2):
            k = four * per_register + i + (K // 2) * register
            b[k, group] = (register * 32 + lane) * per_register + i
    for register in range(4):
        c[group + 8 * (register >> 1), 2 * four + (register & 1)] = register * 32 + lane
    return Shape(a, b, c, elements)


SHAPES = {
    "m16n8k16.row.col.f32.f16.f16.f32": _shape(16, 2, lambda x: x.view(np.float16).astype(np.float32)),
    "m16n8k16.row.col.f32.bf16.bf16.f32": _shape(16, 2, lambda x: from_bf16(x.view(np.uint16))),
    # a tensor core looks at the upper 19 bits
    "m16n8k8.row.col.f32.tf32.tf32.f32": _shape(8, 1, lambda x: (x & np.uint32(0xFFFFE000)).view(np.float32)),
}


def mma(shape: Shape, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c: registers (4, 32), (2, 32), (4, 32) to (4, 32)."""
    left, right = (shape.elements(np.ascontiguousarray(x)).ravel() for x in (a, b))
    product = left[shape.a] @ right[shape.b] + c.view(np.float32).ravel()[shape.c]
    out = np.empty(4 * 32, np.float32)
    out[shape.c] = product
    return out.view(np.uint32).reshape(4, 32)
