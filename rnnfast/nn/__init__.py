"""The modules, drop-ins for torch.nn's, layers in `sequence` and cells in `cells`; and layers of any cell, in `layer`."""

from rnnfast.nn.cells import GRUCell, LSTMCell, RNNCell
from rnnfast.nn.layer import Layer
from rnnfast.nn.sequence import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "Layer", "RNNCell"]

for _cls in (GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell, Layer):
    _cls.__module__ = __name__  # what pickles and messages name
