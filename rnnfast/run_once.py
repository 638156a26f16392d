"""Runs a model once, tells of its recurrent calls, and leaves it as it was: for `rnnfast.explain` and `rnnfast.tune`."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rnnfast import torch_private
from rnnfast.choice import calls
from rnnfast.choice.calls import Seen
from rnnfast.nn.layer import Layer
from rnnfast.torch_private import tree_leaves

__all__ = ["FUNCTION", "ITSELF", "RECURRENT", "check", "recurrent", "run"]

FUNCTION = "rnnfast.functional"  # the name of calls that no module makes
ITSELF = "the model itself"  # the name of the model among its modules

RECURRENT = torch.nn.RNNBase | torch.nn.RNNCellBase | Layer
Called = Callable[[str, torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]


def check(model: Any, who: str) -> None:
    """Raise an error if `who` cannot run `model`.

    Raises:
        TypeError: if it is not a module.
        ValueError: if it has lazy parameters that no call has given a size yet. Such a call would not leave it as it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got {type(model).__name__}")
    if any(torch.nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(f"the model has parameters without a size yet: call it once before {who}")


def recurrent(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The recurrent layers and cells of a model by their names, torch.nn's too."""
    return {name or ITSELF: module for name, module in model.named_modules() if isinstance(module, RECURRENT)}


def run(
    model: torch.nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    called: Called,
    tell: Callable[[Seen], None],
) -> None:
    """Run a model forward, as it is, and leave it as it was.

    Args:
        called: told of each call of a module among `recurrent`, when it has run: its name, the module, and what it was called
            with. The modes and transforms of the call are still on.
        tell: told of each recurrent call of rnnfast before it runs, as by `rnnfast.choice.calls.watched`.
    """
    with ExitStack() as stack:
        for name, module in recurrent(model).items():
            hook = module.register_forward_hook(_hook(name, called), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(_unchanged(model, (inputs, kwargs)))
        stack.enter_context(calls.watched(tell))
        stack.enter_context(torch_private.uncompiled())  # compiled code would not tell of its calls
        model(*inputs, **kwargs)


def _hook(name: str, called: Called) -> Callable:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        called(name, module, args, kwargs)

    return hook


@contextmanager
def _unchanged(model: torch.nn.Module, inputs: Any) -> Iterator[None]:
    """What runs in the ``with`` block leaves no trace: in the attributes of the modules, in the numbers of their parameters and
    buffers and of the inputs, and in the generators of PyTorch, Python and NumPy."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    places = [place for module in modules for place in (vars(module), *torch_private.registers(module))]
    kept = [dict(place) for place in places]
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *leaves)}
    tensors = {number: tensor for number, tensor in tensors.items() if tensor.layout == torch.strided and not tensor.is_meta}
    copies = {number: tensor.detach().clone() for number, tensor in tensors.items()}
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numpys = numpy.random.get_state() if numpy else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpys)
        for place, before in zip(places, kept, strict=True):
            for name in place.keys() - before.keys():
                del place[name]
            place.update(before)
        for number, tensor in tensors.items():
            if not torch.equal(tensor, copies[number]):
                with torch.inference_mode() if tensor.is_inference() else nullcontext(), torch.no_grad():
                    tensor.copy_(copies[number])
