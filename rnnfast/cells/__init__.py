"""A library of cells, each written once: ``rnnfast.Layer(rnnfast.cells.slstm, 64, 256)``. docs/cells.md has them in a table."""

from rnnfast.cells.bounded import clipped_lstm, hard_sigmoid_lstm
from rnnfast.cells.builtin import gru, lstm, rnn_relu, rnn_tanh
from rnnfast.cells.continuous import cfc, leaky, liquid
from rnnfast.cells.diagonal import indrnn, mingru, minlstm, qrnn, sru
from rnnfast.cells.exponential import slstm
from rnnfast.cells.gated import cifg, mgu, peephole
from rnnfast.cells.normalised import layer_norm_gru, layer_norm_lstm
from rnnfast.cells.regularised import variational_lstm, zoneout_lstm

__all__ = [
    "cfc", "cifg", "clipped_lstm", "gru", "hard_sigmoid_lstm", "indrnn", "layer_norm_gru", "layer_norm_lstm", "leaky", "liquid",
    "lstm", "mgu", "mingru", "minlstm", "peephole", "qrnn", "rnn_relu", "rnn_tanh", "slstm", "sru", "variational_lstm",
    "zoneout_lstm",
]  # fmt: skip
