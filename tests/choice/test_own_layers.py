"""The decision on a call of a cell of one's own, of which PyTorch has no layer."""

import warnings

import pytest
import torch

import rnnfast
from rnnfast import reference
from rnnfast.choice import kernel_plan, obstacles, pipeline
from rnnfast.choice.decide import decide, tell
from rnnfast.choice.gpu import pretend_gpu
from rnnfast.choice.obstacles import FallbackWarning
from rnnfast.kernels.families import FAMILIES
from rnnfast.kernels.persistent.limits import GPUS

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


def test_a_call_of_it_is_not_watched(able, cudnn_benchmark):
    """So that nothing measures it."""
    cudnn_benchmark(True)
    assert not decided(None).watched and decide(None, "cpu", None, torch.float32).watched


# The kernels

NAMES = {
    "diagonal": reference.Cell(None, states=2, gates=4, saved=4, grads=4, held=4, recurrent=False),
    "wide": reference.Cell(None, states=4, gates=5, saved=6, grads=7, held=1, noise=2, kept32=1),
    "rows": reference.Cell(None, states=1, gates=1, saved=2, grads=1, rows=True),
}


@pytest.fixture
def cells(monkeypatch):
    """Cells whose kernels nobody runs."""
    for name, cell in NAMES.items():
        monkeypatch.setitem(reference.CELLS, name, cell)


def picked(cell, members=2, T=1000, **options):
    sizes = cell, T, 16, 128, torch.float16, "half"
    return [kernel_plan.pick(*sizes, back, True, torch.device("cpu"), members=members, **options) for back in (False, True)]


@pytest.mark.parametrize("family", kernel_plan.FAMILIES)
def test_any_cell_has_kernels(cells, family, monkeypatch):
    """Those of the family asked for if it runs the cell, else those for any size, which then say why."""
    monkeypatch.setenv("RNNFAST_KERNELS", family)
    monkeypatch.setenv("RNNFAST_CANARY", "trust")
    with pretend_gpu(GPUS["H100"]):
        for name, cell in NAMES.items():
            for marked in (False, True):
                for choice in picked(name, marked=marked):
                    refusal = family != "auto" and FAMILIES[family].refusal(cell.recurrent, cell.rows)
                    if refusal:
                        assert (choice.family, choice.wanted) == ("step" if cell.recurrent else "scan", family)
                        assert choice.reason == refusal
                    assert not FAMILIES[choice.family].refusal(cell.recurrent, cell.rows)
                    assert choice.family == family or refusal or family == "auto" or choice.reason
    assert picked("diagonal", 9, layers=True)[0].family == "scan"


def test_what_a_cell_keeps_beyond_an_lstm(cells):
    assert pipeline.sizes_of("lstm", 16, 128, 2, "half", False) == pipeline.Sizes(4, 16, 128, 2, "half", False)
    wide = pipeline.sizes_of("wide", 16, 128, 2, "half", True, True)
    assert wide == pipeline.Sizes(
        5, 16, 128, 2, "half", True, True, extra=3 + 3 + 2 + 1
    )  # states, held and noise, saved, gates
    assert pipeline.sizes_of("diagonal", 1, 1, 2, "half", False)[7:] == (4, False, False)


def test_a_refused_launch_runs_the_kernels_for_any_size(cells, monkeypatch):
    """And where the scan kernels are those, they are not launched again."""
    choice = picked("diagonal")[0]
    assert choice.without("no").family == "scan" and picked("wide")[0].without("no").family == "step"

    def refuse(plan):
        raise RuntimeError("Triton Error [CUDA]: invalid argument")

    monkeypatch.setattr("rnnfast.kernels.scan.forward", refuse)
    with pytest.raises(RuntimeError, match="invalid argument"):
        kernel_plan.run("forward", choice, torch.device("cpu"))


@pytest.mark.parametrize(
    ("right", "able"),
    [
        ((), ()),
        (("step",), ("diagonal", "wide", "rows")),
        (("persistent",), ("wide",)),
        (("one_program",), ("wide", "rows")),
    ],
)
def test_a_family_that_the_canary_found_right_runs_cells_of_ones_own(cells, right, able, monkeypatch):
    monkeypatch.setattr("rnnfast.choice.trust.trusted", lambda device: right)
    monkeypatch.setattr("rnnfast.choice.trust.words", lambda limits: "not checked")
    x = torch.zeros(1, dtype=torch.float16)
    with pretend_gpu(GPUS["H100"]):
        for name in NAMES:
            assert kernel_plan.unchecked(name, x) == ("" if name in able else "not checked")
            assert not kernel_plan.unchecked(name, x.double())
        monkeypatch.setenv("RNNFAST_KERNELS", "step")
        assert not kernel_plan.unchecked("wide", x)
    assert not kernel_plan.unchecked("wide", x)  # a CPU needs no check


def test_kernels_that_are_not_checked_run_if_asked_for(able):
    for asked, kernels in ((None, False), ("triton", able)):
        chosen = decided(asked, torch_wins="not checked")
        assert chosen.runner == ("kernels" if kernels else "equations")
        assert chosen.torch_wins == ("not checked" if able and not asked else "")
