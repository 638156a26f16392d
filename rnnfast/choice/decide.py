"""Decides which backend runs a call, and says why another does not.

    "triton"     the fused kernels of rnnfast, on a GPU, or interpreted on the CPU with TRITON_INTERPRET=1
    "torch"      PyTorch's own layer on the same parameters: cuDNN on a GPU, ATen elsewhere
    "reference"  the equations in plain PyTorch (`rnnfast.reference`)

A user asks for a backend with `use_backend` around the call, with ``backend=`` on the module or function, or with the
environment variable RNNFAST_BACKEND. The first of these that is set wins. If none is set, each call runs on "triton" where the
kernels can run, and on "torch" elsewhere. It also runs on "torch" where that is the faster, as measured or predicted
(`rnnfast.choice.kernel_plan`).

If the backend that was asked for cannot run a call, "torch" runs it and a `FallbackWarning` says why. With RNNFAST_STRICT=1 a
`RuntimeError` says why, and nothing runs.

PyTorch has no layer of a cell of the user's own. There "reference" takes the place of "torch" in all of this.

`decide` makes the decision from facts about the call. Modules, cells, functions and `rnnfast.explain` all read it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rnnfast import torch_private
from rnnfast.choice import obstacles, trust
from rnnfast.choice.obstacles import FallbackWarning, user_level
from rnnfast.settings import BACKEND, KEYS, accepted, check_environment, strict
from rnnfast.torch_private import constant, cudnn_benchmark, environment, forward_level, innermost_transform

__all__ = [
    "Decision",
    "asked",
    "check_backend",
    "decide",
    "is_backend",
    "tell",
    "tensor_obstacles",
    "unknown_to_torch",
    "use_backend",
    "watcher",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EXPANDED = "the weights are those of call_for_per_sample_grads, which the kernels do not know"
FORM = "torch.nn itself serves or refuses a call of this form"
JIT_TRACE = "torch.jit.trace is on: a trace should hold PyTorch's own operators only"
ONNX_EXPORT = "the model is being exported to ONNX, which knows PyTorch's own operators only"
PACKED = "lengths"  # the one option that PyTorch's own layer can serve, on packed rows


def unknown_to_torch(options: Iterable[str]) -> list[str]:
    """Those of the options, by name, that PyTorch's own layer cannot serve."""
    return [option for option in options if option != PACKED]


@dataclass(frozen=True)
class Decision:
    """What runs a call, and why.

    Attributes:
        backend: what the user is told: "triton", "torch" or "reference".
        runner: what runs: "kernels"; "equations"; "torch", PyTorch's own layer; or "packed", that layer on rows packed by their
            lengths.
        asked: the backend that the user asked for by name, or None.
        asked_by: how it was asked for: "rnnfast.use_backend", "backend=" or "RNNFAST_BACKEND"; "nobody" if it was not.
        obstacles: every reason why the kernels cannot run this call.
        gives_way: the reasons why the backend that was asked for cannot run the call. If none was asked for, those of the
            kernels.
        torch_wins: why PyTorch's own layer is the automatic choice although the kernels can run. Empty if it is not.
        stands_in: why the equations run although "torch" is the backend. Empty if they do not.
        refusal: why no backend can run the call. Empty if one can.
        unfused: why there are no kernels of the cell, if that is one of the `obstacles`. Else empty.
        inside: the transforms around the call, the outermost first (`rnnfast.torch_private.inside`).
        watched: whether `rnnfast.choice.calls.before` may have something to do before the call runs. False while anything is
            traced or compiled.
    """

    backend: str
    runner: str
    asked: str | None = None
    asked_by: str = "nobody"
    obstacles: tuple[str, ...] = ()
    gives_way: tuple[str, ...] = ()
    torch_wins: str = ""
    stands_in: str = ""
    refusal: str = ""
    inside: tuple[str, ...] = ()
    watched: bool = False
    unfused: str = ""


# Whoever is told of calls: see `rnnfast.choice.calls`
watcher: ContextVar[Callable[[Any], None] | None] = ContextVar("rnnfast watcher", default=None)


def is_backend(name: object) -> bool:
    """Whether `name` is a backend, or None or "auto", which leave the choice to each call."""
    return name is None or (isinstance(name, str) and name in BACKEND.choices)


def check_backend(name: str | None) -> None:
    """Raise a `ValueError` that lists the backends if `name` is not one of them."""
    if not is_backend(name):
        BACKEND.check(name, "backend")  # type: ignore[arg-type]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every rnnfast layer on the backend `name`, within the ``with`` block and in this thread.

    It overrides ``backend=`` and RNNFAST_BACKEND. With "auto" or None rnnfast chooses for each call. Another name raises a
    `ValueError`.

    The block does not reach other threads. ``torch.utils.checkpoint`` may run a layer again in a thread of autograd. Give such
    a layer its ``backend=`` instead.

    Example:
        >>> layer = rnnfast.GRU(3, 4)
        >>> with rnnfast.use_backend("reference"):
        ...     output, h_n = layer(torch.zeros(5, 2, 3))
    """
    check_backend(name)
    with BACKEND.within(name or "auto"):
        yield


@constant
def asked(own: str | None) -> tuple[str | None, str]:
    """The backend that the user asked for by name (or None), and how. `own` is the module's or function's ``backend=``."""
    for name, source in ((BACKEND.block.get(), "rnnfast.use_backend"), (own, "backend=")):
        if name is not None:
            return None if name == "auto" else name, source
    name = BACKEND.in_environment() if BACKEND.key in environment else None
    return (None, "nobody") if name is None else (None if name == "auto" else name, BACKEND.variable)


def _without_rule(inside: tuple[str, ...]) -> str:
    """Which of these transforms the kernels' operators have no rule for, in words. Empty if they have a rule for each."""
    if "forward" in inside:
        return "forward-mode differentiation is on, for which the kernels have no rule"
    if torch_private.tracing():
        return "a torch.func transform is being compiled, for which the kernels have no rule"
    if "functionalize" in inside:
        return "the call is inside torch.func.functionalize, for which the kernels have no rule"
    return ""


def tensor_obstacles(tensor: Tensor) -> tuple[str, ...]:
    """Every reason why the kernels cannot now run a call with an input of this device and dtype. Empty if they can."""
    return decide("triton", tensor.device.type, tensor.device.index, tensor.dtype).obstacles


@constant
def decide(
    own: str | None,
    kind: str | None,
    index: int | None,
    dtype: torch.dtype | None,
    *,
    well_formed: bool = True,
    replaced: str = "",
    expanded: bool = False,
    padded: bool = True,
    options: Iterable[str] = (),
    packable: bool = True,
    onednn_trains: bool = False,
    steps: bool = True,
    torch_wins: str = "",
    own_layer: str = "",
    obstacle: str = "",
) -> Decision:
    """Decide what runs a call, from facts about it.

    It does not warn. It raises a `ValueError` only if a setting has an unknown value.

    Args:
        own: the module's or function's ``backend=``.
        kind, index: the type and index of the input's device. None if the input is not a tensor.
        dtype: the dtype of the input, or None.
        well_formed: whether shapes, dtypes and devices of all tensors fit. If not, torch.nn runs the call or raises its error.
        replaced: which part of torch.nn's forward was overridden or replaced, in words. Only torch.nn can run such a layer.
        expanded: whether the weights are those of call_for_per_sample_grads.
        padded: whether the input is a tensor, not a PackedSequence.
        options: the names of the options that the call has.
        packable: whether the values of the lengths can be read here. Packing needs them.
        onednn_trains: whether the call needs gradients and PyTorch runs the layer as one oneDNN operator.
        steps: whether the call runs over time. It is false for a cell.
        torch_wins: why PyTorch's own layer is to run if nobody asked for a backend (`rnnfast.choice.kernel_plan.torch_wins`);
            with `own_layer` why the equations are (`rnnfast.choice.kernel_plan.unchecked`).
        own_layer: why PyTorch has no such layer, in words, for example "PyTorch has no layer of the cell `peephole`"; empty if
            it has. Where PyTorch's layer would run, asked for or not, the equations then run with every option: the runner is
            "equations", the backend "reference", and `stands_in` has these words. Such a call has to be well formed; nobody
            watches it, because it is not measured. Give the words to `tell` too.
        obstacle: why there are no kernels of the cell, that is the text of its `CannotFuse`; empty if there are. It is one of
            the `obstacles`, and `unfused` in the decision.
    """
    if tuple(map(environment.get, KEYS)) not in accepted:
        check_environment()
    is_asked = own is not None or BACKEND.block.get() is not None or BACKEND.key in environment
    name, source = asked(own) if is_asked else (None, "nobody")
    inside = () if innermost_transform() is None and forward_level() < 0 else torch_private.inside()
    onnx: Any = sys.modules.get("torch.onnx")
    trace = JIT_TRACE if torch.jit.is_tracing() else ONNX_EXPORT if onnx is not None and onnx.is_in_onnx_export() else ""
    found: tuple[str, ...] = ()
    if kind is not None and dtype is not None:
        device, known = f"{kind}:{index}", obstacles.known
        on_cpu_autocast = kind == "cpu" and torch.is_autocast_enabled("cpu")
        reasons = (
            known["triton"] if "triton" in known else obstacles.triton_obstacle(),
            known[device] if device in known else trust.device_obstacle(kind, index),
            None if dtype in DTYPES else f"the dtype is {dtype}: the kernels take float16, bfloat16 and float32",
            "autocast is on: on the CPU, PyTorch's own layer decides what it casts" if on_cpu_autocast else None,
            (_without_rule(inside) if inside else None) or trace,
            EXPANDED if expanded else None,
        )
        found = tuple([reason for reason in reasons if reason])
    found += tuple([reason for reason in (replaced, obstacle) if reason])
    by_equations = (replaced,) if replaced else ()
    if steps and not options and trace and not own_layer:
        by_equations += (f"{trace}, and the equations would keep the number of steps",)
    gives_way = () if name == "torch" else by_equations if name == "reference" else found
    torch_wins = torch_wins if name is None and not gives_way and well_formed else ""
    own_backend = name != "torch" and not gives_way and well_formed and not torch_wins
    backend = (name or "triton") if own_backend else "torch"
    runner, stands_in, refusal = {"triton": "kernels", "reference": "equations", "torch": "torch"}[backend], "", ""
    if backend == "torch" and own_layer:
        backend, runner, stands_in = "reference", "equations", own_layer
    elif backend == "torch" and well_formed:
        missing = unknown_to_torch(options)
        if missing:
            runner, stands_in = "equations", f"PyTorch's own layer has no {', no '.join(missing)}"
            if replaced:
                refusal = f"{replaced}, and {stands_in}"
        elif not replaced:
            stands_in = _stands_in(inside, kind, padded, expanded, onednn_trains, dtype)
            if not stands_in and options and not packable:
                stands_in = "lengths cannot be read here, as packing would"
            runner = "equations" if stands_in else "torch"
        if options and runner == "torch":
            runner = "packed"
    if not well_formed:
        found += (FORM,)
    watched = (cudnn_benchmark() or watcher.get() is not None) and not own_layer and not torch_private.tracing()
    return Decision(
        backend, runner, name, source, found, gives_way, torch_wins, stands_in, refusal, inside, watched, obstacle
    )  # fmt: skip


def _stands_in(
    inside: tuple[str, ...], kind: str | None, padded: bool, expanded: bool, onednn_trains: bool, dtype: torch.dtype | None
) -> str:
    """Why the equations have to run in place of PyTorch's own layer. Empty if that layer can run.

    The operators of that layer have no rule for vmap or forward mode. They have one for torch.func.grad only if they are
    composed of other operators, as they are on a CPU for a padded input, outside a compiler.
    """
    on_cpu = kind == "cpu"
    if inside and not (padded and on_cpu and {"grad", "functionalize"}.issuperset(inside) and not torch_private.tracing()):
        return f"PyTorch's own layer has no rule for {' inside '.join(reversed(inside))} here"
    if expanded:
        return "PyTorch's own layer has no rule for the weights of call_for_per_sample_grads"
    compiled = torch_private.tracing() and not torch.compiler.is_exporting()
    if onednn_trains and on_cpu and dtype != torch.float64 and compiled:  # AOTAutograd fails on the operator, PyTorch 2.13
        return "compiled code has no gradients of PyTorch's own LSTM on a CPU"
    return ""


@constant
def tell(asked: str | None, asked_by: str, gives_way: tuple[str, ...], own_layer: str = "", unfused: str = "") -> None:
    """Warn that PyTorch's own layer runs in place of the backend that was asked for. Say nothing if none was asked for.

    With `own_layer` the equations run, not that layer. A cell without kernels is then warned of once, if the kernels were
    asked for or if nothing else kept them from running.

    Args:
        asked, asked_by, gives_way, unfused: those of the `Decision`.
        own_layer: as for `decide`.

    Raises:
        RuntimeError: RNNFAST_STRICT=1 is set, even if no backend was asked for.
    """
    why = "; ".join(gives_way)
    if strict():
        raise RuntimeError(f"RNNFAST_STRICT is set and the {asked or 'triton'!r} backend cannot run this call: {why}")
    runs = "the equations run in plain PyTorch" if own_layer else "PyTorch's own layer runs"
    message = f"{asked!r} was asked for by {asked_by}, but {runs}: {why}" if asked else ""
    if unfused in gives_way:
        message = "" if unfused in _told else message or (f"{runs}: {why}" if gives_way == (unfused,) else "")
        if message:
            _told.add(unfused)
    if message:
        warnings.warn(message, FallbackWarning, stacklevel=user_level())


_told: set[str] = set()  # the cells without kernels that were warned of, by the reason why there are none
