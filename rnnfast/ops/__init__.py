"""The kernels as PyTorch operators, one layer in one direction, and their derivatives. A module imports those above it:

schema       every tensor of a recurrent call: its shape, its batch axis, whether it has a gradient
marks        lengths and resets around the kernels
recurrence   runs the kernels
operators    ``rnnfast::forward`` and ``rnnfast::backward``, their fake kernels and FLOP formulas
vmap         vmap over them
gradients    derivatives of any order
layers       `layer` and `trace`
dropout      dropout between layers, operators of their own
"""

from rnnfast.ops import dropout
from rnnfast.ops.layers import layer, trace
from rnnfast.ops.operators import FLOP_FORMULAS, backward, forward

__all__ = ["FLOP_FORMULAS", "backward", "dropout", "forward", "layer", "trace"]
