"""Dropout between layers as a PyTorch operator, ``rnnfast::dropout``: see `rnnfast.kernels.dropout`.

The seed comes from PyTorch's generator of the device, one number a layer. So ``torch.manual_seed`` fixes the masks,
checkpointing makes the same masks again, and a CUDA graph draws new ones at each replay. Only the seed is saved for backward.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rnnfast import torch_private
from rnnfast.ops import recurrence, rounds
from rnnfast.ops.schema import NAMESPACE
from rnnfast.ops.vmap import batched, each

__all__ = ["dropout", "mask", "seeds"]


@torch.library.custom_op(f"{NAMESPACE}::dropout", mutates_args=())
def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """`x` (T, B, W) with dropout. The derivative is the operator itself.

    Args:
        x: float16, bfloat16 or float32.
        seed: (1,) int64 on its device.
        p: the probability that an element is dropped, 0 to 1. The others are multiplied by 1 / (1 - p).
    """
    if not x.numel():
        return x.clone()
    with recurrence.on_device(x):
        return rounds.drop_out(x[None], seed, p)[0]


@dropped.register_fake
def _(x, seed, p):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, grad):
    (seed,) = ctx.saved_tensors

    def run(grad):
        # an operator has no tangent, a product has
        return (grad * mask(grad, seed, ctx.p) if torch_private.is_forward_mode() else dropped(grad, seed, ctx.p),)

    return *batched(run, (grad,)), None, None


dropped.register_autograd(_backward, setup_context=_setup)
dropped.register_vmap(partial(each, dropped))


def mask(like: Tensor, seed: Tensor, p: float) -> Tensor:
    """What `dropped` multiplies by: 0 or 1 / (1 - p), in the shape and dtype of `like`."""
    return dropped(torch.ones_like(like), seed, p)


def seeds(like: Tensor, p: float, count: int = 1) -> Tensor:
    """`count` seeds (count,) from PyTorch's generator of the device of `like`.

    Raises:
        RuntimeError: torch.dropout's, if `p` is no probability.
    """
    if not 0 <= p <= 1:
        torch.dropout(like, p, train=True)
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=like.device)


def dropout(x: Tensor, p: float) -> Tensor:
    """`x` (T, B, W) with dropout, with a seed from PyTorch's generator.

    Raises:
        RuntimeError: torch.dropout's, if `p` is no probability.
    """
    return dropped(x, seeds(x, p), float(p))
