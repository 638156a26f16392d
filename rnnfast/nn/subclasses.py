"""Classes made of a user's subclass of torch.nn.LSTM, GRU or RNN and of rnnfast's layer.

A user's class and rnnfast's are both derived from torch.nn's. A class with both as bases has rnnfast's between them::

    Made -> the user's class -> rnnfast.LSTM -> torch.nn.LSTM

All of the user's code runs as before, and its ``super().forward(...)`` reaches rnnfast's ``forward``.
"""

from __future__ import annotations

import threading
import types
from types import CellType, CodeType, FunctionType
from typing import Any

import torch

from rnnfast import torch_private
from rnnfast.nn.sequence import GRU, LSTM, RNN, Sequence

__all__ = ["LAYERS", "both", "is_torchs", "user_class"]

LAYERS: dict[type, type] = {torch.nn.LSTM: LSTM, torch.nn.GRU: GRU, torch.nn.RNN: RNN}
"""torch.nn's class of a layer -> rnnfast's."""

_MADE_OF = "_rnnfast_made_of"  # attribute of a made class: the user's class
_lock = threading.Lock()


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """``__reduce_ex__`` of each made class: what pickle and copy make the module from. No import finds the made class, so the
    user's stands for it."""
    made, user = next((cls, user) for cls in type(self).__mro__ if (user := user_class(cls)))
    parts = super(made, self).__reduce_ex__(protocol)
    if isinstance(parts, str) or type(self) is not made:
        return parts
    function, args, *state = parts
    return (_remade, (user, *(user if part is made else part for part in (function, *args))), *state)


def _remade(user: type, *parts: Any) -> Any:
    """Call ``parts[0](*parts[1:])``, with the class made of `user` wherever `user` stands."""
    made = both(user)
    if isinstance(made, str):
        raise RuntimeError(f"the module was saved as {user.__qualname__} on rnnfast's layer, which cannot be made: {made}")
    function, *args = (made if part is user else part for part in parts)
    return function(*args)


def is_torchs(cls: type) -> bool:
    """Whether PyTorch defined the class, or made it from another, as it does for a parametrized module."""
    return cls.__module__.partition(".")[0] == "torch"


def user_class(made: type) -> type | None:
    """The class that `both` made `made` from. None for a class that `both` did not make."""
    return vars(made).get(_MADE_OF)


def both(user: type) -> type | str:
    """The class made of `user` and of rnnfast's layer: the same one each time, as long as anything uses it.

    It has the name and the module of `user`, so that a repr shows them. The user's ``__init_subclass__`` runs, as for the
    classes that PyTorch derives.

    Args:
        user: a subclass of torch.nn.LSTM, GRU or RNN that neither PyTorch nor rnnfast defines.

    Returns:
        The class. In words, why there is none, if it cannot be made, or if the kernels would never run in it.
    """
    theirs = next((cls for cls in user.__mro__ if cls in LAYERS), None)
    if theirs is None:
        return "it is derived from none of torch.nn.LSTM, GRU and RNN"
    own = user.__mro__[: user.__mro__.index(theirs)]
    last = next((cls for cls in reversed(own) if "forward" in vars(cls)), None)
    if last is not None and not _may_call_super(own, vars(last)["forward"]):
        return f"{last.__qualname__}.forward does not call super().forward, so rnnfast's would never run"
    with _lock:
        made = next((cls for cls in type.__subclasses__(user) if user_class(cls) is user), None)
        if made is None:
            names = {name: getattr(user, name) for name in ("__module__", "__qualname__", "__doc__")}
            names["__reduce_ex__"] = _reduce_ex
            try:
                made = types.new_class(user.__name__, (user, LAYERS[theirs]), exec_body=lambda body: body.update(names))
            except Exception as error:  # whatever the user's metaclass or __init_subclass__ raises
                return f"no class can be made of it and rnnfast.{theirs.__name__} ({error})"
            type.__setattr__(made, _MADE_OF, user)  # not before: a class that was refused lives on among the subclasses
    replaced = torch_private.replaced_in_class(made, Sequence)
    return f"{replaced}, so the kernels would never run" if replaced else made


def _may_call_super(classes: tuple[type, ...], forward: Any) -> bool:
    """Whether the code of `forward` names ``super``, or that of a method of `classes` that it names, and so on.

    `forward` may be something else than a Python function. Then it may call anything.
    """
    methods = {name: value for cls in reversed(classes) for name, value in vars(cls).items() if name != "forward"}
    queue, seen = [forward], set()
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, CodeType):
            if "super" in value.co_names:
                return True
            queue += [methods.get(name) for name in value.co_names] + list(value.co_consts)
        elif isinstance(value, FunctionType):  # a wrapper has the function that it wraps in a cell
            queue += [value.__code__] + [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
    return not isinstance(forward, FunctionType)
