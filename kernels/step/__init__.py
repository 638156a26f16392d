"""Step kernels: one launch a time step of all members of a group, for any size."""

from rnnfast.kernels.step.kernels import backward_step_kernel, forward_step_kernel
from rnnfast.kernels.step.launch import backward, forward

__all__ = ["backward", "backward_step_kernel", "forward", "forward_step_kernel"]
