"""The cells: the pointwise maths of one time step, forward and backward, one file a cell.

A kernel computes the matrix products and hands the cell float32 tiles of one shape; the cell never sees a pointer. Its two
``@triton.jit`` functions are arguments of the generic kernels:

``forward(x_gates, h_gates, states) -> (states, saved)``
    ``x_gates``: W_ih x_t + b_ih, a tile a gate, in PyTorch's gate order. ``h_gates``: W_hh h_{t-1} + b_hh, likewise.
    ``states``: ``(h_{t-1},)`` or ``(h_{t-1}, c_{t-1})``. Returns the new states and the tiles that backward needs.

``backward(saved, states, new_states, d_states) -> (d_gates, d_h, d_c)``
    ``saved``: what forward saved. ``states``, ``new_states``: before and after the step. ``d_states``: the gradients of
    the new states. Returns the gate gradients in storage order (see `Cell.grads`), the part of h_{t-1}'s gradient that
    does not pass through W_hh (used where `Cell.direct` is set) and the gradient of c_{t-1} (used where `Cell.carries_c`
    is set).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from rnnfast.kernels.cells import gru, lstm, rnn

__all__ = ["CELLS", "Cell"]


@dataclass(frozen=True, eq=False)  # eq=False: a key of dictionaries at the cost of an address
class Cell:
    """What a generic kernel has to know of a cell.

    Attributes:
        gates: blocks of H rows in W_ih and W_hh.
        saved: activations kept per unit and step for backward, in the dtype of the input.
        grads: blocks of gate gradients per unit and step. The first `gates` blocks belong to the input side, the last
            `gates` blocks to the hidden side. They are the same blocks unless the cell keeps a gate's two sides apart;
            then ``grads == gates + 1``, the last gate's input side comes first and its hidden side last.
        carries_c: whether there is a cell state, carried in float32.
        direct: whether h_{t-1} reaches h_t by a way other than W_hh.
        forward: the cell's forward function.
        backward: the cell's backward function.
    """

    gates: int
    saved: int
    grads: int
    carries_c: bool
    direct: bool
    forward: triton.JITFunction
    backward: triton.JITFunction


CELLS = {
    "lstm": Cell(gates=4, saved=4, grads=4, carries_c=True, direct=False, forward=lstm.forward, backward=lstm.backward),
    "gru": Cell(gates=3, saved=4, grads=4, carries_c=False, direct=True, forward=gru.forward, backward=gru.backward),
    "rnn_tanh": Cell(
        gates=1, saved=0, grads=1, carries_c=False, direct=False, forward=rnn.tanh_forward, backward=rnn.tanh_backward
    ),
    "rnn_relu": Cell(
        gates=1, saved=0, grads=1, carries_c=False, direct=False, forward=rnn.relu_forward, backward=rnn.relu_backward
    ),
}
