"""How many launches, rounds and steps a group takes: counted, and for long sequences not run."""

import math

import pytest
import torch
from support.groups import Stack, running
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast.kernels import step
from rnnfast.kernels.runtime import Launcher
from rnnfast.ops import recurrence, rounds


class Launches:
    """Counts launches of the step kernels in place of running them, and the rounds of each call of a family."""

    def __init__(self, monkeypatch):
        self.steps: list[str] = []
        self.rounds: list[int] = []

        def bind(launcher, grid, *args):
            return (lambda *args: self.steps.append(launcher.kernel.__name__)), args

        def counted(run):
            def called(cell, given, *args, **options):
                taken = []

                def pairs():
                    for each in given():
                        taken.append(each)
                        yield each

                run(cell, pairs, *args, **options)
                self.rounds.append(len(taken))

            return called

        monkeypatch.setattr(Launcher, "bind", bind)
        monkeypatch.setattr("rnnfast.kernels.recompute.compute", lambda *args: None)
        for name in ("forward", "backward"):
            monkeypatch.setattr(step, name, counted(getattr(step, name)))

    def take(self, kernel):
        """Launches and rounds since the last call, of this kernel alone."""
        assert set(self.steps) == {f"{kernel}_step_kernel"}
        found = len(self.steps), list(self.rounds)
        self.steps.clear()
        self.rounds.clear()
        return found


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch)


def both(stack, launches, device):
    """Launches and rounds of forward and of backward."""
    tensors = stack.tensors(device)
    y, *_ = stack.on_kernels(tensors)
    forward = launches.take("forward")
    torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y), allow_unused=True)
    return forward, launches.take("backward")


@pytest.mark.parametrize("N", [1, 32, "T"])
@pytest.mark.parametrize("T", [1, 7, 512])
@pytest.mark.parametrize("L", [1, 2, 6])
def test_layers(L, T, N, device, launches):
    """T + (L - 1) N launches of a step in ceil(T / N) + L - 1 rounds, where layers one after another take L T."""
    N = min(T, T if N == "T" else N)
    with running(N):
        found = both(Stack("rnn_tanh", L, T=T, B=1, H=2, states=False), launches, device)
    for steps, rounds_of_calls in found:
        assert steps == T + (L - 1) * N
        assert L == 1 or rounds_of_calls == [math.ceil(T / N) + L - 1]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("T", [1, 7, 512])
def test_directions(T, cell, device, launches):
    """T launches for both directions, where one after the other takes 2 T."""
    for members, expected in ((2, T), (1, 2 * T)):
        with running(members=members):
            found = both(Stack(cell, directions=2, T=T, B=1, H=2), launches, device)
        assert [steps for steps, _ in found] == [expected] * 2


@pytest.mark.parametrize("members, expected", [(6, 7 + 5 * 2), (4, (7 + 3 * 2) + (7 + 2)), (2, 3 * (7 + 2)), (1, 6 * 7)])
def test_parts(members, expected, device, launches):
    """Six layers in chunks of two steps, in parts of so many layers: each part takes T + (its layers - 1) N."""
    with running(2, members):
        found = both(Stack("gru", 6, T=7), launches, device)
    assert [steps for steps, _ in found] == [expected] * 2


@pytest.mark.parametrize("layers, directions", [(3, 1), (1, 2)])
def test_layers_of_two_directions_and_others(layers, directions, device, launches):
    """A module: one pipeline for a stack of one direction; a group for each layer of two."""
    T = 4
    module = rnnfast.LSTM(3, 2, layers + 1, bidirectional=directions == 2, device=device, backend="triton")
    with running(2):
        output, _ = module(torch.randn(T, 1, 3, device=device))
        expected = T + layers * 2 if directions == 1 else 2 * T
        assert launches.take("forward")[0] == expected
        output.sum().backward()
        assert launches.take("backward")[0] == expected


class Work(TorchDispatchMode):
    """The operators of PyTorch that do work on a GPU: no views and no empty tensors."""

    FREE = ("view", "as_strided", "slice", "select", "expand", "reshape", "unsqueeze", "transpose", "t", "new_empty")

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").strip("_")
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_work_of_a_round(dropout, device, launches, monkeypatch):
    """Forward, a round of a pipeline: one product for all layers but the first, which has one for several rounds. Backward: one
    product, and a copy of the last layer's gradient. With dropout one kernel more."""
    dropped = []
    monkeypatch.setattr("rnnfast.kernels.dropout.apply", lambda *args, **options: dropped.append(args))
    T, N, L, ahead = 8, 2, 3, 2
    stack = Stack("lstm", L, T=T, dropout=dropout)
    monkeypatch.setattr(recurrence, "CHUNK_ROWS", ahead * N * stack.B)
    tensors, count = stack.tensors(device), T // N + L - 1

    def taken(call, name):
        inner, work = getattr(rounds, name).chunk, Work()

        def chunk(self, *args):
            with work:
                return inner(self, *args)

        monkeypatch.setattr(getattr(rounds, name), "chunk", chunk)
        return call(), work.names

    with running(N):
        (y, *_), forward = taken(lambda: stack.on_kernels(tensors), "Sides")
        assert sorted(forward) == ["bmm"] * (count - 1) + ["mm"] * (T // N // ahead)
        assert len(dropped) == (count - 1) * bool(dropout)
        dropped.clear()
        call = lambda: torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y), allow_unused=True)  # noqa: E731
        _, backward = taken(call, "Upstream")
        assert sorted(backward) == ["bmm"] * (count - 1) + ["copy"] * (T // N) + ["new_zeros"]
