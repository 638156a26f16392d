"""`explain`: what will run for a call, and why not another backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import backends, families, tuning
from rnnfast.nn import _Recurrent

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. ``print`` it.

    Attributes:
        backend: the backend that will run: "triton", "torch" or "reference".
        asked: how that was asked for, in words.
        obstacles: all that keeps the Triton kernels from running this call; empty if nothing does.
        call: the layer and its input, in words.
        details: how it will run, in words.
        tuning: what `rnnfast tune` has measured for this call, in words; empty where that has no say.
    """

    backend: str
    asked: str
    obstacles: tuple[str, ...]
    call: str
    details: str
    tuning: str = ""

    def __str__(self) -> str:
        lines = [self.call, f"  backend: {self.backend} ({self.asked})", f"  how: {self.details}"]
        lines += [f"  tuning: {self.tuning}"] if self.tuning else []
        lines += [f"  not triton: {obstacle}" for obstacle in self.obstacles]
        return "\n".join(lines)


def explain(module: torch.nn.Module, input: Tensor | PackedSequence, hx: Any = None) -> Explanation:
    """Say which backend will run ``module(input, hx)`` as things stand now, and why not another. Runs nothing.

    Args:
        module: an `rnnfast.LSTM`, `rnnfast.GRU` or `rnnfast.RNN`.
        input, hx: as for the call.

    Returns:
        An `Explanation`; its ``str`` is for people.

    Raises:
        TypeError: if `module` is not a layer of rnnfast.

    Example:
        >>> print(rnnfast.explain(rnnfast.LSTM(3, 4, backend="torch"), torch.zeros(5, 2, 3)))
        LSTM(3, 4, backend='torch'), input (5, 2, 3) torch.float32 on cpu
          backend: torch (asked for by backend=)
          how: PyTorch's own layer, on ATen
          not triton: the tensors are on the CPU, where the kernels run only in Triton's interpreter (TRITON_INTERPRET=1)
    """
    if not isinstance(module, _Recurrent):
        raise TypeError(f"module should be an rnnfast.LSTM, GRU or RNN, got {type(module).__name__}")
    packed = isinstance(input, PackedSequence)
    tensor = input.data if isinstance(input, PackedSequence) else input
    shape = f"{'packed ' if packed else ''}{tuple(tensor.shape)}"
    call = f"{module}, input {shape} {tensor.dtype} on {tensor.device}"
    name, source = backends.asked(module.backend)
    by = f"asked for by {source}" if name else "chosen for this call"
    obstacles = module._obstacles(input, None)
    if not packed and not module._is_plain(input, hx):
        obstacles += ("torch.nn itself serves or refuses a call of this form",)
        backend = "torch"
    else:
        backend = "torch" if name == "torch" or module._obstacles(input, name) else name or "triton"
        if name is None and backend == "triton" and module._torch_wins(tensor, hx):
            backend, by = "torch", "measured as the fastest for this call by rnnfast tune"
    if name not in (None, backend):
        by = f"{name!r} was {by}, but cannot run this call"
    if backends.strict() and name != "torch" and module._obstacles(input, name):
        by += "; RNNFAST_STRICT is set, so the call raises"
    shape = module._shape(tensor, hx) if not obstacles and name in (None, "triton") else None
    details = {"torch": _torch, "triton": _triton, "reference": _reference}[backend](module, tensor, shape)
    return Explanation(backend, by, obstacles, call, details, _tuning(shape, tensor.device) if shape else "")


def _tuning(shape: tuning.Shape, device: torch.device) -> str:
    gpu = families.limits(device)
    if gpu is None or families.asked() != "auto":
        return ""
    table = tuning.table(gpu)
    command = f"rnnfast tune --cell {shape.cell} --hidden {shape.H} --input {shape.I} --batch {shape.B} --steps {shape.T}"
    command += f" --dtype {'tf32' if shape.precision == 'tf32' else shape.dtype} --layers {shape.layers}"
    advice = f"to measure it: {command}{' --bidirectional' if shape.directions > 1 else ''}"
    if table.unused:
        return f"not measured here ({table.unused}); {advice}"
    entry = tuning.kernels(gpu, shape.cell, shape.T, shape.B, shape.H, shape.dtype, shape.precision, shape.training)
    if entry is None:
        return f"{table.path} has nothing near this call; {advice}"
    return f"by {table.path}, measured at {entry.shape}"


def _torch(module: _Recurrent, tensor: Tensor, shape: tuning.Shape | None) -> str:
    cudnn = tensor.is_cuda and torch.backends.cudnn.is_acceptable(tensor)
    return f"PyTorch's own layer, on {'cuDNN' if cudnn else 'ATen'}"


def _reference(module: _Recurrent, tensor: Tensor, shape: tuning.Shape | None) -> str:
    return "the equations in plain PyTorch, one time step after another"


def _triton(module: _Recurrent, tensor: Tensor, shape: tuning.Shape | None) -> str:
    from rnnfast.kernels import step

    assert shape is not None
    dtype = getattr(torch, shape.dtype)
    steps, rows = shape.T, shape.B
    times = f"{shape.layers} layers x {shape.directions} directions x"

    def words(backward: bool) -> str:
        training = backward or shape.training
        choice = families.pick(shape.cell, steps, rows, shape.H, dtype, families.precision(), backward, training, tensor.device)
        if choice.persistent is not None:
            launch = f"one launch for {min(choice.persistent.steps, steps)} time steps: {times} {steps} steps"
            return f"persistent kernels, {launch}; {choice.persistent.words(rows)}"
        tiles = choice.step
        return (
            f"step kernels{', interpreted' if step.mode() == 'interpreted' else ''}, one launch a time step: "
            f"{times} {steps} steps; a program computes {tiles.BLOCK_H} units of {tiles.BLOCK_B} rows in chunks of "
            f"{tiles.BLOCK_K}, {tiles.num_warps} warps, {tiles.num_stages} stages"
            + (f"; not persistent: {choice.reason}" if choice.reason else "")
        )

    forward, backward = words(False), words(True)
    text = forward if forward == backward else f"forward: {forward}\n       backward: {backward}"
    return text + (f"; products in {families.precision()}" if dtype == torch.float32 else "")
