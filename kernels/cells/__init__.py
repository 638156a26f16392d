"""The cells: the pointwise maths of one time step, forward and backward, one file a cell.

A kernel computes the matrix products and hands the cell float32 tiles of one shape; the cell never sees a pointer. Its two
``@triton.jit`` functions are arguments of the generic kernels:

``forward(x_gates, h_gates, states, given) -> (states, saved)``
    ``x_gates``: W_ih x_t + b_ih, a tile a gate, in the order of the gates. ``h_gates``: W_hh h_{t-1} + b_hh, likewise; ``()``
    without W_hh. ``states``: h_{t-1}, then the `Cell.carried` states kept in float32. ``given``: `Cell.held` tiles that no step
    changes, then `Cell.noise` tiles of random numbers (`rnnfast.kernels.given`). Returns the new states and the tiles that
    backward needs.

``backward(saved, states, new_states, given, d_states) -> (d_gates, d_states, d_held)``
    ``saved``: what forward saved. ``states``, ``new_states``: before and after the step. ``d_states``: the gradients of
    the new states. Returns the gate gradients in storage order (see `Cell.grads`), the gradients of the states before, of
    h_{t-1} only the part that does not pass through W_hh (used where `Cell.direct` is set), and those of the held tiles.

A cell of which `Cell.rows` is set needs all units of a row at once. Its functions have two arguments more at the end, ``row``
and ``row_mean``: ``row_mean(tile, n, row)`` is the mean of each row of a tile over all units, as a tile that goes with others.
n counts the calls of a function: 0, 1, ...
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from rnnfast.kernels.cells import gru, lstm, rnn_relu, rnn_tanh

__all__ = ["CELLS", "Cell"]


@dataclass(frozen=True, eq=False)  # eq=False: a key of dictionaries at the cost of an address
class Cell:
    """What a generic kernel has to know of a cell.

    Attributes:
        gates: blocks of H rows in W_ih and W_hh.
        saved: activations kept per unit and step for backward, in the dtype of the input.
        grads: blocks of gate gradients per unit and step. The first `gates` blocks belong to the input side, the last
            `gates` blocks to the hidden side. They are the same blocks unless the cell keeps the two sides of its last k
            gates apart. Then ``grads == gates + k``: the input sides of these gates come first and their hidden sides last.
        carried: states besides h, carried in float32. In memory they lie side by side: c is (..., B, carried * H).
        direct: whether h_{t-1} reaches h_t by a way other than W_hh.
        forward: the cell's forward function.
        backward: the cell's backward function.
        held: tiles that no step changes, which have gradients.
        noise: tiles of random numbers, new at each step; at most 4.
        recurrent: whether there is a W_hh. Without, the weights (M, 0, H) are empty and only the scan kernels run the cell.
        rows: whether its functions need the means of whole rows.
    """

    gates: int
    saved: int
    grads: int
    carried: int
    direct: bool
    forward: triton.JITFunction
    backward: triton.JITFunction
    held: int = 0
    noise: int = 0
    recurrent: bool = True
    rows: bool = False

    @property
    def apart(self) -> int:
        """How many gates, the last ones, have two sides with gradients of their own."""
        return self.grads - self.gates


CELLS = {
    "lstm": Cell(gates=4, saved=4, grads=4, carried=1, direct=False, forward=lstm.forward, backward=lstm.backward),
    "gru": Cell(gates=3, saved=4, grads=4, carried=0, direct=True, forward=gru.forward, backward=gru.backward),
    "rnn_tanh": Cell(gates=1, saved=0, grads=1, carried=0, direct=False, forward=rnn_tanh.forward, backward=rnn_tanh.backward),
    "rnn_relu": Cell(gates=1, saved=0, grads=1, carried=0, direct=False, forward=rnn_relu.forward, backward=rnn_relu.backward),
}
