"""The private names of torch that the operators need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["add_batch", "in_forward_mode", "is_mapped_by_autograd", "mapped_level", "remove_batch", "saved_tensor"]

# torch.autograd.grad(is_grads_batched=True) maps by an older vmap than torch.func's: its tensors, and how to unwrap them
is_mapped_by_autograd = torch._C._functorch.is_legacy_batchedtensor  # type: ignore[attr-defined]
remove_batch, add_batch = torch._remove_batch_dim, torch._add_batch_dim


def mapped_level() -> int:
    """The level of the innermost map of that older vmap."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on, by torch.func or torch.autograd."""
    return forward_ad._current_level >= 0


def saved_tensor(ctx: Any, index: int) -> Tensor | None:
    """``ctx.saved_tensors[index]`` without the others: PyTorch then checks whether this one alone was edited in place.

    Raises:
        RuntimeError: it was edited in place after it was saved.
    """
    return ctx._raw_saved_tensors[index].unpack()
