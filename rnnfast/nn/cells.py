"""The cells, one step a call: `LSTMCell`, `GRUCell` and `RNNCell`, derived from torch.nn's own.

As with the layers, ``forward`` alone is new, and what the kernels do not take, a wrong call included, goes to torch.nn's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnfast import reference, torch_private
from rnnfast.choice import kernel_plan
from rnnfast.choice.decide import Decision, decide, tell
from rnnfast.choice.gpu import known
from rnnfast.nn import base, checks, stack
from rnnfast.nn.base import cell_of
from rnnfast.reference import STATES
from rnnfast.torch_private import forward_level, innermost_transform

__all__ = ["Cell", "GRUCell", "LSTMCell", "RNNCell", "decision"]


class Cell(base.Accelerated, torch.nn.RNNCellBase):
    """The common ``forward``. A mixin: it stands before torch.nn's class among the bases."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if base.is_traced_by_fx(self, Cell.forward, input, hx):
            return base.fx_node(self, input, hx)
        chosen = decision(self, input, hx)
        if chosen.gives_way:
            tell(chosen.asked, chosen.asked_by, chosen.gives_way)
        return super().forward(input, hx) if chosen.runner == "torch" else _run(chosen.runner, self, input, hx)


def _weights(cell: Any) -> tuple[Any, ...]:
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


def decision(cell: Cell, input: Any, hx: Any) -> Decision:
    """The facts about a call, put to `rnnfast.choice.decide.decide`."""
    is_tensor, name, weights = isinstance(input, Tensor), cell_of(cell), _weights(cell)
    fits = checks.cell_fits(cell, name, weights, input, hx)
    may_choose = fits and not torch.compiler.is_compiling() and innermost_transform() is None and forward_level() < 0
    may_choose = may_choose and not known.get(("no gpu", input.device))
    return decide(
        cell._rnnfast_backend,
        input.device.type if is_tensor else None,
        input.device.index if is_tensor else None,
        input.dtype if is_tensor else None,
        well_formed=fits,
        replaced=torch_private.replaced(cell, Cell),
        expanded=torch_private.is_expanded(cell),
        steps=False,
        torch_wins=_torch_wins(name, weights, input, hx) if may_choose else "",
    )


def _torch_wins(cell: str, weights: tuple[Any, ...], input: Tensor, hx: Any) -> str:
    """Why PyTorch's own cell is the automatic choice, as predicted of one step; empty if it is not."""
    if not kernel_plan.predicts(input):
        return ""
    rows, width = (input.shape[0] if input.dim() == 2 else 1), input.shape[-1]
    tensors = (input, *checks.states_of(cell, hx), *weights)
    return kernel_plan.torch_wins_call(cell, 1, rows, width, weights[1].shape[1], 1, 1, tensors)


def _run(runner: str, cell: Cell, input: Tensor, hx: Any) -> Any:
    """A well-formed call, on "kernels" or by "equations"."""
    name, batched = cell_of(cell), input.dim() == 2
    x = input[None] if batched else input[None, None]
    states = tuple(state if batched else state[None] for state in checks.states_of(name, hx)) or None
    w_ih, w_hh, b_ih, b_hh = _weights(cell)
    _, last, *_ = reference.alone(stack.GROUPS[runner], name, x, states, w_ih, w_hh, b_ih, b_hh)
    if not batched:
        last = tuple(state[0] for state in last)
    return last if STATES[name] > 1 else last[0]


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


class LSTMCell(Cell, torch.nn.LSTMCell):
    __doc__ = _DOC.format(
        layer="LSTM",
        equations="h', c' = one step from (h, c)",
        c="\n    Between steps c is rounded to the dtype of the input, as torch.nn's is; `rnnfast.LSTM` carries it in float32.",
        result="h, c",
    )


class GRUCell(Cell, torch.nn.GRUCell):
    __doc__ = _DOC.format(layer="GRU", equations="h' = one step from h", c="", result="h")


class RNNCell(Cell, torch.nn.RNNCell):
    __doc__ = _DOC.format(layer="RNN", equations="h' = one step from h", c="", result="h")
