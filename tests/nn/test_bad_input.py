"""Wrong calls, side by side with torch.nn: the same type and text of error, or the same result, before any launch."""

import itertools
import warnings
from collections import namedtuple

import pytest
import torch
from support.layers import NAMES, B, H, I, T, close, equal, flat, outcome, packed, pair, states

import rnnfast


def same(ours, theirs, *args):
    """Whether both modules raise the same, or return the same."""
    found, expected = outcome(ours, *args), outcome(theirs, *args)
    if isinstance(expected[0], type):
        assert found == expected
    else:
        assert not isinstance(found[0], type), found
        assert all(a.device == b.device for a, b in zip(flat(found), flat(expected), strict=True))
        found, expected = ([t.new_zeros(t.shape, device="cpu") if t.is_meta else t for t in flat(r)] for r in (found, expected))
        assert equal(found, expected)


INPUTS = {
    "0-D": lambda x: x[0, 0, 0],
    "1-D": lambda x: x[0, 0],
    "4-D": lambda x: x[None],
    "few features": lambda x: x[..., :-1],
    "many features": lambda x: torch.cat([x, x], -1),
    "no features": lambda x: x[..., :0],
    "no batch": lambda x: x[:, :0],
    "no steps": lambda x: x[:0],
    "neither": lambda x: x[:0, :0],
    "unbatched, few features": lambda x: x[0, :, :-1],
    "unbatched, no steps": lambda x: x[0, :0],
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "int64": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex64": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "None": lambda x: None,
    "text": lambda x: "x",
    "number": lambda x: 1.0,
    "list": lambda x: x.tolist(),
    "tuple": lambda x: (x,),
    "numpy": lambda x: x.cpu().numpy(),
}
STATES = {
    "few layers": lambda h: h[:-1],
    "many layers": lambda h: torch.cat([h, h]),
    "few rows": lambda h: h[:, :-1],
    "no rows": lambda h: h[:, :0],
    "few units": lambda h: h[..., :-1],
    "many units": lambda h: torch.cat([h, h], -1),
    "1-D": lambda h: h[0, 0],
    "2-D": lambda h: h[0],
    "4-D": lambda h: h[None],
    "batch first": lambda h: h.transpose(0, 1),
    "float64": lambda h: h.double(),
    "float16": lambda h: h.half(),
    "int64": lambda h: h.long(),
    "meta": lambda h: h.to("meta"),
    "list": lambda h: h.tolist(),
    "None": lambda h: None,
    "number": lambda h: 1.0,
}
SIZES = [kind for kind in STATES if kind.split()[-1] in ("layers", "rows", "units", "first") or kind.endswith("-D")]
CONTAINERS = {
    "a tensor": lambda h: h,
    "both in a tensor": lambda h: torch.stack([h, h]),
    "one in a tuple": lambda h: (h,),
    "two in a tuple": lambda h: (h, h),
    "three in a tuple": lambda h: (h, h, h),
    "nested": lambda h: ((h, h),),
    "empty tuple": lambda h: (),
    "empty list": lambda h: [],
    "dict": lambda h: {"h": h, "c": h},
    "number": lambda h: 0,
    "text": lambda h: "hx",
    "False": lambda h: False,
}
STACKED = {"num_layers": 2, "bidirectional": True, "batch_first": True}


@pytest.mark.parametrize("options", [{}, STACKED], ids=["plain", "stacked"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name, kind, given, options, device, no_launch):
    """A wrong input gives torch.nn's error, type and text, or torch.nn's result where it takes it, without a launch."""
    ours, theirs = pair(name, device, backend=None, **options)
    hx = states(name, 4 if options else 1, T if options else B, H, device=device) if given else None
    same(ours, theirs, INPUTS[kind](torch.randn(T, B, I, device=device)), hx)


@pytest.mark.parametrize(
    "name, kind",
    [case for case in itertools.product(NAMES, STATES) if case != ("LSTM", "meta")],  # which crashes torch.nn.LSTM itself
)
def test_bad_states(name, kind, device, no_launch):
    """A wrong state, also if only one of an LSTM's two is wrong or the input has no batch: torch.nn's error or result."""
    ours, theirs = pair(name, device, backend=None, num_layers=2)
    x, good = torch.randn(3, B, I, device=device), torch.randn(2, B, H, device=device)
    bad = STATES[kind](good)
    for hx in [(bad, good), (good, bad), (bad, bad)] if name == "LSTM" else [bad] if bad is not None else []:
        same(ours, theirs, x, hx)
        same(ours, theirs, x[:, 0], hx)
        if name != "LSTM":
            same(ours, theirs, packed(x, [3, 2, 1]), hx)
        elif kind in SIZES:  # torch.nn.LSTM itself does not check the states of a packed call, and crashes
            with pytest.raises(RuntimeError, match=r"Expected hidden\[[01]\] size"):
                ours(packed(x, [3, 2, 1]), hx)


@pytest.mark.parametrize(
    "name, kind",
    [
        (name, kind)
        for name, kind in itertools.product(NAMES, CONTAINERS)
        if kind != ("two in a tuple" if name == "LSTM" else "a tensor")  # the right one
    ],
)
def test_bad_containers(name, kind, device, no_launch):
    """States packed otherwise than this cell takes them: torch.nn's error, type and text."""
    ours, theirs = pair(name, device, backend=None)
    same(ours, theirs, torch.randn(T, B, I, device=device), CONTAINERS[kind](torch.randn(1, B, H, device=device)))
    same(ours, theirs, torch.randn(T, I, device=device), CONTAINERS[kind](torch.randn(1, H, device=device)))


@pytest.mark.parametrize("where", ["input", "weights", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_meta(name, where, device, no_launch):
    """On the meta device shapes are worked out as torch.nn does, and a mixture of devices is refused as there."""
    ours, theirs = pair(name, device, backend=None)
    x = torch.randn(T, B, I, device=device)
    if where != "input":
        ours, theirs = ours.to("meta"), theirs.to("meta")
    same(ours, theirs, x.to("meta") if where != "weights" else x)


BROKEN = {
    "shape": lambda w: torch.nn.Parameter(w.detach()[:-1]),
    "rank": lambda w: torch.nn.Parameter(w.detach()[None]),
    "dtype": lambda w: torch.nn.Parameter(w.detach().double()),
    "meta": lambda w: torch.nn.Parameter(w.detach().to("meta")),
    "None": lambda w: None,
}


@pytest.mark.parametrize("weight", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_broken_weights(name, kind, weight, device, no_launch):
    """A weight of the wrong shape, dtype or device never reaches a kernel: torch.nn refuses it in its own words."""
    ours, theirs = pair(name, device, backend=None)
    for module in (ours, theirs):
        setattr(module, weight, BROKEN[kind](getattr(module, weight)))
    same(ours, theirs, torch.randn(T, B, I, device=device))


ARGUMENTS = [
    *[((), {}), ((3,), {}), ((0, 4), {}), ((-1, 4), {}), ((3, 0), {}), (("3", 4), {}), ((3.0, 4), {}), ((3, "4"), {})],
    *[((3, 4.0), {}), ((None, 4), {}), ((3, 4, 0), {}), ((3, 4), {"num_layers": -1}), ((3, 4), {"num_layers": "2"})],
    *[((3, 4), {"num_layers": n}) for n in (1.5, None)],
    *[((3, 4), {"bias": bias}) for bias in (None, 1, "no")],
    *[((3, 4), {"batch_first": flag}) for flag in (None, 0)],
    *[((3, 4, 2), {"dropout": p}) for p in (-0.1, 1.1, True, "a", None, float("nan"))],
    *[((3, 4), {"dropout": 0.5}), ((3, 4), {"bidirectional": "yes"}), ((3, 4), {"bidirectional": None})],
    *[((3, 4), {"proj_size": n}) for n in (-1, 2, 4, 5, "2")],
    *[((3, 4), {"device": "nowhere"}), ((3, 4), {"dtype": torch.int64}), ((3, 4), {"dtype": "float32"})],
    *[((3, 4), {"unknown": 1}), ((3, 4), {"input_size": 3}), ((3, 4), {"nonlinearity": "relu"})],
    *[((3, 4), {"nonlinearity": "gelu"}), ((3, 4), {"mode": "LSTM"}), ((3, 4, 1, "relu"), {}), ((3, 4, 1, "gelu"), {})],
    *[((3, 4, 1, True, False, 0.0, False, 0, None, None, 1), {}), ((True, 4), {})],
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_constructor_arguments(name, arguments):
    """Constructor arguments of every kind: torch.nn's error or warning, type and text, or a module that looks the same."""
    found = []
    for namespace in (rnnfast, torch.nn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = outcome(getattr(namespace, name), *arguments[0], **arguments[1])
        made = made if isinstance(made, tuple) else (repr(made), [tuple(p.shape) for p in made.parameters()])
        found.append((made, [(w.category, str(w.message)) for w in caught]))
    assert found[0] == found[1]


def test_accepted_containers(device):
    """A list or a named tuple of the LSTM's two states is taken as torch.nn takes it."""
    ours, theirs = pair("LSTM", device)
    x, hx = torch.randn(1, B, I, device=device), states("LSTM", 1, B, H, device=device)
    expected = flat(ours(x, hx))
    close(expected, flat(theirs(x, hx)))
    for other in (list(hx), namedtuple("States", "h c")(*hx)):
        assert equal(flat(ours(x, other)), expected)
    assert equal(flat(ours(hx=hx, input=x)), expected)
