"""The modules, drop-ins for torch.nn's: layers in `sequence`, cells in `cells`."""

from rnnfast.nn.cells import GRUCell, LSTMCell, RNNCell
from rnnfast.nn.sequence import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

for _cls in (GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell):
    _cls.__module__ = __name__  # what pickles and messages name
