"""Models around a layer: KernelBench's problems 35 to 42, and lengths; and what others have published of them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.floor import work as floors
from benchmarks.floor.published import PUBLISHED, SOURCES
from benchmarks.timing.cases import MODELS, Case, named_set
from benchmarks.timing.problem import Problem
from benchmarks.timing.providers import BASE, all_providers, named_provider

pytestmark = [pytest.mark.numerical, pytest.mark.same_everywhere]

NAMES = [name for name in MODELS if name]
LSTMS, BOTH_WAYS = ("lengths", "kb35", "kb36", "kb37", "kb38"), ("kb38", "kb41", "kb42")


def small(name: str, mode: str = "training") -> Case:
    """Three layers, in place of six, at sizes of which no two are the same."""
    cell, directions = "LSTM" if name in LSTMS else "GRU", 2 if name in BOTH_WAYS else 1
    return Case(cell, 5, 3, 4, 6, 3, directions, "float32", mode, model=name)


def by_hand(problem: Problem, name: str) -> tuple[torch.Tensor, ...]:
    """What the model returns, by torch.nn's own calls."""
    case, weights = problem.case, problem.weights
    first = name in ("kb35", "kb36", "kb37", "kb38")
    layer = getattr(torch.nn, case.cell)(4, 6, 3, batch_first=first, bidirectional=case.directions == 2)
    layer.load_state_dict({key[len("layer.") :]: value for key, value in weights.items() if key.startswith("layer.")})
    if name == "lengths":
        lengths = torch.tensor([5, 3, 1])
        packed, (h_n, c_n) = layer(pack_padded_sequence(problem.x, lengths))
        return pad_packed_sequence(packed)[0], h_n, c_n
    h0, *c0 = problem.states
    y, last = layer(problem.x, (h0, *c0) if c0 else h0)
    if name in ("kb35", "kb38"):
        return (torch.nn.functional.linear(y[:, 4], weights["last.weight"], weights["last.bias"]),)
    return ({"kb36": last[0], "kb37": last[1], "kb39": y, "kb40": last, "kb41": y, "kb42": last}[name],)


@pytest.mark.parametrize("name", NAMES)
def test_models(name):
    """torch.nn in the model gives what the same calls give by hand, from states that are not zero."""
    problem = Problem(small(name), "cpu")
    assert problem.x.shape[:2] == ((3, 5) if MODELS[name].batch_first else (5, 3))
    found = named_provider(BASE).ready(problem).outputs(problem.x)
    expected = by_hand(problem, name)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in problem.upstream]
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("name", NAMES)
def test_ours_in_models(name):
    """PyTorch's own layer in ours gives what torch.nn gives, and all gradients."""
    problem = Problem(small(name), "cpu")
    assert problem.check(named_provider("rnnfast-torch").ready(problem))["worst"] <= 1
    assert problem.answers()[1] == "", "against the reference"


@pytest.mark.parametrize("name", ["kb37", "kb42", "lengths"])
def test_kernels_in_models(name, device):
    case = dataclasses.replace(small(name), T=3, layers=2)
    problem, provider = Problem(case, device), named_provider("rnnfast-step")
    with provider.settings():
        ready = provider.ready(problem)
        assert "torch" not in ready.note and problem.check(ready)["worst"] <= 1


@pytest.mark.parametrize("name", NAMES)
def test_another_model_is_found(name):
    """Zero states, or full lengths, in place of those of the case are no right result."""
    problem = Problem(small(name, "inference"), "cpu")
    ready = named_provider("rnnfast-torch").ready(problem)
    if name == "lengths":
        ready.forward.lengths.fill_(5)
    else:
        ready.forward.states = tuple(map(torch.zeros_like, problem.states))
    assert problem.check(ready)["worst"] > 1


def test_who_runs_models():
    """torch.nn and ours. The others say why not."""
    for name, provider in all_providers().items():
        if not name.startswith(("torch.nn", "rnnfast")):
            assert provider.obstacle(dataclasses.replace(small("kb39"), T=2, layers=1), "cpu")


def test_bad_models():
    for changes in ({"model": "kb34"}, {"packed": True}, {"cell": "GRU", "model": "kb37"}):
        with pytest.raises(ValueError, match="kb3"):
            dataclasses.replace(small("kb35"), **changes)
    old = {name: value for name, value in small("kb35").as_dict().items() if name != "model"}
    assert Case(**json.loads(json.dumps(old))).model == "", "of a file of results from before there were models"


def test_kernelbench_set():
    """All eight problems, forward and training, at KernelBench's sizes."""
    found = named_set("kernelbench", "cuda")
    assert {(case.model, case.mode) for case in found} == {
        (name, mode) for name in NAMES if name.startswith("kb") for mode in ("inference", "training")
    }
    for case in found:
        assert (case.T, case.B, case.I, case.H, case.layers, case.dtype) == (512, 10, 128, 256, 6, "tf32")
        assert (case.cell, case.directions) == (small(case.model).cell, small(case.model).directions)


def test_what_a_model_does_not_return_need_not_be_moved():
    case = dataclasses.replace(small("kb40"), B=256, H=1024)
    moved = floors.work(dataclasses.replace(case, model="kb39")).bytes - floors.work(case).bytes
    assert moved == 2 * 5 * 256 * 1024 * 4  # y, and dy in backward


def test_published():
    """Of each KernelBench problem on five kinds of GPU, and each with a source that names a commit or a thread."""
    of = {name: [one for one in PUBLISHED if one.case.model == name] for name in NAMES}
    for name in NAMES:
        if name.startswith("kb"):
            kinds = {one.gpu.partition(" (")[0].removesuffix(" 40 GB").removesuffix(" 80 GB") for one in of[name]}
            assert kinds == {"H100 SXM", "H100 PCIe", "A100", "B200", "L40S"}
            assert all(one.case.mode == "inference" and 10_000 < one.us_per_step * 512 < 130_000 for one in of[name])
    h100 = next(one for one in of["kb35"] if one.gpu == "H100 SXM (Together)")
    assert h100.us_per_step * 512 == pytest.approx(16_900)
    for one in PUBLISHED:
        assert (one.us_per_step is None) == (one.case.model == "lengths") == (one.times_padded is not None)
    assert all("github.com" in text or "arXiv" in text or "mlr.press" in text for text in SOURCES.values())
    assert {one.source for one in PUBLISHED} == set(SOURCES.values())
