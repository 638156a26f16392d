"""Keras 3 on PyTorch: `enable` lets its LSTM, GRU and SimpleRNN layers run on rnnfast.

Keras runs these layers as a loop in Python, one time step after another, or on a GPU by one call of cuDNN for some of them.
`enable` replaces ``inner_loop`` of the three classes and ``call`` of Bidirectional. The new functions run one rnnfast layer
with the weights of the Keras layer. Models, weights and saved files stay Keras' own. Models that were built earlier run on
rnnfast, too.

    Keras                      rnnfast
    kernel (I, G*H)            w_ih (G*H, I), the transpose
    recurrent_kernel (H, G*H)  w_hh (G*H, H), the transpose
    bias of LSTM, SimpleRNN    b_ih; b_hh is zero
    bias (2, 3*H) of GRU       b_ih and b_hh
    gates i, f, c, o of LSTM   i, f, g, o
    gates z, r, h of GRU       r, z, n

A mask may have any form. Keras skips a masked step: it keeps the state and repeats the last output, or gives zeros. The steps
that count are moved to the front of each row here, the layer runs with their number as ``lengths``, and its outputs are moved
back.

A layer that rnnfast cannot run stays on Keras' own code. `explain` says which, and why.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rnnfast.choice.decide import asked
from rnnfast.choice.obstacles import FallbackWarning, user_level
from rnnfast.integrations import load
from rnnfast.nn import GRU, LSTM, RNN
from rnnfast.settings import strict

__all__ = ["Enabled", "Explanation", "disable", "enable", "explain"]

_OURS = {"LSTM": LSTM, "GRU": GRU, "SimpleRNN": RNN}
_replaced: dict[tuple[type, str], Any] = {}  # what the classes of Keras held under each name; None if they inherited it


class Enabled:
    """What `enable` returns. As a context manager it calls `disable` at the end, unless rnnfast was enabled before."""

    def __init__(self, before: bool) -> None:
        self._before = before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            disable()


@dataclass(frozen=True)
class Explanation:
    """What runs the recurrent layers of a Keras model. ``print`` shows it.

    Attributes:
        ours: the path and description of each layer that rnnfast runs.
        own: the path of each recurrent layer that Keras' own code runs, and the reason.
    """

    ours: tuple[tuple[str, str], ...]
    own: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{len(self.ours)} layer{'' if len(self.ours) == 1 else 's'} on rnnfast"]
        lines += [f"  {name}: {text}" for name, text in self.ours]
        if self.own:
            lines += ["on Keras' own code"] + [f"  {name}: {reason}" for name, reason in self.own]
        return "\n".join(lines)


def enable() -> Enabled:
    """Run LSTM, GRU and SimpleRNN of Keras on rnnfast, alone and in Bidirectional, in the whole process until `disable`.

    It concerns every model, built earlier or later. A second call changes nothing. ``rnnfast.use_backend``, RNNFAST_BACKEND and
    RNNFAST_STRICT have their usual meaning: in strict mode, a layer that has to run on Keras' own code raises a `RuntimeError`.
    A layer with ``use_cudnn=False`` is left to Keras' own code.

    Returns:
        An object that ``with`` takes: ``with rnnfast.keras.enable():`` ends with `disable`.

    Raises:
        ImportError: if Keras is not installed, or has no such classes.
        RuntimeError: if Keras does not run on PyTorch.

    Warns:
        UserWarning: if another minor version of Keras than the tested one is installed.
    """
    keras = load("keras", "keras")
    if keras.config.backend() != "torch":
        raise RuntimeError(
            f"Keras runs on {keras.config.backend()!r}, and rnnfast on PyTorch: set the environment variable "
            "KERAS_BACKEND=torch before Python imports keras"
        )
    if _replaced:
        return Enabled(before=True)
    wraps = {(name, "inner_loop"): _inner_loop for name in _OURS} | {("Bidirectional", "call"): _bidirectional}
    classes = {name: getattr(keras.layers, name, None) for name, _ in wraps}
    missing = [f"{name}.{method}" for name, method in wraps if not hasattr(classes[name], method)]
    if missing:
        raise ImportError(f"keras {keras.__version__} has no {', '.join(missing)}: rnnfast cannot replace them", name="keras")
    for (name, method), wrap in wraps.items():
        cls: Any = classes[name]
        _replaced[cls, method] = vars(cls).get(method)
        setattr(cls, method, wrap(keras, getattr(cls, method)))
    return Enabled(before=False)


def disable() -> None:
    """Undo `enable`. Without it, nothing happens."""
    while _replaced:
        (cls, name), own = _replaced.popitem()
        if own is None:
            delattr(cls, name)
        else:
            setattr(cls, name, own)


def explain(model: Any, *, training: bool = False) -> Explanation:
    """Say which recurrent layers of a Keras model rnnfast runs.

    Args:
        model: a Keras model or layer, built or not.
        training: whether for ``fit`` or for ``predict``. Recurrent dropout keeps a layer on Keras' own code in training alone.

    Raises:
        ImportError: if Keras is not installed.
        TypeError: if `model` is no Keras layer.

    Compiled by ``torch.compile`` or exported, every layer runs on Keras' own code, whatever this says.
    """
    keras = load("keras", "keras")
    if not isinstance(model, keras.Layer):
        raise TypeError(f"model should be a Keras model or layer, got {type(model).__name__}")
    ours, own = [], []
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.RNN):
            reason = _obstacle(keras, layer, training) if _replaced else "rnnfast.keras.enable() was not called"
            kind = f"{type(layer).__name__} of {getattr(layer, 'units', '?')} units"
            (own if reason else ours).append((layer.path or layer.name, reason or kind))
    return Explanation(tuple(ours), tuple(own))


def _obstacle(keras: Any, layer: Any, training: bool) -> str:
    """Why rnnfast cannot run a recurrent layer of Keras, whatever its input. Empty if it can."""
    cell = layer.cell
    name = type(cell).__name__.removesuffix("Cell")
    if name not in _OURS or type(cell) is not getattr(keras.layers, f"{name}Cell"):
        return f"{type(cell).__name__} is a cell of its own: rnnfast runs Keras' LSTM, GRU and SimpleRNN"
    if not getattr(type(layer).inner_loop, "of_rnnfast", False):
        return f"{type(layer).__name__} is a class with a loop of its own"
    if name == "SimpleRNN":
        if not _is(keras, cell.activation, "tanh", "relu"):
            return f"its activation is {_named(cell.activation)}: rnnfast has tanh and relu"
    elif not _is(keras, cell.activation, "tanh"):
        return f"its activation is {_named(cell.activation)}: rnnfast has tanh"
    elif not _is(keras, cell.recurrent_activation, "sigmoid"):
        return f"its recurrent activation is {_named(cell.recurrent_activation)}: rnnfast has sigmoid"
    elif layer.use_cudnn is False:
        return "use_cudnn=False asks for Keras' own code"
    if name == "GRU" and not cell.reset_after:
        return "with reset_after=False it is another layer: its reset gate acts before the matrix product"
    if training and cell.recurrent_dropout:
        return "recurrent_dropout drops hidden units at every step, in training"
    if training and cell.dropout and getattr(cell, "dropout_mask_count", None):
        return "dropout with implementation=1 draws a mask for each gate, in training"
    return ""


def _is(keras: Any, activation: Any, *names: str) -> bool:
    """Whether an activation is one of these functions, of Keras or of PyTorch."""
    return any(activation is getattr(module, name) for name in names for module in (keras.activations, keras.ops, torch))


def _named(activation: Any) -> str:
    return getattr(activation, "__name__", type(activation).__name__)


def _refused(x: Tensor) -> str:
    """Why rnnfast cannot run a call with this input. Empty if it can."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the model is being compiled or exported, which takes Keras' own operators"
    if x.device.type == "meta":
        return "the input has a shape and no numbers"
    return "the input is empty" if x.numel() == 0 else ""


def _tell(name: str, reason: str) -> None:
    """Say that a layer runs on Keras' own code, to those who asked for another backend by name.

    Raises:
        RuntimeError: with RNNFAST_STRICT=1.
    """
    if strict():
        raise RuntimeError(f"RNNFAST_STRICT is set and rnnfast cannot run the Keras layer {name!r}: {reason}")
    backend, by = asked(None)
    if backend not in (None, "torch"):
        message = f"{backend!r} was asked for by {by}, but Keras' own code runs the layer {name!r}: {reason}"
        warnings.warn(message, FallbackWarning, stacklevel=user_level())


def _inner_loop(keras: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """``inner_loop`` of a recurrent layer: ``(last output, outputs, states)`` of sequences (B, T, I)."""

    @functools.wraps(original)
    def inner_loop(self, sequences, initial_state, mask, training=False):
        x = keras.ops.convert_to_tensor(sequences)
        reason = _obstacle(keras, self, training) or _refused(x)
        if reason:
            if x.device.type != "meta":
                _tell(self.name, reason)
            return original(self, sequences, initial_state, mask, training)
        states = tuple(initial_state) if isinstance(initial_state, (list, tuple)) else (initial_state,)
        mask = _mask(keras, mask)
        if training and self.cell.dropout:
            x = x * self.cell.get_dropout_mask(x[:, 0, :])[:, None]
        if self.go_backwards:
            x, mask = x.flip(1), None if mask is None else mask.flip(1)
        y, last = _run(keras, (self.cell,), x, (states,), mask)
        y = y[:, :, 0]
        if mask is not None:
            y = _spread(y, mask, hold=not self.zero_output_for_mask)
        return y[:, -1], y if self.return_sequences else y[:, -1:], list(last[0])

    inner_loop.of_rnnfast = True  # type: ignore[attr-defined]
    return inner_loop


def _bidirectional(keras: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` of Bidirectional: both directions in one call of rnnfast, or each by its own ``inner_loop``."""

    @functools.wraps(original)
    def call(self, sequences, initial_state=None, mask=None, training=None):
        x = keras.ops.convert_to_tensor(sequences)
        pair, given = (self.forward_layer, self.backward_layer), tuple(initial_state or ())
        if not _is_pair(keras, self, pair, len(given), training) or _refused(x):
            return original(self, sequences, initial_state, mask, training)
        half = len(given) // 2
        empty = [tuple(each.get_initial_state(batch_size=x.shape[0])) for each in pair]
        states = (given[:half], given[half:]) if given else (empty[0], empty[1])
        mask = _mask(keras, mask)
        y, last = _run(keras, tuple(each.cell for each in pair), x, states, mask)
        if self.return_sequences:
            y = y if mask is None else _spread(y, mask, hold=False)
            parts = y[:, :, 0], y[:, :, 1]
        else:
            parts = last[0][0], last[1][0]
            if mask is not None:  # a row without any step has no output, though it keeps its state
                parts = tuple(part.masked_fill(~mask.any(1, keepdim=True), 0) for part in parts)
        merged = _merged(self.merge_mode, *(part.to(x.dtype) for part in parts))
        ends = last[0] + last[1] if self.return_state else ()
        if self.merge_mode is None:
            return (*merged, *ends)
        return (merged, *ends) if ends else merged

    return call


def _is_pair(keras: Any, layer: Any, pair: tuple[Any, Any], given: int, training: Any) -> bool:
    """Whether one call of rnnfast gives what the two layers of a Bidirectional give, and all that Keras does around them."""
    first, second = pair
    if not all(isinstance(each, keras.layers.RNN) and each.built for each in pair):
        return False
    return (
        type(first.cell) is type(second.cell)
        and not any(_obstacle(keras, each, bool(training)) for each in pair)
        and (first.go_backwards, second.go_backwards) == (False, True)
        and first.zero_output_for_mask == second.zero_output_for_mask == layer.return_sequences
        and not any(each.stateful or each.activity_regularizer or (each.cell.dropout and training) for each in pair)
        and len({each.compute_dtype for each in (layer, *pair)}) == 1
        and first.units == second.units
        and first.cell.use_bias == second.cell.use_bias
        and first.cell.activation is second.cell.activation
        and given in (0, 2 * len(first.state_size))
    )


def _merged(mode: str | None, y: Tensor, y_back: Tensor) -> Any:
    if mode == "concat":
        return torch.cat([y, y_back], -1)
    if mode == "mul":
        return y * y_back
    return {"sum": y + y_back, "ave": (y + y_back) / 2, None: (y, y_back)}[mode]


def _mask(keras: Any, mask: Any) -> Tensor | None:
    """A mask of Keras, (B, T), (B, T, 1) or a list of one, as (B, T) bool. True: the step counts."""
    mask = mask[0] if isinstance(mask, (list, tuple)) else mask
    if mask is None:
        return None
    mask = keras.ops.convert_to_tensor(mask, dtype="bool")
    return mask[..., 0] if mask.dim() == 3 else mask


def _run(
    keras: Any, cells: tuple[Any, ...], x: Tensor, states: tuple[tuple[Any, ...], ...], mask: Tensor | None
) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...]]:
    """Run the cells of one or of both directions over x (B, T, I), each from its states (B, H).

    Returns:
        y (B, T, directions, H), and the last states of each direction. With a mask, y has the steps that count first, and zeros
        after them.
    """
    weights = {}
    for cell, suffix in zip(cells, ("", "_reverse"), strict=False):
        weights |= {f"{name}_l0{suffix}": each for name, each in _weights(keras, cell).items()}
    w_ih = weights["weight_ih_l0"]
    x = x.to(w_ih.dtype)
    hx = [torch.stack([keras.ops.convert_to_tensor(each) for each in of]).to(x.dtype) for of in zip(*states, strict=True)]
    lengths = None
    if mask is not None:
        x, lengths = torch.take_along_dim(x, (~mask).byte().argsort(dim=1, stable=True)[..., None], 1), mask.sum(1)
    shell = _shell(cells[0], w_ih.shape[1], len(cells))
    y, last = torch.func.functional_call(shell, weights, (x, hx[0] if len(hx) == 1 else tuple(hx)), {"lengths": lengths})
    last = (last,) if isinstance(last, Tensor) else last
    return y.unflatten(-1, (len(cells), -1)), tuple(tuple(state[n] for state in last) for n in range(len(cells)))


def _spread(y: Tensor, mask: Tensor, hold: bool) -> Tensor:
    """Outputs (B, T, ...) of the steps that count, moved from the front of each row to where the mask (B, T) is true.

    A masked step gets zeros; with `hold` the output before it, and zeros if there is none.
    """
    place = mask.cumsum(1) - 1
    shape = (*mask.shape, *[1] * (y.dim() - 2))
    y = torch.take_along_dim(y, place.clamp(min=0).view(shape), 1)
    return y.masked_fill(~(place >= 0 if hold else mask).view(shape), 0)


def _weights(keras: Any, cell: Any) -> dict[str, Tensor]:
    """The weights of a Keras cell in the layout of torch.nn, by torch.nn's names. A cell without biases has none."""
    own = [keras.ops.convert_to_tensor(cell.kernel), keras.ops.convert_to_tensor(cell.recurrent_kernel)]
    if cell.use_bias:
        bias = keras.ops.convert_to_tensor(cell.bias)
        own += list(bias) if bias.dim() == 2 else [bias, torch.zeros_like(bias)]
    if type(cell).__name__ == "GRUCell":
        own = [torch.cat([each.chunk(3, -1)[gate] for gate in (1, 0, 2)], -1) for each in own]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {name: each.t().contiguous() for name, each in zip(names, own, strict=False)}


class _Shells(threading.local):
    """The layers that `_shell` made. functional_call puts the weights into the module while it runs, which threads must not
    share."""

    def __init__(self) -> None:
        self.made: dict[tuple[Any, ...], torch.nn.Module] = {}


_shells = _Shells()


def _shell(cell: Any, I: int, directions: int) -> torch.nn.Module:
    """An rnnfast layer without numbers of its own, for `torch.func.functional_call`, that computes what a Keras cell does."""
    name, activation = type(cell).__name__.removesuffix("Cell"), _named(cell.activation)
    key = (name, activation, I, cell.units, cell.use_bias, directions)
    if key not in _shells.made:
        options: dict[str, Any] = {"bias": cell.use_bias, "batch_first": True, "bidirectional": directions == 2}
        options |= {"nonlinearity": activation} if name == "SimpleRNN" else {}
        _shells.made[key] = _OURS[name](I, cell.units, device="meta", **options)
    return _shells.made[key]
