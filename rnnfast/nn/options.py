"""The options of a call: lengths, resets, and what it wants to see of every step.

`CallOptions` lists them, `read` checks what the user gave. Within the library everything is time first.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import torch_private
from rnnfast.nn.checks import is_tensor, one_dtype, same_device
from rnnfast.reference import STATES

__all__ = ["CallOptions", "packed_like", "padded", "read", "read_for_module", "state_shapes"]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class CallOptions:
    """The options of a call by the names of their keywords, with their defaults. None and False ask for nothing.

    As the user gave them, or checked by `read`, which returns the types below.

    Attributes:
        lengths: (B,) int64 on the input's device, in 0..T; None for full rows.
        resets: (T, B) bool; None for none.
        reset_to: a tuple of the states that resets restart from; None for zeros.
        return_all_states: whether the states of all steps are to be returned.
        return_gates: whether the gate activations of all steps are.
    """

    lengths: Any = None
    resets: Any = None
    reset_to: Any = None
    return_all_states: bool = False
    return_gates: bool = False

    def of_layer(self) -> dict[str, Any]:
        """What the kernels and the equations take. A module's `reset_to` has the states of all layers."""
        found = {"lengths": self.lengths, "resets": self.resets, "reset_to": self.reset_to, "details": self.details}
        return {name: value for name, value in found.items() if value is not None and value is not False}

    @property
    def given(self) -> dict[str, Any]:
        """The options that ask for something, by name."""
        values = {name: getattr(self, name) for name in NAMES}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    @property
    def details(self) -> bool:
        """Whether the states or the gates of every step are wanted."""
        return self.return_all_states or self.return_gates

    def returned(self, all_states: Any, gates: Any) -> tuple[Any, ...]:
        """What the call returns besides the output and the last states."""
        return (*([all_states] if self.return_all_states else []), *([gates] if self.return_gates else []))

    @property
    def marked(self) -> bool:
        """Whether the kernels need marks: `rnnfast.reference.marks`."""
        return self.lengths is not None or self.resets is not None

    @property
    def packable(self) -> bool:
        """Whether the lengths are numbers that can be read now, as packing reads them."""
        lengths = self.lengths
        return lengths is not None and not torch.compiler.is_compiling() and not torch_private.is_fake(lengths)


NAMES = tuple(field.name for field in fields(CallOptions))


def read(x: Tensor, given: CallOptions, *, shapes: tuple[tuple[int, ...], ...], batch_first: bool = False) -> CallOptions:
    """Check the options of a call whose tensors are right.

    Args:
        x: (T, B, I), (B, T, I) with `batch_first`, or without a batch (T, I).
        given: as the user gave them.
        shapes: those of hx's states, for `x` as it is.

    Raises:
        TypeError: for what is no tensor; for `lengths`, whatever holds integers will do.
        RuntimeError: for a wrong size or device, or a length out of range.
        ValueError: for a wrong dtype, or options that do not go together.
    """
    lengths, resets, reset_to = given.lengths, given.resets, given.reset_to
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
        is_tensor("resets", resets)
        if resets.dtype != torch.bool:
            raise ValueError(f"resets must be bool, got {resets.dtype}")
        if resets.shape != steps:
            raise RuntimeError(f"Expected resets of size {tuple(steps)}, got {tuple(resets.shape)}")
        same_device("resets", resets, x)
        resets = resets.unsqueeze(1) if len(steps) == 1 else resets.transpose(0, 1) if batch_first else resets
    if reset_to is not None:
        reset_to = _read_states(reset_to, x, shapes)
        reset_to = tuple(state.unsqueeze(-2) for state in reset_to) if len(steps) == 1 else reset_to
    lengths = _read_lengths(lengths, x)
    flags = {"return_all_states": bool(given.return_all_states), "return_gates": bool(given.return_gates)}
    return replace(given, lengths=lengths, resets=resets, reset_to=reset_to, **flags)


def read_for_module(layer: torch.nn.RNNBase, cell: str, input: Any, given: CallOptions) -> CallOptions:
    """`read` for a module's call whose tensors fit."""
    packed = isinstance(input, PackedSequence)
    if packed and given.marked:
        raise ValueError("a PackedSequence has its own lengths, and no place for resets: pad it, and give lengths")
    x = input.data.unsqueeze(0) if packed else input
    return read(x, given, shapes=state_shapes(layer, cell, input), batch_first=layer.batch_first)


def state_shapes(layer: torch.nn.RNNBase, cell: str, input: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of hx's states, for an input of the right rank."""
    if isinstance(input, PackedSequence):
        batch = (int(input.batch_sizes[0]),)
    else:
        batch = () if input.dim() == 2 else (input.shape[0 if layer.batch_first else 1],)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = (layer.proj_size or layer.hidden_size, layer.hidden_size)[: STATES[cell]]
    return tuple((count, *batch, width) for width in widths)


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
        same_device("lengths", lengths, x)
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
    if len(shapes) == 1:
        reset_to = (reset_to,)
    elif not isinstance(reset_to, (tuple, list)):
        raise TypeError(f"reset_to must be a tuple of {len(shapes)} tensors, as hx, got {type(reset_to).__name__}")
    if len(reset_to) != len(shapes):
        raise RuntimeError(f"reset_to must hold {len(shapes)} states, as hx, got {len(reset_to)}")
    for n, (state, shape) in enumerate(zip(reset_to, shapes, strict=True)):
        label = "reset_to" if len(shapes) == 1 else f"reset_to[{n}]"
        is_tensor(label, state)
        if state.shape != shape:
            raise RuntimeError(f"Expected {label} of size {tuple(shape)}, got {tuple(state.shape)}")
        same_device(label, state, x)
        if not one_dtype(state, x):
            raise ValueError(f"the input has dtype {x.dtype} and {label} has {state.dtype}: they must have one dtype")
    return tuple(reset_to)


def padded(packed: PackedSequence, options: CallOptions | None) -> tuple[Tensor, CallOptions | None]:
    """The rows of a PackedSequence in its own order, (T, B, I), and `options` with their lengths, unless all have T steps."""
    data, sizes = packed.data, packed.batch_sizes
    T = sizes.numel()
    if int(sizes[0]) == int(sizes[-1]):
        return data.reshape(T, -1, data.shape[1]), options
    if torch_private.inside():  # where PyTorch's operator has no rule
        x = data.new_zeros(T * int(sizes[0]), data.shape[1]).index_copy(0, _positions(packed), data).view(T, -1, data.shape[1])
        lengths = _lengths(sizes)
    else:
        x, lengths = torch_private.pad(data, sizes, T)
    return x, replace(options or CallOptions(), lengths=lengths.to(data.device, non_blocking=True))


def packed_like(packed: PackedSequence, tensor: Tensor) -> PackedSequence:
    """(T, B, ...), rows in the order of `packed`, packed as that is."""
    sizes = packed.batch_sizes
    if torch_private.inside():
        data = tensor.flatten(0, 1).index_select(0, _positions(packed))
    else:
        data = torch_private.pack(tensor, _lengths(sizes))
    return PackedSequence(data, sizes, packed.sorted_indices, packed.unsorted_indices)


def _lengths(sizes: Tensor) -> Tensor:
    return (sizes[:, None] > torch.arange(int(sizes[0]), device=sizes.device)).sum(0)


def _positions(packed: PackedSequence) -> Tensor:
    """The place of each packed step among the steps of all rows, t * B + b."""
    sizes = [int(size) for size in packed.batch_sizes]
    return torch.tensor([t * sizes[0] + b for t, size in enumerate(sizes) for b in range(size)], device=packed.data.device)
