"""The schema of a recurrent call against the operators: names, shapes, axes. And calls on meta tensors and other devices."""

import inspect

import pytest
import torch
from support.groups import KINDS, Stack
from support.layers import equal
from test_ops import CELLS, B, H, I, T, make
from torch._subclasses.fake_tensor import FakeTensorMode

from rnnfast import ops, reference
from rnnfast.ops import operators, recurrence
from rnnfast.ops.gradients import Tape
from rnnfast.ops.members import Frame
from rnnfast.ops.schema import DIFFERENTIABLE, TENSORS, UPSTREAM, batch_axis

EXPORTED = [  # programs that were exported hold these: arguments are added at the end, with a default
    "rnnfast::forward(str cell, Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
    "Tensor? w_up, SymInt flips, bool save, Tensor? marks=None, Tensor? lengths=None, Tensor? reset_h=None, "
    "Tensor? reset_c=None, Tensor? seeds=None, float dropout=0., bool recompute=False",
    "rnnfast::backward(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor h, Tensor saved, Tensor c, Tensor? h0, "
    "Tensor? c0, Tensor w_hh, Tensor? w_up, SymInt flips, bool need_starts, Tensor? dcs=None, Tensor? marks=None, "
    "Tensor? lengths=None, Tensor? reset_h=None, Tensor? reset_c=None, Tensor? seeds=None, float dropout=0., "
    "Tensor? x=None, Tensor? w_ih=None, Tensor? b_ih=None, Tensor? b_hh=None",
]
RUNS = {"forward": recurrence.forward, "backward": recurrence.backward}
RETURNS = {"forward": operators.Results, "backward": operators.Grads}


@pytest.mark.parametrize("name", list(RUNS))
def test_signature_and_table_agree(name):
    """Every tensor that an operator takes or returns is in the table, and nothing else that it takes is."""
    parameters = inspect.signature(RUNS[name]).parameters
    tensors = [parameter.name for parameter in parameters.values() if "Tensor" in parameter.annotation]
    assert tensors == [argument for argument in parameters if argument in TENSORS]
    assert set(RETURNS[name]._fields) <= set(TENSORS)
    assert str(getattr(torch.ops.rnnfast, name).default._schema).startswith(EXPORTED[list(RUNS).index(name)])


def test_table():
    """A gradient from outside has the shape of what it is of. Gradients go to arguments of `forward`, in its order."""
    assert all(TENSORS[name] == TENSORS[of] for name, of in UPSTREAM.items())
    assert [name for name in operators.Forward._fields if name in DIFFERENTIABLE] == list(DIFFERENTIABLE)
    axes = {"x": -2, "h0": -2, "w_ih": None, "w_up": None, "marks": -1, "lengths": -1, "h": -2, "y": -2, "seeds": None}
    assert {name: batch_axis(name) for name in axes} == axes and batch_axis("cell") is None
    assert set(Tape._fields) <= set(TENSORS)


def everything(cell, layers, directions, device, **changed):
    """All arguments of `rnnfast::forward` for a stack of layers or for directions, by name."""
    made = Stack(cell, layers, directions, T, B, I, H, marked=True, dropout=0.5 if layers > 1 else 0.0, **changed)
    frame = Frame(made.members, directions, True, cell, made.flips, True, made.dropout, made.recompute)
    tensors = {name: tensor.detach() for name, tensor in made.tensors(device).items()}
    x, lengths, resets = tensors["x"], *(option.to(device) for option in made.options.values())
    marks = torch.stack([reference.marks(x, lengths, resets, bool(m)) for m in range(directions)])
    seeds = ops.dropout.seeds(x, made.dropout, layers - 1) if layers > 1 else None
    weights = [tensors[f"{kind}{m}"] for m in range(made.members) for kind in KINDS]
    (h0, c0), (reset_h, reset_c) = ([tensors.get(f"{name}{n}") for n in range(2)] for name in ("start", "reset"))
    return frame.assembled([x, h0, c0, reset_h, reset_c, marks, lengths, seeds, None, None, *weights])


@pytest.mark.parametrize("layers, directions, recompute", [(1, 1, False), (1, 2, False), (3, 1, False), (3, 1, True)])
@pytest.mark.parametrize("cell", CELLS)
def test_shapes(cell, layers, directions, recompute, device):
    """Shapes are those of the table, in the kernels and in the fake kernels; and dtypes are the same in both."""
    spec = reference.CELLS[cell]
    sizes = {"T": T, "B": B, "I": I, "H": H, "G": spec.gates, "S": spec.saved, "K": spec.grads}
    sizes |= {"C": spec.carried, "E": spec.held, "M": layers * directions, "D": directions, "U": layers - 1}

    def check(names, tensors):
        for name, tensor in zip(names, tensors, strict=True):
            if tensor is not None and tensor.numel():
                assert tuple(tensor.shape) == tuple(eval(size, {}, sizes) for size in TENSORS[name].shape.split()), name

    call = everything(cell, layers, directions, device, recompute=recompute)
    check(operators.INPUTS, [getattr(call, name) for name in operators.INPUTS])
    results = operators.Results(*ops.forward(*call))
    check(results._fields, results)
    assert results.h.numel() == (layers > 1) * layers * T * B * H
    given = {"dy": results.y, "dh_n": results.h_n, "dc_n": None, "need_starts": True}
    given |= {} if layers > 1 else {"h": results.y}
    given |= {} if recompute else dict.fromkeys(("x", "w_ih", "b_ih", "b_hh"))
    named = {**call._asdict(), **results._asdict(), **given}
    arguments = operators.Backward(**{name: named[name] for name in operators.Backward._fields if name in named})
    grads = ops.backward(*arguments)
    check(operators.Grads._fields, grads)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for operator, given, real in ((ops.forward, call, results), (ops.backward, arguments, grads)):
            fake = operator(*(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in given))
            assert [(a.shape, a.dtype) for a in fake] == [(a.shape, a.dtype) for a in real]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_default_device(cell, device):
    """Inside ``with torch.device(...)``, which is as torch.set_default_device, every tensor is made where the input is."""
    found = []
    for default in (device, "meta"):
        torch.manual_seed(1)
        tensors = make(cell, device)
        x, weights = tensors["x"], [tensors[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
        start = tuple(tensors[name] for name in ("h0", "c0") if name in tensors)
        lengths = torch.tensor([2, 0, T], device=device)
        resets = torch.ones(T, B, dtype=torch.bool, device=device)
        w_hr = torch.randn(H, H, device=device, requires_grad=True) if cell == "lstm" else None
        options = {"lengths": lengths, "resets": resets, "reset_to": start, "recompute": True}
        with torch.device(default):
            runs = []
            for run in (ops.layer, lambda *args, recompute, **given: reference.layer(*args, **given)):
                y, last = run(cell, x, start, *weights, w_hr, **options)
                y = ops.dropout.dropout(torch.cat([y, y], 2), 0.5).detach() + torch.cat([y, y], 2)
                (dx,) = torch.autograd.grad(y.square().sum() + last[0].sum(), x, create_graph=True)
                runs += [y, *last, dx, *torch.autograd.grad(dx.square().sum(), [x, *weights])]
            found.append(runs)
    assert equal(*found)


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("cell", CELLS)
def test_shapes_without_values(cell, where):
    """On meta tensors and inside FakeTensorMode, with lengths, resets and a gradient: shapes, no launch."""
    mode = FakeTensorMode()
    device = "meta" if where == "meta" else "cpu"
    with mode if where == "fake" else torch.device("meta"):
        tensors = make(cell, device)
        x, weights = tensors["x"], [tensors[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
        start = tuple(tensors[name] for name in ("h0", "c0") if name in tensors)
        lengths, resets = torch.ones(B, dtype=torch.int64, device=device), torch.ones(T, B, dtype=torch.bool, device=device)
        for run in (ops.trace, reference.trace):
            y, last, cells, gates = run(cell, x, start, *weights, lengths=lengths, resets=resets, reset_to=start)
            assert [tuple(a.shape) for a in (y, *last, *cells)] == [
                (T, B, H),
                *[(B, H)] * len(start),
                *[(T, B, H)] * len(cells),
            ]
            assert tuple(gates.shape) == (T, B, reference.GATES[cell], H)
            grads = torch.autograd.grad(y.sum(), [x, *start, *weights])
            assert [grad.shape for grad in grads] == [tensor.shape for tensor in (x, *start, *weights)]
