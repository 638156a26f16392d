"""What layers and cells share: their options, how others know them, and what of torch.nn runs in their stead.

The classes add nothing to torch.nn's but ``forward`` and methods that PyTorch calls. Functions that take the layer do the work,
so that no name of ours can meet one of a subclass or of a user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx.proxy import TraceError
from torch.utils.checkpoint import checkpoint

from rnnfast import torch_private
from rnnfast.choice.decide import check_backend, is_backend

__all__ = ["Accelerated", "Option", "cell_of", "checkpointed", "fx_node", "is_traced_by_fx"]

ACCELERATED = "_rnnfast_accelerated"  # attribute of a layer that `rnnfast.accelerate` exchanged


class Option:
    """An attribute of a layer that may be set at any time to what `is_ours` accepts; ``_rnnfast_<name>`` keeps it.

    Anything else that is set under the name is the user's own, and has no effect here: a module, a parameter, a number.
    """

    def __init__(self, name: str, is_ours: Callable[[Any], bool], doc: str) -> None:
        self.name, self.kept, self.is_ours, self.__doc__ = name, f"_rnnfast_{name}", is_ours, doc

    def __get__(self, layer: Any, cls: type | None = None) -> Any:
        if layer is None:
            return self
        own = vars(layer)
        for place in (own, *torch_private.registers(layer)):
            if self.name in place:
                return place[self.name]
        return getattr(layer, self.kept)

    def __set__(self, layer: Any, value: Any) -> None:
        own = vars(layer)
        own.pop(self.name, None)
        own.pop(self.kept, None)
        own[self.kept if self.is_ours(value) else self.name] = value

    def __delete__(self, layer: Any) -> None:
        own = vars(layer)
        if self.name not in own and self.kept not in own:
            raise AttributeError(self.name)
        own.pop(self.name, None)
        own.pop(self.kept, None)


class Accelerated(torch.nn.Module):
    """A mixin: it stands before torch.nn's class among the bases."""

    _rnnfast_backend: str | None = None
    backend = Option("backend", is_backend, "The backend that the layer asks for, or None.")

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_backend(backend)
        if backend is not None:
            vars(self)["_rnnfast_backend"] = backend

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for option in _options(type(self)) if ACCELERATED not in state else ():
            if option.name in state and option.is_ours(state[option.name]):  # pickled when options were plain attributes
                setattr(self, option.name, state[option.name])

    def register_parameter(self, name: str, param: Any) -> None:
        _make_room(self, torch_private.own_parameters(self), name)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
        _make_room(self, torch_private.own_buffers(self), name)
        super().register_buffer(name, *args, **kwargs)

    def add_module(self, name: str, module: Any) -> None:
        _make_room(self, torch_private.own_modules(self), name)
        super().add_module(name, module)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError("torch.jit.script does not know rnnfast's layers: script rnnfast.restore(model, every=True)")

    def extra_repr(self) -> str:
        backend = self._rnnfast_backend
        return super().extra_repr() + (f", backend={backend!r}" if backend not in (None, "auto") else "")


def _options(cls: type) -> list[Option]:
    return [option for name in ("backend", "recompute") if isinstance(option := getattr(cls, name, None), Option)]


def _make_room(layer: torch.nn.Module, register: dict[str, Any], name: str) -> None:
    """Let `name` be registered though it is an option's: torch.nn refuses names of attributes that are not in the register."""
    taken = any(name in each for each in (vars(layer), *torch_private.registers(layer)))
    if not taken and any(option.name == name for option in _options(type(layer))):
        register[name] = None


# What of torch.nn runs


def cell_of(layer: Any) -> str:
    """The name of the layer's or cell's equations in `rnnfast.reference`; another word for a nonlinearity that is none."""
    if isinstance(layer, torch.nn.RNNBase):
        return str(layer.mode).lower()
    if isinstance(layer, torch.nn.LSTMCell):
        return "lstm"
    return "gru" if isinstance(layer, torch.nn.GRUCell) else f"rnn_{layer.nonlinearity}"


def _parts(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, (tuple, list)) else (value,)


def is_traced_by_fx(layer: torch.nn.Module, forward: Any, *values: Any) -> bool:
    """Whether torch.fx is to keep the call whole, as it keeps torch.nn's.

    It is if one of `values` stands for a tensor, and the layer's ``forward`` is `forward` itself. One that calls it would run
    twice. torch.nn's refuses to be traced there, and so does ours.
    """
    traced = any(isinstance(part, torch.fx.Proxy) for part in _parts(values))
    return traced and type(layer).forward is forward and "forward" not in layer.__dict__


def fx_node(layer: torch.nn.Module, *args: Any, **options: Any) -> Any:
    """The call as one node of a torch.fx graph, ``call_module``."""
    proxy: Any = next(part for part in _parts((*args, *options.values())) if isinstance(part, torch.fx.Proxy))
    if layer is proxy.tracer.root:
        raise TraceError("torch.fx traces models that contain a layer, not a layer: torch.nn.Sequential(layer)")
    return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(layer), args, options)


def checkpointed(run: Callable, *args: Any, also: Iterable[Any] = (), **options: Any) -> Any:
    """``run(*args, **options)`` under PyTorch's checkpoint. That notices that a tensor was edited before backward only if the
    tensor is an argument itself: so every tensor is, those inside others and those of `also` too."""
    count = len(args)
    tensors = [leaf for leaf in torch_private.tree_leaves((args, options)) if isinstance(leaf, Tensor)]

    def call(*given: Any) -> Any:
        return run(*given[:count], **options)

    return checkpoint(call, *args, *tensors, *also, use_reentrant=False)
