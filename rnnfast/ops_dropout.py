"""Dropout between layers as PyTorch operators, ``rnnfast::dropout`` and its backward: see `rnnfast.kernels.dropout`.

The seed is drawn from PyTorch's generator of the device, one number a layer: ``torch.manual_seed`` fixes the masks,
checkpointing makes them again, a CUDA graph draws anew at each replay. Kept for backward: the seed.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnfast import ops, ops_autograd

__all__ = ["dropout", "dropout_joined"]


@torch.library.custom_op("rnnfast::dropout", mutates_args=())
def dropout_joined(first: Tensor, second: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """One or two directions (T, B, H), side by side, with dropout: (T, B, H) or (T, B, 2 H).

    Args:
        first, second: float16, bfloat16 or float32; `second` None for one direction.
        seed: one int64 on their device.
        p: the probability to be dropped, 0 to 1; what stays is multiplied by 1 / (1 - p).
    """
    from rnnfast.kernels import dropout as kernel

    T, B, H = first.shape
    first = first.contiguous()
    W = H if second is None else 2 * H
    joined = first.new_empty(T, B, W)
    if joined.numel():
        sides = (first.view(T * B, H), None if second is None else second.contiguous().view(T * B, H))
        with ops.on_device(first):
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
        with ops.on_device(joined):
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
        if forward_ad._current_level < 0:
            return _dropout_apart(grad, seed, ctx.p, ctx.directions)
        # an operator has no tangent, a product has
        return tuple(
            part * mask
            for part, mask in zip(
                grad.chunk(ctx.directions, -1), _dropout_apart(torch.ones_like(grad), seed, ctx.p, ctx.directions), strict=False
            )
        )

    first, second = (*ops_autograd.batched(run, (grad,)), None)[:2]
    return first, second if ctx.directions == 2 else None, None, None


def _setup_apart(ctx, inputs, output):
    _, seed, ctx.p, ctx.directions = inputs
    ctx.save_for_backward(seed)


def _backward_apart(ctx, first, second):
    def run(*parts):
        return (dropout_joined(*(*parts, None)[:2], ctx.saved_tensors[0], ctx.p),)

    (joined,) = ops_autograd.batched(run, (first, second)[: ctx.directions])
    return joined, None, None, None


dropout_joined.register_autograd(_backward_joined, setup_context=_setup_joined)
_dropout_apart.register_autograd(_backward_apart, setup_context=_setup_apart)
dropout_joined.register_vmap(partial(ops_autograd.vmap_each, dropout_joined))
_dropout_apart.register_vmap(partial(ops_autograd.vmap_each, _dropout_apart))


def dropout(directions: list[Tensor], p: float) -> Tensor:
    """`dropout_joined` with a seed of PyTorch's generator.

    Raises:
        RuntimeError: torch.dropout's, for a `p` that is none.
    """
    first = directions[0]
    if not 0 <= p <= 1:
        torch.dropout(first, p, train=True)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=first.device)
    return dropout_joined(first, directions[1] if len(directions) == 2 else None, seed, float(p))
