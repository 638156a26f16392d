"""What a call says of its sequences besides their numbers: lengths, resets, and what it wants to see of every step.

`rnnfast.nn.checks` reads them from what the user gave. Within the library everything is time first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import torch_private
from rnnfast.choice.decide import Options

__all__ = ["CallOptions", "given", "packed_like", "padded"]


@dataclass(frozen=True)
class CallOptions:
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
        """What the kernels and the equations take, for the layer and direction `n`."""
        return {
            "lengths": self.lengths,
            "resets": self.resets,
            "reset_to": tuple(state[n] for state in self.reset_to) or None,
        }

    @property
    def details(self) -> bool:
        """Whether the states or the gates of every step are wanted."""
        return self.all_states or self.gates

    @property
    def marked(self) -> bool:
        """Whether the kernels need marks: `rnnfast.reference.marks`."""
        return self.lengths is not None or self.resets is not None

    @property
    def kind(self) -> Options:
        if self.resets is not None or self.all_states or self.gates:
            return "more"
        return "none" if self.lengths is None else "lengths"

    @property
    def packable(self) -> bool:
        """Whether the lengths are numbers that can be read now, as packing reads them."""
        lengths = self.lengths
        return lengths is not None and not torch.compiler.is_compiling() and not torch_private.is_fake(lengths)


def given(lengths: Any, resets: Any, reset_to: Any, all_states: bool, gates: bool) -> bool:
    """Whether a call has any of these options."""
    return not (lengths is None and resets is None and reset_to is None) or all_states or gates


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
