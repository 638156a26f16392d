"""The private names of PyTorch that take its operators apart, as `rnnfast.torch_private` has all others.

tests/derive notices if one changes its meaning, because each derivation is compared with autograd.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Mode", "decomposition"]

# Operators outside of PyTorch's core that have a rule.
_MORE = {"hardtanh", "leaky_relu", "elu", "celu", "gelu", "addcmul", "addcdiv", "lerp", "square", "softplus", "logaddexp"}


class Mode(TorchDispatchMode):
    """A mode of dispatch that leaves Dynamo out. Others ask Dynamo not to compile them, which imports it: seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@cache
def _rules() -> dict[Any, Callable]:
    from torch._decomp import core_aten_decompositions, decomposition_table

    table = core_aten_decompositions()
    for operator, rule in decomposition_table.items():
        if operator.__name__.split(".")[0].removesuffix("_backward") in _MORE:
            table[operator] = rule
    # What is around a rule converts dtypes, which float32 tiles need not, and imports Dynamo to do so.
    return {operator: inspect.unwrap(rule) for operator, rule in table.materialize().items()}


def decomposition(operator: Any) -> Callable | None:
    """PyTorch's own rule that computes an operator by simpler ones, or None. The first call takes a second."""
    rule = _rules().get(operator)
    known: Any = torch._C._dispatch_has_kernel_for_dispatch_key  # type: ignore[attr-defined]
    if rule is None and known(operator.name(), "CompositeImplicitAutograd"):
        return operator.decompose
    return rule
