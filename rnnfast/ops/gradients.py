"""Derivatives of the operators: of any order, and inside PyTorch's function transforms.

    first order       the kernels: `rnnfast::backward`, then the large products (`gradients`)
    higher orders     `Gradients` makes the first order differentiable. Its own derivative goes through the equations in plain
                      PyTorch (`rnnfast.reference`), one step after another, in float32; only where such a derivative is taken
    torch.func        cannot differentiate an operator. Inside its transforms `Layer` stands before the operator: same kernels
    eager             `RnnfastForward` stands for the operator where nobody could tell, as it takes less of the host's time. It
                      takes the weights of the members one by one (`rnnfast.ops.members`)
    forward mode      has no rule here: `rnnfast.choice.decide` has such calls sent to the equations before they come

All inputs, y, the activations and the cell states are saved. Second derivatives read every input. First derivatives read fewer,
which `reads` lists. If PyTorch finds that a saved tensor was edited in place:

    it is not read         a first derivative goes on without it
    it is y                forward runs again from the inputs. A private copy of y would cost memory in each call, this costs a
                           forward pass where there was an edit. (Of a pipeline the outputs of all layers are kept, and y is a
                           copy of the last.)
    it is another, or a    PyTorch's error
    second derivative

torch.nn's GRU and RNN on a CPU allow these edits, its LSTM allows none; `Cell.allows_edits` says it of a cell.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from rnnfast import reference, torch_private
from rnnfast.ops import dropout, operators, recurrence
from rnnfast.ops.marks import by_direction, by_member, entering
from rnnfast.ops.members import Frame
from rnnfast.ops.operators import INPUTS, Backward, Forward, Results
from rnnfast.ops.products import added_product, product
from rnnfast.ops.recurrence import no_autocast
from rnnfast.ops.schema import DIFFERENTIABLE, RETURNED, STATE_TENSORS, UPSTREAM
from rnnfast.ops.vmap import batched
from rnnfast.reference import PADDED, spec_of

__all__ = ["Gradients", "Layer", "RnnfastForward", "Tape", "gradients", "reads"]

KEPT = ("h", "saved", "c")  # what a derivative needs of the results; h is y if there is one layer
RECOMPUTED_FROM = dict.fromkeys(("x", "w_ih", "b_ih", "b_hh"))  # `rnnfast::backward` takes these with ``recompute`` only
Tape: Any = namedtuple("Tape", (*UPSTREAM, *INPUTS, *KEPT))  # all tensors of a derivative, None for what is absent
_AT = {name: n for n, name in enumerate(Forward._fields)}
_PASSED = tuple(name for name in Backward._fields if name in Tape._fields)
_inputs, _passed = attrgetter(*INPUTS), attrgetter(*_PASSED)


@dataclass(frozen=True)
class Call:
    """What a derivative needs to know besides tensors. It is no tuple, because torch.func would look for tensors in one.

    Attributes:
        cell, flips, dropout, recompute: as in `rnnfast::forward`.
        needs: the arguments of `rnnfast::forward` whose gradients are wanted, in its order.
    """

    cell: str
    flips: int
    dropout: float
    recompute: bool
    needs: tuple[str, ...]


def reads(call: Call) -> set[str]:
    """The inputs of `rnnfast::forward` that its first derivatives read."""
    spec = spec_of(call.cell)
    found = {"w_hh", "w_up", "c0", "reset_c", "marks", "lengths", "seeds", "held", "noise"}
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
    call = Forward(*inputs)
    return _keep(ctx, call, Results(*output), INPUTS, _inputs(call))


def _keep(ctx, call: Any, results: Results, names: tuple[str, ...], inputs: tuple[Tensor | None, ...]) -> bool:
    """Save `inputs`, which have these names, and what a derivative needs of the results. Returns whether there is anything to
    save."""
    ctx.cell, ctx.flips, ctx.dropout, ctx.recompute = call.cell, call.flips, call.dropout, call.recompute
    ctx.names = names
    ctx.mark_non_differentiable(results.h, results.saved)
    ctx.set_materialize_grads(False)
    if call.save:
        h = results.y if call.w_up is None else results.h
        ctx.save_for_backward(*inputs, h.detach(), results.saved.detach(), results.c.detach())
    return call.save


def _backward(ctx, *grad_outputs):
    needs = tuple([name for name, need in zip(Forward._fields, ctx.needs_input_grad, strict=False) if need])
    grads: list[Tensor | None] = [None] * len(_AT)
    for name, grad in _found(ctx, needs, grad_outputs, lambda tensors: tensors).items():
        grads[_AT[name]] = grad
    return tuple(grads)


def _found(ctx, needs: tuple[str, ...], grad_outputs, assembled: Callable) -> dict[str, Tensor]:
    """The gradients that are needed, by name. `assembled` makes `INPUTS` of the inputs that were saved."""
    call = Call(ctx.cell, ctx.flips, ctx.dropout, ctx.recompute, needs)
    dy, dh_n, dc_n, _, _, dcs = grad_outputs
    upstream = (dy, dh_n, dc_n, dcs) if spec_of(call.cell).carried else (dy, dh_n, None, None)
    inputs, kept = _saved_tensors(ctx, call, assembled)

    def run(*upstream):
        tape = Tape(*upstream, *inputs, *kept)
        with no_autocast(tape.h.device.type):
            if torch_private.is_forward_mode():
                return _gradients_by_equations(call, tape)
            return Gradients.apply(call, *tape) if torch.is_grad_enabled() else gradients(call, tape)

    return dict(zip(needs, batched(run, upstream), strict=True))


def _saved_tensors(ctx, call: Call, assembled: Callable) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """What was saved, `INPUTS` and `KEPT`. After an edit in place: None for inputs that are not read, and `KEPT` anew if it was
    edited.

    Raises:
        RuntimeError: PyTorch's, for an edit of a tensor that is read. In versions of PyTorch that unpack all saved tensors at
            once, for an edit of any.
    """
    count = len(ctx.names)
    try:
        saved = ctx.saved_tensors
        return assembled(saved[:count]), saved[count:]
    except RuntimeError:
        can_tell = torch_private.unpacks_one_by_one and spec_of(call.cell).allows_edits
        if not can_tell or torch.is_grad_enabled() or torch_private.is_forward_mode():
            raise
    read = reads(call)
    inputs = [torch_private.saved_tensor(ctx, n) if name in read else None for n, name in enumerate(ctx.names)]
    try:
        kept = tuple(torch_private.saved_tensor(ctx, count + n) for n in range(len(KEPT)))
    except RuntimeError:
        whole = assembled([torch_private.saved_tensor(ctx, n) for n in range(count)])
        anew = Forward(
            cell=call.cell, flips=call.flips, save=True, dropout=call.dropout, recompute=call.recompute,
            **dict(zip(INPUTS, whole, strict=True)),
        )  # fmt: skip
        results = Results(*operators.forward(*anew))
        kept = (results.y if anew.w_up is None else results.h, results.saved, results.c)
    return assembled(inputs), kept


def _refuse(ctx, *_):
    raise RuntimeError("rnnfast::backward has no derivative of its own: differentiate rnnfast::forward with create_graph=True")


def gradients(call: Call, tape: Any) -> tuple[Tensor, ...]:
    """The gradients that are needed, on the kernels, in the order of ``call.needs``."""
    needs = call.needs
    passed = dict(zip(_PASSED, _passed(tape), strict=True))
    if not call.recompute:
        passed |= RECOMPUTED_FROM
    need_starts = "h0" in needs if passed["marks"] is None else not set(STATE_TENSORS).isdisjoint(needs)
    arguments = Backward(cell=call.cell, flips=call.flips, dropout=call.dropout, need_starts=need_starts, **passed)
    run = recurrence.backward if not torch.is_grad_enabled() and recurrence.is_eager(*arguments) else operators.backward
    d_gates, *others = run(*arguments)
    found = dict(zip(RETURNED, others, strict=True))

    M, T, B, width = d_gates.shape
    H, D, spec = tape.w_hh.shape[2], 1 if tape.w_up is not None else M, spec_of(call.cell)
    sides, rolled = spec.gates * H, spec.apart * H  # the input sides of the last gates are stored first: see Cell.grads
    rows = d_gates.reshape(M, T * B, width)  # inside vmap it is no view
    d_input, d_hidden = rows[..., :sides], rows[..., -sides:]
    d_read = d_input[:D]  # of the members that read x

    def in_order(grad: Tensor) -> Tensor:
        return grad.roll(-rolled, 1) if rolled else grad

    if "x" in needs:
        w_ih = tape.w_ih.roll(rolled, 1) if rolled else tape.w_ih
        d_x = product(d_read[0], w_ih[0])
        for m in range(1, D):
            d_x = added_product(d_x, d_read[m], w_ih[m])
        found["x"] = d_x.view(T, B, -1)
    if "w_ih" in needs:
        x = tape.x
        if tape.lengths is not None:  # a NaN in padding times a gradient of 0 would be NaN
            x = x.masked_fill((tape.marks[0] == PADDED)[..., None], 0)
        x = x.reshape(T * B, -1)
        found["w_ih"] = in_order(_of_each([product(d.t(), x) for d in d_read]))
    if "w_up" in needs:
        below = tape.h[:-1]
        if tape.seeds is not None:
            below = torch.stack([dropout.dropped(*each, call.dropout) for each in zip(below, tape.seeds.split(1), strict=True)])
        found["w_up"] = in_order(product(d_input[1:].mT, below.reshape(M - 1, T * B, H)))
    if "w_hh" in needs:
        found["w_hh"] = _recurrent_gradient(call, tape, d_hidden) if spec.recurrent else torch.zeros_like(tape.w_hh)
    if "b_ih" in needs:
        found["b_ih"] = in_order(d_input.sum(1))
    if "b_hh" in needs:
        found["b_hh"] = d_hidden.sum(1)
    return tuple([found[name] for name in needs])


def _of_each(tensors: list[Tensor]) -> Tensor:
    """Those of all members, with the members in front."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _recurrent_gradient(call: Call, tape: Any, d_hidden: Tensor) -> Tensor:
    """The gradient of W_hh (M, G*H, H). Step t met h of step t - 1, or t + 1 in reverse; the first step met h0."""
    h = by_member(tape.h, 1 if tape.w_up is not None else len(d_hidden))
    _, T, B, H = h.shape
    if tape.marks is not None:
        found = []
        for m, member in enumerate(h):
            start, reset = (None if state is None else state[m] for state in (tape.h0, tape.reset_h))
            codes = tape.marks[min(m, len(tape.marks) - 1)]
            met = entering(member, start, reset, codes, bool(call.flips >> m & 1), 0, T)
            found.append(product(d_hidden[m].t(), met.reshape(T * B, H)))
        return _of_each(found)
    found = []
    for members, reverse in by_direction(call.flips, len(h)):
        own, steps = d_hidden[members], h[members]
        first, later, met = (own[:, -B:], own[:, :-B], steps[:, 1:]) if reverse else (own[:, :B], own[:, B:], steps[:, :-1])
        grad = product(later.mT, met.flatten(1, 2))
        found.append(grad if tape.h0 is None else added_product(grad, first.mT, tape.h0[members]))
    return found[0] if len(found) == 1 else torch.cat(found)


def _by_equations(call: Call, tape: Any) -> dict[str, Tensor]:
    """The results of `rnnfast::forward` that have gradients, by the equations in float32, in which the kernels compute."""
    given, spec = {name: getattr(tape, name) for name in DIFFERENTIABLE}, spec_of(call.cell)
    floats = tape._replace(**{name: tensor.float() for name, tensor in given.items() if tensor is not None})
    D, dtype, H = len(tape.w_ih), tape.x.dtype, tape.w_hh.shape[2]
    zeros = floats.x.new_zeros(floats.x.shape[1], H)

    def states(m: int, h, c):
        """h and the carried states that the equations have; the kernels carry what they keep in float32 besides."""
        carried = (zeros,) * (spec.states - 1) if c is None else c[m].split(H, -1)[: spec.states - 1]
        return zeros if h is None else h[m], *carried

    def side_by_side(h, carried):
        return torch.cat([*carried, *[torch.zeros_like(h)] * spec.kept32], -1)

    x, outputs, lasts, cells = floats.x, [], [], []
    for m, w_hh in enumerate(floats.w_hh):
        if m >= D:
            x = outputs[-1].float()
            if tape.seeds is not None:
                x = x * dropout.mask(x.detach(), tape.seeds[m - 1 : m], call.dropout)
        y, last, cell_states, _ = reference.trace(
            call.cell,
            x,
            states(m, floats.h0, floats.c0),
            floats.w_ih[m] if m < D else floats.w_up[m - D],
            w_hh,
            *(None if bias is None else bias[m] for bias in (floats.b_ih, floats.b_hh)),
            reverse=bool(call.flips >> m & 1),
            held=None if floats.held is None else floats.held[m],
            codes=None if tape.marks is None else tape.marks[min(m, len(tape.marks) - 1)],
            reset_to=states(m, floats.reset_h, floats.reset_c),
            seed=None if tape.noise is None else tape.noise[m],
        )
        outputs.append(y.to(dtype))
        lasts.append(last)
        cells.append(cell_states)
    y = torch.cat(outputs, -1) if D > 1 else outputs[-1]
    found = {"y": y, "h_n": torch.stack([last[0] for last in lasts]).to(dtype)}
    if spec.carried:
        found["c_n"] = torch.stack([side_by_side(last[0], last[1:]) for last in lasts]).to(dtype)
        found["c"] = torch.stack([side_by_side(y, carried).float() for y, carried in zip(outputs, cells, strict=True)])
    return found


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
    def forward(ctx, frame: Frame, *tensors):
        call = frame.assembled(tensors)
        results = recurrence.forward(*call)
        ctx.frame = frame
        if not _keep(ctx, call, Results(*results), frame.names, tensors):
            raise RuntimeError("rnnfast::forward was called with save=False on inputs that require gradients")
        return results

    @staticmethod
    def backward(ctx, *grad_outputs):
        frame, needed = ctx.frame, ctx.needs_input_grad[1:]
        wanted = {name for name, need in zip(frame.names, needed, strict=True) if need}
        needs = tuple([name for name in INPUTS if name in wanted])
        found = _found(ctx, needs, grad_outputs, lambda tensors: _inputs(frame.assembled(tensors)))
        return None, *frame.apart(found)


operators.forward.register_autograd(_backward, setup_context=_setup_operator)
operators.backward.register_autograd(_refuse)
