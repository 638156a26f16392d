"""Expressions as Triton source."""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from rnnfast.derive.expressions import COMPARE, Expr, inputs_of
from rnnfast.version import PACKAGE

__all__ = ["Argument", "function", "module"]

INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}
CALLS = {
    "exp": "exp", "log1p": "log1p", "expm1": "expm1", "sigmoid": "sigmoid", "tanh": "tanh", "log": "tl.log", "abs": "tl.abs",
    "sqrt": "tl.sqrt", "rsqrt": "tl.rsqrt", "sin": "tl.sin", "cos": "tl.cos", "erf": "tl.erf", "floor": "tl.floor",
    "where": "tl.where",
}  # fmt: skip
MATHS = ("exp", "expm1", "log1p", "sigmoid", "tanh")  # of rnnfast.kernels.maths
LONGEST = 100  # characters of an expression that is used once and goes into its user
COMPARED, SUM, PRODUCT, NEGATED, ATOM = 0, 1, 2, 3, 9  # how strongly an expression holds together


class Argument:
    """An argument of a function that is a tuple of tiles.

    Args:
        name: the argument's.
        tiles: what is in it; None for one that no line may read.
        titles: a name for each tile.
    """

    def __init__(self, name: str, tiles: Sequence[Expr | None], titles: Sequence[str]):
        self.name, self.tiles, self.titles = name, tiles, titles


def function(name: str, arguments: list[Argument], results: list[list[Any]], like: str, rows: bool) -> str:
    """A ``@triton.jit`` function.

    Args:
        name: the function's.
        arguments: an expression that is in several is read from the first, and from ``saved`` if it is nowhere else.
        results: the tuples to return, of expressions and numbers.
        like: a tile, for the shape of numbers.
        rows: whether it has the arguments ``row`` and ``row_mean``.
    """
    taken = {argument.name for argument in arguments} | {"tl", "triton", "row", "row_mean", *MATHS}
    known: dict[Expr, str] = {}
    places: dict[Expr, tuple[Argument, int]] = {}
    for argument in sorted(arguments, key=lambda argument: argument.name == "saved"):
        for n, (expr, title) in enumerate(zip(argument.tiles, argument.titles, strict=True)):
            if expr is not None and expr not in known:
                known[expr], places[expr] = _unused(title, taken), (argument, n)
    roots = [value for group in results for value in group]
    needed = inputs_of(roots, known)
    lines = _loads(arguments, places, known, set(needed))
    texts = _Texts(roots, [expr for expr in needed if expr not in known], known, taken)
    lines += texts.lines
    tuples = []
    for group in results:
        shown = [texts.result(value, like) for value in group]
        tuples.append(f"({', '.join(shown)}{',' if len(shown) == 1 else ''})")
    names = [argument.name for argument in arguments] + ["row", "row_mean"] * rows
    body = "\n".join(f"    {line}" for line in [*lines, f"return {', '.join(tuples)}"])
    return f"@triton.jit\ndef {name}({', '.join(names)}):\n{body}\n"


def _unused(name: str, taken: set[str]) -> str:
    found = name
    count = 1
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    taken.add(found)
    return found


def _loads(arguments: list[Argument], places: dict, known: dict[Expr, str], used: set[Expr]) -> list[str]:
    """A line for each argument that names all its tiles, or a line for each tile that is used."""
    lines = []
    for argument in arguments:
        own = [(n, known[expr]) for expr, (where, n) in places.items() if where is argument and expr in used]
        if len(own) == len(argument.tiles) > 1:
            lines.append(f"{', '.join(name for _, name in own)} = {argument.name}")
        else:
            lines += [f"{name} = {argument.name}[{n}]" for n, name in own]
    return lines


class _Texts:
    """The lines that compute expressions, each once and in the order in which they were made."""

    def __init__(self, roots: list[Any], order: list[Expr], known: dict[Expr, str], taken: set[str]):
        self.names, self.lines, self.taken = dict(known), [], taken
        self.inside: dict[Expr, tuple[str, int]] = {}  # used once: the text that goes into the user
        self.means = 0
        uses: dict[Expr, int] = dict.fromkeys(order, 0)
        for expr in order:
            for child in expr.children:
                if child in uses:
                    uses[child] += 1
        for root in roots:
            if isinstance(root, Expr) and root in uses:
                uses[root] += 2  # a result has a name
        for expr in order:
            text, own = self._printed(expr)
            if uses[expr] == 1 and len(text) <= LONGEST and not expr.name and expr.op != "row_mean":
                self.inside[expr] = text, own
            else:
                self.names[expr] = _unused(expr.name, taken) if expr.name else self._numbered()
                self.lines.append(f"{self.names[expr]} = {text}")

    def _numbered(self) -> str:
        n = 0
        while f"t{n}" in self.taken:
            n += 1
        self.taken.add(f"t{n}")
        return f"t{n}"

    def of(self, value: Any, strength: int = COMPARED) -> str:
        """The text of an expression or number, in brackets where what is around holds together more strongly."""
        if not isinstance(value, Expr):
            number = float(value)
            return f'float("{number}")' if not math.isfinite(number) else repr(number) if number >= 0 else f"({number!r})"
        if value in self.names:
            return self.names[value]
        text, own = self.inside[value]
        return f"({text})" if own < strength else text

    def result(self, value: Any, like: str) -> str:
        """The text of a tile, which has the shape of `like` if it is a number."""
        if isinstance(value, Expr):
            return self.of(value)
        return f"tl.full_like({like}, {self.of(value)})" if value else f"tl.zeros_like({like})"

    def _printed(self, expr: Expr) -> tuple[str, int]:
        args = expr.args
        if expr.op in INFIX:
            sign, own = INFIX[expr.op]
            return f"{self.of(args[0], own)} {sign} {self.of(args[1], own + (expr.op in ('sub', 'div')))}", own
        if expr.op in COMPARE:
            return f"{self.of(args[0], SUM)} {COMPARE[expr.op]} {self.of(args[1], SUM)}", COMPARED
        if expr.op in ("and", "or"):
            return f"({self.of(args[0], ATOM)} {'&' if expr.op == 'and' else '|'} {self.of(args[1], ATOM)})", ATOM
        if expr.op == "neg":
            return f"-{self.of(args[0], NEGATED)}", NEGATED
        if expr.op == "not":
            return f"({self.of(args[0], ATOM)} == 0)", ATOM
        if expr.op in ("maximum", "minimum"):
            return f"tl.{expr.op}({self.of(args[0])}, {self.of(args[1])}, tl.PropagateNan.ALL)", ATOM
        if expr.op == "row_mean":
            self.means += 1
            return f"row_mean({self.of(args[0])}, {self.means - 1}, row)", ATOM
        return f"{CALLS[expr.op]}({', '.join(self.of(arg) for arg in args)})", ATOM


def module(cell: Callable, about: str, functions: list[str]) -> str:
    """The text of a file: the author's function as a comment, and the functions made of it."""
    body = "\n\n".join(functions)
    maths = [name for name in MATHS if re.search(rf"(?<![\w.]){name}\(", body)]
    imports = f"\nfrom {PACKAGE}.kernels.maths import {', '.join(maths)}\n" if maths else ""
    comment = "".join(f"#{' ' * bool(line)}{line}\n" for line in _author(cell))
    hint = "" if "tl." in body else "  # noqa: F401 - the interpreter wants it in sight of every jit function"
    return f'"""{about}"""\n\n{comment}\nimport triton\nimport triton.language as tl{hint}\n{imports}\n\n{body}'


def _author(cell: Callable) -> list[str]:
    try:
        text = textwrap.dedent(inspect.getsource(cell))
    except OSError:
        return [f"{cell.__name__}, a function made from text"]
    return [line.rstrip() for line in text.splitlines()]
