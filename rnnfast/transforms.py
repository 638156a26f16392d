"""What is done to the function that a call is part of: torch.func's transforms, forward-mode differentiation, tracing.

Asked at each call, so cheap, and known to Dynamo as constants while it traces: it guards them itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.autograd import forward_ad

__all__ = [
    "EXPANDED",
    "compiles_no_gradients",
    "constant",
    "equations_stand_in",
    "expanded",
    "innermost",
    "inside",
    "maybe_mapped",
    "obstacle",
]

_F = TypeVar("_F", bound=Callable)
EXPANDED = "torch.nn.utils._expanded_weights.expanded_weights_impl"
_modules, innermost = sys.modules, torch._C._functorch.peek_interpreter_stack  # type: ignore[attr-defined]


def constant(function: _F) -> _F:
    """``torch.compiler.assume_constant_result`` without importing Dynamo, and with it Triton, along with rnnfast."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def inside() -> tuple[str, ...]:
    """The transforms that the call is inside of: "forward" if forward-mode differentiation is on, torch.func's or
    torch.autograd's, and those of torch.func, the outermost first: "vmap", "grad", "jvp", "functionalize"."""
    stack = torch._C._functorch.get_interpreter_stack() or ()  # type: ignore[attr-defined]
    forward = ("forward",) if forward_ad._current_level >= 0 else ()
    return (*forward, *(interpreter.key().name.lower() for interpreter in stack))


def maybe_mapped(tensor: Tensor) -> bool:
    """Whether vmap may map over `tensor`, so that it cannot be looked into."""
    return "vmap" in inside() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]


@constant
def _may_be_expanded() -> bool:
    return EXPANDED in _modules


def expanded(tensors: Iterable[Any]) -> bool:
    """Whether among `tensors` are weights of torch.nn.utils' call_for_per_sample_grads."""
    return _may_be_expanded() and any(type(tensor).__name__ == "ExpandedWeight" for tensor in tensors)


@constant
def _torch_has_a_rule(padded_on_cpu: bool) -> bool:
    found = inside()
    return not found or (padded_on_cpu and {"grad", "functionalize"}.issuperset(found) and not TracingContext.try_get())


def equations_stand_in(padded_on_cpu: bool, tensors: Iterable[Any] = ()) -> bool:
    """Whether, where PyTorch's own layer is to run, the equations do in its stead, because it has no rule: for vmap and forward
    mode; for any transform of torch.func, unless the input is `padded_on_cpu` and nothing is being compiled; and for expanded
    weights, of an LSTM."""
    return not _torch_has_a_rule(padded_on_cpu) or expanded(tensors)


@constant
def _compiled() -> bool:
    return TracingContext.try_get() is not None and not torch.compiler.is_exporting()


def compiles_no_gradients(cell: str, x: Tensor, tensors: Iterable[Any]) -> bool:
    """Whether compiled code has no gradients of PyTorch's own layer on `x` and `tensors`: AOTAutograd fails on an operator of
    oneDNN's, an LSTM's on a CPU (PyTorch 2.13)."""
    return (
        cell == "lstm"
        and _compiled()
        and x.is_cpu
        and x.dtype != torch.float64
        and torch.is_grad_enabled()
        and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (x, *tensors))
    )


def obstacle() -> str | None:
    """What the kernels' operators have no rule for, or None."""
    found = inside()
    if "forward" in found:
        return "forward-mode differentiation is on, for which the kernels have no rule"
    if found and TracingContext.try_get():
        return "a torch.func transform is being compiled, for which the kernels have no rule"
    if "functionalize" in found:
        return "the call is inside torch.func.functionalize, for which the kernels have no rule"
    if torch.jit.is_tracing():
        return "torch.jit.trace is on: a trace should hold PyTorch's own operators only"
    onnx: Any = _modules.get("torch.onnx")
    if onnx is not None and onnx.is_in_onnx_export():
        return "the model is being exported to ONNX, which knows PyTorch's own operators only"
    return None
