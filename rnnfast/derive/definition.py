"""What a recurrent cell is written with: `cell`, and what its function may use and be annotated with.

A cell is a plain PyTorch function of tensors (B, H)::

    @cell(gates="i f g o", states="h c")
    def lstm(x, h, s):
        i, f, o = sigmoid(x.i + h.i), sigmoid(x.f + h.f), sigmoid(x.o + h.o)
        g = tanh(x.g + h.g)
        c = f * s.c + i * g
        return o * tanh(c), c

It imports torch and the standard library only. Nothing here runs the function to learn of it: `rnnfast.derive.recording` does.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import pickle
import threading
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

__all__ = ["Cell", "Learned", "Noise", "Row", "cell", "keep", "row_mean", "row_norm"]


if TYPE_CHECKING:  # inside of a cell's function such an argument is a tensor
    _Argument = Tensor
else:
    _Argument = object


class Row(_Argument):
    """Annotation of an argument: a tensor (B, H) given at the call, the same at each step."""


class Noise(_Argument):
    """Annotation of an argument: numbers uniform in [0, 1), new at each step, batch row and unit."""


class Learned(_Argument):
    """A vector (H,) that the layer learns, as the annotation of an argument or, with its first value, as the default:
    ``gain=Learned(1.0)``. An argument with neither annotation nor default is one, too.

    Args:
        init: the number that all its values have at first; None for values uniform in +-1 / sqrt(H), as torch.nn's weights.
    """

    def __init__(self, init: float | None = None):
        if init is not None and (isinstance(init, bool) or not isinstance(init, (int, float))):
            raise TypeError(f"Learned(init) takes a number or None, got {init!r}")
        self.init = init

    def __repr__(self) -> str:
        return f"Learned({'' if self.init is None else self.init})"


class _Running(threading.local):
    """What `keep` and `row_mean` do while a cell runs in this thread; None for what they do outside of one."""

    def __init__(self):  # not attributes of the class, which Dynamo would tell from those of a thread
        self.keep: Callable[[tuple[Tensor, ...], bool], None] | None = None
        self.row_mean: Callable[[Tensor], Tensor] | None = None

    @contextmanager
    def within(self, keep: Callable, row_mean: Callable | None = None) -> Iterator[None]:
        before = self.keep, self.row_mean
        self.keep, self.row_mean = keep, row_mean
        try:
            yield
        finally:
            self.keep, self.row_mean = before


running = _Running()


def keep(*tiles: Any, dtype: torch.dtype | None = None) -> Any:
    """Have the kernels save these tiles for backward, in this order and before what the derivation adds. Returns them.

    Without it the derivation chooses what is cheapest, and a cell need not call it. Tiles are saved in the dtype of the input,
    so a value beyond 65504 would be infinite in float16. An exponential is therefore saved in float32, and what is computed
    from one by sums and products, unless the exponent is seen to be at most 0, as in ``exp(a - torch.maximum(a, b))``. For any
    other value that may grow so large, say ``keep(v, torch.float32)``.

    Args:
        tiles: tensors (B, H) that were computed in the cell, or sides of its gates.
        dtype: ``torch.float32`` to save them in float32 whatever the dtype of the input. It may also be the last argument:
            ``keep(v, torch.float32)``.

    Raises:
        TypeError: a tile is no tensor.
        ValueError: another dtype.
    """
    if tiles and isinstance(tiles[-1], torch.dtype):
        *tiles, dtype = tiles  # type: ignore[assignment]
    if dtype not in (None, torch.float32):
        raise ValueError(f"keep() saves tiles in the dtype of the input or in torch.float32, not in {dtype}")
    if not tiles or not all(isinstance(tile, Tensor) for tile in tiles):
        raise TypeError(f"keep() takes tensors, got {', '.join(type(tile).__name__ for tile in tiles) or 'nothing'}")
    if running.keep is not None:
        running.keep(tuple(tiles), dtype is not None)
    return tiles[0] if len(tiles) == 1 else tuple(tiles)


def row_mean(tile: Tensor) -> Tensor:
    """The mean of each row over all units, (B, H) like the tile. It is the one sum over units that a cell may ask for."""
    if running.row_mean is not None:
        return running.row_mean(tile)
    return tile.mean(-1, keepdim=True).expand_as(tile)


def row_norm(*tiles: Tensor, eps: float = 1e-5) -> Any:
    """Layer normalisation (Ba et al., 2016) without gain and offset: (v - mean) / sqrt(var + eps), var without correction.

    Args:
        tiles: one, normalised over its H units; or several, normalised together over all units of all of them, as the gates of
            a LayerNorm LSTM are over 4 H.
        eps: added to the variance.

    Returns:
        The normalised tile, or a tuple of them.
    """
    mean = row_mean(functools.reduce(torch.add, tiles)) / len(tiles)
    centred = [tile - mean for tile in tiles]
    square = row_mean(functools.reduce(torch.add, [tile * tile for tile in centred])) / len(tiles)
    scale = torch.rsqrt(square + eps)
    normed = tuple(tile * scale for tile in centred)
    return normed[0] if len(tiles) == 1 else normed


class Cell:
    """A function with what is known of its arguments. It can still be called as the function.

    Attributes:
        name: the function's.
        function: the function itself.
        gates: names of the blocks of rows of W_ih and W_hh.
        states: names. The first is what W_hh multiplies.
        output: the index of the state that is the layer's output.
        recurrent: whether there is a W_hh.
        learned: `Learned` for each learned vector, by its name.
        rows, noise: names of the arguments annotated `Row` and `Noise`.
        constants: the numbers by name, with their defaults. ``training`` is the mode of the layer.
        held: the names of all tiles that no step changes: the learned vectors, then the rows.
    """

    def __init__(self, function: Callable, gates: Any, states: Any, output: str | None, recurrent: bool):
        if not inspect.isfunction(function):
            raise TypeError(f"a cell is a Python function, got {function!r}")
        functools.update_wrapper(self, function)
        self.function, self.name, self.recurrent = function, function.__name__, bool(recurrent)
        self.gates, self.states = _names(gates, "gates", self.name), _names(states, "states", self.name)
        if not self.name.isidentifier():
            raise ValueError(f"a cell needs a name, and {self.name} is none: write it as a function with def")
        if output is not None and output not in self.states:
            raise ValueError(f"cell `{self.name}`: output={output!r} is none of its states, {', '.join(self.states)}")
        self.output = self.states.index(output) if output is not None else 0
        self._read_arguments()
        self._sides = _tiles("gate", self.gates), _tiles("state", self.states)

    def _read_arguments(self) -> None:
        arguments = inspect.signature(self.function).parameters.values()
        places = [a.name for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.POSITIONAL_ONLY)]
        strange = [str(a) for a in arguments if a.kind in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
        if len(places) != 2 + self.recurrent or strange:
            wanted = "x, h, s" if self.recurrent else "x, s"
            sides = "the input sides, the hidden sides and the states" if self.recurrent else "the input sides and the states"
            raise TypeError(
                f"cell `{self.name}` takes ({', '.join(places + strange)}), and should take ({wanted}), {sides}; "
                "whatever else it takes stands after a *"
            )
        self.learned: dict[str, Learned] = {}
        self.constants: dict[str, Any] = {}
        rows, noise = [], []
        for a in (a for a in arguments if a.kind is a.KEYWORD_ONLY):
            kind = a.default if isinstance(a.default, Learned) else _annotation(self.function, a)
            if kind in (Row, Noise) or isinstance(kind, Learned):
                if a.default not in (a.empty, kind):
                    raise TypeError(f"cell `{self.name}`: {a.name} is a tensor, so it has no default, got {a.default!r}")
                if isinstance(kind, Learned):
                    self.learned[a.name] = kind
                else:
                    (rows if kind is Row else noise).append(a.name)
            elif a.name == "training" and a.default is a.empty:
                self.constants["training"] = True
            elif a.default is a.empty:
                raise TypeError(
                    f"cell `{self.name}`: {a.name} has an annotation and no default. A number has a default; a tensor "
                    "is annotated Learned, Row or Noise"
                )
            else:
                self.constants[a.name] = number(self.name, a.name, a.default)
        self.rows, self.noise = tuple(rows), tuple(noise)
        self.held = (*self.learned, *self.rows)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        options = [f"gates={' '.join(self.gates)!r}", f"states={' '.join(self.states)!r}"]
        options += [f"output={self.states[self.output]!r}"] * bool(self.output) + ["recurrent=False"] * (not self.recurrent)
        return f"<cell {self.name}({', '.join(options)})>"

    def __reduce__(self) -> str:
        name = self.function.__qualname__
        if "<locals>" in name:
            raise pickle.PicklingError(
                f"cell `{self.name}` is defined inside a function ({self.__module__}.{name}), where pickle does not find "
                "it: define it at the top of a module"
            )
        return name  # found again by its name, as a function is

    def __copy__(self) -> Cell:
        return self

    def __deepcopy__(self, memo: dict) -> Cell:
        return self

    def numbers(self, **constants: Any) -> dict[str, Any]:
        """All numbers of the cell: these, and its defaults for the others.

        Raises:
            TypeError: it has none of this name, or the value is no number.
        """
        for name, value in constants.items():
            if name not in self.constants:
                known = ", ".join(self.constants) or "none"
                raise TypeError(f"cell `{self.name}` has no number {name!r}; its numbers: {known}")
            number(self.name, name, value)
        return self.constants | constants

    def step(
        self,
        x: Tensor,
        h: Tensor | None,
        states: tuple[Tensor, ...],
        given: tuple[Tensor, ...] = (),
        constants: dict[str, Any] | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One step in plain PyTorch, in any floating dtype.

        Args:
            x: W_ih x_t + b_ih, (B, G * H).
            h: W_hh h_{t-1} + b_hh, (B, G * H); None if the cell is not recurrent.
            states: the states before the step, (B, H) each.
            given: the tiles that no step changes, in the order of `held`, then the noise, (B, H) each.
            constants: numbers of the cell other than its defaults.

        Returns:
            The new states, and what the function gave to `keep`, in order.

        Raises:
            TypeError: the function does not return its new states.
        """
        kept: list[Tensor] = []
        with running.within(lambda tiles, _: kept.extend(tiles)):
            G = len(self.gates)
            hidden = None if h is None else h.chunk(G, -1)
            new = self.run(x.chunk(G, -1), hidden, states, given, self.constants | (constants or {}))
        return new, tuple(kept)

    def run(self, x: Any, h: Any, states: Any, given: Any, constants: dict[str, Any]) -> tuple[Tensor, ...]:
        """The new states, from tuples of tiles."""
        sides, named = self._sides
        places = [sides(*x), *([] if h is None else [sides(*h)]), named(*states)]
        new = self.function(*places, **dict(zip((*self.held, *self.noise), given, strict=True)), **constants)
        new = new if isinstance(new, tuple) else (new,)
        if len(new) != len(self.states) or not all(isinstance(each, Tensor) for each in new):
            kinds = ", ".join("a tensor" if isinstance(each, Tensor) else type(each).__name__ for each in new)
            tensors = "a tensor" if len(self.states) == 1 else f"a tuple of {len(self.states)} tensors"
            raise TypeError(
                f"cell `{self.name}` should return {tensors}, the new {', '.join(self.states)}; "
                f"it returned {kinds or 'nothing'}"
            )
        return new


def _tiles(kind: str, names: tuple[str, ...]) -> type:
    """A named tuple of tiles, which says what there is if another is asked for."""

    class Tiles(namedtuple("Tiles", names)):
        __slots__ = ()

        def __getattr__(self, name: str) -> Tensor:
            raise AttributeError(f"there is no {kind} `{name}`; there is {', '.join(names)}")

    return Tiles


def _names(names: Any, what: str, cell: str) -> tuple[str, ...]:
    if not isinstance(names, (str, Iterable)):
        raise TypeError(f"cell `{cell}`: {what} are names in a string, got {names!r}")
    found = tuple(names.split() if isinstance(names, str) else names)
    if not found:
        raise ValueError(f"cell `{cell}` needs at least one name in {what}")
    for name in found:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise ValueError(f"cell `{cell}`: {name!r} in {what} is no name that can follow a dot, as in s.{name}")
    if len(set(found)) < len(found):
        raise ValueError(f"cell `{cell}`: a name is twice in {what}: {' '.join(found)}")
    return found


def _annotation(function: Callable, argument: inspect.Parameter) -> Any:
    """`Row`, `Noise`, a `Learned`, or whatever else the argument is annotated with; it may stand there as text."""
    found = argument.annotation
    if isinstance(found, str):
        try:
            found = eval(found, {"Row": Row, "Noise": Noise, "Learned": Learned} | function.__globals__)
        except NameError:  # a name for type checkers only; of a number nothing but its default counts
            if argument.default is argument.empty:
                raise TypeError(f"cell `{function.__name__}`: nothing is known of the annotation {found!r}") from None
    if found is Learned or (found is argument.empty and argument.default is argument.empty and argument.name != "training"):
        return Learned()
    return type(found) if isinstance(found, (Row, Noise)) else found


def number(cell: str, name: str, value: Any) -> Any:
    """`value`, if it is a number that may be part of a kernel.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, (bool, int, float)):
        raise TypeError(
            f"cell `{cell}`: {name} is part of the kernel, so it should be an int, a float or a bool, got {value!r}"
        )
    return value


def cell(*, gates: Any, states: Any = "h", output: str | None = None, recurrent: bool = True) -> Callable[[Callable], Cell]:
    """Make a recurrent cell of a function ``step(x, h, s, *, ...)`` of tensors (B, H), which returns the new states.

    ``x.f`` is W_ih x_t + b_ih of the gate f, ``h.f`` W_hh h_{t-1} + b_hh, ``s.c`` the state c before the step. In a kernel all
    are float32. The function says what happens to each unit, from the values of that unit alone, besides `row_mean`.

    Arguments after ``*``: one without annotation and default, or with `Learned` in either place, is a learned vector (H,) of
    the layer; one annotated `Row` a tensor (B, H) given at the call; one annotated `Noise` random numbers; one with a default a
    number, which is set when the layer is made and is part of the kernel. ``training`` is the layer's mode.

    What the function reads besides, such as a global number, is read once, when the cell is derived.

    Args:
        gates: their names, in the order of the blocks of rows of W_ih and W_hh: text with blanks between, or a sequence.
        states: likewise. The first is what W_hh multiplies; the others are carried in float32.
        output: the state that is the layer's output; None for the first.
        recurrent: whether there is a W_hh. If not, the function is ``step(x, s, *, ...)``, and no unit waits for another.

    Raises:
        TypeError: the function takes other arguments, or a default is no number.
        ValueError: a name is none, or twice there, or `output` is no state.
    """
    return lambda function: Cell(function, gates, states, output, recurrent)
