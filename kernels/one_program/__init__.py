"""One-program kernels: one program runs a whole small layer's recurrence for a few batch rows, W_hh in its registers.

`forward` and `backward` take what those of `rnnfast.kernels.step` take, write the same buffers, and differ in the plan. Any
family's backward runs on what any family's forward saved. Programs exchange nothing, so no launch can hang, and a group may
have any number of members.
"""

from rnnfast.kernels.marks import pack_kernel
from rnnfast.kernels.one_program.backward import one_program_backward_kernel
from rnnfast.kernels.one_program.forward import one_program_forward_kernel
from rnnfast.kernels.one_program.launch import backward, forward

__all__ = ["backward", "forward", "one_program_backward_kernel", "one_program_forward_kernel", "pack_kernel"]
