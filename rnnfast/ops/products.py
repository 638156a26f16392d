"""Matrix products around the kernels, in the precision of PyTorch's recurrent layers. In compiled code a product is a plain
matmul of the graph, with the precision of matmuls (docs/numerics.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnfast.choice.kernel_plan import precision
from rnnfast.torch_private import matmul_precision

__all__ = ["added_product", "product", "wide_product"]


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` of matrices or batches of them."""
    multiply: Any = torch.bmm if a.dim() == 3 else torch.mm
    with matmul_precision(precision(), a):
        return multiply(a, b) if out is None else multiply(a, b, out=out)


def added_product(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``c + a @ b`` of matrices or batches of them."""
    multiply: Any = torch.baddbmm if a.dim() == 3 else torch.addmm
    with matmul_precision(precision(), a):
        return multiply(c, a, b)


def wide_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in float32. That saves one rounding, which is worth little: see docs/numerics.md."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return product(a.float(), b.float(), out)
    multiply: Any = torch.bmm if a.dim() == 3 else torch.mm
    return multiply(a, b, out_dtype=torch.float32, **({} if out is None else {"out": out}))
