"""`rnnfast.explain` of a model: what ran in each of its recurrent layers, from one run of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import PackedSequence

from rnnfast import run_once
from rnnfast.accelerate import advice, described
from rnnfast.choice.calls import Seen
from rnnfast.nn.cells import Cell
from rnnfast.nn.layer import Layer
from rnnfast.nn.sequence import Sequence
from rnnfast.torch_private import tree_leaves

if TYPE_CHECKING:
    from rnnfast.explain import Explanation

__all__ = ["LayerCalls", "ModelExplanation", "explain_model", "input_words"]

OURS = Sequence, Cell, Layer
FORWARDS = tuple(cls.forward for cls in OURS)


@dataclass(frozen=True)
class LayerCalls:
    """The calls of one recurrent layer that ran alike.

    Attributes:
        name: of the layer in the model; "rnnfast.functional" for calls of its functions.
        layer: the layer, in words.
        calls: how many there were.
        inputs: their different inputs, in words.
        ours: whether it is rnnfast's.
        backend: what ran: "triton", "torch" or "reference". Empty for a layer that is not rnnfast's or was not called.
        families: the families of kernels that ran forward and, if autograd recorded the call, backward.
        ran: what ran, in words. Of a layer that is not rnnfast's what to do about it.
        why: why that ran, in words.
        time: of a step, as in `rnnfast.Explanation`.
        obstacles: why the kernels did not run, as in `rnnfast.Explanation`.
    """

    name: str
    layer: str
    calls: int
    inputs: tuple[str, ...]
    ours: bool
    backend: str = ""
    families: tuple[str, ...] = ()
    ran: str = ""
    why: str = ""
    time: str = ""
    obstacles: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One line for the layer, and one for what ran."""
        counted = f"{self.calls} call{'s' if self.calls != 1 else ''}" if self.calls else "not called"
        shown = f" with {self.inputs[0]}" if self.inputs else ""
        shown += f" and {len(self.inputs) - 1} other inputs" if len(self.inputs) > 1 else ""
        lines = [f"  {self.name}: {self.layer}, {counted}{shown}"]
        if self.backend:
            lines.append(f"    {self.backend}: {self.ran} ({self.why}){f'; {self.time}' if self.time else ''}")
        elif self.ran:
            lines.append(f"    {self.ran}")
        return lines


@dataclass(frozen=True)
class ModelExplanation:
    """What `rnnfast.explain` found of a model. ``print`` shows it.

    Attributes:
        layers: the calls of each recurrent layer, in the order of the layers in the model. A layer whose calls ran in different
            ways is there once for each way. Calls of `rnnfast.functional` come after the layers, under its name.
    """

    layers: tuple[LayerCalls, ...]

    def __str__(self) -> str:
        names = {one.name: one.ours for one in self.layers if one.name != run_once.FUNCTION}
        ours = sum(names.values())
        share = "none" if not ours else "all" if ours == len(names) > 1 else ours
        lines = [f"{len(names)} recurrent layer{'s' if len(names) > 1 else ''}, {share} of rnnfast's"]
        if not names:
            lines = ["no recurrent layers: this model has no layer or cell of torch.nn's or rnnfast's"]
        refused = [one for one in self.layers if one.obstacles]
        together = len(refused) > 1 and len({one.obstacles for one in refused}) == 1
        for one in self.layers:
            lines += one.lines()
            lines += [f"    not triton: {obstacle}" for obstacle in one.obstacles if not together]
        if together:
            lines += [f"  not triton, of all {len(refused)}: {obstacle}" for obstacle in refused[0].obstacles]
        return "\n".join(lines)


def input_words(input: Any) -> str:
    """The input of a call in words: its shape, dtype and device."""
    if isinstance(input, PackedSequence):
        return f"packed {input_words(input.data)}"
    if not isinstance(input, torch.Tensor):
        return type(input).__name__
    return f"{tuple(input.shape)} {input.dtype} on {input.device}"


def explain_model(
    model: torch.nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    explain_layer: Callable[..., Explanation],
) -> ModelExplanation:
    """`rnnfast.explain` of a model. `explain_layer` explains a call of one layer, right after it has run."""
    run_once.check(model, "rnnfast.explain")
    names = {id(module): name for name, module in run_once.recurrent(model).items()}
    found: dict[str, list[LayerCalls]] = {name: [] for name in (*names.values(), run_once.FUNCTION)}
    pending: dict[str, list[Seen]] = {name: [] for name in found}  # rnnfast's calls that no hook has told of yet

    def tell(call: Seen) -> None:
        pending[names.get(id(call.layer), run_once.FUNCTION)].append(call)

    def called(name: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inner, pending[name] = pending[name], []
        x = args[0] if args else kwargs.get("input", next(iter(tree_leaves(kwargs)), None))
        one = LayerCalls(name, described(module), 1, (input_words(x),), isinstance(module, OURS))
        if not one.ours:
            found[name].append(replace(one, ran=_not_ours(module)))
        elif type(module).forward in FORWARDS and "forward" not in vars(module):
            found[name].append(_ran(one, explain_layer(module, *args, **kwargs)))
        else:  # a forward of the user's, which may call rnnfast's with something else, and several times
            for x, hx, options in (call.given for call in inner):
                found[name].append(_ran(replace(one, inputs=(input_words(x),)), explain_layer(module, x, hx, **options)))
            if not inner:
                found[name].append(replace(one, ran="a forward of its own ran, and no layer of rnnfast's in it"))

    run_once.run(model, inputs, kwargs, called, tell)
    for name, calls in pending.items():
        found[name] += [_decided(name, call) for call in calls]
    for name, module in model.named_modules():
        name, ours = name or run_once.ITSELF, isinstance(module, OURS)
        if name in found and not found[name]:
            found[name].append(LayerCalls(name, described(module), 0, (), ours, ran="" if ours else _not_ours(module)))
        elif name not in found and advice(module):
            found[name] = [LayerCalls(name, type(module).__name__, 0, (), False, ran=_not_ours(module))]
    return ModelExplanation(tuple(one for calls in found.values() for one in _counted(calls)))


def _not_ours(module: torch.nn.Module) -> str:
    return f"not ours: {advice(module)}"


def _ran(one: LayerCalls, explained: Explanation) -> LayerCalls:
    kernels = f"{' and '.join(dict.fromkeys(explained.families))} kernels"
    return replace(
        one,
        backend=explained.backend,
        families=explained.families,
        ran=kernels if explained.families else explained.details,
        why=explained.asked,
        time=explained.time,
        obstacles=explained.obstacles,
    )


def _decided(name: str, call: Seen) -> LayerCalls:
    """A call that no hook has told of: of a function, or of a layer's ``forward``. The decision on it is known."""
    chosen = call.chosen
    return LayerCalls(
        name,
        call.cell if call.layer is None else str(call.layer),
        1,
        (input_words(call.given[0]),) if call.given else (),
        True,
        chosen.backend,
        ran={"kernels": "the kernels", "equations": "the equations in plain PyTorch"}.get(chosen.runner, "PyTorch's own layer"),
        why=chosen.torch_wins or (f"asked for by {chosen.asked_by}" if chosen.asked else "chosen for this call"),
        obstacles=chosen.obstacles,
    )


def _counted(calls: Iterable[LayerCalls]) -> Iterator[LayerCalls]:
    """Those that ran alike as one."""
    alike: dict[LayerCalls, list[LayerCalls]] = {}
    for call in calls:
        alike.setdefault(replace(call, inputs=(), time=""), []).append(call)
    for one, group in alike.items():
        inputs = dict.fromkeys(words for call in group for words in call.inputs)
        times = dict.fromkeys(call.time for call in group)
        time = next(iter(times)) if len(times) == 1 else ""
        yield replace(one, calls=sum(call.calls for call in group), inputs=tuple(inputs), time=time)
