"""Step kernels: one launch a time step of all members of a group, or two for a cell that needs whole rows, for any size."""

from rnnfast.kernels.step.backward import backward_step_kernel
from rnnfast.kernels.step.forward import forward_step_kernel
from rnnfast.kernels.step.launch import backward, forward

__all__ = ["backward", "backward_step_kernel", "forward", "forward_step_kernel"]
