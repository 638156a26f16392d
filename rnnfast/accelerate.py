"""`accelerate` and `restore` exchange the recurrent layers of a model. `as_default` makes new layers rnnfast's.

A layer is exchanged by setting its class: ``module.__class__ = rnnfast.LSTM``. It stays the same object with the same
parameters, buffers, hooks, mode and attributes. Optimizers, tied modules, DDP wrappers and checkpoints therefore keep working.
A user's subclass of torch.nn's layers is exchanged if asked for: `rnnfast.nn.subclasses` makes a class of it and ours. The
report names each layer that is left, and why.
"""

from __future__ import annotations

import copy
import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from rnnfast.nn import GRUCell, LSTMCell, RNNCell
from rnnfast.nn.base import ACCELERATED
from rnnfast.nn.sequence import Sequence
from rnnfast.nn.subclasses import LAYERS, both, is_torchs, user_class
from rnnfast.version import PACKAGE

__all__ = ["Report", "accelerate", "advice", "as_default", "described", "restore"]

_Model = TypeVar("_Model", bound=torch.nn.Module)

_CELLS: dict[type, type] = {torch.nn.LSTMCell: LSTMCell, torch.nn.GRUCell: GRUCell, torch.nn.RNNCell: RNNCell}
_THEIRS = {ours: theirs for theirs, ours in (LAYERS | _CELLS).items()}


@dataclass(frozen=True)
class Report:
    """What `accelerate` or `restore` did. ``print`` shows it.

    Attributes:
        to: "rnnfast" or "torch.nn": where the classes of the exchanged layers now come from.
        changed: the name and description of each exchanged layer. The name of the model itself is "".
        left: the name of each recurrent layer that was not exchanged, and the reason. `accelerate` also names Keras's modules,
            and those whose class has the name of a recurrent layer, but is none of torch.nn's.
    """

    to: str
    changed: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        count = len(self.changed)
        lines = [f"{count} layer{'' if count == 1 else 's'} exchanged for {self.to}'s"]
        lines += [f"  {name or '(the model itself)'}: {text}" for name, text in self.changed]
        if self.left:
            lines += ["left as they are"] + [f"  {name or '(the model itself)'}: {reason}" for name, reason in self.left]
        elif not self.changed:
            lines.append("  no module of the model is a torch.nn.LSTM, GRU or RNN, or has such a name")
        return "\n".join(lines)


_ASKS_FOR_SUBCLASSES = "accelerate(model, subclasses=True) takes it if its forward calls super().forward"


def accelerate(
    model: _Model, *, inplace: bool = True, subclasses: bool = False, report: Callable[[Report], Any] | None = print
) -> _Model:
    """Replace every torch.nn.LSTM, GRU and RNN inside `model`, and `model` itself if it is one, by rnnfast's layer.

    Each layer keeps its parameters (the same `Parameter` objects), buffers, hooks, train mode, parametrizations, pruning and
    attributes. It finds the modules that ``model.modules()`` finds. It leaves cells, scripted and quantized layers, layers
    whose ``forward`` was replaced on the instance and, unless asked for, subclasses. The report gives the reason for each.

    Args:
        model: any module. Afterwards ``isinstance(layer, torch.nn.LSTM)`` is still true, and ``type(layer) is torch.nn.LSTM``
            is false.
        inplace: whether to change `model`. If False, a deep copy is changed. It shares all tensors with `model`, including
            those that the model keeps in tuples, dictionaries or other objects.
        subclasses: whether to take user's subclasses of the three too. Such a layer gets a class made of its own and of
            rnnfast's: its code runs as before, and its ``super().forward(...)`` is rnnfast's. It stays an instance of its
            class, with the same repr. The report says so of a class whose ``forward`` does not call ``super().forward``, or
            that changes what torch.nn's ``forward`` calls: such layers are left.
        report: a function that is called with the `Report`. None for no report.

    Returns:
        `model`, or the copy.

    Raises:
        TypeError: if `model` is not a module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 3), torch.nn.GRU(3, 4))
        >>> model = rnnfast.accelerate(model)
        1 layer exchanged for rnnfast's
          1: GRU(3, 4)
        >>> isinstance(model[1], rnnfast.GRU)
        True
    """

    def replacement(cls: type) -> type | None:
        made = both(cls) if subclasses and _is_users(cls) else LAYERS.get(cls)
        return None if isinstance(made, str) else made

    def why_left(user: type) -> str:
        return str(both(user)) if subclasses else _ASKS_FOR_SUBCLASSES

    return _exchange(model, "rnnfast", replacement, inplace, report, lambda module: True, why_left)


def restore(
    model: _Model, *, inplace: bool = True, every: bool = False, report: Callable[[Report], Any] | None = print
) -> _Model:
    """Undo `accelerate`: replace the layers that it exchanged by torch.nn's, with their current parameters.

    Use it before code that needs exactly the class torch.nn.LSTM: ``torch.jit.script``, dynamic quantization, or a pickle for a
    machine without rnnfast.

    Args:
        model, inplace, report: as in `accelerate`.
        every: also replace layers and cells that were built as rnnfast's. (`accelerate` leaves cells alone.)

    Returns, raises: as `accelerate`.

    Example:
        >>> model = rnnfast.accelerate(torch.nn.LSTM(3, 4), report=None)
        >>> type(rnnfast.restore(model, report=None)) is torch.nn.LSTM
        True
    """

    def replacement(cls: type) -> type | None:
        return _THEIRS.get(cls) or user_class(cls)

    def is_meant(module: torch.nn.Module) -> bool:
        return every or ACCELERATED in vars(module)

    return _exchange(model, "torch.nn", replacement, inplace, report, is_meant, lambda user: "accelerate did not exchange it")


def described(module: torch.nn.Module) -> str:
    """A layer in one line, without the modules inside of it."""
    return f"{module._get_name()}({module.extra_repr()})"


def advice(module: torch.nn.Module) -> str:
    """What to do about a recurrent module that is not rnnfast's, in words. Empty for other modules."""
    new = _exchanged(type(module), LAYERS.get)
    reason = _reason(module, new, True, lambda user: _ASKS_FOR_SUBCLASSES)
    return "rnnfast.accelerate(model) exchanges it" if new is not None and reason is None else reason or ""


def _exchange(
    model: _Model,
    to: str,
    replacement: Callable[[type], type | None],
    inplace: bool,
    report: Callable[[Report], Any] | None,
    is_meant: Callable[[torch.nn.Module], bool],
    why_left: Callable[[type], str],
) -> _Model:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        model = copy.deepcopy(model, {id(tensor): tensor for tensor in _tensors(model)})
    changed, left = [], []
    for name, module in model.named_modules():
        new = _exchanged(type(module), replacement)
        reason = _reason(module, new, is_meant(module), why_left)
        if reason is not None:
            left.append((name, reason))
        elif new is not None:
            object.__setattr__(module, "__class__", new)  # a user's __setattr__ may do anything
            if to == "rnnfast":
                vars(module)[ACCELERATED] = True
            else:
                vars(module).pop(ACCELERATED, None)
            users = _users(new)
            of = f", a subclass: {_named(users)}" if users else ""
            changed.append((name, described(module) + of))
    if to == "rnnfast":
        left += _others(model, [name for name, _ in (*changed, *left)])
    if report is not None:
        report(Report(to, tuple(changed), tuple(left)))
    return model


def _exchanged(cls: type, replacement: Callable[[type], type | None]) -> type | None:
    """The class that replaces `cls`. None if there is none for `cls`, nor for a class from which PyTorch derived `cls`.

    PyTorch gives a parametrized or sharded module a new class, which is derived from the module's class. Its replacement is
    derived from rnnfast's class instead. The old class is not changed, because copies of the module may share it.
    """
    new = replacement(cls)
    if new is not None or not is_torchs(cls):
        return new
    bases = tuple(_exchanged(base, replacement) or base for base in cls.__bases__)
    if bases == cls.__bases__:
        return None
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, own)


def _is_users(cls: type) -> bool:
    """Whether `cls` is a user's subclass of torch.nn's layers, with nothing of rnnfast's in it."""
    return issubclass(cls, torch.nn.RNNBase) and not issubclass(cls, Sequence) and not is_torchs(cls)


def _users(cls: type) -> type | None:
    """The user's class that a module of class `cls` has: `cls` itself, or what PyTorch or rnnfast made `cls` of."""
    candidates = (user_class(each) or each for each in cls.__mro__)
    return next((each for each in candidates if _is_users(each)), None)


def _named(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _reason(module: torch.nn.Module, new: type | None, is_meant: bool, why_left: Callable[[type], str]) -> str | None:
    """Why a recurrent layer is not exchanged. None if it is exchanged, and for other modules."""
    cls = type(module)
    name = _named(cls)
    if new is not None:
        if "forward" in vars(module):
            return "its forward was replaced on the instance, which another class would not change"
        return None if is_meant else f"it was built as {name}: every=True takes it too"
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", "")
        return "it is TorchScript, compiled from torch.nn's code" if original in ("LSTM", "GRU", "RNN") else None
    if cls in LAYERS or cls in _THEIRS:  # cells of torch.nn's come below
        return f"it is {name} already"
    if isinstance(module, Sequence):
        return f"{name} is derived from rnnfast's layer already"
    if name.startswith("torch.ao.nn.quant") and cls.__name__.endswith(("LSTM", "GRU", "RNN")):
        return f"{name} is quantized, which the kernels do not know"
    if isinstance(module, torch.nn.RNNBase):
        user = _users(cls) or cls
        return f"{_named(user)} is a class of its own: {why_left(user)}"
    if isinstance(module, torch.nn.RNNCellBase):
        is_ours = name.startswith(f"{PACKAGE}.")
        return None if is_ours else f"a cell runs one step a call; there is rnnfast.{cls.__name__} to build"
    return None


def _others(model: torch.nn.Module, known: list[str]) -> list[tuple[str, str]]:
    """The modules that may be recurrent and are not torch.nn's: Keras's, and those whose class has such a name. And what to do.

    A model may have such a name because of what is inside of it. So a module is left out if another one, or one that is `known`
    already, is inside of it. Keras hides its layers from ``named_modules``: its outermost module stands for all.
    """
    alike = re.compile("LSTM|Lstm|GRU|Gru(?![a-z])|RNN|Rnn|Recurrent")
    modules = {name: type(module) for name, module in model.named_modules()}
    keras = [name for name, cls in modules.items() if any(_package(each) == "keras" for each in cls.__mro__)]
    skipped = {*known, *keras}
    skipped |= {name for name, cls in modules.items() if cls.__module__.startswith(f"{PACKAGE}.")}
    named = [name for name, cls in modules.items() if alike.search(cls.__name__) and name not in skipped]
    outer = [name for name in keras if not any(_is_inside(name, other) for other in keras)]
    inner = [name for name in named if not any(_is_inside(other, name) for other in (*known, *named))]
    reasons = dict.fromkeys(outer, "Keras's: rnnfast.keras.enable() lets rnnfast run Keras's recurrent layers")
    reasons |= dict.fromkeys(inner, "none of torch.nn's layers; rnnfast.Layer runs a cell that you write in plain PyTorch")
    return [(name, f"{_named(modules[name])} is {reason}") for name, reason in reasons.items()]


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _is_inside(name: str, other: str) -> bool:
    """Whether the module called `name` is inside of the one called `other`."""
    return name != other and (not other or name.startswith(f"{other}."))


def _tensors(model: torch.nn.Module) -> Iterator[Tensor]:
    """All tensors that ``copy.deepcopy(model)`` would copy, wherever the model keeps them."""
    queue: list[Any] = [model]
    seen: dict[int, Any] = {}  # the objects too, so that no other gets the number of one
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            queue += [*value.keys(), *value.values(), getattr(value, "__dict__", None)]
        elif isinstance(value, (list, tuple, set, frozenset)):
            queue += [*value, getattr(value, "__dict__", None)]
        elif isinstance(value, MethodType):
            queue.append(value.__self__)
        elif not isinstance(value, (type, FunctionType, ModuleType, str, bytes, int, float, complex, type(None))):
            queue += _parts(value)


def _parts(value: Any) -> list[Any]:
    """The parts of an object that ``copy.deepcopy`` would copy."""
    try:
        made = value.__reduce_ex__(4)
    except Exception:  # it cannot be copied this way: deepcopy may know another, or will raise
        return [getattr(value, "__dict__", None)]
    return [getattr(value, "__dict__", None)] if isinstance(made, str) else [_listed(part) for part in made[1:]]


def _listed(part: Any) -> Any:
    return list(part) if isinstance(part, Iterator) else part


_building: ContextVar[bool] = ContextVar("rnnfast_as_default", default=False)
_blocks, _inits, _lock = [0], {}, threading.Lock()


def _building_init(cls: type, init: Callable[..., None]) -> Callable[..., None]:
    """The ``__init__`` of torch.nn's `cls` while a block of `as_default` is open in any thread."""

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        if type(self) is cls and _building.get():
            self.__class__ = LAYERS[cls]
            self.__init__(*args, **kwargs)
        else:
            init(self, *args, **kwargs)

    return __init__


@contextmanager
def as_default() -> Iterator[None]:
    """Let ``torch.nn.LSTM(...)``, ``GRU(...)`` and ``RNN(...)`` build rnnfast's layers, in the ``with`` block and this thread.

    This also works in code that imported the classes earlier, such as a third-party model. The names still refer to torch.nn's
    classes, so ``isinstance`` with them is true for old and new layers. A subclass of these classes builds itself. Blocks nest,
    end after an exception, and serve as a decorator. Copied and unpickled modules keep their class: use `accelerate` on them.

    While a block is open in any thread, the three classes have another ``__init__``. When the last block ends, they get their
    own back.

    Example:
        >>> with rnnfast.as_default():
        ...     model = torch.nn.Sequential(torch.nn.GRU(3, 4))
        >>> isinstance(model[0], rnnfast.GRU), type(torch.nn.GRU(3, 4)) is torch.nn.GRU
        (True, True)
    """
    with _lock:
        _blocks[0] += 1
        if _blocks[0] == 1:
            for cls in LAYERS:
                _inits[cls] = cls.__init__, _building_init(cls, cls.__init__)
                cls.__init__ = _inits[cls][1]
    token = _building.set(True)
    try:
        yield
    finally:
        _building.reset(token)
        with _lock:
            _blocks[0] -= 1
            for cls, (init, ours) in _inits.items() if _blocks[0] == 0 else ():
                if cls.__init__ is ours:  # else another library has wrapped it, and outside of blocks ours changes nothing
                    cls.__init__ = init
