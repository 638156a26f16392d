"""Persistent kernels: one launch runs many time steps; the recurrent weights stay on chip.

`forward` and `backward` take what those of `rnnfast.kernels.step` take, write the same buffers, and differ in the plan. Any
family's backward runs on what any family's forward saved. All members of a group are resident together.
"""

from rnnfast.kernels.marks import pack_kernel
from rnnfast.kernels.persistent.backward import persistent_backward_kernel
from rnnfast.kernels.persistent.clear import clear_kernel
from rnnfast.kernels.persistent.forward import persistent_forward_kernel
from rnnfast.kernels.persistent.give_up import gave_up
from rnnfast.kernels.persistent.launch import backward, forward

__all__ = [
    "backward",
    "clear_kernel",
    "forward",
    "gave_up",
    "pack_kernel",
    "persistent_backward_kernel",
    "persistent_forward_kernel",
]
