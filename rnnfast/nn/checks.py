"""The one validator of modules, cells and functions: whether tensors fit a call, and the options read from what a user gave.

A call of a module whose tensors do not fit goes to torch.nn, to be served or refused there. Functions and options, which
torch.nn does not have, raise here, with the types that torch.nn raises.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import torch_private
from rnnfast.choice.obstacles import autocast
from rnnfast.nn.options import CallOptions
from rnnfast.reference import GATES, STATES

__all__ = [
    "ONEDNN",
    "cell_fits",
    "check_function",
    "check_recompute",
    "layer_fits",
    "read_options",
    "state_shapes",
    "states_of",
]

ONEDNN = ("lstm",)  # the cells that PyTorch has one operator of oneDNN for, on a CPU
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def check_recompute(value: bool) -> None:
    """A `TypeError`, as torch.nn's of its sizes, for a ``recompute`` that is no bool: "False" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"recompute should be of type bool, got: {type(value).__name__}")


def _one_dtype(tensor: Tensor, x: Tensor) -> bool:
    """Whether `tensor` may meet the input `x`: it has its dtype, or autocast will cast both."""
    return tensor.dtype == x.dtype or (autocast(x.device.type) and tensor.is_floating_point())


# Modules


def states_of(cell: str, hx: Any) -> tuple[Any, ...]:
    """hx as a tuple of states, empty if absent."""
    if hx is None:
        return ()
    return tuple(hx) if STATES.get(cell) != 1 and isinstance(hx, (tuple, list)) else (hx,)


def state_shapes(layer: torch.nn.RNNBase, cell: str, input: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of hx's states, for an input of the right rank."""
    if isinstance(input, PackedSequence):
        batch = (int(input.batch_sizes[0]),)
    else:
        batch = () if input.dim() == 2 else (input.shape[0 if layer.batch_first else 1],)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = (layer.proj_size or layer.hidden_size, layer.hidden_size)[: STATES[cell]]
    return tuple((count, *batch, width) for width in widths)


def layer_fits(
    layer: torch.nn.RNNBase, cell: str, weights: list[Any], input: Any, states: tuple[Any, ...], given: bool
) -> bool:
    """Whether every tensor of a layer's call fits and none is empty.

    Args:
        weights: all, layer after layer and direction after direction.
        states: those of hx, empty if absent; `given`: whether it is there.
    """
    if cell not in GATES or not isinstance(layer.dropout, (float, int)):
        return False
    x, batch = input, ()
    if isinstance(input, PackedSequence):
        if not _is_consistent(input):
            return False
        x, batch = input.data, (int(input.batch_sizes[0]),)
    elif not isinstance(x, Tensor) or x.dim() not in (2, 3):
        return False
    elif x.dim() == 3:
        batch = (x.shape[0 if layer.batch_first else 1],)
    if x.numel() == 0 or x.shape[-1] != layer.input_size or x.layout is not torch.strided:
        return False
    H, P, directions = layer.hidden_size, layer.proj_size or layer.hidden_size, 2 if layer.bidirectional else 1
    rows, groups = GATES[cell] * H, layer.num_layers * directions
    if given and len(states) != STATES[cell]:
        return False
    expected: list[tuple[int, ...]] = [(groups, *batch, P), (groups, *batch, H)][: len(states)]
    for n in range(groups):
        expected += [(rows, layer.input_size if n < directions else directions * P), (rows, P)]
        expected += [(rows,)] * 2 if layer.bias else []
        expected += [(P, H)] if layer.proj_size else []
    tensors = (*states, *weights)
    kind = x.device.type
    casts = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)  # then every floating dtype will do
    return len(tensors) == len(expected) and all(
        [
            isinstance(tensor, Tensor)
            and tensor.shape == shape
            and tensor.device == x.device
            and (tensor.dtype == x.dtype or (casts and tensor.is_floating_point()))
            and (n >= len(states) or tensor.layout is torch.strided)
            for n, (tensor, shape) in enumerate(zip(tensors, expected, strict=True))
        ]
    )


def _is_consistent(packed: PackedSequence) -> bool:
    """Whether the batch sizes are those of its rows: of int64, at least 1, never growing, and as many as there are rows."""
    data, sizes = packed.data, packed.batch_sizes
    if sizes.dim() != 1 or sizes.dtype != torch.int64 or sizes.numel() == 0 or data.dim() != 2:
        return False
    return int(sizes.sum()) == data.shape[0] and int(sizes[-1]) > 0 and bool((sizes[1:] <= sizes[:-1]).all())


def cell_fits(layer: Any, cell: str, weights: tuple[Any, ...], input: Any, hx: Any) -> bool:
    """Whether every tensor of a cell's call fits and none is empty."""
    if not isinstance(input, Tensor) or input.dim() not in (1, 2) or input.numel() == 0 or cell not in GATES:
        return False
    states, (w_ih, w_hh, *biases) = states_of(cell, hx), weights
    rows = GATES[cell] * layer.hidden_size
    given = [(state, (*input.shape[:-1], layer.hidden_size)) for state in states]
    given += [(w_ih, (rows, layer.input_size)), (w_hh, (rows, layer.hidden_size))]
    given += [(bias, (rows,)) for bias in biases if layer.bias]
    return (
        input.shape[-1] == layer.input_size
        and (hx is None or len(states) == STATES[cell])
        and input.layout is torch.strided
        and all(
            isinstance(tensor, Tensor)
            and tensor.device == input.device
            and _one_dtype(tensor, input)
            and tensor.layout is torch.strided
            and tensor.shape == shape
            for tensor, shape in given
        )
    )


# Options


def read_options(
    x: Tensor,
    lengths: Any,
    resets: Any,
    reset_to: Any,
    all_states: bool,
    gates: bool,
    *,
    shapes: tuple[tuple[int, ...], ...],
    batch_first: bool = False,
) -> CallOptions:
    """Check the options of a call whose tensors are right.

    Args:
        x: (T, B, I), (B, T, I) with `batch_first`, or without a batch (T, I).
        lengths, resets, reset_to, all_states, gates: as the user gave them.
        shapes: those of hx's states, for `x` as it is.

    Raises:
        TypeError: for what is no tensor; for `lengths`, whatever holds integers will do.
        RuntimeError: for a wrong size or device, or a length out of range.
        ValueError: for a wrong dtype, or options that do not go together.
    """
    if reset_to is not None and resets is None:
        raise ValueError("reset_to says what resets restart from: give resets too")
    if x.dim() == 2:
        if lengths is not None:
            raise ValueError("lengths are those of a batch, but the input has no batch dimension")
        x = x.unsqueeze(1)
        steps = x.shape[:1]
    else:
        steps = x.shape[:2]
        x = x.transpose(0, 1) if batch_first else x
    if resets is not None:
        _is_tensor("resets", resets)
        if resets.dtype != torch.bool:
            raise ValueError(f"resets must be bool, got {resets.dtype}")
        if resets.shape != steps:
            raise RuntimeError(f"Expected resets of size {tuple(steps)}, got {tuple(resets.shape)}")
        _same_device("resets", resets, x)
        resets = resets.unsqueeze(1) if len(steps) == 1 else resets.transpose(0, 1) if batch_first else resets
    states = _read_states(reset_to, x, shapes)
    if len(steps) == 1:
        states = tuple(state.unsqueeze(-2) for state in states)
    return CallOptions(_read_lengths(lengths, x), resets, states, bool(all_states), bool(gates))


def _read_lengths(lengths: Any, x: Tensor) -> Tensor | None:
    """`lengths` as (B,) int64 on the device of `x`, (T, B, I), in 0..T.

    Lengths on a CPU are checked. On another device they are not, as that would wait for it: what is out of range counts as 0 or
    T. Nor are they where their numbers are not there: while compiling or tracing, where vmap maps over them, in a FakeTensor.
    """
    if lengths is None:
        return None
    T, B, _ = x.shape
    if not isinstance(lengths, Tensor):
        lengths = _integers(lengths)
    if lengths.dtype not in INTEGERS:
        raise ValueError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise RuntimeError(f"Expected lengths of size ({B},), one for each row of the batch, got {tuple(lengths.shape)}")
    lengths = lengths.to(torch.int64)
    if lengths.device.type != "cpu":
        _same_device("lengths", lengths, x)
    elif _is_readable(lengths) and not (int(lengths.min()) >= 0 and int(lengths.max()) <= T):
        raise RuntimeError(f"lengths must be from 0 to the {T} steps of the input, got {lengths.tolist()}")
    return lengths.to(x.device, non_blocking=True).clamp(0, T)


def _is_readable(lengths: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    mapped = torch_private.is_wrapped(lengths) and "vmap" in torch_private.inside()
    return not mapped and not torch_private.is_fake(lengths)


def _integers(values: Any) -> Tensor:
    """A tensor of what packing takes: a list, a tuple, an array; of Python's integers, NumPy's, or tensors of one."""
    error = "lengths must be a tensor or a list of integers"
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(error)
    values = list(values)
    if values and all(isinstance(value, Tensor) and value.dim() == 0 and value.dtype in INTEGERS for value in values):
        return torch.stack([value.to(torch.int64) for value in values])
    numbers = []
    for value in values:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype not in INTEGERS):
            raise TypeError(error)
        if not isinstance(value, (int, torch.SymInt)):
            try:
                value = operator.index(value)
            except (TypeError, ValueError):
                raise TypeError(error) from None
        numbers.append(value)
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _read_states(reset_to: Any, x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    if reset_to is None:
        return ()
    if len(shapes) == 1:
        reset_to = (reset_to,)
    elif not isinstance(reset_to, (tuple, list)):
        raise TypeError(f"reset_to must be a tuple of {len(shapes)} tensors, as hx, got {type(reset_to).__name__}")
    if len(reset_to) != len(shapes):
        raise RuntimeError(f"reset_to must hold {len(shapes)} states, as hx, got {len(reset_to)}")
    for n, (state, shape) in enumerate(zip(reset_to, shapes, strict=True)):
        label = "reset_to" if len(shapes) == 1 else f"reset_to[{n}]"
        _is_tensor(label, state)
        if state.shape != shape:
            raise RuntimeError(f"Expected {label} of size {tuple(shape)}, got {tuple(state.shape)}")
        _same_device(label, state, x)
        if not _one_dtype(state, x):
            raise ValueError(f"the input has dtype {x.dtype} and {label} has {state.dtype}: they must have one dtype")
    return tuple(reset_to)


def _is_tensor(label: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(value).__name__}")


def _same_device(label: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise RuntimeError(f"the input is on {x.device} and {label} on {tensor.device}: they must be on one device")


# Functions


def check_function(
    cell: str,
    x: Tensor,
    hx: tuple[Tensor, ...] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> None:
    """Raise for arguments of `rnnfast.functional` that do not fit: `RuntimeError`, `ValueError` for dtypes, `TypeError`."""
    gates, count = GATES[cell], STATES[cell]
    if hx is not None and not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx must be a tuple of {count} tensors, got {type(hx).__name__}")
    if hx is not None and len(hx) != count:
        raise RuntimeError(f"hx must hold {count} states, got {len(hx)}")
    required = {"x": x, "w_ih": w_ih, "w_hh": w_hh, **{f"hx[{n}]": state for n, state in enumerate(hx or ())}}
    optional = {label: bias for label, bias in (("b_ih", b_ih), ("b_hh", b_hh)) if bias is not None}
    for label, tensor in (required | optional).items():
        _is_tensor(label, tensor)
    if x.dim() != 3:
        raise RuntimeError(f"x must have 3 dimensions, got {x.dim()}")
    if w_hh.dim() != 2 or w_hh.shape[0] != gates * w_hh.shape[1]:
        raise RuntimeError(f"w_hh must be (G*H, H) with G = {gates}, got {tuple(w_hh.shape)}")
    T, B, I = x.shape
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if B == 0 or I == 0:
        raise RuntimeError(f"x must not be empty, got {tuple(x.shape)}")
    rows, H = w_hh.shape
    shapes = {"w_ih": (w_ih, (rows, I)), "w_hh": (w_hh, (rows, H)), "b_ih": (b_ih, (rows,)), "b_hh": (b_hh, (rows,))}
    shapes |= {f"hx[{n}]": (state, (B, H)) for n, state in enumerate(hx or ())}
    for label, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise RuntimeError(f"Expected {label} of size {shape}, got {tuple(tensor.shape)}")
        if not _one_dtype(tensor, x):
            raise ValueError(f"x has dtype {x.dtype} and {label} has {tensor.dtype}: all tensors must have one dtype")
        if tensor.device != x.device:
            raise RuntimeError(f"x is on {x.device} and {label} on {tensor.device}: all tensors must be on one device")
    if (b_ih is None) != (b_hh is None):
        raise RuntimeError("b_ih and b_hh must be given both or neither")
