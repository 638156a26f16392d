"""Whether the arguments of `rnnfast.Layer` and of its calls are right. Errors are of the types, and where it fits in the words,
that torch.nn's have."""

from __future__ import annotations

import inspect
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast.choice.obstacles import user_level
from rnnfast.derive.definition import Cell
from rnnfast.nn.checks import is_consistent, is_tensor, one_dtype

__all__ = ["check_call", "check_layer", "checked_constants", "learned_of", "own_names", "rows_of"]


def check_layer(layer: Any) -> None:
    """The attributes of a layer that is being made."""
    for name, wanted in {"input_size": int, "hidden_size": int, "num_layers": int, "heads": int}.items():
        value = getattr(layer, name)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
        if value <= 0:
            raise ValueError(f"{name} must be greater than zero")
    for name in ("bias", "batch_first", "bidirectional", "recompute"):
        value = getattr(layer, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    p = layer.dropout
    if not isinstance(p, numbers.Number) or not 0 <= p <= 1 or isinstance(p, bool):  # type: ignore[operator]
        raise ValueError("dropout should be a number in range [0, 1] representing the probability of an element being zeroed")
    if p > 0 and layer.num_layers == 1:  # type: ignore[operator]
        warnings.warn(
            "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects num_layers greater "
            f"than 1, but got dropout={p} and num_layers={layer.num_layers}",
            stacklevel=user_level(),
        )
    check_heads(layer.cell, layer.hidden_size, layer.heads)


def check_heads(cell: Cell, hidden_size: int, heads: int) -> None:
    if hidden_size % heads:
        raise ValueError(f"hidden_size must be divisible by heads, got {hidden_size} units and {heads} heads")
    if heads > 1 and not cell.recurrent:
        raise ValueError(f"heads are blocks of W_hh, and cell `{cell.name}` has no W_hh (recurrent=False)")


def own_names(cell: Cell, *functions: Callable) -> None:
    """Raise a `ValueError` if a number, a row or a learned vector of the cell has the name of a parameter of `functions`."""
    taken = {name for function in functions for name in inspect.signature(function).parameters}
    taken |= {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
    for name in (*cell.constants, *cell.held):
        if name in taken:
            raise ValueError(f"cell `{cell.name}` names an argument {name!r}, which means something else to a layer: rename it")


def checked_constants(cell: Cell, constants: Mapping[str, Any], modes: bool = True) -> dict[str, Any]:
    """The numbers of the cell that are not to be its own.

    Args:
        modes: whether ``training`` comes from a module, so that it is no number.

    Raises:
        TypeError: for an unknown name, or what is no number, or no bool where the cell has one.
    """
    known = {name: value for name, value in cell.constants.items() if not modes or name != "training"}
    found = {}
    for name, value in constants.items():
        if name not in known:
            has = f"its numbers are {', '.join(known)}" if known else "it has no numbers"
            raise TypeError(f"cell `{cell.name}` has no number {name!r}: {has}")
        wanted: tuple[type, ...] = (bool,) if isinstance(known[name], bool) else (int, float)
        if type(value) not in wanted:
            names = " or ".join(each.__name__ for each in wanted)
            raise TypeError(f"{name} should be of type {names}, got: {type(value).__name__}")
        found[name] = float(value) if isinstance(known[name], float) else value  # so that 1 and 1.0 are one kernel
    return found


# Calls


def check_call(layer: Any, input: Any, hx: Any, parameters: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Raise for what does not fit. Returns the states of hx, empty if there are none.

    Args:
        parameters: those of the layer by name, with their shapes in ``layer._shapes``.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for a wrong rank or dtype of the input.
        RuntimeError: for a wrong size, device or dtype of another tensor.
    """
    x = input.data if isinstance(input, PackedSequence) else input
    is_tensor("input", x)
    if isinstance(input, PackedSequence):
        if not is_consistent(input):
            raise RuntimeError("the batch sizes of the PackedSequence are not those of its rows")
        batch: tuple[int, ...] = (int(input.batch_sizes[0]),)
    elif x.dim() not in (2, 3):
        raise ValueError(f"{layer.cell.name}: Expected input to be 2D or 3D, got {x.dim()}D instead")
    else:
        batch = () if x.dim() == 2 else (x.shape[0 if layer.batch_first else 1],)
    dtype = next(iter(parameters.values())).dtype
    for name, shape in layer._shapes.items():
        found = parameters[name]
        is_tensor(name, found)
        if found.shape != shape:
            raise RuntimeError(f"Expected {name} of size {tuple(shape)}, got {tuple(found.shape)}")
        if found.device != x.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{x.device} and parameter tensor at {found.device}"
            )
        if not one_dtype(found, x):
            if found.dtype != dtype:
                raise RuntimeError(f"{name} has dtype {found.dtype} and another parameter {dtype}: they must have one dtype")
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({dtype}). Convert input: input.to({dtype}), or "
                f"convert model: model.to({x.dtype})"
            )
    if x.shape[-1] != layer.input_size:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {layer.input_size}, got {x.shape[-1]}")
    if not isinstance(input, PackedSequence) and x.shape[1 if x.dim() == 3 and layer.batch_first else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return _states(layer, x, hx, (layer.places, *batch, layer.hidden_size))


def _states(layer: Any, x: Tensor, hx: Any, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    if hx is None:
        return ()
    names = layer.cell.states
    if len(names) > 1 and not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx must be a tuple of {len(names)} tensors ({', '.join(names)}), got {type(hx).__name__}")
    states: tuple[Any, ...] = tuple(hx) if len(names) > 1 else (hx,)
    if len(states) != len(names):
        raise RuntimeError(f"hx must hold {len(names)} states ({', '.join(names)}), got {len(states)}")
    for n, state in enumerate(states):
        label = "hidden" if len(names) == 1 else f"hidden[{n}]"
        is_tensor(label, state)
        if state.dim() != len(shape):
            form, rank = ("batched 3-D", 3) if len(shape) == 3 else ("unbatched 2-D", 2)
            raise RuntimeError(f"For {form} input, hx should also be {rank}-D but got {state.dim()}-D tensor")
        if state.shape != shape:
            raise RuntimeError(f"Expected {label} size {shape}, got {list(state.shape)}")
        if state.device != x.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{x.device} and hidden tensor at {state.device}"
            )
        if not one_dtype(state, x):
            raise RuntimeError(
                "Input and hidden tensors are not the same dtype, found input tensor with "
                f"{x.dtype} and hidden tensor with {state.dtype}"
            )
    return states


def rows_of(cell: Cell, given: Mapping[str, Any], x: Tensor, B: int | None, H: int, places: int) -> list[Tensor]:
    """What a call gives to the `Row` arguments of the cell, in their order, each (places or 1, B or 1, H).

    Args:
        B: rows of the batch; None without a batch.
        places: layers times directions.

    Raises:
        TypeError: for an argument that is missing, unknown or no tensor.
        RuntimeError: for a wrong size or device.
        ValueError: for a wrong dtype.
    """
    for name in given:
        if name not in cell.rows:
            has = f"its rows are {', '.join(cell.rows)}" if cell.rows else "it has none"
            raise TypeError(f"cell `{cell.name}` takes no row {name!r}: {has}")
    found = []
    for name in cell.rows:
        shapes = [(H,), (places, H)] if B is None else [(H,), (B, H), (places, B, H)]
        row = _given(cell, "row", name, given, x, shapes)
        row = row.unsqueeze(-2) if B is None or row.dim() == 1 else row
        found.append(row if row.dim() == 3 else row.unsqueeze(0))
    return found


def learned_of(cell: Cell, given: Mapping[str, Any], x: Tensor, H: int) -> list[Tensor]:
    """The learned vectors (H,) of a call without a module, in the order of the cell. Raises what `rows_of` raises."""
    return [_given(cell, "learned vector", name, given, x, [(H,)]) for name in cell.learned]


def _given(cell: Cell, kind: str, name: str, given: Mapping[str, Any], x: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    if name not in given:
        raise TypeError(f"cell `{cell.name}` needs the {kind} {name!r}: give it by its name")
    tensor = given[name]
    is_tensor(name, tensor)
    if tuple(tensor.shape) not in shapes:
        raise RuntimeError(f"Expected {name} of size {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise RuntimeError(f"the input is on {x.device} and {name} on {tensor.device}: they must be on one device")
    if not one_dtype(tensor, x):
        raise ValueError(f"the input has dtype {x.dtype} and {name} has {tensor.dtype}: they must have one dtype")
    return tensor
