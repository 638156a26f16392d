"""The cells, one step a call: `LSTMCell`, `GRUCell` and `RNNCell`, derived from torch.nn's own.

As with the layers, ``forward`` alone is new, and what the kernels do not take, a wrong call included, goes to torch.nn's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnfast import backends, ops, reference
from rnnfast.dispatch import Dispatched

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

_LAYERS = {"triton": ops.layer, "reference": reference.layer}


class _Cell(Dispatched, torch.nn.RNNCellBase):
    """The common ``forward``. A mixin: it stands before torch.nn's class among the bases."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return self._dispatch(input, hx)

    def _weights(self) -> tuple[Any, ...]:
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def _is_plain(self, input: Any, hx: Any) -> bool:
        if not isinstance(input, Tensor) or input.dim() not in (1, 2) or input.numel() == 0 or self.mode not in reference.GATES:
            return False
        states, (w_ih, w_hh, *biases) = self._states(hx), self._weights()
        rows, autocast = reference.GATES[self.mode] * self.hidden_size, backends.autocast(input.device.type)
        given = [(state, (*input.shape[:-1], self.hidden_size)) for state in states]
        given += [(w_ih, (rows, self.input_size)), (w_hh, (rows, self.hidden_size))]
        given += [(bias, (rows,)) for bias in biases if self.bias]
        return (
            input.shape[-1] == self.input_size
            and (hx is None or len(states) == (2 if self.mode == "lstm" else 1))
            and input.layout is torch.strided
            and all(
                isinstance(tensor, Tensor)
                and tensor.layout is torch.strided
                and tensor.shape == shape
                and tensor.device == input.device
                and (tensor.dtype == input.dtype or (autocast and tensor.is_floating_point()))
                for tensor, shape in given
            )
        )

    def _run(self, backend: str, input: Tensor, hx: Any) -> Any:
        x = input[None] if input.dim() == 2 else input[None, None]
        states = tuple(state if input.dim() == 2 else state[None] for state in self._states(hx)) or None
        w_ih, w_hh, b_ih, b_hh = self._weights()
        _, last = _LAYERS[backend](self.mode, x, states, w_ih, w_hh, b_ih, b_hh)
        if input.dim() == 1:
            last = tuple(state[0] for state in last)
        return last if self.mode == "lstm" else last[0]


_DOC = """One step of `rnnfast.{layer}`, a drop-in for torch.nn.{layer}Cell.

    {equations}

    Same constructor, parameters, initialisation, state_dict, inputs, outputs and errors as torch.nn.{layer}Cell, of which it is
    a subclass; see there. Equations and gate order are those of `rnnfast.{layer}`, which runs a whole sequence in one
    call: a cell is for what must decide something between two steps.

    Args:
        args, kwargs: those of torch.nn.{layer}Cell.
        backend: as in `rnnfast.{layer}`.

    Shapes and dtypes: ``input`` (B, I) or (I,); each state (B, H) or (H,), zeros if absent; dtypes as in `rnnfast.{layer}`.{c}
    All outputs are differentiable with respect to input, states and parameters.

    Example:
        >>> cell = rnnfast.{layer}Cell(10, 20)
        >>> {result} = cell(torch.randn(3, 10))
        >>> h.shape
        torch.Size([3, 20])
    """


class LSTMCell(_Cell, torch.nn.LSTMCell):
    mode = "lstm"
    __doc__ = _DOC.format(
        layer="LSTM",
        equations="h', c' = one step from (h, c)",
        c="\n    Between steps c is rounded to the dtype of the input, as torch.nn's is; `rnnfast.LSTM` carries it in float32.",
        result="h, c",
    )


class GRUCell(_Cell, torch.nn.GRUCell):
    mode = "gru"
    __doc__ = _DOC.format(layer="GRU", equations="h' = one step from h", c="", result="h")


class RNNCell(_Cell, torch.nn.RNNCell):
    __doc__ = _DOC.format(layer="RNN", equations="h' = one step from h", c="", result="h")

    @property
    def mode(self) -> str:  # type: ignore[override]
        return f"rnn_{self.nonlinearity}"
