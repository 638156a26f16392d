"""Fused recurrent layers for PyTorch on GPUs: drop-in replacements for torch.nn.LSTM, GRU and RNN, written in Triton."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if (Path(__file__).parent / "kernels").is_file():
    raise ImportError(
        "rnnfast/kernels should be a link to the folder kernels/, and this copy of the sources has no links (from a zip, or on "
        "Windows). Delete the file rnnfast/kernels and copy the folder kernels into rnnfast, or clone with "
        "`git clone -c core.symlinks=true`."
    )

from rnnfast import cells, functional
from rnnfast.accelerate import Report, accelerate, as_default, restore
from rnnfast.choice import calls
from rnnfast.choice.decide import use_backend
from rnnfast.choice.obstacles import FallbackWarning
from rnnfast.choice.trust import CanaryWarning
from rnnfast.choice.tuned import TuningWarning
from rnnfast.derive.definition import Cell, Learned, Noise, Row, cell, keep, row_mean, row_norm
from rnnfast.derive.recording import CannotFuse
from rnnfast.explain import Explanation, explain
from rnnfast.explain_model import LayerCalls, ModelExplanation
from rnnfast.inspect import Inspection, inspect
from rnnfast.integrations import keras
from rnnfast.nn import GRU, LSTM, RNN, GRUCell, Layer, LSTMCell, RNNCell
from rnnfast.ops import FLOP_FORMULAS
from rnnfast.settings import BACKENDS
from rnnfast.version import __version__ as __version__

if TYPE_CHECKING:
    from rnnfast.choice.tuning_file import Entry, Shape
    from rnnfast.commands.tune_model import TuningReport

__all__ = [
    "BACKENDS",
    "FLOP_FORMULAS",
    "GRU",
    "LSTM",
    "RNN",
    "CanaryWarning",
    "CannotFuse",
    "Cell",
    "Explanation",
    "FallbackWarning",
    "GRUCell",
    "Inspection",
    "LSTMCell",
    "Layer",
    "LayerCalls",
    "Learned",
    "ModelExplanation",
    "Noise",
    "RNNCell",
    "Report",
    "Row",
    "TuningWarning",
    "accelerate",
    "as_default",
    "cell",
    "cells",
    "enable_compile",
    "explain",
    "functional",
    "inspect",
    "keep",
    "keras",
    "restore",
    "row_mean",
    "row_norm",
    "tune",
    "use_backend",
]


def enable_compile() -> None:
    """Let ``torch.compile`` trace rnnfast layers. Call it once, before compiling.

    Dynamo refuses every instance of torch.nn.LSTM, GRU and RNN, and therefore their subclasses in rnnfast, unless its own
    switch ``torch._dynamo.config.allow_rnn`` is on. This function turns the switch on for the whole process.

    torch.nn's own layers in the same model are then traced, too. Dynamo unrolls them over time, which takes long for a long
    sequence. Exchange these layers as well, or wrap them in ``torch.compiler.disable``.
    """
    import torch._dynamo

    torch._dynamo.config.allow_rnn = True


def tune(model: torch.nn.Module, *inputs: Any, again: bool = False, **kwargs: Any) -> TuningReport:
    """Measure what is fastest for each recurrent call of ``model(*inputs, **kwargs)`` on this GPU, and remember it.

    The model runs forward once, as it is: in its mode of training or evaluation, with gradients on or off. Each distinct shape
    among the calls of rnnfast's layers and functions is then measured as ``rnnfast tune`` does (docs/tuning.md), for inference,
    and for training if the call needs gradients. Each result is stored as soon as it is there, and followed from then on. A
    line on stderr shows the progress and the time left, and a table of the results is printed.

    Ctrl-C keeps what was measured. The same call goes on from there, because it leaves out what the tuning file has.

    The model and its inputs are left as they were: the attributes of the modules, the numbers of parameters, buffers and
    inputs, and the state of the generators of PyTorch, Python and NumPy. For that the tensors are copied while the model runs.

    Args:
        model: its recurrent calls should be on a GPU.
        inputs, kwargs: what it is called with.
        again: measure what the tuning file has already, too.

    Returns:
        A `TuningReport`: a row for each shape, and the recurrent calls that were not measured, each with its reason. These are
        cells, layers of torch.nn's own, calls that the kernels cannot run, and calls with a backend by name.

    Raises:
        RuntimeError: if PyTorch sees no GPU, or the tuning file cannot be written. The message says what to do.
        TypeError: if `model` is not a module.
        ValueError: if it has lazy parameters that no call has given a size yet.
        KeyboardInterrupt: after Ctrl-C, when the table has been printed.
        Exception: what the model raises.
    """
    from rnnfast.commands import tune_model

    return tune_model.tune(model, inputs, kwargs, again)


def __dir__() -> list[str]:
    """The public names. Modules such as `rnnfast.numerics` are found by importing them."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def _measure(shape: Shape, device: torch.device) -> Entry | None:
    """What `rnnfast.choice.calls` measures with. It imports what measures when that is first needed."""
    from rnnfast.commands import first_call

    return first_call.measure(shape, device)


calls.measure = _measure
