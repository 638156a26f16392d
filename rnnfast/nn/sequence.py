"""The modules: `LSTM`, `GRU` and `RNN`, derived from torch.nn's own.

Constructor, parameters, initialisation, state_dict, repr and errors are inherited. ``forward`` alone is new. It asks
`rnnfast.choice.decide` what runs, and lets torch.nn's own ``forward`` take what the kernels do not, a call that torch.nn would
refuse included, so that the error is torch.nn's too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import torch_private
from rnnfast.choice import calls, kernel_plan, obstacles, tuning_file
from rnnfast.choice.decide import Decision, decide, tell, unknown_to_torch, watcher
from rnnfast.choice.gpu import known
from rnnfast.nn import base, checks, stack
from rnnfast.nn.base import Option, cell_of
from rnnfast.nn.options import CallOptions, read_for_module
from rnnfast.settings import BACKEND, CANARY, KERNELS, KEYS, STRICT, accepted, check_environment
from rnnfast.torch_private import constant, environment, forward_level, innermost_transform, thread

__all__ = ["GRU", "LSTM", "RNN", "Call", "Sequence", "cpu_is_torchs", "decision", "shape"]


class Sequence(base.Accelerated, torch.nn.RNNBase):
    """The common ``forward``. A mixin: it stands before torch.nn's class among the bases."""

    _rnnfast_recompute: bool = False
    recompute = Option("recompute", lambda value: isinstance(value, bool), "Whether training keeps no gate activations.")

    def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        checks.check_recompute(recompute)
        if recompute:
            vars(self)["_rnnfast_recompute"] = True

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Any = None,
        resets: Tensor | None = None,
        reset_to: Any = None,
        return_all_states: bool = False,
        return_gates: bool = False,
    ) -> Any:
        """torch.nn's ``forward``, and what torch.nn does not have: see the class."""
        plain = lengths is None and resets is None and reset_to is None and not return_all_states and not return_gates
        # a call on a CPU may take 25 us, of which these lines must not be a part that counts
        simple = plain and isinstance(input, Tensor) and input.is_cpu and not self._rnnfast_recompute
        if simple and cpu_is_torchs(self._rnnfast_backend):
            try:
                return super().forward(input, hx)
            except RuntimeError:
                if not torch_private.is_expanded(self):
                    raise
        options = None if plain else CallOptions(lengths, resets, reset_to, return_all_states, return_gates)
        return _call(self, input, hx, options)

    def extra_repr(self) -> str:
        text = super().extra_repr() + (", recompute=True" if self._rnnfast_recompute else "")
        if torch_private.dynamo_refuses_layers():  # it is about to, and puts the layer's repr into the message
            text += "; to compile rnnfast layers, call rnnfast.enable_compile() once before"
        return text


_in_block, _backend, _kernels, _strict, _canary = BACKEND.block, BACKEND.key, KERNELS.key, STRICT.key, CANARY.key


@constant
def cpu_is_torchs(own: str | None) -> bool:
    """Whether PyTorch's own layer runs any call on CPU tensors, as far as can be told in a fraction of a microsecond.

    A call on a CPU may take 25 us, of which this question must not be a part that counts. If False, the call has to be looked
    at as a whole. Settings may change at any time. What hinders the kernels on the CPU is known from the first call that asked.

    Args:
        own: the module's ``backend=``.
    """
    if _in_block.get() is not None or watcher.get() is not None:
        return False
    if _backend in environment or _kernels in environment or _strict in environment or _canary in environment:
        if tuple(map(environment.get, KEYS)) not in accepted:
            check_environment()
        if own is None and (_backend in environment or _strict in environment):
            return False
    if own != "torch" and (own is not None or not obstacles.known.get("cpu:None")):
        return False
    if thread.__dict__.get("tracing_context") is not None:  # being compiled or exported
        return False
    return innermost_transform() is None and forward_level() < 0


@torch_private.skipped_by_dynamo
def _call(layer: Sequence, input: Any, hx: Any, options: CallOptions | None) -> Any:
    """A call with these options, as the user gave them; None for none."""
    given = {} if options is None else options.given
    plain = isinstance(input, Tensor) and hx is None and not given  # with nothing that can stand for a tensor
    if not plain and base.is_traced_by_fx(layer, Sequence.forward, input, hx, *given.values()):
        return base.fx_node(layer, input, hx, **given)
    call, chosen = decision(layer, input, hx, options)
    if chosen.watched and call.fits and _measured_now(layer, call, chosen, input, hx):
        call, chosen = decision(layer, input, hx, options)
    if given and not call.fits:
        _by_torch(layer, input, hx)
        raise RuntimeError(f"the options of this call ({', '.join(given)}) need an input that is not empty")
    if chosen.refusal:
        raise RuntimeError(chosen.refusal)
    if chosen.gives_way:
        tell(chosen.asked, chosen.asked_by, chosen.gives_way)
    again = layer._rnnfast_recompute
    if chosen.runner != "kernels":
        # torch.func refuses PyTorch's checkpoint: inside its transforms all is kept
        again = again and torch.is_grad_enabled() and not chosen.inside
    if chosen.runner in stack.GROUPS:
        members = stack.members_of(layer, call.weights)
        return stack.run(chosen.runner, layer, call.cell, members, input, call.states, call.options, again)
    by_torch = partial(_again_by_torch if again else _by_torch, layer)
    if chosen.runner == "packed":
        assert call.options is not None
        return stack.by_packing(by_torch, layer, call.cell, call.options.lengths, input, hx)
    return by_torch(input, hx)


def _measured_now(layer: Sequence, call: Call, chosen: Decision, input: Any, hx: Any) -> bool:
    """Whether the call was measured just now, so that the decision may be another: see `rnnfast.choice.calls`."""
    x = input.data if isinstance(input, PackedSequence) else input
    plain = x is input and call.options is None and not layer.proj_size
    given = input, hx, call.options.given if call.options else {}
    return calls.before(layer, call.cell, x, chosen, plain, lambda: shape(layer, call.cell, call.weights, input, hx), given)


def _by_torch(layer: Sequence, input: Any, hx: Any) -> Any:
    """torch.nn's own ``forward``. torch.nn.LSTM does not check the sizes of the states of a packed call, and crashes."""
    if isinstance(input, PackedSequence):
        states = checks.states_of(cell_of(layer), hx)
        if len(states) > 1 and all(isinstance(state, Tensor) for state in states):
            layer.check_forward_args(input.data, hx, input.batch_sizes)
    return super(Sequence, layer).forward(input, hx)


def _again_by_torch(layer: Sequence, input: Any, hx: Any) -> Any:
    return base.checkpointed(partial(_by_torch, layer), input, hx, also=torch_private.own_parameters(layer).values())


class Call(NamedTuple):
    """What is found of a call, once.

    Attributes:
        cell: the name of the equations.
        weights: all that torch.nn's ``forward`` would use in this call, in its order.
        states: those of hx; empty if absent.
        fits: whether every tensor fits, so that a backend of ours may run the call.
        options: read and checked; None without any.
    """

    cell: str
    weights: list[Any]
    states: tuple[Any, ...]
    fits: bool
    options: CallOptions | None


def decision(layer: Sequence, input: Any, hx: Any, given: CallOptions | None) -> tuple[Call, Decision]:
    """What is found of a call with the options `given`, and what `rnnfast.choice.decide.decide` makes of it."""
    cell = str(layer.mode).lower()
    expanded = torch_private.is_expanded(layer)
    weights = torch_private.current_weights(layer, expanded)
    replaced = torch_private.replaced(layer, Sequence)
    states = () if hx is None else checks.states_of(cell, hx)
    fits = checks.layer_fits(layer, cell, weights, input, states, hx is not None)
    options = read_for_module(layer, cell, input, given) if given is not None and fits else None
    tensor = input.data if isinstance(input, PackedSequence) else input
    is_tensor = isinstance(tensor, Tensor)
    trains = fits and not expanded and tensor is input and cell in checks.ONEDNN and torch.is_grad_enabled()
    # not in compiled code, where PyTorch unrolls its layer, nor inside a transform
    may_choose = fits and not torch.compiler.is_compiling() and innermost_transform() is None and forward_level() < 0
    may_choose = may_choose and not known.get(("no gpu", tensor.device))
    chosen = decide(
        layer._rnnfast_backend,
        tensor.device.type if is_tensor else None,
        tensor.device.index if is_tensor else None,
        tensor.dtype if is_tensor else None,
        well_formed=fits,
        replaced=replaced,
        expanded=expanded,
        padded=is_tensor and tensor is input,
        options=() if options is None else tuple(options.given),
        packable=options is not None and options.packable,
        onednn_trains=trains and any([each.requires_grad for each in (tensor, *weights)]),
        torch_wins=_torch_wins(layer, cell, weights, input, hx, options) if may_choose else "",
    )
    return Call(cell, weights, states, fits, options), chosen


def _torch_wins(
    layer: torch.nn.RNNBase, cell: str, weights: list[Any], input: Any, hx: Any, options: CallOptions | None
) -> str:
    """Why PyTorch's own layer is the automatic choice, as measured or predicted; empty if it is not."""
    if not kernel_plan.predicts(input.data):
        return ""
    packed = isinstance(input, PackedSequence) or (options is not None and options.lengths is not None)
    kernels_only = options is not None and bool(unknown_to_torch(options.given))
    sizes = _sizes(layer, input)
    tensors = (input.data, *checks.states_of(cell, hx), *weights)
    return kernel_plan.torch_wins_call(cell, *sizes, tensors, packed, bool(layer.proj_size), kernels_only)


def _sizes(layer: torch.nn.RNNBase, input: Tensor | PackedSequence) -> tuple[int, int, int, int, int, int]:
    """T, B, I, H, layers and directions of a well-formed call."""
    if isinstance(input, PackedSequence):
        T, B = input.batch_sizes.numel(), int(input.batch_sizes[0])
    else:
        T, B = (input.shape[0], 1) if input.dim() == 2 else input.shape[:2]
        if input.dim() == 3 and layer.batch_first:
            T, B = B, T
    return T, B, layer.input_size, layer.hidden_size, layer.num_layers, 1 + layer.bidirectional


def shape(layer: torch.nn.RNNBase, cell: str, weights: list[Any], input: Tensor | PackedSequence, hx: Any) -> tuning_file.Shape:
    """The shape of a well-formed call, as it is tuned for: without its options, and of a PackedSequence with all rows full."""
    return kernel_plan.shape(cell, *_sizes(layer, input), (input.data, *checks.states_of(cell, hx), *weights))


_DOC = """{title}, a drop-in for torch.nn.{name} on fused kernels:

        {equations}

    Same constructor, parameters, initialisation, state_dict, inputs, outputs and errors as torch.nn.{name}, of which it is a
    subclass; see there. Weights of one load into the other.

    Args:
        args, kwargs: those of torch.nn.{name}.
        backend: "triton", "torch" or "reference" to have it run there; None, the default, or "auto" for the choice per call
            that `rnnfast.explain` explains. A `ValueError` for another name.
        recompute: whether training keeps less: no gate activations, which backward computes again with two matrix products. On
            the kernels an LSTM then keeps its cell states in float32 and a GRU nothing, besides each layer's input and output.
            The other backends run their whole forward once more (``torch.utils.checkpoint``). It has no effect on what is
            returned. A `TypeError` for what is no bool.

    A layer's ``backend`` and ``recompute`` may be set at any time. Neither name is reserved: what else a subclass or a user
    keeps under it is theirs, and ignored here.

    Called with ``input`` and ``hx`` as torch.nn.{name} is, and with what that does not have (docs/sequences.md):

    Keyword Args:
        lengths: integers (B,), the steps of each row that count, 0 to T, in any order; a list, a NumPy array, a list of tensors
            of one, or a tensor on the CPU or the input's device. ``output`` is zero in padding, the last states are those of
            each row's last step.
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


class LSTM(Sequence, torch.nn.LSTM):
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


class GRU(Sequence, torch.nn.GRU):
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


class RNN(Sequence, torch.nn.RNN):
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
