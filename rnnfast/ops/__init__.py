"""The kernels as PyTorch operators, which run a group of recurrences, and their derivatives. A module imports those above it:

schema       every tensor of a recurrent call: its shape, its batch axis, whether it has a gradient
products     matrix products in the precision of recurrent layers
marks        lengths and resets around the kernels, and which members run in which direction
rounds       what each launch of a group is given
recurrence   runs the kernels
operators    ``rnnfast::forward`` and ``rnnfast::backward``, their fake kernels and FLOP formulas
members      the weights of a group's members, put together
vmap         vmap over them
dropout      dropout between layers, an operator of its own
gradients    derivatives of any order
layers       `group`, `layer` and `trace`
"""

from rnnfast.ops import dropout
from rnnfast.ops.layers import group, layer, trace
from rnnfast.ops.operators import FLOP_FORMULAS, backward, forward

__all__ = ["FLOP_FORMULAS", "backward", "dropout", "forward", "group", "layer", "trace"]
