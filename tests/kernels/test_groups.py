"""Groups: the schedule of a call's launches, and members of the step kernels bit by bit as alone."""

import itertools

import pytest
import torch
from support import recurrence
from support.recurrence import Layer, Members, steps_of

from rnnfast.kernels import runtime, step
from rnnfast.kernels.cells import CELLS
from rnnfast.kernels.groups import Group
from rnnfast.kernels.runtime import Launcher

pytestmark = pytest.mark.numerical

KINDS = {  # whether each member runs from the last step to the first
    "two directions": (False, True),
    "two directions, the reverse one first": (True, False),
    "2 layers": (False,) * 2,
    "3 layers": (False,) * 3,
    "6 layers": (False,) * 6,
    "3 layers in reverse": (True,) * 3,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
T, B, H = 5, 3, 9
interpreted = pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1")


def some(*chosen):
    """For `pytest.mark.parametrize`: each value of the rest is in the sweep alone, the chosen ones run by default."""
    return lambda *rest: [*chosen, *(pytest.param(*each, marks=pytest.mark.sweep) for each in rest if each not in chosen)]


def layers_of(kind: str, cell: str, dtype: torch.dtype, T: int = T, H: int = H, marked: bool = False, **options) -> list[Layer]:
    """Layers of other weights, inputs and states each, and if `marked` of other lengths and resets."""
    layers = []
    for m, reverse in enumerate(KINDS[kind]):
        marks = {}
        if marked:
            marks["lengths"] = [T - m % 2, (m + 2) % (T + 1), 0 if m % 3 else T]
            marks["resets"] = torch.arange(T * B).view(T, B) % (m + 3) == 2
        layers.append(Layer(cell, dtype, T, B, H, reverse=reverse, seed=m, **marks, **options))
    return layers


def assert_as_alone(layers: list[Layer], *chunks: int, **options) -> None:
    plan = steps_of(layers[0].shape[2], layers[0].w.dtype)
    recurrence.assert_as_alone(step, plan, layers, *chunks, **options)


@pytest.mark.parametrize("N", [1, 32, 512])
@pytest.mark.parametrize("T", [1, 7, 512])
@pytest.mark.parametrize("members, directions", [(1, 1), (2, 2), (2, 1), (6, 1)])
def test_schedule(members, directions, T, N):
    """Each member runs each position once, in order; in a pipeline one launch after the member whose results it takes: forward
    the one before, backward the one after. There are as many launches and steps as docs/kernels.md says."""
    lag = N if members > directions else 0
    group = Group(members, directions, lag=lag)
    chunks = -(-T // N)
    for backward in (False, True):
        ran: list[list[int]] = [[] for _ in range(members)]  # for each position of a member, the launch
        steps, launches = 0, 0
        for begin in group.begins(T, N, backward):
            most = 0
            for m, of_member in enumerate(ran):
                first = begin + m * (lag if backward else -lag)
                assert (0 <= first < T and first == len(of_member)) or first < 0 or len(of_member) == T
                of_member += [launches] * max(0, min(N, T - first) if first >= 0 else 0)
                most = max(most, of_member.count(launches))
            assert group.steps(begin, N, T, backward) == most
            steps, launches = steps + most, launches + 1
        assert [len(of_member) for of_member in ran] == [T] * members
        if lag:
            order = ran[::-1] if backward else ran
            assert all([launch + 1 for launch in order[m]] == order[m + 1] for m in range(members - 1))
        assert launches == chunks + (members - 1 if lag else 0)
        assert steps == (launches * T if chunks == 1 else T + (launches - chunks) * N)


@interpreted
@pytest.mark.parametrize("kind, T, N, count", [("two directions", 4, 3, 4), ("3 layers", 4, 3, 10), ("6 layers", 1, 2, 6)])
def test_one_launch_a_step(kind, T, N, count, monkeypatch):
    """One launch for a step of all members, none where no member has a step, all of them on one grid."""
    launches, bind = [], Launcher.bind

    def watched(self, grid, *args):
        launch, plain = bind(self, grid, *args)
        return lambda *args: (launches.append((self.kernel.__name__, grid)), launch(*args)), plain

    monkeypatch.setattr(Launcher, "bind", watched)
    layers = layers_of(kind, "gru", torch.float32, T)
    members = Members(layers, N)
    plan = steps_of(H, torch.float32)
    members.backward(step, plan, members.forward(step, plan))
    grid = (1, 1, len(layers))
    assert launches == [("forward_step_kernel", grid)] * count + [("backward_step_kernel", grid)] * count


@interpreted
@pytest.mark.parametrize(
    "kind, N, marked",
    some(
        ("two directions", 3, True), ("two directions, the reverse one first", T, False), ("2 layers", T + 2, False),
        ("3 layers", 1, False), ("3 layers", 3, True), ("3 layers in reverse", 3, True), ("6 layers", 2, False),
    )(*itertools.product(KINDS, (1, 2, 3, T, T + 2), (False, True))),
)  # fmt: skip
def test_kinds(kind, N, marked):
    """Every kind of group, in chunks of one step to more than all. NaN fills what a chunk has beyond a member's steps."""
    assert_as_alone(layers_of(kind, "lstm", torch.float32, marked=marked), N)


@interpreted
@pytest.mark.parametrize(
    "cell, dtype, kind, marked",
    some(
        ("lstm", torch.float16, "two directions", False), ("gru", torch.float32, "3 layers", False),
        ("gru", torch.bfloat16, "two directions", True), ("rnn_tanh", torch.float16, "3 layers", True),
        ("rnn_relu", torch.float32, "two directions", False),
    )(*itertools.product(CELLS, DTYPES, ("two directions", "3 layers"), (False, True))),
)  # fmt: skip
def test_cells(cell, dtype, kind, marked):
    """Every cell in every dtype."""
    assert_as_alone(layers_of(kind, cell, dtype, marked=marked), 2)


@interpreted
@pytest.mark.parametrize(
    "cell, kind, T, H",
    some(
        ("lstm", "two directions", 1, 1), ("gru", "2 layers", 1, 16), ("lstm", "two directions", 2, 17)
    )(*itertools.product(("lstm", "gru"), ("two directions", "2 layers"), (1, 4), (1, 16, 17, 33))),
)  # fmt: skip
def test_sizes(cell, kind, T, H):
    """A single step; rows on 16 bytes and not, one unit, several tiles of units."""
    assert_as_alone(layers_of(kind, cell, torch.float16, T, H), 2)


OPTIONS = {
    "no states, no dy": {"h0": False, "dy": False},
    "no biases": {"bias": False},
    "gradients of all cell states": {"dcs": True},
    "marked from zeros, gradients of all cell states": {"dcs": True, "marked": True, "h0": False},
    "marked, no dy, no gradients of the states": {"marked": True, "starts": False, "dy": False},
}


@interpreted
@pytest.mark.parametrize(
    "options, cell, kind",
    some(
        ("no states, no dy", "lstm", "3 layers"), ("no biases", "gru", "two directions"),
        ("gradients of all cell states", "lstm", "two directions"),
        ("marked, no dy, no gradients of the states", "gru", "3 layers"),
        ("marked from zeros, gradients of all cell states", "lstm", "3 layers"),
    )(*itertools.product(OPTIONS, ("lstm", "gru"), ("two directions", "3 layers"))),
)  # fmt: skip
def test_options(options, cell, kind):
    """Without initial states, biases and gradients of the outputs; with a gradient of all cell states."""
    assert_as_alone(layers_of(kind, cell, torch.float32, **OPTIONS[options]), 2)


@interpreted
@pytest.mark.parametrize(
    "kind, marked, N, gradient_N",
    some(
        ("two directions", False, 2, 3), ("3 layers", False, 3, 2), ("3 layers in reverse", True, T, 1)
    )(*((*each, *Ns) for *each, Ns in itertools.product(
        ("two directions", "3 layers", "3 layers in reverse"), (False, True), ((2, 3), (3, 2), (2, T), (T, 1))
    ))),
)  # fmt: skip
def test_saved_by_chunk(kind, marked, N, gradient_N):
    """Backward given what is saved a chunk at a time, in chunks of its own length."""
    assert_as_alone(layers_of(kind, "lstm", torch.float32, marked=marked), N, gradient_N, by_chunk=True)
