"""Expressions over tiles, simplified as they are made.

An `Expr` is made once: the same operation on the same arguments is the same object. So common subexpressions are found without
a search, and whether the two sides of a gate have the same gradient is a comparison of two objects.

Operations, on expressions and numbers: add, sub, mul, div, neg; exp, expm1, log, log1p, sigmoid, tanh, sqrt, rsqrt, abs, sin,
cos, erf, floor; maximum, minimum, where; gt, ge, lt, le, eq, ne, and, or, not; row_mean, the mean over all units of a row.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

__all__ = ["COMPARE", "Expr", "Pool", "inputs_of", "is_zero", "may_overflow"]


class Expr:
    """An operation on expressions and numbers, or a leaf: op "leaf", args (kind, index, name).

    Attributes:
        number: how many were made before it.
        name: a local variable of the author's, or None.
        primal: whether the cell itself computes it, rather than its derivative alone.
    """

    __slots__ = ("args", "name", "number", "op", "primal")

    def __init__(self, op: str, args: tuple, number: int, primal: bool):
        self.op, self.args, self.number, self.primal = op, args, number, primal
        self.name: str | None = None

    @property
    def children(self) -> tuple[Expr, ...]:
        return () if self.op == "leaf" else tuple(arg for arg in self.args if isinstance(arg, Expr))

    @property
    def is_bool(self) -> bool:
        return self.op in COMPARE or self.op in ("and", "or", "not")


COMPARE = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
ORDERLESS = ("add", "mul", "maximum", "minimum", "and", "or")
FOLD = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "abs": abs, "maximum": max, "minimum": min, "exp": math.exp, "expm1": math.expm1, "log": math.log, "log1p": math.log1p,
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)), "tanh": math.tanh, "sqrt": math.sqrt, "rsqrt": lambda a: 1 / math.sqrt(a),
    "sin": math.sin, "cos": math.cos, "erf": math.erf, "floor": math.floor, "row_mean": float,
}  # fmt: skip


def is_zero(value: Any) -> bool:
    """Whether it is the number 0, as the gradient of what has none."""
    return not isinstance(value, Expr) and value == 0


class Pool:
    """Makes expressions.

    Attributes:
        primal: whether those made now belong to the cell itself.
    """

    def __init__(self):
        self.made: dict[tuple, Expr] = {}
        self.primal = True
        # Whether a was within a bound shows as well in what it was clamped to, which may be a state, and so not be rounded.
        self.clamped: dict[tuple, tuple[str, Expr]] = {}

    def leaf(self, kind: str, index: int, name: str) -> Expr:
        return self._make("leaf", (kind, index, name))

    def _make(self, op: str, args: tuple) -> Expr:
        ids = [("e", arg.number) if isinstance(arg, Expr) else ("n", repr(arg)) for arg in args]
        key = (op, *(sorted(ids) if op in ORDERLESS else ids))
        if key not in self.made:
            self.made[key] = Expr(op, args, len(self.made), self.primal)
        return self.made[key]

    def __call__(self, op: str, *args: Any) -> Any:
        """An expression, or a number where that is what it comes to. A product with 0 is 0, because no gradient flows there.

        Raises:
            ArithmeticError, ValueError: numbers for which the operation has no value.
        """
        if not any(isinstance(arg, Expr) for arg in args):
            if op in COMPARE:
                return getattr(operator, op)(*args)
            if op in FOLD:
                return float(FOLD[op](*(float(arg) for arg in args)))
        if op in ("ge", "le") and not isinstance(args[1], Expr) and (args[0], op, args[1]) in self.clamped:
            op, clamped = self.clamped[args[0], op, args[1]]
            return self(op, clamped, args[1])
        simpler = getattr(self, f"_{op}", None)
        found = simpler(*args) if simpler else None
        return self._make(op, args) if found is None else found

    # One method for each operation that can be simplified: an expression or a number, or None where there is nothing to do.

    def _add(self, a: Any, b: Any) -> Any:
        if is_zero(a) or is_zero(b):
            return b if is_zero(a) else a
        if _is(b, "neg"):
            return self("sub", a, b.args[0])
        return self("sub", b, a.args[0]) if _is(a, "neg") else None

    def _sub(self, a: Any, b: Any) -> Any:
        if is_zero(b):
            return a
        if is_zero(a):
            return self("neg", b)
        if a is b:
            return 0.0
        if not self.primal and _is(b, "mul"):
            # d - d z is d (1 - z), and d a - d b is d (a - b): more exact where they cancel. The cell stays as it was written.
            factors = [(a, 1.0), *([a.args, a.args[::-1]] if _is(a, "mul") else [])]
            for factor, rest in factors:
                if isinstance(factor, Expr) and factor in b.args:
                    return self("mul", factor, self("sub", rest, b.args[b.args[0] is factor]))
        return self("add", a, b.args[0]) if _is(b, "neg") else None

    def _mul(self, a: Any, b: Any) -> Any:
        for one, other in ((a, b), (b, a)):
            if not isinstance(one, Expr):
                if one in (0, 1):
                    return other if one else 0.0
                if one == -1:
                    return self("neg", other)
            elif one.op == "neg":
                return self("neg", self("mul", one.args[0], other))
            elif one.is_bool:
                return self("where", one, other, 0.0)
        return None

    def _div(self, a: Any, b: Any) -> Any:
        if is_zero(a):
            return 0.0
        if not isinstance(b, Expr) and b and math.frexp(b)[0] in (0.5, -0.5):
            return self("mul", a, 1 / b)  # by a power of two: exact
        return self("neg", self("div", a.args[0], b)) if _is(a, "neg") else None

    def _neg(self, a: Expr) -> Any:
        return a.args[0] if a.op == "neg" else None

    def _row_mean(self, a: Expr) -> Any:
        return a if a.op == "row_mean" else None

    def _and(self, a: Any, b: Any) -> Any:
        return self._joined(a, b, False)

    def _or(self, a: Any, b: Any) -> Any:
        return self._joined(a, b, True)

    def _joined(self, a: Any, b: Any, wins: bool) -> Any:
        for one, other in ((a, b), (b, a)):
            if not isinstance(one, Expr):
                return wins if bool(one) == wins else other
        return None

    def _not(self, a: Any) -> Any:
        return (a.args[0] if a.op == "not" else None) if isinstance(a, Expr) else not a

    def _where(self, condition: Any, yes: Any, no: Any) -> Any:
        if not isinstance(condition, Expr):
            return yes if condition else no
        same = yes is no or (not isinstance(yes, Expr) and not isinstance(no, Expr) and yes == no)
        return yes if same else None


def _is(value: Any, op: str) -> bool:
    return isinstance(value, Expr) and value.op == op


def inputs_of(roots: Iterable[Any], stop: Iterable[Expr] = ()) -> list[Expr]:
    """All expressions that the roots need, in the order in which they were made, which is one to compute them in; nothing of
    what those in `stop` need."""
    ends, seen = set(stop), set()
    queue = [root for root in roots if isinstance(root, Expr)]
    while queue:
        expr = queue.pop()
        if expr not in seen:
            seen.add(expr)
            queue.extend(() if expr in ends else expr.children)
    return sorted(seen, key=lambda expr: expr.number)


def may_overflow(expr: Any) -> bool:
    """Whether a value grows as an exponential of a gate or a state may, so that it can leave float16's range: an exponential,
    unless what it is of is seen to be at most 0, and what is made of it by arithmetic."""
    if not isinstance(expr, Expr):
        return False
    if expr.op in ("exp", "expm1"):
        return not _at_most_zero(expr.args[0])
    if expr.op in ("add", "sub", "mul", "div", "neg", "abs", "where", "maximum", "minimum", "sqrt", "row_mean"):
        return any(may_overflow(child) for child in expr.children if not child.is_bool)
    return False


def _at_least(expr: Any, bound: Any) -> bool:
    """Whether `expr` is `bound`, a maximum of it and others, or a choice between such."""
    if expr is bound:
        return True
    if _is(expr, "maximum"):
        return any(_at_least(arg, bound) for arg in expr.args)
    return _is(expr, "where") and all(_at_least(arg, bound) for arg in expr.args[1:])


def _at_most_zero(expr: Any) -> bool:
    """-|a|, -(a a), a - max(a, b), min(a, 0) and the like: what keeps an exponential in range."""
    if not isinstance(expr, Expr):
        return expr <= 0
    if expr.op == "neg":
        inner = expr.args[0]
        return _is(inner, "abs") or (_is(inner, "mul") and inner.args[0] is inner.args[1])
    if expr.op == "sub":
        return _at_least(expr.args[1], expr.args[0])
    if expr.op in ("mul", "div"):
        return any(_at_most_zero(a) and not isinstance(b, Expr) and b > 0 for a, b in (expr.args, expr.args[::-1]))
    return expr.op == "minimum" and any(_at_most_zero(arg) for arg in expr.args)
