"""The modules: `LSTM`, `GRU` and `RNN`, derived from torch.nn's own.

Constructor, parameters, initialisation, state_dict, repr and errors are inherited. ``forward`` alone is new: it settles which
backend runs, and lets torch.nn's own ``forward`` take what the kernels do not, a call that torch.nn would refuse included, so
that the error is torch.nn's too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.nn.utils.rnn import PackedSequence

from rnnfast import backends, families, ops, reference, tuning

__all__ = ["GRU", "LSTM", "RNN"]

_LAYERS = {"triton": ops.layer, "reference": reference.layer}


class _Recurrent(torch.nn.RNNBase):
    """The common ``forward``. A mixin: it stands before torch.nn's class among the bases."""

    backend: str | None = None  # also what a module pickled by torch.nn has

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        backends.check_name(backend)
        self.backend = backend

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:  # type: ignore[override]
        if isinstance(input, Tensor) and input.is_cpu and backends.cpu_is_torchs(self.backend):
            return super().forward(input, hx)
        name, source = backends.asked(self.backend)
        if name != "torch":
            obstacles = self._obstacles(input, name)
            if obstacles:
                backends.settle(name, source, obstacles)
            elif self._is_plain(input, hx) and not (name is None and self._torch_wins(input, hx)):
                return self._run(name or "triton", input, hx)
        if isinstance(input, torch.fx.Proxy):  # torch.fx takes modules of torch.nn as they are: so it shall ours
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, hx), {})
        return super().forward(input, hx)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError("torch.jit.script does not know rnnfast's layers: script rnnfast.restore(model, every=True)")

    def _states(self, hx: Any) -> tuple[Tensor, ...]:
        """hx as a tuple of states, empty if absent."""
        if hx is None:
            return ()
        return tuple(hx) if self.mode == "LSTM" and isinstance(hx, (tuple, list)) else (hx,)

    def _is_plain(self, input: Any, hx: Any) -> bool:
        """Whether the tensors of this call all fit. If not it goes to torch.nn, to be served or refused there."""
        if not isinstance(input, Tensor) or input.dim() not in (2, 3) or input.numel() == 0:
            return False
        batch = () if input.dim() == 2 else (input.shape[0 if self.batch_first else 1],)
        directions = 2 if self.bidirectional else 1
        expected = (self.num_layers * directions, *batch, self.hidden_size)
        states, weights = self._states(hx), self._weights()
        rows = reference.GATES[self.mode.lower()] * self.hidden_size
        autocast = backends.autocast(input.device.type)
        return (
            input.shape[-1] == self.input_size
            and (hx is None or len(states) == (2 if self.mode == "LSTM" else 1))
            and input.layout is torch.strided
            and all(isinstance(state, Tensor) and state.layout is torch.strided and state.shape == expected for state in states)
            and all(
                isinstance(tensor, Tensor)
                and tensor.device == input.device
                and (tensor.dtype == input.dtype or (autocast and tensor.is_floating_point()))
                for tensor in (*states, *(weight for group in weights for weight in group))
            )
            and all(
                (w_ih.shape, w_hh.shape)
                == ((rows, self.input_size if n < directions else directions * self.hidden_size), (rows, self.hidden_size))
                and all(bias.shape == (rows,) for bias in rest[:2] if self.bias)
                for n, (w_ih, w_hh, *rest) in enumerate(weights)
            )
        )

    def _weights(self) -> list[list[Any]]:
        """The weights of each layer and direction, looked up by name at each call: a replaced weight is never missed."""
        return [[getattr(self, name, None) for name in names] for names in self._all_weights]

    def _obstacles(self, input: Any, name: str | None) -> tuple[str, ...]:
        """What keeps the backend `name`, or "triton" if None, from running a call that is plain; see `_is_plain`."""
        packed = isinstance(input, PackedSequence)
        tensor = input.data if packed else input
        found = () if name == "reference" or not isinstance(tensor, Tensor) else backends.tensor_obstacles(tensor)
        if self.proj_size:
            found += ("proj_size is set, which the kernels do not know yet",)
        if packed:
            found += ("the input is a PackedSequence, which the kernels do not take yet",)
        return found

    def _torch_wins(self, input: Any, hx: Any) -> bool:
        """Whether PyTorch's own layer was measured as the fastest for this plain call. Not in compiled code, where PyTorch
        unrolls it."""
        if torch.compiler.is_compiling() or not families.measured(input.device):
            return False
        return families.torch_wins(self._shape(input, hx), input.device)

    def _shape(self, input: Tensor, hx: Any) -> tuning.Shape:
        """Of a plain call on the kernels, as it is tuned for."""
        T, B = (input.shape[0], 1) if input.dim() == 2 else input.shape[:2]
        if input.dim() == 3 and self.batch_first:
            T, B = B, T
        tensors = (input, *self._states(hx), *self.parameters())
        return families.shape(
            self.mode.lower(), T, B, self.input_size, self.hidden_size, self.num_layers, 1 + self.bidirectional, tensors
        )

    def _run(self, backend: str, input: Any, hx: Any) -> Any:
        layer, cell = _LAYERS[backend], self.mode.lower()
        directions = 2 if self.bidirectional else 1
        states, weights = self._states(hx), self._weights()
        batched = input.dim() == 3
        x = input.unsqueeze(1) if not batched else input.transpose(0, 1) if self.batch_first else input
        if not batched:
            states = tuple(state.unsqueeze(1) for state in states)

        last_states = []
        for index in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                n = index * directions + direction
                w_ih, w_hh = weights[n][:2]
                b_ih, b_hh = weights[n][2:4] if self.bias else (None, None)
                start = tuple(state[n] for state in states) or None
                y, last = layer(cell, x, start, w_ih, w_hh, b_ih, b_hh, reverse=direction == 1)
                outputs.append(y)
                last_states.append(last)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
            if self.dropout and self.training and index < self.num_layers - 1:
                x = torch.dropout(x, self.dropout, train=True)  # whose errors are torch.nn.LSTM's

        output = x.squeeze(1) if not batched else x.transpose(0, 1) if self.batch_first else x
        hidden = tuple(torch.stack(state) for state in zip(*last_states, strict=True))
        if not batched:
            hidden = tuple(state.squeeze(1) for state in hidden)
        return output, hidden if self.mode == "LSTM" else hidden[0]

    def extra_repr(self) -> str:
        text = super().extra_repr() + (f", backend={self.backend!r}" if self.backend not in (None, "auto") else "")
        if TracingContext.try_get() and not torch._dynamo.config.allow_rnn:
            # Dynamo is about to refuse this layer, and puts its repr into the message
            text += "; to compile rnnfast layers, call rnnfast.enable_compile() once before"
        return text


_DOC = """{title}, a drop-in for torch.nn.{name} on fused kernels.

    {equations}

    Same constructor, parameters, initialisation, state_dict, inputs, outputs and errors as torch.nn.{name}, of which it is a
    subclass; see there. Weights of one load into the other.

    Args:
        *args, **kwargs: those of torch.nn.{name}.
        backend: "triton", "torch" or "reference" to have it run there; None, the default, or "auto" for the choice per call
            that `rnnfast.explain` explains. A `ValueError` for another name.

    Shapes and dtypes: ``input`` (T, B, I), (B, T, I) with ``batch_first``, or (T, I); each state of ``hx``
    (layers * directions, B, H) or, unbatched, (layers * directions, H); ``output`` (T, B, directions * H). float16, bfloat16
    and float32 on the kernels, which accumulate in float32{carried}; float64 on PyTorch's own layer, as for
    now a `PackedSequence`{proj}. All outputs are differentiable with respect to input, states and parameters.

    Source: {source}.

    Example:
        >>> layer = rnnfast.{name}(10, 20, num_layers=2, bidirectional=True)
        >>> output, {result} = layer(torch.randn(5, 3, 10))
        >>> output.shape
        torch.Size([5, 3, 40])
    """


class LSTM(_Recurrent, torch.nn.LSTM):
    __doc__ = _DOC.format(
        title="Long short-term memory",
        name="LSTM",
        equations="i, f, o = sigmoid(W_i x + b_i + R_i h + p_i), ...; g = tanh(W_g x + b_g + R_g h + p_g)\n"
        "    c' = f c + i g; h' = o tanh(c')        gate order i, f, g, o",
        carried=" and carry the cell\n    state in it",
        proj=" and ``proj_size``",
        source="Hochreiter and Schmidhuber, 1997, with the forget gate of Gers, Schmidhuber and Cummins, 2000",
        result="(h_n, c_n)",
    )


class GRU(_Recurrent, torch.nn.GRU):
    __doc__ = _DOC.format(
        title="Gated recurrent unit",
        name="GRU",
        equations="r, z = sigmoid(W_r x + b_r + R_r h + p_r), ...; n = tanh(W_n x + b_n + r (R_n h + p_n))\n"
        "    h' = (1 - z) n + z h        gate order r, z, n",
        carried="",
        proj="",
        source="Cho et al., 2014, with the reset gate after the product, as cuDNN has it",
        result="h_n",
    )


class RNN(_Recurrent, torch.nn.RNN):
    __doc__ = _DOC.format(
        title="Elman network",
        name="RNN",
        equations="h' = tanh(W x + b + R h + p), or relu with nonlinearity='relu'",
        carried="",
        proj="",
        source="Elman, 1990",
        result="h_n",
    )
