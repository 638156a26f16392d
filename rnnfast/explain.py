"""`explain`: what will run for a call, and why not another backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import backends, sequences
from rnnfast.choice import kernel_plan, tuned, tuning_file
from rnnfast.dispatch import Dispatched
from rnnfast.nn import _Recurrent
from rnnfast.sequences import Sequences

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


def explain(module: torch.nn.Module, input: Tensor | PackedSequence, hx: Any = None, **options: Any) -> Explanation:
    """Say which backend will run ``module(input, hx, **options)`` as things stand now, and why not another. Runs nothing.

    Args:
        module: an `rnnfast.LSTM`, `rnnfast.GRU` or `rnnfast.RNN`, or a cell of these.
        input, hx, options: as for the call.

    Returns:
        An `Explanation`; its ``str`` is for people.

    Raises:
        TypeError: if `module` is neither a layer nor a cell of rnnfast, or for an option that is none.
        TypeError, RuntimeError, ValueError: for wrong options, as the call would.

    Example:
        >>> print(rnnfast.explain(rnnfast.LSTM(3, 4, backend="torch"), torch.zeros(5, 2, 3)))
        LSTM(3, 4, backend='torch'), input (5, 2, 3) torch.float32 on cpu
          backend: torch (asked for by backend=)
          how: PyTorch's own layer, on ATen
          not triton: the tensors are on the CPU, where the kernels run only in Triton's interpreter (TRITON_INTERPRET=1)
    """
    if not isinstance(module, Dispatched):
        raise TypeError(f"module should be an rnnfast.LSTM, GRU or RNN, or a cell, got {type(module).__name__}")
    layer = module if isinstance(module, _Recurrent) else None
    if options and layer is None:
        raise TypeError(f"{type(module).__name__} takes no {', '.join(options)}")
    packed = isinstance(input, PackedSequence)
    tensor = input.data if isinstance(input, PackedSequence) else input
    given = None
    shape = f"{'packed ' if packed else ''}{tuple(tensor.shape)}"
    call = f"{module}, input {shape} {tensor.dtype} on {tensor.device}"
    name, source = backends.asked(module.backend)
    by = f"asked for by {source}" if name else "chosen for this call"
    obstacles = module._obstacles(input, None)
    if not module._is_plain(input, hx):
        obstacles += ("torch.nn itself serves or refuses a call of this form",)
        backend = "torch"
    else:
        given = layer._read(input, hx, **options) if layer and options else sequences.Sequences()
        backend = "torch" if name == "torch" or module._obstacles(input, name) else name or "triton"
        if name is None and backend == "triton" and not options and module._torch_wins(input, hx):
            backend, by = "torch", "measured as the fastest for this call by rnnfast tune"
    if name not in (None, backend):
        by = f"{name!r} was {by}, but cannot run this call"
    if backends.strict() and name != "torch" and module._obstacles(input, name):
        by += "; RNNFAST_STRICT is set, so the call raises"
    shape = None
    if (
        layer
        and isinstance(input, Tensor)
        and not options
        and not layer.proj_size
        and not obstacles
        and name in (None, "triton")
    ):
        shape = layer._shape(input, hx)
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (tensor, *module.parameters()))
    details = {"torch": _torch, "triton": _triton, "reference": _reference}[backend](module, input, given, training)
    if layer and training:
        details += _recompute(layer, backend, given)
    return Explanation(backend, by, obstacles, call, details, _tuning(shape, tensor.device) if shape else "")


def _recompute(layer: _Recurrent, backend: str, given: Sequences | None) -> str:
    if not layer.recompute:
        return ""
    if backend != "triton":
        return "; backward runs it once more"
    if layer.mode in ("RNN_TANH", "RNN_RELU"):
        return "; backward needs no gates, so recompute changes nothing"
    if given and given.details:
        return "; gates are kept, as states or gates are returned, whatever recompute says"
    return "; backward computes the gates again"


def _tuning(shape: tuning_file.Shape, device: torch.device) -> str:
    gpu = kernel_plan.limits(device)
    if gpu is None or kernel_plan.asked() != "auto":
        return ""
    table = tuned.table(gpu)
    command = f"rnnfast tune --cell {shape.cell} --hidden {shape.H} --input {shape.I} --batch {shape.B} --steps {shape.T}"
    command += f" --dtype {'tf32' if shape.precision == 'tf32' else shape.dtype} --layers {shape.layers}"
    advice = f"to measure it: {command}{' --bidirectional' if shape.directions > 1 else ''}"
    if table.unused:
        return f"not measured here ({table.unused}); {advice}"
    entry = tuned.kernels(gpu, shape.cell, shape.T, shape.B, shape.H, shape.dtype, shape.precision, shape.training)
    if entry is None:
        return f"{table.path} has nothing near this call; {advice}"
    return f"by {table.path}, measured at {entry.shape}"


def _torch(module: Dispatched, input: Tensor | PackedSequence, given: Sequences | None, training: bool) -> str:
    if given and (given.resets is not None or given.details):
        return "the equations in plain PyTorch, one time step after another: PyTorch's own layer has no resets, states or gates"
    if not isinstance(module, _Recurrent):
        return "PyTorch's own cell"
    tensor = input.data if isinstance(input, PackedSequence) else input
    cudnn = tensor.is_cuda and torch.backends.cudnn.is_acceptable(tensor)
    lengths = ", on rows packed by their lengths, which are read on the CPU" if given and given.only_lengths else ""
    return f"PyTorch's own layer, on {'cuDNN' if cudnn else 'ATen'}{lengths}"


def _reference(module: Dispatched, input: Tensor | PackedSequence, given: Sequences | None, training: bool) -> str:
    return "the equations in plain PyTorch, one time step after another"


def _triton(module: Dispatched, input: Tensor | PackedSequence, given: Sequences, training: bool) -> str:
    from rnnfast.kernels import runtime

    layer = module if isinstance(module, _Recurrent) else None
    layers, directions = (layer.num_layers, 2 if layer.bidirectional else 1) if layer else (1, 1)
    extras = "; the projection is one matrix with the recurrent weights" if layer and layer.proj_size else ""
    marked = given.marked
    if isinstance(input, PackedSequence):
        tensor, sizes = input.data, input.batch_sizes
        steps, rows = sizes.numel(), int(sizes[0])
        marked = int(sizes[-1]) < rows
        extras += "; packed rows are padded inside" if marked else ""
    else:
        tensor = input
        sizes = tensor.shape[:-1] if layer else (1, *tensor.shape[:-1])
        steps, rows = (*sizes, 1)[:2]
        if tensor.dim() == 3 and layer and layer.batch_first:
            steps, rows = rows, steps
    kind = tensor.device.type
    dtype = torch.get_autocast_dtype(kind) if backends.autocast(kind) else tensor.dtype
    cell, units = module.mode.lower(), int(module.hidden_size)  # type: ignore[arg-type]
    times = f"{layers} layers x {directions} directions x"

    def words(backward: bool) -> str:
        keeps = backward or training
        choice = kernel_plan.pick(
            cell, steps, rows, units, dtype, kernel_plan.precision(), backward, keeps, tensor.device, marked
        )
        interpreted = ", interpreted" if runtime.mode() == "interpreted" else ""
        return (
            f"{choice.family} kernels{interpreted}, {choice.plan.launch_words(steps)}: {times} {steps} steps; "
            f"{choice.plan.words(rows)}" + (f"; not {choice.wanted}: {choice.reason}" if choice.reason else "")
        )

    forward, backward = words(False), words(True)
    text = (forward if forward == backward else f"forward: {forward}\n       backward: {backward}") + extras
    return text + (f"; products in {kernel_plan.precision()}" if dtype == torch.float32 else "")
