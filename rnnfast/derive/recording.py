"""Runs a cell and its derivative once, on small tensors, and has an expression for each tensor that comes about.

All of it runs in a thread of its own. So whatever the caller has on, which PyTorch keeps for each thread, is off here and stays
as it is there: the mode of gradients, inference mode, autocast, a default device, modes of dispatch (fake tensors among them),
the transforms of torch.func, vmap, tracing by Dynamo or make_fx, a profiler of Python. The random generator is not used, and
the default dtype not set.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import linecache
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rnnfast.derive import definition
from rnnfast.derive.definition import Cell
from rnnfast.derive.expressions import Expr, Pool
from rnnfast.derive.operators import BRANCH, CAPTURED, IN_PLACE, TRANSLATED, Refused, from_operator, refusal
from rnnfast.torch_rules import Mode, decomposition

__all__ = ["SHAPE", "CannotFuse", "Recorded", "alone", "place", "record"]

SHAPE = (5, 7)  # of the tiles to record with; nothing of it is kept
_Result = TypeVar("_Result")


class CannotFuse(ValueError):
    """A cell cannot run in the kernels. The message has the file and line, the reason, and the rewriting that would work."""


@dataclass
class Recorded:
    """What a cell and its derivative compute, as expressions and numbers.

    Attributes:
        leaves: the arguments: of kind "x", "h" (the sides of the gates), "state", "given" (held), "noise" and "d" (the
            gradients of the new states).
        new_states: in order.
        kept: what the function gave to `keep`, each with whether it is to be saved in float32.
        d_x, d_h, d_states, d_held: gradients.
    """

    leaves: list[Expr]
    new_states: list[Any]
    kept: list[tuple[Any, bool]]
    d_x: list[Any]
    d_h: list[Any]
    d_states: list[Any]
    d_held: list[Any]


def alone(function: Callable[..., _Result], *args: Any) -> _Result:
    """Call the function in a thread of its own; returns or raises what it does."""
    found: list[_Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(function(*args))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="rnnfast-derive", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def place(function: Callable) -> str:
    """The function, and the file and line where it begins."""
    code = function.__code__
    return f"cell `{function.__name__}` ({Path(code.co_filename).name}:{code.co_firstlineno})"


class _Recorder(Mode):
    """Has an expression for each tensor that comes about inside, by its storage. An operator without a translation is taken
    apart by PyTorch's own rules, inside again."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function, self.pool = function, Pool()
        self.expressions: dict[int, Any] = {}
        self.alive: list[Tensor] = []  # an address that is freed may be given out again
        self.arguments: dict[int, str] = {}  # what may not be changed in place
        self.line, self.text, self.by_author = "", "", True
        self.variables = _variables(function)

    def put(self, tensor: Tensor, expression: Any) -> Any:
        self.alive.append(tensor)
        self.expressions[tensor.untyped_storage().data_ptr()] = expression
        return expression

    def of(self, tensor: Tensor, name: str = "") -> Any:
        found = self.expressions.get(tensor.untyped_storage().data_ptr())
        if found is None and tensor.numel() == 1 and (not self.by_author or name == "lift_fresh"):
            return tensor.item()
        if found is None:
            raise self.refuse(CAPTURED.format(tuple(tensor.shape)))
        return found

    def refuse(self, reason: str) -> CannotFuse:
        return CannotFuse(f"{place(self.function)}{self.line}: {reason}")

    def at(self, number: int) -> None:
        """Note the line of the author's file with this number."""
        self.text = linecache.getline(self.function.__code__.co_filename, number).strip()
        self.line = f", line {number}, `{self.text}`"

    def look(self) -> None:
        """Note the author's line, and the names of his variables."""
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_code is not self.function.__code__:
            frame = frame.f_back
        if frame is None:
            return
        self.at(frame.f_lineno)
        for name, value in frame.f_locals.items():
            if name in self.variables and isinstance(value, Tensor):
                found = self.expressions.get(value.untyped_storage().data_ptr())
                if isinstance(found, Expr) and found.op != "leaf":
                    found.name = found.name or name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        full = func.name().removeprefix("aten::").split(".")[0]
        name = full.rstrip("_")
        if self.by_author:
            self.look()
            if reason := refusal(name, self.text):
                raise self.refuse(reason)
            if "out" in kwargs:
                raise self.refuse(f"`{name}` writes into a tensor (out=). Leave out= away and use the result")
            if full.endswith("_") and args[0].untyped_storage().data_ptr() in self.arguments:
                raise self.refuse(IN_PLACE.format(self.arguments[args[0].untyped_storage().data_ptr()]))
        if name not in TRANSLATED and (rule := decomposition(func)) is not None:
            before, self.by_author = self.by_author, False
            try:
                with self:
                    result = rule(*args, **kwargs)
            finally:
                self.by_author = before
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            given = [self.of(arg, name) if isinstance(arg, Tensor) else arg for arg in args]
            try:
                self.put(result, from_operator(self.pool, name, given, kwargs, result, SHAPE))
            except Refused as error:
                raise self.refuse(str(error)) from None
        elif self.by_author:
            raise self.refuse(f"`{name}`, which gives no tile")
        return result

    def row_mean(self, tile: Tensor) -> Tensor:
        """`definition.row_mean` while this records."""
        if tuple(tile.shape) != SHAPE:
            raise self.refuse(f"row_mean takes a tile (B, H), got {tuple(tile.shape)} where tiles are {SHAPE}")
        return _RowMean.apply(tile, self)  # type: ignore[return-value]


class _RowMean(torch.autograd.Function):
    """A tile whose expression is the mean; its derivative is the mean of the gradient."""

    @staticmethod
    def forward(ctx: Any, tile: Tensor, recorder: _Recorder) -> Tensor:
        ctx.recorder = recorder
        result = tile.clone()
        recorder.put(result, recorder.pool("row_mean", recorder.of(tile)))
        return result

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:  # type: ignore[override]
        return _RowMean.forward(ctx, d, ctx.recorder), None


def _variables(function: Callable) -> set[str]:
    """The local variables that the text of the function binds. Comprehensions bind theirs in it in some versions of Python and
    not in others, so theirs are left out."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # a function made from text
        return set()
    found: set[str] = set()
    queue: list[ast.AST] = list(ast.iter_child_nodes(tree.body[0]))
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        if not isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            queue.extend(ast.iter_child_nodes(node))
    return found


def record(cell: Cell, constants: dict[str, Any]) -> Recorded:
    """What the cell and its derivative compute. To be called by `alone`.

    Raises:
        CannotFuse: why it cannot be part of a kernel.
    """
    recorder = _Recorder(cell.function)
    hidden = cell.gates if cell.recurrent else ()
    groups = {"x": cell.gates, "h": hidden, "state": cell.states, "given": cell.held, "noise": cell.noise, "d": cell.states}
    titles = {"x": "the input side of gate {}", "h": "the hidden side of gate {}", "state": "the state {} before the step"}
    generator = torch.Generator().manual_seed(0)
    leaves: list[Expr] = []
    wanted: dict[str, list[Tensor]] = {}  # the tensors to differentiate by, or the gradients
    tiles: dict[str, list[Tensor]] = {}  # what the cell is given: a copy, so that a change in place comes to be seen here
    for kind, names in groups.items():
        wanted[kind] = [torch.rand(SHAPE, generator=generator, dtype=torch.float32) for _ in names]
        for n, (name, tile) in enumerate(zip(names, wanted[kind], strict=True)):
            leaves.append(recorder.put(tile, recorder.pool.leaf(kind, n, name)))
            tile.requires_grad_(kind not in ("noise", "d"))
        tiles[kind] = [tile.clone() for tile in wanted[kind]]
        for n, (name, tile) in enumerate(zip(names, tiles[kind], strict=True)):
            recorder.put(tile, recorder.expressions[wanted[kind][n].untyped_storage().data_ptr()])
            recorder.arguments[tile.untyped_storage().data_ptr()] = titles.get(kind, "the argument {}").format(name)
    kept: list[tuple[Any, bool]] = []

    def keep(given: tuple[Tensor, ...], float32: bool) -> None:
        kept.extend((recorder.of(tile), float32) for tile in given)

    # PyTorch's search for NaN in gradients would be recorded; it is a setting of the process
    anomaly = torch.autograd.set_detect_anomaly(False) if torch.is_anomaly_enabled() else contextlib.nullcontext()
    with anomaly, recorder, definition.running.within(keep, recorder.row_mean):
        new = _run(recorder, cell, tiles, constants)
        recorder.by_author, recorder.pool.primal, recorder.line = False, False, ", in its derivative"
        pairs = [(tensor, grad) for tensor, grad in zip(new, wanted["d"], strict=True) if tensor.requires_grad]
        inputs = [tile for kind in ("x", "h", "state", "given") for tile in wanted[kind]]
        outputs, gradients = [a for a, _ in pairs], [b for _, b in pairs]
        try:
            found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True) if pairs else [None] * len(inputs)
        except CannotFuse:
            raise
        except Exception as error:
            raise recorder.refuse(f"{type(error).__name__}: {error}") from error
    values = iter(0.0 if tensor is None else recorder.of(tensor) for tensor in found)
    grads = {kind: [next(values) for _ in wanted[kind]] for kind in ("x", "h", "state", "given")}
    states = [recorder.of(tensor) for tensor in new]
    return Recorded(leaves, states, kept, grads["x"], grads["h"], grads["state"], grads["given"])


def _run(recorder: _Recorder, cell: Cell, tiles: dict[str, list[Tensor]], constants: dict[str, Any]) -> tuple[Tensor, ...]:
    """The new states."""
    try:
        hidden = tiles["h"] if cell.recurrent else None
        new = cell.run(tiles["x"], hidden, tiles["state"], (*tiles["given"], *tiles["noise"]), constants)
    except CannotFuse:
        raise
    except Exception as error:
        for frame, number in traceback.walk_tb(error.__traceback__):
            if frame.f_code is cell.function.__code__:
                recorder.at(number)
        branch = isinstance(error, RuntimeError) and (
            "ambiguous" in str(error) or "cannot be converted to Scalar" in str(error)
        )
        raise recorder.refuse(BRANCH if branch else f"{type(error).__name__}: {error}") from error
    recorder.line = ""
    for name, tensor in zip(cell.states, new, strict=True):
        if tuple(tensor.shape) != SHAPE:
            raise recorder.refuse(
                f"the new {name} is {tuple(tensor.shape)} where tiles are {SHAPE}: each state has all H units in their places"
            )
    for expression, name in zip([recorder.of(tensor) for tensor in new], cell.states, strict=True):
        if isinstance(expression, Expr) and expression.op != "leaf":
            expression.name = f"new_{name}"
    return new
