"""What a launch whose programs waited in vain tells: its own later polls and the launches after it, and the host.

A poll that gives up writes two words. `flag`, in the GPU's memory, is looked at by all polls that have to try often, so that
they do not wait as long one after another. `told`, in pinned memory of the host, gets the number of the launch by `name_of`.
The host reads it without waiting for the GPU. Neither is ever cleared: nobody launches the kernels after that.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from rnnfast.kernels.cells import CELLS, Cell

__all__ = ["GiveUp", "for_launch", "gave_up", "name_of"]


class GiveUp(NamedTuple):
    """The two words of a device, (1,) int32 each, zero until a launch gives up."""

    flag: Any
    told: Any


_words: dict[Any, GiveUp] = {}  # by device
_names: dict[tuple[str, Cell | None, int, Any], int] = {}  # of launches: numbers from 1 on


def for_launch(tensor) -> GiveUp:
    """The words of the device of `tensor`, which is of a floating type. They live as long as the process."""
    device = tensor.device
    if device not in _words:
        told = tensor.new_zeros(1, device="cpu").int()
        words = GiveUp(tensor.new_zeros(1).int(), told if device.type == "cpu" else told.pin_memory())
        _words.setdefault(device, words)  # another thread may have been first, and launched with its own
    return _words[device]


def name_of(direction: str, cell: Cell | None, H: int, dtype) -> int:
    """The number by which a launch tells the host what it was."""
    return _names.setdefault((direction, cell, H, dtype), len(_names) + 1)


def gave_up(device) -> str:
    """Which launch on `device` has given up, in words; empty if none has."""
    if device not in _words:
        return ""
    told = ctypes.c_int32.from_address(_words[device].told.data_ptr()).value
    if not told:
        return ""
    key = next((key for key, number in _names.items() if number == told), None)
    if key is None:
        return "a kernel without a name"
    direction, cell, H, dtype = key
    module = "no cell" if cell is None else cell.forward.fn.__module__.removeprefix("rnnfast_cell_")  # of a derived cell
    name = next((name for name, other in CELLS.items() if other is cell), module)
    return f"{direction} of {name} with {H} hidden units in {str(dtype).removeprefix('torch.')}"
