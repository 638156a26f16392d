"""What a call says of its sequences besides their numbers: lengths, resets, and what it wants to see of every step.

Checked here, for modules and functions alike, before anything runs. Within the library everything is time first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import transforms

__all__ = ["Sequences", "consistent", "given", "packed_like", "padded", "read"]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Sequences:
    """The options of a call, checked.

    Attributes:
        lengths: (B,) int64 on the input's device, in 0..T; None for full rows.
        resets: (T, B) bool; None for none.
        reset_to: the states that resets restart from, in the form of hx's; empty for zeros.
        all_states: whether the states of all steps are to be returned.
        gates: whether the gate activations of all steps are.
    """

    lengths: Tensor | None = None
    resets: Tensor | None = None
    reset_to: tuple[Tensor, ...] = ()
    all_states: bool = False
    gates: bool = False

    def of_layer(self, n: int) -> dict[str, Any]:
        """What `trace` of a backend takes, for the layer and direction `n`."""
        return {
            "lengths": self.lengths,
            "resets": self.resets,
            "reset_to": tuple(state[n] for state in self.reset_to) or None,
        }

    @property
    def details(self) -> bool:
        return self.all_states or self.gates

    @property
    def marked(self) -> bool:
        """Whether the kernels need marks: `rnnfast.reference.marks`."""
        return self.lengths is not None or self.resets is not None

    @property
    def only_lengths(self) -> bool:
        return self.lengths is not None and self.resets is None and not self.details


def given(lengths: Any, resets: Any, reset_to: Any, all_states: bool, gates: bool) -> bool:
    """Whether a call has any of these options."""
    return not (lengths is None and resets is None and reset_to is None) or all_states or gates


def read(
    x: Tensor,
    lengths: Any,
    resets: Any,
    reset_to: Any,
    all_states: bool,
    gates: bool,
    *,
    shapes: tuple[tuple[int, ...], ...],
    batch_first: bool = False,
) -> Sequences:
    """Check the options of a call whose tensors are right.

    Args:
        x: (T, B, I), (B, T, I) with `batch_first`, or without a batch (T, I).
        lengths, resets, reset_to, all_states, gates: as the user gave them.
        shapes: those of hx's states, for `x` as it is.

    Raises:
        TypeError: for what is no tensor (of integers, for `lengths`, a list will do).
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
    return Sequences(_read_lengths(lengths, x), resets, states, bool(all_states), bool(gates))


def _read_lengths(lengths: Any, x: Tensor) -> Tensor | None:
    """`lengths` as (B,) int64 on the device of `x`, (T, B, I), in 0..T.

    Those on a CPU are checked. Those on another device are not, which would wait for it: they count as 0 or T where they are
    out of range; nor are they while compiling, or where vmap maps over them.
    """
    if lengths is None:
        return None
    T, B, _ = x.shape
    if not isinstance(lengths, Tensor):
        if not isinstance(lengths, Sequence) or not all(isinstance(n, int) and not isinstance(n, bool) for n in lengths):
            raise TypeError("lengths must be a tensor or a list of integers")
        lengths = torch.tensor(lengths, dtype=torch.int64)
    if lengths.dtype not in INTEGERS:
        raise ValueError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise RuntimeError(f"Expected lengths of size ({B},), one for each row of the batch, got {tuple(lengths.shape)}")
    if lengths.device.type != "cpu":
        _same_device("lengths", lengths, x)
    elif not (torch.compiler.is_compiling() or transforms.maybe_mapped(lengths)) and not (
        int(lengths.min()) >= 0 and int(lengths.max()) <= T
    ):
        raise RuntimeError(f"lengths must be from 0 to the {T} steps of the input, got {lengths.tolist()}")
    return lengths.to(x.device, torch.int64, non_blocking=True).clamp(0, T)


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
        if state.dtype != x.dtype and not (torch.is_autocast_enabled(x.device.type) and state.is_floating_point()):
            raise ValueError(f"the input has dtype {x.dtype} and {label} has {state.dtype}: they must have one dtype")
    return tuple(reset_to)


def _is_tensor(label: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(value).__name__}")


def _same_device(label: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise RuntimeError(f"the input is on {x.device} and {label} on {tensor.device}: they must be on one device")


def consistent(packed: PackedSequence) -> bool:
    """Whether the batch sizes are those of its rows: of int64, at least 1, never growing, and as many as there are rows."""
    data, sizes = packed.data, packed.batch_sizes
    if sizes.dim() != 1 or sizes.dtype != torch.int64 or sizes.numel() == 0 or data.dim() != 2:
        return False
    return int(sizes.sum()) == data.shape[0] and int(sizes[-1]) > 0 and bool((sizes[1:] <= sizes[:-1]).all())


def padded(packed: PackedSequence, options: Sequences | None) -> tuple[Tensor, Sequences | None]:
    """The rows of a PackedSequence in its own order, (T, B, I), and `options` with their lengths, unless all have T steps."""
    data, sizes = packed.data, packed.batch_sizes
    T = sizes.numel()
    if int(sizes[0]) == int(sizes[-1]):
        return data.reshape(T, -1, data.shape[1]), options
    if transforms.inside():  # where PyTorch's own has no rule
        x = data.new_zeros(T * int(sizes[0]), data.shape[1]).index_copy(0, _positions(packed), data).view(T, -1, data.shape[1])
        lengths = _lengths(sizes)
    else:
        x, lengths = _VF._pad_packed_sequence(data, sizes, False, 0.0, T)  # type: ignore[attr-defined]
    return x, replace(options or Sequences(), lengths=lengths.to(data.device, non_blocking=True))


def packed_like(packed: PackedSequence, tensor: Tensor) -> PackedSequence:
    """(T, B, ...), rows in the order of `packed`, packed as that is."""
    sizes = packed.batch_sizes
    if transforms.inside():
        data = tensor.flatten(0, 1).index_select(0, _positions(packed))
    else:
        data, _ = _VF._pack_padded_sequence(tensor, _lengths(sizes), False)  # type: ignore[attr-defined]
    return PackedSequence(data, sizes, packed.sorted_indices, packed.unsorted_indices)


def _lengths(sizes: Tensor) -> Tensor:
    return (sizes[:, None] > torch.arange(int(sizes[0]))).sum(0)


def _positions(packed: PackedSequence) -> Tensor:
    """Of each packed step, its place among the steps of all rows, t * B + b."""
    sizes = [int(size) for size in packed.batch_sizes]
    return torch.tensor([t * sizes[0] + b for t, size in enumerate(sizes) for b in range(size)], device=packed.data.device)
