"""The decision on a call of a cell of one's own, of which PyTorch has no layer."""

import warnings

import pytest
import torch

import rnnfast
from rnnfast.choice import obstacles
from rnnfast.choice.decide import decide, tell
from rnnfast.choice.obstacles import FallbackWarning

OWN = "PyTorch has no layer of the cell `mine`"
NOT_FUSED = "cell `mine` (mine.py:3), line 4: a matrix product"
ON_CPU = "the tensors are on the CPU"


@pytest.fixture(params=["able", "cpu"])
def able(request, monkeypatch):
    """Whether the kernels can run on this device, apart from what the cell is."""
    monkeypatch.setitem(obstacles.known, "triton", None)
    monkeypatch.setitem(obstacles.known, "cpu:None", None if request.param == "able" else ON_CPU)
    monkeypatch.setattr("rnnfast.choice.decide._told", set())
    return request.param == "able"


def decided(asked, obstacle="", **facts):
    return decide(asked, "cpu", None, torch.float32, own_layer=OWN, obstacle=obstacle, **facts)


def told(chosen):
    """The texts of the warnings of two calls."""
    with pytest.warns() as found:
        for _ in range(2):
            if chosen.gives_way:
                tell(chosen.asked, chosen.asked_by, chosen.gives_way, OWN, chosen.unfused)
        warnings.warn("end", UserWarning, stacklevel=1)
    return [str(each.message) for each in found if each.category is FallbackWarning]


@pytest.mark.parametrize("asked", [None, "auto", "triton", "torch", "reference"])
@pytest.mark.parametrize("options", [(), ("lengths", "return_gates")])
def test_the_equations_take_the_place_of_torchs_layer(able, asked, options):
    chosen = decided(asked, options=options)
    kernels = able and asked in (None, "auto", "triton")
    assert (chosen.backend, chosen.runner) == (("triton", "kernels") if kernels else ("reference", "equations"))
    assert chosen.obstacles == (() if able else (ON_CPU,)) and not chosen.refusal and not chosen.torch_wins
    assert chosen.stands_in == ("" if kernels or asked == "reference" else OWN)
    warned = asked == "triton" and not able
    assert (
        told(chosen) == [f"'triton' was asked for by backend=, but the equations run in plain PyTorch: {ON_CPU}"] * 2 * warned
    )


@pytest.mark.parametrize("asked", [None, "triton", "torch", "reference"])
def test_a_cell_without_kernels_is_warned_of_once(able, asked):
    chosen = decided(asked, NOT_FUSED)
    assert (chosen.backend, chosen.runner, chosen.unfused) == ("reference", "equations", NOT_FUSED)
    assert chosen.obstacles == ((NOT_FUSED,) if able else (ON_CPU, NOT_FUSED))
    words = told(chosen)
    assert len(words) == (asked == "triton" or (able and asked is None))
    assert all(text.endswith(NOT_FUSED) and "the equations run in plain PyTorch" in text for text in words)


def test_strict_raises_for_a_cell_without_kernels(able, monkeypatch):
    monkeypatch.setenv("RNNFAST_STRICT", "1")
    for asked in (None, "triton"):
        chosen = decided(asked, NOT_FUSED)
        with pytest.raises(RuntimeError, match=r"'triton' backend cannot run this call: .*a matrix product"):
            tell(chosen.asked, chosen.asked_by, chosen.gives_way, OWN, chosen.unfused)
    for asked in ("torch", "reference"):
        assert not decided(asked, NOT_FUSED).gives_way


def test_other_ways_to_ask(able):
    with rnnfast.use_backend("reference"):
        chosen = decided("triton")
    assert (chosen.backend, chosen.asked_by, chosen.stands_in) == ("reference", "rnnfast.use_backend", "")


def test_a_call_of_it_is_not_watched(able, monkeypatch):
    """So that nothing measures it."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert not decided(None).watched and decide(None, "cpu", None, torch.float32).watched
