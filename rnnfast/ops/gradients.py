"""Derivatives of the operators: of any order, and inside PyTorch's function transforms.

    first order       the kernels: `rnnfast::backward`, then the large products (`gradients`)
    higher orders     `Gradients` makes the first order differentiable. Its own derivative goes through the equations in plain
                      PyTorch (`rnnfast.reference`), one step after another, in float32; only where such a derivative is taken
    torch.func        cannot differentiate an operator. Inside its transforms `Layer` stands before the operator: same kernels
    eager             `RnnfastForward` stands for the operator where nobody could tell, as it takes less of the host's time
    forward mode      has no rule here: `rnnfast.choice.decide` has such calls sent to the equations before they come

All inputs, y, the activations and the cell states are saved. Second derivatives read every input. First derivatives read fewer,
which `reads` lists. If PyTorch finds that a saved tensor was edited in place:

    it is not read         a first derivative goes on without it
    it is y                forward runs again from the inputs. A private copy of y would cost memory in each call, this costs a
                           forward pass where there was an edit
    it is another, or a    PyTorch's error
    second derivative

torch.nn's GRU and RNN on a CPU allow these edits, its LSTM allows none; `Cell.allows_edits` says it of a cell.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from rnnfast import reference, torch_private
from rnnfast.ops import operators, recurrence
from rnnfast.ops.marks import entered
from rnnfast.ops.operators import INPUTS, Backward, Forward, Results
from rnnfast.ops.recurrence import no_autocast
from rnnfast.ops.schema import DIFFERENTIABLE, STATE_TENSORS, UPSTREAM
from rnnfast.ops.vmap import batched
from rnnfast.reference import CELLS, PADDED

__all__ = ["Gradients", "Layer", "RnnfastForward", "Tape", "gradients", "reads"]

KEPT = ("y", "saved", "c")  # what a derivative needs of the results
RECOMPUTED_FROM = dict.fromkeys(("x", "w_ih", "b_ih", "b_hh"))  # `rnnfast::backward` takes these with ``recompute`` only
Tape: Any = namedtuple("Tape", (*UPSTREAM, *INPUTS, *KEPT))  # all tensors of a derivative, None for what is absent
_AT = {name: n for n, name in enumerate(Forward._fields)}
_PASSED = tuple(name for name in Backward._fields if name in Tape._fields)
_inputs, _passed = attrgetter(*INPUTS), attrgetter(*_PASSED)


@dataclass(frozen=True)
class Call:
    """What a derivative needs to know besides tensors. It is no tuple, because torch.func would look for tensors in one.

    Attributes:
        cell, reverse, recompute: as in `rnnfast::forward`.
        needs: the arguments of `rnnfast::forward` whose gradients are wanted, in its order.
    """

    cell: str
    reverse: bool
    recompute: bool
    needs: tuple[str, ...]


def reads(call: Call) -> set[str]:
    """The inputs of `rnnfast::forward` that its first derivatives read."""
    spec = CELLS[call.cell]
    found = {"w_hh", "c0", "reset_c", "marks", "lengths"}
    if "x" in call.needs:
        found |= {"w_ih"}
    if "w_ih" in call.needs:
        found |= {"x"}
    if "w_hh" in call.needs or spec.reads_h_before:
        found |= {"h0", "reset_h"}
    if call.recompute and spec.saved:
        found |= {*RECOMPUTED_FROM, "h0", "reset_h"}
    return found


def _setup_operator(ctx, inputs, output) -> None:
    if not _setup_context(ctx, inputs, output):
        raise RuntimeError("rnnfast::forward was called with save=False on inputs that require gradients")


def _setup_context(ctx, inputs, output) -> bool:
    """Save for backward. Returns whether there is anything to save."""
    call, results = Forward(*inputs), Results(*output)
    ctx.cell, ctx.reverse, ctx.recompute = call.cell, call.reverse, call.recompute
    ctx.mark_non_differentiable(results.saved)
    ctx.set_materialize_grads(False)
    if call.save:
        ctx.save_for_backward(*_inputs(call), results.y.detach(), results.saved.detach(), results.c.detach())
    return call.save


def _backward(ctx, *grad_outputs):
    needs = tuple([name for name, need in zip(Forward._fields, ctx.needs_input_grad, strict=False) if need])
    call = Call(ctx.cell, ctx.reverse, ctx.recompute, needs)
    dy, dh_n, dc_n, _, dcs = grad_outputs
    upstream = (dy, dh_n, dc_n, dcs) if CELLS[call.cell].states > 1 else (dy, dh_n, None, None)
    tensors = _saved_tensors(ctx, call)

    def run(*upstream):
        tape = Tape(*upstream, *tensors)
        with no_autocast(tape.y.device.type):
            if torch_private.is_forward_mode():
                return _gradients_by_equations(call, tape)
            return Gradients.apply(call, *tape) if torch.is_grad_enabled() else gradients(call, tape)

    grads: list[Tensor | None] = [None] * len(_AT)
    for name, grad in zip(needs, batched(run, upstream), strict=True):
        grads[_AT[name]] = grad
    return tuple(grads)


def _saved_tensors(ctx, call: Call) -> tuple[Tensor | None, ...]:
    """What was saved, `INPUTS` and `KEPT`. After an edit in place: None for inputs that are not read, and `KEPT` anew if it was
    edited.

    Raises:
        RuntimeError: PyTorch's, for an edit of a tensor that is read. In versions of PyTorch that unpack all saved tensors at
            once, for an edit of any.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError:
        can_tell = torch_private.unpacks_one_by_one and CELLS[call.cell].allows_edits
        if not can_tell or torch.is_grad_enabled() or torch_private.is_forward_mode():
            raise
    read, at = reads(call), {name: n for n, name in enumerate((*INPUTS, *KEPT))}
    inputs = [torch_private.saved_tensor(ctx, at[name]) if name in read else None for name in INPUTS]
    try:
        kept = [torch_private.saved_tensor(ctx, at[name]) for name in KEPT]
    except RuntimeError:
        whole = {name: torch_private.saved_tensor(ctx, at[name]) for name in INPUTS}
        anew = Forward(cell=call.cell, reverse=call.reverse, save=True, recompute=call.recompute, **whole)
        results = Results(*operators.forward(*anew))
        kept = [getattr(results, name) for name in KEPT]
    return (*inputs, *kept)


def _refuse(ctx, *_):
    raise RuntimeError("rnnfast::backward has no derivative of its own: differentiate rnnfast::forward with create_graph=True")


def gradients(call: Call, tape: Any) -> tuple[Tensor, ...]:
    """The gradients that are needed, on the kernels, in the order of ``call.needs``."""
    needs = call.needs
    passed = dict(zip(_PASSED, _passed(tape), strict=True))
    if not call.recompute:
        passed |= RECOMPUTED_FROM
    need_starts = "h0" in needs if tape.marks is None else not set(STATE_TENSORS).isdisjoint(needs)
    arguments = Backward(cell=call.cell, reverse=call.reverse, need_starts=need_starts, **passed)
    run = recurrence.backward if not torch.is_grad_enabled() and recurrence.is_eager(*arguments) else operators.backward
    d_gates, *state_grads = run(*arguments)
    found = dict(zip(STATE_TENSORS, state_grads, strict=True))

    T, B, H = tape.y.shape
    sides = CELLS[call.cell].gates * H
    kept_apart = d_gates.shape[2] > sides  # the last gate's two sides; its input side is stored first: see Cell.grads
    rows = d_gates.reshape(T * B, -1)
    d_input, d_hidden = rows[:, :sides], rows[:, -sides:]
    if "x" in needs:
        found["x"] = (d_input @ (tape.w_ih.roll(H, 0) if kept_apart else tape.w_ih)).view(T, B, -1)
    if "w_ih" in needs:
        x = tape.x
        if tape.lengths is not None:  # a NaN in padding times a gradient of 0 would be NaN
            x = x.masked_fill((tape.marks == PADDED)[..., None], 0)
        dw_ih = d_input.t() @ x.reshape(T * B, -1)
        found["w_ih"] = dw_ih.roll(-H, 0) if kept_apart else dw_ih
    if "w_hh" in needs:
        found["w_hh"] = _recurrent_gradient(call, tape, d_hidden)
    if "b_ih" in needs:
        db_ih = d_input.sum(0)
        found["b_ih"] = db_ih.roll(-H, 0) if kept_apart else db_ih
    if "b_hh" in needs:
        found["b_hh"] = d_hidden.sum(0)
    return tuple([found[name] for name in needs])


def _recurrent_gradient(call: Call, tape: Any, d_hidden: Tensor) -> Tensor:
    """The gradient of W_hh. Step t met y[t - 1], or y[t + 1] in reverse; the first step met h0."""
    T, B, H = tape.y.shape
    if tape.marks is not None:
        met = entered(tape.y, tape.h0, tape.reset_h, tape.marks, call.reverse)
        return d_hidden.t() @ met.reshape(T * B, H)
    if call.reverse:
        first, later, met = d_hidden[-B:], d_hidden[:-B], tape.y[1:]
    else:
        first, later, met = d_hidden[:B], d_hidden[B:], tape.y[:-1]
    found = later.t() @ met.reshape((T - 1) * B, H)
    return found if tape.h0 is None else torch.addmm(found, first.t(), tape.h0)


def _by_equations(call: Call, tape: Any) -> dict[str, Tensor]:
    """The results of `rnnfast::forward` that have gradients, by the equations in float32, in which the kernels compute."""
    given = {name: getattr(tape, name) for name in DIFFERENTIABLE}
    floats = tape._replace(**{name: tensor.float() for name, tensor in given.items() if tensor is not None})
    zeros = floats.x.new_zeros(floats.x.shape[1], floats.w_hh.shape[1])

    def states(*given):
        return tuple(zeros if state is None else state for state in given[: CELLS[call.cell].states])

    y, last, cells, _ = reference.trace(
        call.cell,
        floats.x,
        states(floats.h0, floats.c0),
        floats.w_ih,
        floats.w_hh,
        floats.b_ih,
        floats.b_hh,
        reverse=call.reverse,
        codes=tape.marks,
        reset_to=states(floats.reset_h, floats.reset_c),
    )
    rounded = zip(("y", "h_n", "c_n"), (y, *last), strict=False)
    return {name: tensor.to(tape.x.dtype) for name, tensor in rounded} | dict(zip(("c",), cells, strict=False))


def _gradients_by_equations(call: Call, tape: Any) -> tuple[Tensor, ...]:
    """`gradients` by the equations: differentiable in any mode, any number of times."""
    given = [name for name in UPSTREAM if getattr(tape, name) is not None]

    def outputs(*values):
        found = _by_equations(call, tape._replace(**dict(zip(call.needs, values, strict=True))))
        return tuple(found[UPSTREAM[name]] for name in given)

    pull: Any = torch.func.vjp(outputs, *(getattr(tape, name) for name in call.needs))[1]
    return pull(tuple(getattr(tape, name) for name in given))


class Gradients(torch.autograd.Function):
    """`gradients` as a function that has derivatives: those of the same gradients by the equations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call, *tensors):
        return gradients(call, Tape(*tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors[: -len(KEPT)])  # `KEPT` follows from the others

    @staticmethod
    def backward(ctx, *upstream):
        tape = Tape(*ctx.saved_tensors, *[None] * len(KEPT))
        moved = [name for name in (*UPSTREAM, *DIFFERENTIABLE) if getattr(tape, name) is not None]

        def first(*values):
            return _gradients_by_equations(ctx.call, tape._replace(**dict(zip(moved, values, strict=True))))

        def run(*upstream):
            with no_autocast(upstream[0].device.type):
                return torch.func.vjp(first, *(getattr(tape, name) for name in moved))[1](upstream)

        found = dict(zip(moved, batched(run, upstream), strict=True))
        return None, *(found.get(name) for name in Tape._fields)


class Layer(torch.autograd.Function):
    """`rnnfast::forward` inside torch.func's transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return operators.forward(*arguments)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


class RnnfastForward(torch.autograd.Function):
    """`rnnfast::forward` with its derivatives, where `recurrence.is_eager`. PyTorch shows the name in ``grad_fn``."""

    @staticmethod
    def forward(ctx, *arguments):
        results = recurrence.forward(*arguments)
        _setup_operator(ctx, arguments, results)
        return results

    backward = staticmethod(_backward)


operators.forward.register_autograd(_backward, setup_context=_setup_operator)
operators.backward.register_autograd(_refuse)
