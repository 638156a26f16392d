"""`explain` says what runs a call, and why another backend does not. `rnnfast.explain_model` has that of a whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import torch_private
from rnnfast.choice import kernel_plan, pipeline, trust, tuned, tuning_file
from rnnfast.choice.decide import Decision, unknown_to_torch
from rnnfast.choice.forecast import Forecast
from rnnfast.choice.obstacles import autocast
from rnnfast.explain_model import ModelExplanation, explain_model, input_words
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
        families: the families of kernels that run forward and, if autograd records the call, backward. Empty without kernels.
        time: of what runs, in words: measured if `rnnfast tune` measured it, else predicted. Empty if neither is known.
    """

    backend: str
    asked: str
    obstacles: tuple[str, ...]
    call: str
    details: str
    tuning: str = ""
    predicted: str = ""
    families: tuple[str, ...] = ()
    time: str = ""

    def __str__(self) -> str:
        lines = [self.call, f"  backend: {self.backend} ({self.asked})", f"  how: {self.details}"]
        lines += [f"  tuning: {self.tuning}"] if self.tuning else []
        lines += [f"  predicted: {self.predicted}"] if self.predicted else []
        lines += [f"  not triton: {obstacle}" for obstacle in self.obstacles]
        return "\n".join(lines)


@overload
def explain(model: Sequence | Cell | Layer, /, *inputs: Any, **kwargs: Any) -> Explanation: ...


@overload
def explain(model: torch.nn.Module, /, *inputs: Any, **kwargs: Any) -> ModelExplanation: ...


def explain(model: torch.nn.Module, /, *inputs: Any, **kwargs: Any) -> Explanation | ModelExplanation:
    """Say what runs in ``model(*inputs, **kwargs)``, and why.

    One layer or cell of rnnfast: it says which backend will run the call as things stand now, and why not another. It runs
    nothing.

    Any other model: it runs the model forward once, as it is, in its mode of training or evaluation, with gradients on or off.
    It says for each recurrent layer what ran, why, and the time of a step, measured or predicted. Layers of torch.nn's own are
    listed with what to do about them. The model and its inputs are left as they were, as by `rnnfast.tune`. No call is measured
    meanwhile.

    Args:
        model: a module.
        inputs, kwargs: what it is called with.

    Returns:
        An `Explanation` of a layer or cell, a `ModelExplanation` of a model; its ``str`` is for people.

    Raises:
        TypeError: if `model` is not a module; and of a layer for an option that it does not have.
        ValueError: if a model has lazy parameters that no call has given a size yet.
        TypeError, RuntimeError, ValueError: for wrong options of a layer, as the call would.
        Exception: what a model raises.

    Example:
        >>> print(rnnfast.explain(rnnfast.LSTM(3, 4, backend="torch"), torch.zeros(5, 2, 3)))
        LSTM(3, 4, backend='torch'), input (5, 2, 3) torch.float32 on cpu
          backend: torch (asked for by backend=)
          how: PyTorch's own layer, on ATen
          not triton: the tensors are on the CPU, where the kernels run only in Triton's interpreter (TRITON_INTERPRET=1)
        >>> tagger = torch.nn.Sequential(torch.nn.Embedding(9, 3), torch.nn.LSTM(3, 4))
        >>> print(rnnfast.explain(tagger, torch.zeros(5, 2, dtype=torch.int64)))
        1 recurrent layer, none of rnnfast's
          1: LSTM(3, 4), 1 call with (5, 2, 3) torch.float32 on cpu
            not ours: rnnfast.accelerate(model) exchanges it
    """
    if isinstance(model, (Sequence, Cell, Layer)):
        return _explain_layer(model, *inputs, **kwargs)
    return explain_model(model, inputs, kwargs, _explain_layer)


def _explain_layer(module: Any, input: Tensor | PackedSequence, hx: Any = None, **options: Any) -> Explanation:
    tensor = input.data if isinstance(input, PackedSequence) else input
    call = f"{module}, input {input_words(input)}"
    expanded = torch_private.is_expanded(module)  # which cannot be asked
    training = torch.is_grad_enabled() and (expanded or any(each.requires_grad for each in (tensor, *module.parameters())))
    tuning = predicted = measured = ""
    forecast: Forecast | None = None
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
                predicted, forecast = _predicted(called, tensor.device, packed, bool(module.proj_size), read_options)
                if not packed and not options and not module.proj_size:
                    tuning, measured = _tuning(called, tensor.device, chosen.backend)
        details, families = _how(chosen, module, input, read_options, training)
        time = measured or (_time(forecast, chosen.runner, families, read_options) if forecast else "")
    return Explanation(chosen.backend, _asked(chosen), chosen.obstacles, call, details, tuning, predicted, families, time)


def _predicted(
    shape: tuning_file.Shape, device: torch.device, packed: bool, projected: bool, options: CallOptions
) -> tuple[str, Forecast | None]:
    """What the models predict, on the families that are trusted or, while none is, on all; in words with the canary's verdict,
    and in numbers."""
    gpu = kernel_plan.limits(device)
    assert gpu is not None
    if gpu.arch:
        return f"nothing, because no model knows AMD GPUs; {trust.words(gpu)}", None
    families = trust.trusted(device)
    found = kernel_plan.predict(shape, device, gpu, families or trust.families(), packed, projected, options.details)
    said = str(found)
    if unknown_to_torch(options.given):
        said = said.partition(", cuDNN")[0] + " us a time step; cuDNN has no such call"
    return f"{said}; {trust.words(gpu)}", found


def _time(forecast: Forecast, runner: str, families: tuple[str, ...], options: CallOptions) -> str:
    """The predicted time of what runs, and of the other, in words. Empty if the prediction is not of what runs."""
    kernels, theirs = f"{forecast.kernels:.2f}", f"{forecast.torch:.2f}"
    if runner == "kernels" and families == forecast.families:
        other = "" if unknown_to_torch(options.given) else f", of cuDNN's layer {theirs}"
        return f"predicted {kernels} us a time step{other}"
    if runner in ("torch", "packed"):
        return f"predicted {theirs} us a time step" + (f", of the kernels {kernels}" if forecast.families else "")
    return ""


def _asked(chosen: Decision) -> str:
    """How the backend was asked for, in words."""
    if chosen.torch_wins:
        return chosen.torch_wins
    by = f"asked for by {chosen.asked_by}" if chosen.asked else "chosen for this call"
    if chosen.asked not in (None, chosen.backend):
        by = f"{chosen.asked!r} was {by}, but cannot run this call"
    return by + ("; RNNFAST_STRICT is set, so the call raises" if chosen.gives_way and strict() else "")


def _how(chosen: Decision, module: Any, input: Any, options: CallOptions, training: bool) -> tuple[str, tuple[str, ...]]:
    """How the call will run, in words; and the families of kernels that run."""
    families: tuple[str, ...] = ()
    if chosen.refusal:
        return f"the call raises: {chosen.refusal}", families
    if chosen.runner == "kernels":
        text, families = _kernels(module, input, options, training)
    elif chosen.runner == "equations":
        text = "the equations in plain PyTorch, one time step after another"
        text += f": {chosen.stands_in}" if chosen.stands_in else ""
    else:
        text = _torch(module, input, chosen.runner)
    recompute = module.recompute if isinstance(module, Layer) else isinstance(module, Sequence) and module._rnnfast_recompute
    return text + (_recompute(module, chosen, options) if recompute and training else ""), families


def _recompute(module: Sequence | Layer, chosen: Decision, options: CallOptions) -> str:
    if chosen.runner != "kernels":
        return "" if chosen.inside else "; backward runs it once more"
    if not spec_of(_cell(module)).saved:
        return "; backward needs no gates, so recompute changes nothing"
    if _details(module, options):
        return "; gates are kept, as states or gates are returned, whatever recompute says"
    return "; backward computes the gates again"


def _tuning(shape: tuning_file.Shape, device: torch.device, backend: str) -> tuple[str, str]:
    """What was measured for a call, or how to measure it; and the time of a step on this backend. Both in words."""
    gpu = kernel_plan.limits(device)
    assert gpu is not None
    table = tuned.table(gpu)
    group = pipeline.grouping(shape.layers, shape.directions)[:2]
    entry = tuned.kernels(gpu, shape.cell, shape.T, shape.B, shape.H, shape.dtype, shape.precision, shape.training, *group)
    if entry is not None:
        source = "torch.backends.cudnn.benchmark in this process" if entry.shape in table.own else table.path
        return f"by {source}, measured at {entry.shape}", _measured(entry.times, backend)
    command = f"rnnfast tune --cell {shape.cell} --hidden {shape.H} --input {shape.I} --batch {shape.B} --steps {shape.T}"
    command += f" --dtype {'tf32' if shape.precision == 'tf32' else shape.dtype} --layers {shape.layers}"
    advice = f"to measure it: {command}{' --bidirectional' if shape.directions > 1 else ''}"
    if table.unused:
        return f"not measured here ({table.unused}); {advice}", ""
    return f"{table.path} has nothing near this call; {advice}", ""


def _measured(times: dict[str, float], backend: str) -> str:
    """The time that was measured of what runs, and of the other, in words. `times`: as in `tuning_file.Entry`."""
    kernels = min((us for name, us in times.items() if name != "torch.nn"), default=None)
    found = {"torch": ("torch.nn's layer", times.get("torch.nn")), "triton": ("the kernels", kernels)}
    _, own = found.pop(backend)
    ((other, others),) = found.values()
    if own is None:
        return ""
    return f"measured {own:.2f} us a time step" + ("" if others is None else f", of {other} {others:.2f}")


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


def _kernels(module: Any, input: Tensor | PackedSequence, options: CallOptions, training: bool) -> tuple[str, tuple[str, ...]]:
    """How the kernels run the call, in words; and their families, forward and in training backward."""
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

    def words(backward: bool) -> tuple[str, str]:
        keeps = backward or training
        choice = kernel_plan.pick(
            cell, steps, rows, units, dtype, precision, backward, keeps, tensor.device, marked, group.members, group.layers
        )
        sizes = pipeline.sizes_of(cell, rows, units, dtype.itemsize, precision, backward, marked)
        interpreted = ", interpreted" if runtime.mode() == "interpreted" else ""
        return choice.family, (
            f"{choice.family} kernels{interpreted}, {choice.plan.launch_words(choice.chunk or steps)}: {times} {steps} steps"
            f"{_grouped(choice, group, sizes, steps, tensor.device)}; {choice.plan.words(rows, choice.members)}"
            + (f"; not {choice.wanted}: {choice.reason}" if choice.reason else "")
        )

    families, (forward, backward) = zip(words(False), words(True), strict=True)
    text = (forward if forward == backward else f"forward: {forward}\n       backward: {backward}") + extras
    text += f"; products in {precision}, of the input side and of the recurrence" if dtype == torch.float32 else ""
    return text, families[: 1 + training]


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
