"""`explain` says what will run for a call, and why another backend will not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import torch_private
from rnnfast.choice import kernel_plan, pipeline, trust, tuned, tuning_file
from rnnfast.choice.decide import Decision, unknown_to_torch
from rnnfast.choice.obstacles import autocast
from rnnfast.nn import cells, layer, sequence
from rnnfast.nn.base import cell_of
from rnnfast.nn.cells import Cell
from rnnfast.nn.layer import Layer
from rnnfast.nn.options import CallOptions
from rnnfast.nn.sequence import Sequence
from rnnfast.reference import spec_of
from rnnfast.settings import CANARY, strict

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. ``print`` shows it.

    Attributes:
        backend: the backend that will run: "triton", "torch" or "reference".
        asked: how this backend was chosen, in words.
        obstacles: every reason why the Triton kernels cannot run this call. Empty if they can.
        call: the layer and its input, in words.
        details: how the call will run, in words.
        tuning: what `rnnfast tune` measured for this call, in words. Empty if a measurement would not matter.
        predicted: the predicted times of the kernels and of cuDNN, and whether this GPU's canary found the kernels right, in
            words. Empty if a prediction would not matter.
    """

    backend: str
    asked: str
    obstacles: tuple[str, ...]
    call: str
    details: str
    tuning: str = ""
    predicted: str = ""

    def __str__(self) -> str:
        lines = [self.call, f"  backend: {self.backend} ({self.asked})", f"  how: {self.details}"]
        lines += [f"  tuning: {self.tuning}"] if self.tuning else []
        lines += [f"  predicted: {self.predicted}"] if self.predicted else []
        lines += [f"  not triton: {obstacle}" for obstacle in self.obstacles]
        return "\n".join(lines)


def explain(module: torch.nn.Module, input: Tensor | PackedSequence, hx: Any = None, **options: Any) -> Explanation:
    """Say which backend will run ``module(input, hx, **options)`` as things stand now, and why not another. Runs nothing.

    Args:
        module: an `rnnfast.LSTM`, `rnnfast.GRU` or `rnnfast.RNN`, a cell of these, or an `rnnfast.Layer`.
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
    if not isinstance(module, (Sequence, Cell, Layer)):
        raise TypeError(f"module should be an rnnfast.LSTM, GRU or RNN, a cell or a Layer, got {type(module).__name__}")
    tensor = input.data if isinstance(input, PackedSequence) else input
    shape = f"{'packed ' if isinstance(input, PackedSequence) else ''}{tuple(tensor.shape)}"
    call = f"{module}, input {shape} {tensor.dtype} on {tensor.device}"
    expanded = torch_private.is_expanded(module)  # which cannot be asked
    training = torch.is_grad_enabled() and (expanded or any(each.requires_grad for each in (tensor, *module.parameters())))
    tuning = predicted = ""
    with CANARY.within("trust" if CANARY.get() == "trust" else "off"):  # nothing is run here
        if isinstance(module, Cell):
            if options:
                raise TypeError(f"{type(module).__name__} takes no {', '.join(options)}")
            chosen, read_options = cells.decision(module, input, hx), CallOptions()
        elif isinstance(module, Layer):
            prepared = layer.prepared(module, input, hx, *layer.read_keywords(options))
            chosen, read_options = layer.decision(module, input, prepared), prepared.options
        else:
            found, chosen = sequence.decision(module, input, hx, CallOptions(**options) if options else None)
            read_options = found.options or CallOptions()
            if kernel_plan.predicts(tensor) and not chosen.obstacles and chosen.asked in (None, "triton"):
                called = sequence.shape(module, found.cell, found.weights, input, hx)
                packed = isinstance(input, PackedSequence) or read_options.lengths is not None
                predicted = _predicted(called, tensor.device, packed, bool(module.proj_size), read_options)
                if not packed and not options and not module.proj_size:
                    tuning = _tuning(called, tensor.device)
        details = _how(chosen, module, input, read_options, training)
    return Explanation(chosen.backend, _asked(chosen), chosen.obstacles, call, details, tuning, predicted)


def _predicted(shape: tuning_file.Shape, device: torch.device, packed: bool, projected: bool, options: CallOptions) -> str:
    """What the models predict, on the families that are trusted or, while none is, on all; and the canary's verdict."""
    gpu = kernel_plan.limits(device)
    assert gpu is not None
    if gpu.arch:
        return f"nothing, because no model knows AMD GPUs; {trust.words(gpu)}"
    families = trust.trusted(device)
    said = str(kernel_plan.predict(shape, device, gpu, families or trust.families(), packed, projected, options.details))
    if unknown_to_torch(options.given):
        said = said.partition(", cuDNN")[0] + " us a time step; cuDNN has no such call"
    return f"{said}; {trust.words(gpu)}"


def _asked(chosen: Decision) -> str:
    """How the backend was asked for, in words."""
    if chosen.torch_wins:
        return chosen.torch_wins
    by = f"asked for by {chosen.asked_by}" if chosen.asked else "chosen for this call"
    if chosen.asked not in (None, chosen.backend):
        by = f"{chosen.asked!r} was {by}, but cannot run this call"
    return by + ("; RNNFAST_STRICT is set, so the call raises" if chosen.gives_way and strict() else "")


def _how(chosen: Decision, module: Any, input: Any, options: CallOptions, training: bool) -> str:
    """How the call will run, in words."""
    if chosen.refusal:
        return f"the call raises: {chosen.refusal}"
    if chosen.runner == "kernels":
        text = _kernels(module, input, options, training)
    elif chosen.runner == "equations":
        text = "the equations in plain PyTorch, one time step after another"
        text += f": {chosen.stands_in}" if chosen.stands_in else ""
    else:
        text = _torch(module, input, chosen.runner)
    recompute = module.recompute if isinstance(module, Layer) else isinstance(module, Sequence) and module._rnnfast_recompute
    return text + (_recompute(module, chosen, options) if recompute and training else "")


def _recompute(module: Sequence | Layer, chosen: Decision, options: CallOptions) -> str:
    if chosen.runner != "kernels":
        return "" if chosen.inside else "; backward runs it once more"
    if not spec_of(_cell(module)).saved:
        return "; backward needs no gates, so recompute changes nothing"
    if _details(module, options):
        return "; gates are kept, as states or gates are returned, whatever recompute says"
    return "; backward computes the gates again"


def _tuning(shape: tuning_file.Shape, device: torch.device) -> str:
    gpu = kernel_plan.limits(device)
    assert gpu is not None
    table = tuned.table(gpu)
    group = pipeline.grouping(shape.layers, shape.directions)[:2]
    entry = tuned.kernels(gpu, shape.cell, shape.T, shape.B, shape.H, shape.dtype, shape.precision, shape.training, *group)
    if entry is not None:
        source = "torch.backends.cudnn.benchmark in this process" if entry.shape in table.own else table.path
        return f"by {source}, measured at {entry.shape}"
    command = f"rnnfast tune --cell {shape.cell} --hidden {shape.H} --input {shape.I} --batch {shape.B} --steps {shape.T}"
    command += f" --dtype {'tf32' if shape.precision == 'tf32' else shape.dtype} --layers {shape.layers}"
    advice = f"to measure it: {command}{' --bidirectional' if shape.directions > 1 else ''}"
    if table.unused:
        return f"not measured here ({table.unused}); {advice}"
    return f"{table.path} has nothing near this call; {advice}"


def _torch(module: Any, input: Tensor | PackedSequence, runner: str) -> str:
    if isinstance(module, Cell):
        return "PyTorch's own cell"
    tensor = input.data if isinstance(input, PackedSequence) else input
    cudnn = tensor.is_cuda and torch.backends.cudnn.is_acceptable(tensor)
    lengths = ", on rows packed by their lengths, which are read on the CPU" if runner == "packed" else ""
    library = "ATen" if not cudnn else "MIOpen" if torch.version.hip else "cuDNN"
    return f"PyTorch's own layer, on {library}{lengths}"


def _details(module: Any, options: CallOptions) -> bool:
    """Whether the call needs the states of every step, as a cell does that has another output than h."""
    return options.details or (isinstance(module, Layer) and module.cell.output > 0)


def _cell(module: Any) -> str:
    """The name of the module's cell in `rnnfast.reference.CELLS`."""
    return layer.fused(module) if isinstance(module, Layer) else cell_of(module)


def _kernels(module: Any, input: Tensor | PackedSequence, options: CallOptions, training: bool) -> str:
    from rnnfast.kernels import runtime

    over_time, heads = not isinstance(module, Cell), module.heads if isinstance(module, Layer) else 1
    layers, directions = (module.num_layers, 2 if module.bidirectional else 1) if over_time else (1, 1)
    projected = isinstance(module, Sequence) and module.proj_size > 0
    extras = "; the projection is one matrix with the recurrent weights" if projected else ""
    marked = options.marked
    if isinstance(input, PackedSequence):
        tensor, sizes = input.data, input.batch_sizes
        steps, rows = sizes.numel(), int(sizes[0])
        marked = int(sizes[-1]) < rows
        extras += "; packed rows are padded inside" if marked else ""
    else:
        tensor = input
        sizes = tensor.shape[:-1] if over_time else (1, *tensor.shape[:-1])
        steps, rows = (*sizes, 1)[:2]
        if tensor.dim() == 3 and over_time and module.batch_first:
            steps, rows = rows, steps
    kind = tensor.device.type
    dtype = torch.get_autocast_dtype(kind) if autocast(kind) else tensor.dtype
    cell, units = _cell(module), int(module.hidden_size) // heads
    times = f"{layers} layers x {directions} directions x{f' {heads} heads x' if heads > 1 else ''}"
    dropped = over_time and module.dropout > 0 and module.training and bool(torch_private.inside())
    by_layer = _details(module, options) or dropped or projected or not spec_of(cell).recurrent
    group = pipeline.grouping(layers, directions * heads, by_layer)
    precision = kernel_plan.precision()

    def words(backward: bool) -> str:
        keeps = backward or training
        choice = kernel_plan.pick(
            cell, steps, rows, units, dtype, precision, backward, keeps, tensor.device, marked, group.members, group.layers
        )
        sizes = pipeline.sizes_of(cell, rows, units, dtype.itemsize, precision, backward, marked)
        interpreted = ", interpreted" if runtime.mode() == "interpreted" else ""
        return (
            f"{choice.family} kernels{interpreted}, {choice.plan.launch_words(choice.chunk or steps)}: {times} {steps} steps"
            f"{_grouped(choice, group, sizes, steps, tensor.device)}; {choice.plan.words(rows, choice.members)}"
            + (f"; not {choice.wanted}: {choice.reason}" if choice.reason else "")
        )

    forward, backward = words(False), words(True)
    text = (forward if forward == backward else f"forward: {forward}\n       backward: {backward}") + extras
    return text + (f"; products in {precision}, of the input side and of the recurrence" if dtype == torch.float32 else "")


def _grouped(
    choice: kernel_plan.Choice, group: pipeline.Grouping, sizes: pipeline.Sizes, steps: int, device: torch.device
) -> str:
    """How many of a group run at once, and why not more, in words. Empty for a group of one."""
    if group.members == 1:
        return ""
    at_once, why = choice.members, ""
    if at_once < group.members:
        why = f": {kernel_plan.why_fewer(choice, sizes, steps, group.members, group.layers, device)}"
    if not group.layers:
        if group.members > 2:
            return f", {at_once} of {group.members} at once{why}"
        return f", {'both directions at once' if at_once > 1 else 'one direction after the other'}{why}"
    if at_once == 1:
        return f", one layer after another{why}"
    parts = -(-group.members // at_once)
    times = "" if parts == 1 else ", twice" if parts == 2 else f", {parts} times"
    return f", {at_once} layers at once in chunks of {choice.chunk} time steps{times}{why}"
