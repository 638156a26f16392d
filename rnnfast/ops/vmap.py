"""vmap over the operators: rows of a larger batch for the kernels. One call for each where weights differ, or where a stack has
dropout between its layers, because the place of a row in the batch decides what of it is dropped.

Also the older vmap of torch.autograd.grad's ``is_grads_batched=True`` (`batched`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnnfast import torch_private
from rnnfast.ops import operators
from rnnfast.ops.operators import Backward, Forward, Grads, Results
from rnnfast.ops.schema import batch_axis

__all__ = ["batched", "each"]


def _rule(operator, arguments_type, results_type) -> Callable:
    """The rule of an operator that takes and returns the tensors of these records."""
    axes = [batch_axis(name) for name in arguments_type._fields]
    result_axes = [batch_axis(name) for name in results_type._fields]

    def rule(info, in_dims, *arguments):
        shared = all(axis is not None or dim is None for axis, dim in zip(axes, in_dims, strict=False))
        if not shared or arguments_type(*arguments).seeds is not None:
            return each(operator, info, in_dims, *arguments)
        size = info.batch_size
        folded = [
            _folded(value, dim, axis, size) if isinstance(value, Tensor) and axis is not None else value
            for value, dim, axis in zip(arguments, in_dims, axes, strict=False)
        ]
        results = operator(*folded)
        dims = tuple(result.dim() + axis if result.numel() else None for result, axis in zip(results, result_axes, strict=True))
        return tuple(
            result if dim is None else result.unflatten(dim, (size, -1)) for result, dim in zip(results, dims, strict=True)
        ), dims

    return rule


def each(operator, info, in_dims, *arguments):
    """The rule of an operator that is called once for each."""
    pairs = list(zip(arguments, in_dims, strict=True))
    calls = [
        operator(*(value if dim is None else value.select(dim, n) for value, dim in pairs)) for n in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(results) for results in zip(*calls, strict=True)), (0,) * len(calls[0])


def _folded(tensor: Tensor, dim: int | None, axis: int, size: int) -> Tensor:
    """`tensor`, mapped over along `dim`, with that dimension inside its batch `axis`, which counts from the last one."""
    if not tensor.numel():  # nothing was saved
        return tensor if dim is None else tensor.select(dim, 0)
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, axis - 1).flatten(axis - 1, axis)


def batched(run: Callable[..., tuple[Tensor, ...]], upstream: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """``run(*upstream)``, also where torch.autograd.grad maps over `upstream` (``is_grads_batched=True``).

    torch.autograd.grad maps by an older vmap, to which no rule can be given, and in which the derivatives of an
    autograd.Function are lost. Here torch.func's vmap does it instead.
    """
    mapped = [n for n, grad in enumerate(upstream) if grad is not None and torch_private.is_legacy_batched(grad)]
    if not mapped:
        return run(*upstream)
    level = torch_private.batch_dim_level()

    def one(*grads):
        replaced = list(upstream)
        for n, grad in zip(mapped, grads, strict=True):
            replaced[n] = grad
        return run(*replaced)

    # the size 0 would be taken for a tensor without a mapped dimension, but each of these has one
    whole = (torch_private.remove_batch_dim(upstream[n], level) for n in mapped)
    return tuple(torch_private.add_batch_dim(grad, level) for grad in torch.func.vmap(one)(*whole))


operators.forward.register_vmap(_rule(operators.forward, Forward, Results))
operators.backward.register_vmap(_rule(operators.backward, Backward, Grads))
