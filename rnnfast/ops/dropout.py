"""Dropout between layers as PyTorch operators, ``rnnfast::dropout`` and its backward: see `rnnfast.kernels.dropout`.

The seed comes from PyTorch's generator of the device, one number a layer. So ``torch.manual_seed`` fixes the masks,
checkpointing makes the same masks again, and a CUDA graph draws new ones at each replay. Only the seed is saved for backward.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rnnfast import torch_private
from rnnfast.ops import recurrence
from rnnfast.ops.vmap import batched, each

__all__ = ["dropout", "dropout_joined"]


@torch.library.custom_op("rnnfast::dropout", mutates_args=())
def dropout_joined(first: Tensor, second: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """One or two directions (T, B, H), side by side, with dropout: (T, B, H) or (T, B, 2 H).

    Args:
        first, second: float16, bfloat16 or float32; `second` None for one direction.
        seed: one int64 on their device.
        p: the probability that an element is dropped, 0 to 1. The others are multiplied by 1 / (1 - p).
    """
    from rnnfast.kernels import dropout as kernel

    T, B, H = first.shape
    first = first.contiguous()
    W = H if second is None else 2 * H
    joined = first.new_empty(T, B, W)
    if joined.numel():
        sides = (first.view(T * B, H), None if second is None else second.contiguous().view(T * B, H))
        with recurrence.on_device(first):
            kernel.apply(joined.view(T * B, W), *sides, seed, p, backward=False)
    return joined


@torch.library.custom_op("rnnfast::dropout_backward", mutates_args=())
def _dropout_apart(joined: Tensor, seed: Tensor, p: float, directions: int) -> tuple[Tensor, Tensor]:
    """The gradients of both directions, the second empty if there is none."""
    from rnnfast.kernels import dropout as kernel

    T, B, W = joined.shape
    first, second = (joined.new_empty(T, B, W // directions) if n < directions else joined.new_empty(0) for n in (0, 1))
    if joined.numel():
        sides = [side.view(T * B, -1) if side.numel() else None for side in (first, second)]
        with recurrence.on_device(joined):
            kernel.apply(joined.contiguous().view(T * B, W), sides[0], sides[1], seed, p, backward=True)
    return first, second


@dropout_joined.register_fake
def _(first, second, seed, p):
    T, B, H = first.shape
    return first.new_empty(T, B, H if second is None else 2 * H)


@_dropout_apart.register_fake
def _(joined, seed, p, directions):
    T, B, W = joined.shape
    return joined.new_empty(T, B, W // directions), joined.new_empty((T, B, W // 2) if directions == 2 else (0,))


def _setup_joined(ctx, inputs, output):
    _, second, seed, ctx.p = inputs
    ctx.directions = 1 if second is None else 2
    ctx.save_for_backward(seed)


def _backward_joined(ctx, grad):
    (seed,) = ctx.saved_tensors

    def run(grad):
        if not torch_private.is_forward_mode():
            return _dropout_apart(grad, seed, ctx.p, ctx.directions)
        # an operator has no tangent, a product has
        return tuple(
            part * mask
            for part, mask in zip(
                grad.chunk(ctx.directions, -1), _dropout_apart(torch.ones_like(grad), seed, ctx.p, ctx.directions), strict=False
            )
        )

    first, second = (*batched(run, (grad,)), None)[:2]
    return first, second if ctx.directions == 2 else None, None, None


def _setup_apart(ctx, inputs, output):
    _, seed, ctx.p, ctx.directions = inputs
    ctx.save_for_backward(seed)


def _backward_apart(ctx, first, second):
    def run(*parts):
        return (dropout_joined(*(*parts, None)[:2], ctx.saved_tensors[0], ctx.p),)

    (joined,) = batched(run, (first, second)[: ctx.directions])
    return joined, None, None, None


dropout_joined.register_autograd(_backward_joined, setup_context=_setup_joined)
_dropout_apart.register_autograd(_backward_apart, setup_context=_setup_apart)
dropout_joined.register_vmap(partial(each, dropout_joined))
_dropout_apart.register_vmap(partial(each, _dropout_apart))


def dropout(directions: list[Tensor], p: float) -> Tensor:
    """`dropout_joined` of one or two directions, with a seed from PyTorch's generator.

    Raises:
        RuntimeError: torch.dropout's, if `p` is no probability.
    """
    first = directions[0]
    if not 0 <= p <= 1:
        torch.dropout(first, p, train=True)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=first.device)
    return dropout_joined(first, directions[1] if len(directions) == 2 else None, seed, float(p))
