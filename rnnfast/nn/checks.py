"""The one validator of modules, cells and functions: whether tensors fit a call.

A call of a module whose tensors do not fit goes to torch.nn, to be served or refused there. Functions, which torch.nn does not
have, raise here, with the types that torch.nn raises. `rnnfast.nn.options` checks the options of a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast.choice.obstacles import autocast
from rnnfast.reference import GATES, STATES, Cell, spec_of

__all__ = [
    "ONEDNN",
    "cell_fits",
    "check_function",
    "check_recompute",
    "is_consistent",
    "is_tensor",
    "layer_fits",
    "one_dtype",
    "same_device",
    "states_of",
]

ONEDNN = ("lstm",)  # the cells that PyTorch has one operator of oneDNN for, on a CPU


def check_recompute(value: bool) -> None:
    """A `TypeError`, as torch.nn's of its sizes, for a ``recompute`` that is no bool: "False" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"recompute should be of type bool, got: {type(value).__name__}")


def one_dtype(tensor: Tensor, x: Tensor) -> bool:
    """Whether `tensor` may meet the input `x`: it has its dtype, or autocast will cast both."""
    return tensor.dtype == x.dtype or (autocast(x.device.type) and tensor.is_floating_point())


# Modules


def states_of(cell: str, hx: Any) -> tuple[Any, ...]:
    """hx as a tuple of states, empty if absent."""
    if hx is None:
        return ()
    return tuple(hx) if STATES.get(cell) != 1 and isinstance(hx, (tuple, list)) else (hx,)


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
        if not is_consistent(input):
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


def is_consistent(packed: PackedSequence) -> bool:
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
            and one_dtype(tensor, input)
            and tensor.layout is torch.strided
            and tensor.shape == shape
            for tensor, shape in given
        )
    )


# Functions


def is_tensor(label: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(value).__name__}")


def same_device(label: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise RuntimeError(f"the input is on {x.device} and {label} on {tensor.device}: they must be on one device")


def check_function(
    cell: str | Cell,
    x: Tensor,
    hx: tuple[Tensor, ...] | None,
    w_ih: Tensor,
    w_hh: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    heads: bool = False,
) -> None:
    """Raise for arguments of `rnnfast.functional` that do not fit: `RuntimeError`, `ValueError` for dtypes, `TypeError`.

    Args:
        heads: whether ``w_hh`` may be the blocks of several heads, (heads, G*H/heads, H/heads).
    """
    spec = spec_of(cell)
    gates, count = spec.gates, spec.states
    if hx is not None and not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx must be a tuple of {count} tensors, got {type(hx).__name__}")
    if hx is not None and len(hx) != count:
        raise RuntimeError(f"hx must hold {count} states, got {len(hx)}")
    required = {"x": x, "w_ih": w_ih, "w_hh": w_hh, **{f"hx[{n}]": state for n, state in enumerate(hx or ())}}
    if not spec.recurrent:
        if w_hh is not None or b_hh is not None:
            raise RuntimeError("the cell has no W_hh (recurrent=False): w_hh and b_hh must be None")
        del required["w_hh"]
    optional = {label: bias for label, bias in (("b_ih", b_ih), ("b_hh", b_hh)) if bias is not None}
    for label, tensor in (required | optional).items():
        is_tensor(label, tensor)
    if x.dim() != 3:
        raise RuntimeError(f"x must have 3 dimensions, got {x.dim()}")
    if w_hh is None:
        if w_ih.dim() != 2 or not w_ih.shape[0] or w_ih.shape[0] % gates:
            raise RuntimeError(f"w_ih must be (G*H, I) with G = {gates}, got {tuple(w_ih.shape)}")
        H = w_ih.shape[0] // gates
    else:
        form = "(heads, G*H/heads, H/heads) or (G*H, H)" if heads else "(G*H, H)"
        if w_hh.dim() not in ((2, 3) if heads else (2,)) or w_hh.shape[-2] != gates * w_hh.shape[-1]:
            raise RuntimeError(f"w_hh must be {form} with G = {gates}, got {tuple(w_hh.shape)}")
        H = w_hh.shape[-1] * (w_hh.shape[0] if w_hh.dim() == 3 else 1)
    T, B, I = x.shape
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if B == 0 or I == 0:
        raise RuntimeError(f"x must not be empty, got {tuple(x.shape)}")
    rows = gates * H
    shapes = {"w_ih": (w_ih, (rows, I)), "b_ih": (b_ih, (rows,)), "b_hh": (b_hh, (rows,))}
    shapes |= {} if w_hh is None else {"w_hh": (w_hh, tuple(w_hh.shape))}
    shapes |= {f"hx[{n}]": (state, (B, H)) for n, state in enumerate(hx or ())}
    for label, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise RuntimeError(f"Expected {label} of size {shape}, got {tuple(tensor.shape)}")
        if not one_dtype(tensor, x):
            raise ValueError(f"x has dtype {x.dtype} and {label} has {tensor.dtype}: all tensors must have one dtype")
        if tensor.device != x.device:
            raise RuntimeError(f"x is on {x.device} and {label} on {tensor.device}: all tensors must be on one device")
    if spec.recurrent and (b_ih is None) != (b_hh is None):
        raise RuntimeError("b_ih and b_hh must be given both or neither")
