"""A layer whose kernels run as compiled, against the reference, under the numerics contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

import rnnfast
from rnnfast import ops
from rnnfast.kernels.one_program import plan
from rnnfast.numerics import Contract, Verdict
from tests.ptx.gpu import DTYPES, settings


class Layer(NamedTuple):
    """One layer. `marked`: with lengths and resets. `inference`: without gradients too, which is another kernel. `rows`: of a
    program of the one-program kernels, else as planned."""

    family: str  # "step", "persistent" or "one_program"
    cell: str  # "lstm", "gru", "rnn_tanh" or "rnn_relu"
    dtype: str  # of `DTYPES`
    H: int = 32
    B: int = 3
    T: int = 3
    I: int = 5
    marked: bool = False
    reverse: bool = False
    inference: bool = True
    rows: int = 0

    def __str__(self) -> str:
        options = " marked" * self.marked + " reversed" * self.reverse + f" rows={self.rows}" * bool(self.rows)
        return f"{self.family} {self.cell} {self.dtype} H={self.H} B={self.B} T={self.T}{options}"

    def run(self, backward: bool = True) -> list[Verdict]:
        """Forward, `backward` and in inference, each tensor against the reference in float64."""
        return _run(self, backward)


@contextmanager
def _rows(rows: int) -> Iterator[None]:
    """Let the one-program kernels be planned with `rows` batch rows a program; 0 for any."""
    with mock.patch.object(plan, "BATCH_ROWS", (rows,) if rows else plan.BATCH_ROWS):
        plan._rank.cache_clear()
        yield
    plan._rank.cache_clear()


class _Tf32Linear(torch.autograd.Function):
    """x w^T + b with products of tensor cores in TF32, forward and backward."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return _tf32(x) @ _tf32(w).t() + b

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return _tf32(grad) @ _tf32(w), _tf32(grad).t() @ _tf32(x), grad.sum(0)


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """Without the 13 bits that a tensor core does not look at."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


class _Tf32Products(TorchFunctionMode):
    """What PyTorch's own layer does with TF32 on a GPU; a CPU has none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return _Tf32Linear.apply(*args) if function is linear else function(*args, **(kwargs or {}))


def _run(layer: Layer, backward: bool) -> list[Verdict]:
    dtype, tf32 = DTYPES[layer.dtype]
    generator = torch.Generator().manual_seed(0)
    states = 2 if layer.cell == "lstm" else 1
    rows = rnnfast.reference.GATES[layer.cell] * layer.H

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    scale = layer.H**-0.5
    given = {"x": random(layer.T, layer.B, layer.I)}
    given |= {f"state {n}": random(layer.B, layer.H) for n in range(states)}
    given |= {"w_ih": random(rows, layer.I, scale=scale), "w_hh": random(rows, layer.H, scale=scale)}
    given |= {"b_ih": random(rows, scale=scale), "b_hh": random(rows, scale=scale)}
    options = {"reverse": layer.reverse}
    if layer.marked:
        options["lengths"] = torch.randint(0, layer.T + 1, (layer.B,), generator=generator)
        options["lengths"][0] = layer.T
        options["resets"] = torch.rand(layer.T, layer.B, generator=generator) < 0.3
        given |= {f"reset_to {n}": random(layer.B, layer.H) for n in range(states)}
    upstream = [random(layer.T, layer.B, layer.H), *(random(layer.B, layer.H) for _ in range(states))]

    def outputs(call, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        x, *rest = tensors.values()
        start, weights, reset_to = rest[:states], rest[states : states + 4], rest[states + 4 :]
        y, last = call(layer.cell, x, tuple(start), *weights, **options, **({"reset_to": tuple(reset_to)} if reset_to else {}))
        return y, *last

    def everything(call, of: torch.dtype) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.to(of, copy=True).requires_grad_() for name, tensor in given.items()}
        names = ("y", "h", "c")
        outs = outputs(call, tensors)
        found = dict(zip(names, outs, strict=False))
        if backward:
            grads = torch.autograd.grad(outs, list(tensors.values()), [grad.to(of) for grad in upstream])
            found |= {f"gradient of {name}": grad for name, grad in zip(tensors, grads, strict=True)}
        if layer.inference:
            with torch.no_grad():
                outs = outputs(call, tensors)
            found |= {f"{name} in inference": out for name, out in zip(names, outs, strict=False)}
        return found

    with _Tf32Products() if tf32 else nullcontext():
        common = everything(rnnfast.reference.layer, dtype)
    with settings(layer.family, tf32), _rows(layer.rows):
        ours = everything(ops.layer, dtype)
    return Contract(lambda: everything(rnnfast.reference.layer, torch.float64), common, dtype, tf32).judge(ours)
