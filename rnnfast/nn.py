"""The modules: `LSTM`, `GRU` and `RNN`, derived from torch.nn's own.

Constructor, parameters, initialisation, state_dict, repr and errors are inherited. ``forward`` alone is new: it settles which
backend runs, and lets torch.nn's own ``forward`` take what the kernels do not, a call that torch.nn would refuse included, so
that the error is torch.nn's too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnnfast import backends, ops, reference, sequences, transforms
from rnnfast.choice import kernel_plan, tuning_file
from rnnfast.dispatch import Dispatched, computed_again

__all__ = ["GRU", "LSTM", "RNN"]

_LAYERS = {"triton": ops.layer, "reference": reference.layer}
_TRACES = {"triton": ops.trace, "reference": reference.trace}  # with the states and gates of every step


def _joined(directions: Any) -> Tensor:
    return directions[0] if len(directions) == 1 else torch.cat(directions, dim=-1)


def _permuted(states: tuple[Tensor, ...], order: Tensor | None) -> tuple[Tensor, ...]:
    return states if order is None else tuple(state.index_select(1, order) for state in states)


class _Recurrent(Dispatched, torch.nn.RNNBase):
    """The common ``forward``. A mixin: it stands before torch.nn's class among the bases."""

    recompute: bool = False  # also what a module pickled by torch.nn has

    def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        backends.check_recompute(recompute)
        self.recompute = recompute

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | list[int] | None = None,
        resets: Tensor | None = None,
        reset_to: Any = None,
        return_all_states: bool = False,
        return_gates: bool = False,
    ) -> Any:
        """torch.nn's ``forward``, and what torch.nn does not have: see the class."""
        plain = lengths is None and resets is None and reset_to is None and not return_all_states and not return_gates
        # a call on a CPU may take 30 us, of which these lines shall be no part that counts
        if plain and isinstance(input, Tensor) and input.is_cpu and not self.recompute and backends.cpu_is_torchs(self.backend):
            try:
                return super().forward(input, hx)
            except RuntimeError:
                if not transforms.expanded(self._parameters.values()):
                    raise
        if plain:
            return self._dispatch(input, hx)
        options = self._read(input, hx, lengths, resets, reset_to, return_all_states, return_gates)
        return self._forward_with(options, input, hx)

    def _read(
        self,
        input: Any,
        hx: Any,
        lengths: Any = None,
        resets: Any = None,
        reset_to: Any = None,
        return_all_states: bool = False,
        return_gates: bool = False,
    ) -> sequences.Sequences:
        """The options, checked; a call that torch.nn would refuse without them gets its error."""
        if not self._is_plain(input, hx):
            self._by_torch(input, hx)
            raise RuntimeError("lengths, resets, return_all_states and return_gates need an input that is not empty")
        packed = isinstance(input, PackedSequence)
        if packed and (lengths is not None or resets is not None):
            raise ValueError("a PackedSequence has its own lengths, and no place for resets: pad it, and give lengths")
        x = input.data.unsqueeze(0) if packed else input
        shapes = self._state_shapes(input)
        options = (lengths, resets, reset_to, return_all_states, return_gates)
        return sequences.read(x, *options, shapes=shapes, batch_first=self.batch_first)

    def _forward_with(self, options: sequences.Sequences, input: Any, hx: Any) -> Any:
        name, source = backends.asked(self.backend)
        backend = backends.settle(name, source, () if name == "torch" else self._obstacles(input, name))
        if backend == "torch" and options.only_lengths and not self._equations_stand_in(input):
            return self._by_packing(options.lengths, input, hx)
        return self._run("reference" if backend == "torch" else backend, input, hx, options)

    def _by_torch(self, input: Any, hx: Any) -> Any:
        """Of a packed call, torch.nn.LSTM does not check the sizes of the states, and crashes: here it does."""
        if isinstance(input, torch.fx.Proxy):  # torch.fx takes modules of torch.nn as they are: so it shall ours
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, hx), {})
        states = self._states(hx)
        if isinstance(input, PackedSequence) and len(states) == 2 and all(isinstance(state, Tensor) for state in states):
            self.check_forward_args(input.data, hx, input.batch_sizes)
        if self._checkpoints() and not self._equations_stand_in(input):
            return computed_again(super()._by_torch, input, hx, also=self._parameters.values())
        return super()._by_torch(input, hx)

    def _equations_stand_in(self, input: Any) -> bool:
        """See `equations_stand_in` and `compiles_no_gradients` of `rnnfast.transforms`."""
        return super()._equations_stand_in(input) or (
            isinstance(input, Tensor) and transforms.compiles_no_gradients(self.mode.lower(), input, self._parameters.values())
        )

    def _checkpoints(self) -> bool:
        """Whether ``recompute`` is the business of PyTorch's checkpoint, which torch.func refuses: there all is kept."""
        return self.recompute and torch.is_grad_enabled() and not transforms.inside()

    def _by_packing(self, lengths: Any, input: Tensor, hx: Any) -> Any:
        """torch.nn's own layer on rows of several lengths. It takes no empty row: those are run for a step of zeros, and then
        given what they should have."""
        empty = lengths == 0
        row = empty[:, None, None] if self.batch_first else empty[None, :, None]
        packed = pack_padded_sequence(
            input.masked_fill(row, 0), lengths.clamp(min=1).cpu(), batch_first=self.batch_first, enforce_sorted=False
        )
        output, hidden = self._by_torch(packed, hx)
        T = input.shape[1 if self.batch_first else 0]
        output, _ = pad_packed_sequence(output, batch_first=self.batch_first, total_length=T)
        states = self._states(hx)
        hidden = tuple(
            torch.where(empty[None, :, None], states[n] if states else 0, last) for n, last in enumerate(self._states(hidden))
        )
        return output.masked_fill(row, 0), hidden if self.mode == "LSTM" else hidden[0]

    def _state_shapes(self, input: Any) -> tuple[tuple[int, ...], ...]:
        """Those of hx's states, for an input of the right rank."""
        directions = 2 if self.bidirectional else 1
        if isinstance(input, PackedSequence):
            batch = (int(input.batch_sizes[0]),)
        else:
            batch = () if input.dim() == 2 else (input.shape[0 if self.batch_first else 1],)
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
        return tuple((self.num_layers * directions, *batch, width) for width in widths)

    def _is_plain(self, input: Any, hx: Any) -> bool:
        if isinstance(input, PackedSequence):
            x = input.data
            if not sequences.consistent(input):
                return False
        else:
            x = input
            if not isinstance(x, Tensor) or x.dim() not in (2, 3):
                return False
        if x.numel() == 0:
            return False
        directions = 2 if self.bidirectional else 1
        expected, states, weights = self._state_shapes(input), self._states(hx), self._weights()
        rows, width = reference.GATES[self.mode.lower()] * self.hidden_size, self.proj_size or self.hidden_size
        autocast = backends.autocast(x.device.type)
        return (
            x.shape[-1] == self.input_size
            and (hx is None or len(states) == len(expected))
            and x.layout is torch.strided
            and all(
                isinstance(state, Tensor) and state.layout is torch.strided and state.shape == shape
                for state, shape in zip(states, expected[: len(states)], strict=True)
            )
            and all(
                isinstance(tensor, Tensor)
                and tensor.device == x.device
                and (tensor.dtype == x.dtype or (autocast and tensor.is_floating_point()))
                for tensor in (*states, *(weight for group in weights for weight in group))
            )
            and all(
                (w_ih.shape, w_hh.shape) == ((rows, self.input_size if n < directions else directions * width), (rows, width))
                and all(bias.shape == (rows,) for bias in rest[:2] if self.bias)
                and (not self.proj_size or rest[-1].shape == (width, self.hidden_size))
                for n, (w_ih, w_hh, *rest) in enumerate(weights)
            )
        )

    def _weights(self) -> list[list[Any]]:
        """The weights of each layer and direction, looked up by name at each call: a replaced weight is never missed."""
        return [[getattr(self, name, None) for name in names] for names in self._all_weights]

    def _torch_wins(self, input: Any, hx: Any) -> bool:
        """Not in compiled code, where PyTorch unrolls its layer, nor inside a transform."""
        if torch.compiler.is_compiling() or transforms.inside() or not isinstance(input, Tensor) or self.proj_size:
            return False
        if not kernel_plan.measured(input.device):
            return False
        return kernel_plan.torch_wins(self._shape(input, hx), input.device)

    def _shape(self, input: Tensor, hx: Any) -> tuning_file.Shape:
        """Of a plain call on the kernels, as it is tuned for."""
        T, B = (input.shape[0], 1) if input.dim() == 2 else input.shape[:2]
        if input.dim() == 3 and self.batch_first:
            T, B = B, T
        tensors = (input, *self._states(hx), *self.parameters())
        return kernel_plan.shape(
            self.mode.lower(), T, B, self.input_size, self.hidden_size, self.num_layers, 1 + self.bidirectional, tensors
        )

    def _run(self, backend: str, input: Any, hx: Any, options: sequences.Sequences | None = None) -> Any:
        cell, directions = self.mode.lower(), 2 if self.bidirectional else 1
        states, weights = self._states(hx), self._weights()
        packed, batched = None, True
        if isinstance(input, PackedSequence):
            packed = input
            x, options = sequences.padded(packed, options)
            states = _permuted(states, packed.sorted_indices)
        else:
            batched = input.dim() == 3
            x = input.unsqueeze(1) if not batched else input.transpose(0, 1) if self.batch_first else input
        if not batched:
            states = tuple(state.unsqueeze(1) for state in states)
        wants_details = options is not None and options.details
        layer = (_TRACES if wants_details else _LAYERS)[backend]
        if self.recompute and backend == "triton":
            layer = partial(layer, recompute=True)
        elif self._checkpoints():
            layer = partial(computed_again, layer)

        last_states, all_states, all_gates = [], [], []
        for index in range(self.num_layers):
            outputs, seen = [], []
            for direction in range(directions):
                n = index * directions + direction
                w_ih, w_hh, *rest = weights[n]
                b_ih, b_hh = rest[:2] if self.bias else (None, None)
                w_hr = rest[-1] if self.proj_size else None
                start = tuple(state[n] for state in states) or None
                given = {} if options is None else options.of_layer(n)
                y, last, *details = layer(cell, x, start, w_ih, w_hh, b_ih, b_hh, w_hr, reverse=direction == 1, **given)
                outputs.append(y)
                last_states.append(last)
                seen.append(details)
            drops = self.dropout and self.training and index < self.num_layers - 1
            fused = drops and backend == "triton" and not transforms.inside()
            if wants_details or not fused:
                x = _joined(outputs)
            if wants_details:
                cells, gates = zip(*seen, strict=True)
                all_states.append((x, *(_joined(c) for c in zip(*cells, strict=True))))
                all_gates.append(torch.stack(gates, dim=2))
            if fused:
                x = ops.dropout.dropout(outputs, self.dropout)
            elif drops:
                x = torch.dropout(x, self.dropout, train=True)  # whose errors are torch.nn.LSTM's

        hidden = tuple(torch.stack(state) for state in zip(*last_states, strict=True))

        def laid_out(tensor: Tensor) -> Any:
            """(T, B, ...) as the caller has the input."""
            if packed is not None:
                return sequences.packed_like(packed, tensor)
            return tensor.squeeze(1) if not batched else tensor.transpose(0, 1) if self.batch_first else tensor

        if packed is not None:
            hidden = _permuted(hidden, packed.unsorted_indices)
        if not batched:
            hidden = tuple(state.squeeze(1) for state in hidden)
        results = (laid_out(x), hidden if self.mode == "LSTM" else hidden[0])
        if options is not None and options.all_states:
            results += (tuple(tuple(laid_out(state) for state in layer_states) for layer_states in all_states),)
        if options is not None and options.gates:
            results += (tuple(laid_out(layer_gates) for layer_gates in all_gates),)
        return results

    def extra_repr(self) -> str:
        text = super().extra_repr() + (", recompute=True" if self.recompute else "")
        if TracingContext.try_get() and not torch._dynamo.config.allow_rnn:
            # Dynamo is about to refuse this layer, and puts its repr into the message
            text += "; to compile rnnfast layers, call rnnfast.enable_compile() once before"
        return text


_DOC = """{title}, a drop-in for torch.nn.{name} on fused kernels:

        {equations}

    Same constructor, parameters, initialisation, state_dict, inputs, outputs and errors as torch.nn.{name}, of which it is a
    subclass; see there. Weights of one load into the other.

    Args:
        args, kwargs: those of torch.nn.{name}.
        backend: "triton", "torch" or "reference" to have it run there; None, the default, or "auto" for the choice per call
            that `rnnfast.explain` explains. A `ValueError` for another name.
        recompute: whether training keeps less: no gate activations, which backward computes again with two matrix products. Of
            the kernels an LSTM then keeps its cell states in float32 and a GRU nothing, besides the input and the output; the
            other backends run their whole forward once more (``torch.utils.checkpoint``). Without effect on what is returned,
            and a layer's ``recompute`` may be set at any time. A `TypeError` for what is no bool.

    Called with ``input`` and ``hx`` as torch.nn.{name} is, and with what that does not have (docs/sequences.md):

    Keyword Args:
        lengths: integers (B,), the steps of each row that count, 0 to T, in any order; a list, or a tensor on the CPU or the
            input's device. ``output`` is zero in padding, the last states are those of each row's last step.
        resets: bool (T, B), laid out as ``input``: a boundary before a step, at which the state begins anew.
        reset_to: the states that resets begin from, in the form of ``hx``; zeros if not given.
        return_all_states: also return, after the last states, a tuple of an entry a layer, {entry}, each laid out
            as ``output``.
        return_gates: also return, last, a tuple of an entry a layer: the gate activations (T, B, directions, {gates}, H), in
            gate order, without gradient.

    Errors: `RuntimeError` for a wrong size or device or a length out of range, `ValueError` for a wrong dtype or options that
    do not go together, `TypeError` for what is no tensor.

    Shapes and dtypes: ``input`` (T, B, I), (B, T, I) with ``batch_first``, or (T, I); each state of ``hx``
    (layers * directions, B, H) or, unbatched, (layers * directions, H); ``output`` (T, B, directions * H). float16, bfloat16
    and float32 on the kernels, which accumulate in float32{carried}; float64 on PyTorch's own layer.
    A `PackedSequence` comes out as one. All outputs are differentiable with respect to input, states and parameters.

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
        "        c' = f c + i g; h' = o tanh(c')        gate order i, f, g, o",
        carried=" and carry the cell\n    state in it",
        entry="``(h, c)`` of every step",
        gates=4,
        source="Hochreiter and Schmidhuber, 1997, with the forget gate of Gers, Schmidhuber and Cummins, 2000",
        result="(h_n, c_n)",
    )


class GRU(_Recurrent, torch.nn.GRU):
    __doc__ = _DOC.format(
        title="Gated recurrent unit",
        name="GRU",
        equations="r, z = sigmoid(W_r x + b_r + R_r h + p_r), ...; n = tanh(W_n x + b_n + r (R_n h + p_n))\n"
        "        h' = (1 - z) n + z h        gate order r, z, n",
        carried="",
        entry="``(h,)`` of every step",
        gates=3,
        source="Cho et al., 2014, with the reset gate after the product, as cuDNN has it",
        result="h_n",
    )


class RNN(_Recurrent, torch.nn.RNN):
    __doc__ = _DOC.format(
        title="Elman network",
        name="RNN",
        equations="h' = tanh(W x + b + R h + p), or relu with nonlinearity='relu'",
        carried="",
        entry="``(h,)`` of every step",
        gates=1,
        source="Elman, 1990",
        result="h_n",
    )
