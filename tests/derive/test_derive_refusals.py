"""What cannot be a cell, or cannot be fused, says so with file, line, reason and what to write instead."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import sigmoid, tanh

from rnnfast.derive.definition import Learned, Noise, Row, cell, keep
from rnnfast.derive.deriving import MOST_GATES, MOST_NOISE
from rnnfast.derive.registry import CannotFuse, derived, fused, spec

pytestmark = pytest.mark.same_everywhere

WEIGHTS = torch.eye(7)
ALPHA = torch.nn.Parameter(torch.tensor(0.5))
COUNT = iter(range(100))


@cell(gates="r z n")
def reset_before(x, h, s):
    r, z = sigmoid(x.r + h.r), sigmoid(x.z + h.z)
    n = tanh(x.n + (r * s.h) @ WEIGHTS)
    return (1 - z) * n + z * s.h


@cell(gates="a")
def linear(x, h, s):
    return tanh(torch.nn.functional.linear(x.a, WEIGHTS))


@cell(gates="a")
def normalised(x, h, s):
    return tanh(torch.nn.functional.layer_norm(x.a + h.a, s.h.shape[1:]))


@cell(gates="a")
def scaled(x, h, s):
    return tanh((x.a + h.a) / s.h.max())


@cell(gates="a")
def rolled(x, h, s):
    return tanh(x.a + h.a.roll(1, -1))


@cell(gates="a")
def sliced(x, h, s):
    return torch.cat([x.a[:, 1:], h.a[:, :1]], 1)


@cell(gates="a")
def branches(x, h, s):
    return x.a if x.a[0, 0] > 0 else h.a


@cell(gates="a")
def ambiguous(x, h, s):
    if x.a > 0:
        return x.a
    return h.a


@cell(gates="a")
def asks(x, h, s):
    if (x.a > 0).all():
        return x.a
    return h.a


@cell(gates="a")
def item(x, h, s):
    return tanh(x.a + h.a) * s.h.item()


@cell(gates="a")
def widened(x, h, s):
    return tanh(x.a.double() + h.a).float()


@cell(gates="a")
def dropped(x, h, s):
    return torch.nn.functional.dropout(x.a + h.a, 0.5)


@cell(gates="a")
def noisy(x, h, s):
    return x.a + torch.rand_like(h.a)


@cell(gates="a", states="h c")
def too_few(x, h, s):
    return tanh(x.a + h.a)


@cell(gates="a")
def no_tensor(x, h, s):
    return 1.0


@cell(gates="a")
def captured(x, h, s):
    return tanh(x.a + WEIGHTS[0, 0] * h.a)


@cell(gates="a")
def parameter(x, h, s):
    return tanh(x.a + ALPHA * h.a)


@cell(gates="a", states="h c")
def in_place(x, h, s):
    return tanh(x.a + h.a), s.c.add_(1)


@cell(gates="a")
def in_place_behind_detach(x, h, s):
    x.a.detach().mul_(2)
    return tanh(x.a + h.a)


@cell(gates="a")
def in_place_after_use(x, h, s):
    y = sigmoid(x.a + h.a)
    z = tanh(y)
    y.mul_(2)
    return z * sigmoid(y)


@cell(gates="a")
def into(x, h, s):
    return torch.add(x.a, h.a, out=torch.empty_like(x.a))


@cell(gates="a")
def unknown(x, h, s):
    return torch.lgamma(x.a + h.a)


@cell(gates="a")
def misspelled(x, h, s):
    return tanh(x.b + h.a)


@cell(gates="a")
def column(x, h, s):
    return tanh(x.a + h.a).unsqueeze(1)


@cell(gates="a")
def keeps_a_number(x, h, s):
    keep(torch.zeros_like(x.a))
    return tanh(x.a + h.a)


@cell(gates="a")
def changes(x, h, s):
    return tanh(x.a + h.a) * next(COUNT)


@cell(gates="a")
def much_noise(x, h, s, *, u: Noise, v: Noise, w: Noise, p: Noise, q: Noise):
    return tanh(x.a + h.a) * u * v * w * p * q


@cell(gates="a b c d e f g i j")
def many_gates(x, h, s):
    return tanh(x.a + h.j)


REFUSED = {
    reset_before: ("line .*`n = tanh", "a matrix product", "reset after it", r"n = tanh\(x.n \+ r \* h.n\)"),
    linear: ("a matrix product",),
    normalised: ("`native_layer_norm` needs all units of a row", "row_norm"),
    scaled: ("`max` needs all units of a row", "row_mean"),
    rolled: ("`roll` moves or picks units", "a gate or a state of its own"),
    sliced: ("`slice` moves or picks units",),
    branches: ("a decision by the value", "torch.where"),
    ambiguous: ("`if x.a > 0:`", "a decision by the value", "torch.where"),
    asks: ("a decision by the value", "torch.where"),
    item: ("a decision by the value", "torch.where"),
    widened: ("torch.float64", "Leave the conversion out"),
    dropped: ("random numbers of its own", "Noise"),
    noisy: ("random numbers of its own", "Noise"),
    too_few: ("should return a tuple of 2 tensors, the new h, c",),
    no_tensor: ("should return a tensor, the new h", "float"),
    captured: ("not among its arguments|moves or picks",),
    parameter: ("not among its arguments", "a parameter would get no gradient"),
    in_place: ("changes the state c before the step in place", "Write a new value"),
    in_place_behind_detach: ("changes the input side of gate a in place",),
    in_place_after_use: ("modified by an inplace operation",),
    into: ("out=",),
    unknown: ("`lgamma`, which has no translation", "Write it by operators"),
    misspelled: ("there is no gate `b`; there is a", r"line \d+, `return tanh\(x.b \+ h.a\)`"),
    column: ("gives|is", r"\(5, 1, 7\)"),
    keeps_a_number: (r"keep\(\) was given a constant",),
    changes: ("differs from PyTorch's own result",),
    much_noise: (f"5 noise arguments, and the kernels take {MOST_NOISE}",),
    many_gates: (f"9 gates, and the kernels take {MOST_GATES}",),
}


@pytest.mark.parametrize("own", REFUSED, ids=lambda own: own.name)
def test_refused_with_file_line_and_reason(own):
    code = own.function.__code__
    with pytest.raises(CannotFuse) as caught:
        fused(own)
    message = str(caught.value)
    assert message.startswith(f"cell `{own.name}` (test_derive_refusals.py:{code.co_firstlineno})"), message
    for text in REFUSED[own]:
        assert re.search(text, message), message
    with pytest.raises(ValueError, match="cell") as again:  # the same, and not the same object with a growing traceback
        derived(own)
    assert str(again.value) == message and again.value is not caught.value
    assert spec(own).saved == 0  # its equations run


def good(x, h, s):
    return tanh(x.a + h.a)


def sides(x, s):
    return tanh(x.a)


def listed(x, h, s, *, k=[1]):  # noqa: B006
    return x.a


def row_with_default(x, h, s, *, m: Row = 0):
    return x.a


def no_default(x, h, s, *, m: float):
    return x.a


def strange(x, h, s, *, m: Elsewhere):  # noqa: F821
    return x.a


WRONG = {
    "not a function": (TypeError, "a cell is a Python function", lambda: cell(gates="a")(torch.nn.Linear(1, 1))),
    "lambda": (ValueError, "write it as a function with def", lambda: cell(gates="a")(lambda x, h, s: x.a)),
    "no gates": (ValueError, "at least one name in gates", lambda: cell(gates="")(good)),
    "gates": (TypeError, "gates are names in a string", lambda: cell(gates=4)(good)),
    "twice": (ValueError, "twice in gates: a a", lambda: cell(gates="a a")(good)),
    "keyword": (ValueError, "'in' in states", lambda: cell(gates="a", states="h in")(good)),
    "underscore": (ValueError, "'_a' in gates", lambda: cell(gates=["_a"])(good)),
    "output": (ValueError, "output='y' is none of its states, h, c", lambda: cell(gates="a", states="h c", output="y")(good)),
    "places": (TypeError, r"takes \(x, s\), and should take \(x, h, s\)", lambda: cell(gates="a")(sides)),
    "not recurrent": (
        TypeError,
        r"takes \(x, h, s\), and should take \(x, s\)",
        lambda: cell(gates="a", recurrent=False)(good),
    ),
    "mutable": (TypeError, r"k is part of the kernel.*\[1\]", lambda: cell(gates="a")(listed)),
    "row": (TypeError, "m is a tensor, so it has no default", lambda: cell(gates="a")(row_with_default)),
    "number": (TypeError, "m has an annotation and no default", lambda: cell(gates="a")(no_default)),
    "annotation": (TypeError, "nothing is known of the annotation 'Elsewhere'", lambda: cell(gates="a")(strange)),
    "init": (TypeError, "takes a number or None", lambda: Learned("ones")),
    "kept": (TypeError, r"keep\(\) takes tensors, got float", lambda: keep(1.0)),
    "dtype": (ValueError, "torch.float32, not in torch.float64", lambda: keep(torch.ones(1), torch.float64)),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_definitions(what):
    kind, match, make = WRONG[what]
    with pytest.raises(kind, match=match):
        make()


def test_wrong_numbers():
    own = cell(gates="a")(with_number)
    for numbers, match in (({"leek": 1}, "no number 'leek'; its numbers: leak"), ({"leak": "1"}, "leak is part of the kernel")):
        for use in (fused, derived, spec):
            with pytest.raises(TypeError, match=match):
                use(own, **numbers)


def with_number(x, h, s, *, leak: float = 0.5):
    return leak * tanh(x.a + h.a)


def test_cells_are_found_by_name():
    assert pickle.loads(pickle.dumps(rolled)) is rolled
    assert copy.deepcopy(rolled) is rolled and copy.copy(rolled) is rolled
    local = cell(gates="a")(_made())
    assert copy.deepcopy([local])[0] is local
    with pytest.raises(pickle.PicklingError, match=r"defined inside a function .*_made.*define it at the top of a module"):
        pickle.dumps(local)
    assert rolled(*[type("x", (), {"a": torch.zeros(1, 2), "h": 0})] * 3).shape == (1, 2)  # still the function
    assert "rolled" in repr(rolled) and rolled.__doc__ is None


def _made():
    def inner(x, h, s):
        return tanh(x.a + h.a)

    return inner
