"""`Layer`: a stack of recurrent layers of a cell of a user's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnfast import torch_private
from rnnfast.choice.decide import Decision, check_backend
from rnnfast.derive.definition import Cell
from rnnfast.nn import base, heads, layer_checks, stack, variants
from rnnfast.nn.options import CallOptions, read
from rnnfast.ops.dropout import seeds
from rnnfast.reference import Weights, spec_of

__all__ = ["Layer", "Prepared", "decision", "fused", "prepared", "read_keywords"]

_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Layer(nn.Module):
    """A recurrent layer, or a stack of them, of any cell (`rnnfast.cell`), with the constructor, the parameters and the call of
    torch.nn.LSTM.

    Weights of torch.nn.LSTM, GRU and RNN load into layers of the cells `rnnfast.cells.lstm`, ``gru``, ``rnn_tanh`` and
    ``rnn_relu``, and the other way. Under one seed both begin with the same weights.

    Args:
        cell: what `rnnfast.cell` made of a function. Its kernels are derived here, in training and in evaluation if the cell
            asks for the mode. A cell that cannot be fused runs by its equations, with a `FallbackWarning` at the first call
            that the kernels could have run.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for torch.nn.LSTM.
        heads: W_hh has so many blocks on its diagonal and nothing else. Units of one head do not see those of another. Means
            over rows (`rnnfast.row_mean`) are over the units of a head.
        recompute: as for `rnnfast.LSTM`.
        backend: "triton", "reference" or "torch", which here is the same as "reference": the equations in plain PyTorch. None
            or "auto" for the choice per call that `rnnfast.explain` explains.
        constants: numbers of the cell that are not to be its own. A number called ``training`` is the mode of the module.

    Parameters, with G gates and H units: ``weight_ih_l0`` (G*H, I), ``weight_hh_l0`` (G*H, H) or, with several heads,
    (heads, G*H/heads, H/heads), ``bias_ih_l0`` and ``bias_hh_l0`` (G*H,), then ``<name>_l0`` (H,) for each learned vector;
    ``_l1`` for the next layer, ``_l0_reverse`` for the other direction. Gates lie one after another in the rows. A cell without
    W_hh has no ``weight_hh`` and no ``bias_hh``. They begin uniform in +-1/sqrt(H), a learned vector as its
    `rnnfast.Learned` says.

    Called as ``layer(input, hx=None, *, lengths=None, resets=None, reset_to=None, return_all_states=False, **rows)``:

        input               (T, B, I), (B, T, I) with ``batch_first``, (T, I), or a PackedSequence
        hx                  a tensor for a cell with one state, else a tuple in the order of the states; each
                            (layers * directions, B, H), zeros if absent; without a batch (layers * directions, H)
        lengths, resets, reset_to, return_all_states    as for `rnnfast.LSTM` (docs/sequences.md)
        rows                the `rnnfast.Row` arguments of the cell by name: (H,) or (B, H) for all layers and directions, or
                            (layers * directions, B, H)

    Returns ``(output, states)``: output (T, B, directions * H) laid out as ``input``, the states in the form of ``hx``; with
    ``return_all_states`` also a tuple with an entry a layer, a tuple of the states of every step, laid out as ``output``.
    float16, bfloat16 and float32 on the kernels, float64 too by the equations. All are differentiable with respect to input,
    states, parameters and rows.

    A cell with noise draws a seed for each layer, direction and head from PyTorch's generator of the device at each call.
    ``torch.manual_seed`` makes it repeatable, and ``torch.utils.checkpoint`` draws the same again.

    Errors are of the types of torch.nn: `RuntimeError` for a wrong size or device, `ValueError` for a wrong dtype, or a wrong
    rank of the input, `TypeError` for what is no tensor, for an unknown number of the cell and for a row that is missing or
    unknown. Constructing raises `TypeError` and `ValueError` as torch.nn does, and `ValueError` for ``heads`` that do not
    divide hidden_size or are several for a cell without W_hh.

    Example:
        >>> @rnnfast.cell(gates="f z o", states="h c")
        ... def cifg(x, h, s):
        ...     f, o = torch.sigmoid(x.f + h.f), torch.sigmoid(x.o + h.o)
        ...     c = f * s.c + (1 - f) * torch.tanh(x.z + h.z)
        ...     return o * torch.tanh(c), c
        >>> layer = rnnfast.Layer(cifg, 10, 20, num_layers=2, bidirectional=True)
        >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 10))
        >>> output.shape
        torch.Size([5, 3, 40])
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        heads: int = 1,
        recompute: bool = False,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **constants: Any,
    ) -> None:
        super().__init__()
        if not isinstance(cell, Cell):
            raise TypeError(f"cell should be what rnnfast.cell makes of a function, got: {type(cell).__name__}")
        self.cell = cell
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.heads, self.recompute, self.backend = heads, recompute, backend
        layer_checks.check_layer(self)
        check_backend(backend)
        layer_checks.own_names(cell, Layer.__init__, Layer.forward)
        self.dropout = float(dropout)
        self.constants = layer_checks.checked_constants(cell, constants)
        self._variants = _variants(self)
        self._shapes = dict(_shapes(self))
        for name, shape in self._shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @property
    def places(self) -> int:
        """Layers times directions."""
        return self.num_layers * (2 if self.bidirectional else 1)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, in the order of torch.nn's."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name in self._shapes:
            learned = self.cell.learned.get(name.rpartition("_l")[0])
            if learned is None or learned.init is None:
                nn.init.uniform_(getattr(self, name), -bound, bound)
            else:
                nn.init.constant_(getattr(self, name), learned.init)

    def flatten_parameters(self) -> None:
        """Nothing: only cuDNN wants its weights in one piece."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Any = None,
        resets: Tensor | None = None,
        reset_to: Any = None,
        return_all_states: bool = False,
        **rows: Tensor,
    ) -> Any:
        """See the class."""
        options = CallOptions(lengths, resets, reset_to, bool(return_all_states))
        if base.is_traced_by_fx(self, Layer.forward, input, hx, *options.given.values(), *rows.values()):
            return base.fx_node(self, input, hx, **options.given, **rows)
        call = prepared(self, input, hx, options, rows)
        chosen = decision(self, input, call)
        variants.announce(self.cell, chosen)
        runner = chosen.runner if call.x.numel() else "equations"  # which run a batch without rows, too
        noise = seeds(call.x, 0.0, len(call.members)) if spec_of(call.cell).noise else None
        again = variants.checkpoints(self.recompute, chosen)
        output, last, *all_states = stack.run(
            runner, self, call.cell, call.members, input, call.states, call.options, again, noise, self.cell.output
        )
        if len(self.cell.states) == 1:
            return output, heads.joined(last, self.heads), *all_states
        return output, tuple(heads.joined(state, self.heads) for state in last), *all_states

    def extra_repr(self) -> str:
        text = [self.cell.name, str(self.input_size), str(self.hidden_size)]
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False, "heads": 1,
            "recompute": False, "backend": None,
        }  # fmt: skip
        text += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(text + [f"{name}={value!r}" for name, value in self.constants.items()])

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        del state["_variants"]  # another process derives its own
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._variants = _variants(self)


def _variants(layer: Layer) -> dict[bool, variants.Variant]:
    """The cell in training and in evaluation."""
    if "training" not in layer.cell.constants:
        return dict.fromkeys((True, False), variants.variant(layer.cell, layer.constants))
    return {mode: variants.variant(layer.cell, layer.constants | {"training": mode}) for mode in (True, False)}


def _suffixes(layer: Layer) -> list[str]:
    """Of the parameters of each place."""
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    return [f"_l{n}{direction}" for n in range(layer.num_layers) for direction in directions]


def _shapes(layer: Layer) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parameters in the order of torch.nn's, with their shapes."""
    cell, H, k = layer.cell, layer.hidden_size, layer.heads
    rows, directions = len(cell.gates) * H, 2 if layer.bidirectional else 1
    kinds = [kind for kind in _KINDS if (layer.bias or "bias" not in kind) and (cell.recurrent or "_hh" not in kind)]
    for place, suffix in enumerate(_suffixes(layer)):
        width = layer.input_size if place < directions else directions * H
        shapes = {"weight_ih": (rows, width), "weight_hh": (rows, H) if k == 1 else (k, rows // k, H // k)}
        for kind in kinds:
            yield kind + suffix, shapes.get(kind, (rows,))
        for name in cell.learned:
            yield name + suffix, (H,)


class Prepared(NamedTuple):
    """A call that is right.

    Attributes:
        cell, unfused: those of the `rnnfast.nn.variants.Variant`.
        x: the input, or the rows of a packed one.
        members, states: as `rnnfast.nn.stack.run` takes them.
        options: read and checked.
    """

    cell: Any
    unfused: str
    x: Tensor
    members: list[Weights]
    states: tuple[Tensor, ...]
    options: CallOptions


def prepared(layer: Layer, input: Any, hx: Any, options: CallOptions, rows: dict[str, Any]) -> Prepared:
    """Check a call. It raises what the class says."""
    cell, k = layer.cell, layer.heads
    parameters = {name: getattr(layer, name) for name in layer._shapes}
    states = layer_checks.check_call(layer, input, hx, parameters)
    order = None
    if isinstance(input, PackedSequence):
        x, order, B = input.data, input.sorted_indices, int(input.batch_sizes[0])
        if options.marked:
            raise ValueError("a PackedSequence has its own lengths, and no place for resets: pad it, and give lengths")
    else:
        x, B = input, None if input.dim() == 2 else input.shape[0 if layer.batch_first else 1]
    batch = () if B is None else (B,)
    shape = (layer.places, *batch, layer.hidden_size)
    padded = x.unsqueeze(0) if x is not input else x
    options = read(padded, options, shapes=(shape,) * len(cell.states), batch_first=layer.batch_first)
    if options.reset_to is not None:
        options = replace(options, reset_to=tuple(heads.apart(state, k) for state in options.reset_to))
    tiles = layer_checks.rows_of(cell, rows, x, B, layer.hidden_size, layer.places)
    if order is not None:
        tiles = [row if row.shape[1] == 1 else row.index_select(1, order) for row in tiles]
    members = []
    for place, suffix in enumerate(_suffixes(layer)):
        w_ih = parameters[f"weight_ih{suffix}"]
        w_hh, b_ih, b_hh = (parameters.get(kind + suffix) for kind in _KINDS[1:])
        held = variants.held([parameters[name + suffix] for name in cell.learned], tiles, place)
        whole = Weights(w_ih, w_ih.new_empty(0, layer.hidden_size) if w_hh is None else w_hh, b_ih, b_hh, None, held)
        members += heads.members(whole, k, len(cell.gates), len(cell.held))
    name, unfused = layer._variants[layer.training]
    return Prepared(name, unfused, x, members, tuple(heads.apart(state, k) for state in states), options)


def read_keywords(keywords: dict[str, Any]) -> tuple[CallOptions, dict[str, Any]]:
    """The options and the rows among the keywords of a call."""
    names = {name for name in keywords if name in inspect.signature(Layer.forward).parameters}
    return CallOptions(**{name: keywords[name] for name in names}), {n: v for n, v in keywords.items() if n not in names}


def fused(layer: Layer) -> str:
    """The name in `rnnfast.reference.CELLS` of a cell that is fused, in the layer's mode."""
    name = layer._variants[layer.training].cell
    assert isinstance(name, str)
    return name


def decision(layer: Layer, input: Any, call: Prepared) -> Decision:
    """What is to run a call, by `rnnfast.choice.decide`."""
    found = variants.Variant(call.cell, call.unfused)
    expanded = torch_private.is_expanded(layer)
    return variants.decided(layer.cell, found, layer.backend, call.x, padded=call.x is input, expanded=expanded)
