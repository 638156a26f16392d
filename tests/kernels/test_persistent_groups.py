"""Groups on the persistent kernels, all programs of a launch side by side: each member's bits are those that it has alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import triton.language as tl  # noqa: F401 - the interpreter wants it in sight of every jit function
from support.recurrence import UNWRITTEN, Layer, Members, tiles
from support.side_by_side import Fault, Run, together

from rnnfast.kernels import persistent, runtime
from rnnfast.kernels.groups import Group
from rnnfast.kernels.persistent.plan import PersistentPlan

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.skipif(runtime.mode() != "interpreted", reason="runs in Triton's interpreter: TRITON_INTERPRET=1"),
]
KINDS = {  # whether each member runs from the last step to the first
    "two directions": (False, True),
    "2 layers": (False, False),
    "3 layers": (False, False, False),
    "2 layers in reverse": (True, True),
}
T, B = 4, 10  # two batch tiles, the second with masked rows
sweep = pytest.mark.sweep
Results = list[list[torch.Tensor | None]]


def layers_of(kind: str, cell: str, dtype: torch.dtype, H: int, *, T: int = T, B: int = B, marked=False, **options):
    """Layers of other weights, inputs and states each, and if `marked` of other lengths and resets."""
    layers = []
    for m, reverse in enumerate(KINDS[kind]):
        if marked:
            options["lengths"] = [(3 * b + m) % (T + 1) for b in range(B)]
            options["resets"] = torch.arange(T * B).view(T, B) % (m + 3) == 2
        layers.append(Layer(cell, dtype, T, B, H, reverse=reverse, seed=m, **options))
    return layers


def parts(H: int, count: int) -> PersistentPlan:
    """Programs of 8 units and 8 rows, `count` of which share their sums."""
    return PersistentPlan(8, 8, 16, 1, -(-H // 64) * 64, 4, 64, 1 << 20, PARTS=count)


def group_run(layers, N, plan, seed, *, gradient_plan=None, fault=None, **options) -> tuple[Results, Run]:
    """What forward and backward of the group give each member, and what happened."""
    members = Members(layers, N, **options)
    with together(seed, fault) as happened:
        forward = members.forward(persistent, plan)
        backward = members.backward(persistent, gradient_plan or plan, forward)
    return [[*a, *b] for a, b in zip(forward, backward, strict=True)], happened


def alone(layers, plan, gradient_plan=None) -> Results:
    """The same of each layer by itself, all steps in one launch."""
    found = []
    for layer in layers:
        with together(0):
            forward = layer.forward(persistent, plan)
            found.append([*forward, *layer.backward(persistent, gradient_plan or plan, *forward)])
    return found


def assert_same(found: Results, right: Results) -> None:
    for of_member, of_alone in zip(found, right, strict=True):
        for a, b in zip(of_member, of_alone, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (torch.equal(a, b) and not a.isnan().any())


def assert_only_member(m: int, happened: Run) -> None:
    """Who waited in vain: programs of member m, and no others."""
    programs = happened.stuck.partition(": ")[2].split(", program ")
    assert all(f", {m}) at step" in program for program in programs), happened.stuck


def check(layers, chunks, plan, *, gradient_plan=None, seeds=range(1), **options) -> Counter:
    """For every number of steps a chunk and every seed. Returns the launches of the last run, by kernel and grid."""
    right, happened = alone(layers, plan, gradient_plan), Run()
    for N in chunks:
        for seed in seeds:
            found, happened = group_run(layers, N, plan, seed, gradient_plan=gradient_plan, **options)
            assert_same(found, right)
            assert not happened.gave_up
    return Counter(happened.grids)


@pytest.mark.parametrize("kind", ["two directions", "3 layers", *(pytest.param(kind, marks=sweep) for kind in KINDS)])
def test_chunks_and_launches(kind):
    """One step a chunk to more than all: the same bits. A round is one launch and one that clears, all of one grid."""
    layers = layers_of(kind, "rnn_tanh", torch.float16, 32, B=3)
    for N in (1, 3, T, T + 2):
        launches = check(layers, (N,), tiles(32, block_h=16), seeds=range(N, N + 1))
        M = len(layers)
        rounds = -(-T // N) + (0 if kind == "two directions" else M - 1)
        kernels = Counter({name: 0 for name, _ in launches})
        for (name, grid), count in launches.items():
            kernels[name] += count
            assert grid[2] == M and (name == "clear_kernel" or grid == (2, 1, M))
        assert kernels == {
            "clear_kernel": 2 * rounds,
            "persistent_forward_kernel": rounds,
            "persistent_backward_kernel": rounds,
        }


CASES = [
    # cell, dtype, H, kind, marked
    ("lstm", torch.float32, 29, "two directions", True),
    ("gru", torch.float16, 32, "two directions", False),
    ("rnn_relu", torch.bfloat16, 29, "3 layers", False),
    ("lstm", torch.float16, 32, "2 layers", True),
    ("rnn_tanh", torch.float16, 32, "2 layers in reverse", True),
    *(
        pytest.param(cell, dtype, H, kind, marked, marks=sweep)
        for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for H in (29, 32)
        for kind in ("two directions", "3 layers")
        for marked in (False, True)
    ),
]


@pytest.mark.parametrize(("cell", "dtype", "H", "kind", "marked"), CASES)
def test_members_are_as_alone(cell, dtype, H, kind, marked):
    """Two batch tiles; padded H; lengths and resets that differ from member to member; two schedules."""
    check(layers_of(kind, cell, dtype, H, marked=marked, dcs=marked), (3,), tiles(H, block_h=16), seeds=range(2))


@sweep
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("kind", ["two directions", "3 layers"])
def test_any_schedule(kind, marked):
    """200 schedules."""
    check(layers_of(kind, "lstm", torch.float16, 32, B=3, marked=marked), (2,), tiles(32, block_h=16), seeds=range(200))


@pytest.mark.parametrize(
    ("cell", "kind", "marked"),
    [
        ("lstm", "two directions", False),
        pytest.param("gru", "2 layers", True, marks=sweep),
        pytest.param("rnn_tanh", "3 layers", False, marks=sweep),
    ],
)
def test_parts(cell, kind, marked):
    """Programs that share their units' sums: those of a member share them with one another only."""
    layers = layers_of(kind, cell, torch.float16, 64, B=3, marked=marked)
    check(layers, (2,), tiles(64, block_h=16), gradient_plan=parts(64, 2))


OPTIONS = [
    {"h0": False, "bias": False, "dy": False},
    pytest.param({"h0": False, "marked": True, "starts": False}, marks=sweep),
    pytest.param({"dcs": True}, marks=sweep),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["two directions", pytest.param("2 layers", marks=sweep)])
def test_optional_inputs(kind, options):
    check(layers_of(kind, "lstm", torch.float16, 32, B=3, **options), (3,), tiles(32, block_h=16))


@pytest.mark.parametrize("kind", ["2 layers", pytest.param("two directions", marks=sweep)])
def test_batch_in_several_launches(kind):
    """Of all members, one batch tile after another, the first launch the largest; backward given what is saved by the chunk."""
    plan = replace(tiles(32, block_h=16), programs=4)
    assert [grid for grid, _ in plan.launches(20, 2)] == [(2, 1, 2)] * 3
    assert [grid for grid, _ in replace(plan, programs=9).launches(20, 2)] == [(2, 2, 2), (2, 1, 2)]
    launches = check(layers_of(kind, "gru", torch.float16, 32), (3,), plan, by_chunk=True)
    rounds = 3 if kind == "2 layers" else 2
    assert launches["persistent_forward_kernel", (2, 1, 2)] == 2 * rounds
    assert launches["clear_kernel", (1, 1, 2)] == 2 * rounds


@pytest.mark.parametrize("kind", ["two directions", "2 layers"])
@pytest.mark.parametrize("marked", [False, pytest.param(True, marks=sweep)])
def test_inference(kind, marked):
    """The states are bitwise those of training, and each member keeps one cell state, not T."""
    layers = layers_of(kind, "lstm", torch.float16, 32, B=3, marked=marked)
    with together(3):
        found = Members(layers, 3).forward(persistent, tiles(32, block_h=16), training=False)
        alone = [layer.forward(persistent, tiles(32, block_h=16), training=False) for layer in layers]
        trained = [layer.forward(persistent, tiles(32, block_h=16)) for layer in layers]
    for (h, c, _), (h_alone, c_alone, _), (h_trained, *_) in zip(found, alone, trained, strict=True):
        assert torch.equal(h, h_trained) and torch.equal(h, h_alone) and torch.equal(c, c_alone)


def test_clears_only_what_it_runs():
    """The rows of the chunk's steps, of each direction its own columns: member 0 runs steps 1 and 2, member 1 steps 3 and 2."""
    layer = Layer("rnn_tanh", torch.float32, 5, 2, 32)
    h = torch.full((5, 2, 64), UNWRITTEN)
    with together(12):
        persistent.forward(
            layer.cell, lambda: [(1, 2, torch.cat([layer.x[2:4], layer.x[1:3]]), 2)], torch.stack([layer.w] * 2),
            None, None, None, None, h, None, None,
            group=Group(2, 2, flips=2), precision="ieee", plan=tiles(32),
        )  # fmt: skip
    written = h != UNWRITTEN
    for steps, columns in (((1, 2), slice(32)), ((2, 3), slice(32, 64))):
        for t in range(5):
            assert written[t, :, columns].all() if t in steps else not written[t, :, columns].any()


FAULTS = [
    "skipped word",
    "misplaced store",
    *(pytest.param(kind, marks=sweep) for kind in ("skipped store", "missing", "weak store")),
]


@pytest.mark.parametrize("kind", ["two directions", "2 layers"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_member(kind, fault):
    """One program of the second member publishes nothing, one word too few, only after the launch, or into the words of the
    first member. Only programs of its own member hang, and give up. The first member is right, unless it read such a word."""
    H, dtype = 32, torch.float16
    layers = layers_of(kind, "rnn_tanh", dtype, H, B=3)
    to_the_first = H * dtype.itemsize if kind == "two directions" else T * 3 * H * dtype.itemsize
    plan = tiles(H, block_h=16)
    right = alone(layers, plan)
    N, step = (T, 1) if kind == "two directions" else (2, 0)  # in a launch that runs both
    with together(1, Fault(fault, (1, 0, 1), step=step, back=to_the_first)) as happened:
        first, second = Members(layers, N).forward(persistent, plan)
    assert "forward of rnn_tanh" in happened.gave_up
    assert_only_member(1, happened)
    assert second[0].isnan().any()
    assert fault == "misplaced store" or torch.equal(first[0], right[0][0])


@pytest.mark.parametrize("marked", [False, pytest.param(True, marks=sweep)])
def test_launches_after_one_that_gave_up(marked):
    """Members that had not begun go on too, and none waits long: all is NaN that depends on a lost word."""
    layers = layers_of("3 layers", "lstm", torch.float16, 32, B=3, marked=marked)
    plan, fault = tiles(32, block_h=16), Fault("skipped store", (1, 0, 0), step=0)
    with together(1, fault) as happened:
        forward = Members(layers, 2).forward(persistent, plan)
    assert happened.gave_up and happened.switches < 3000
    assert forward[0][0].isnan().any()


def test_a_fault_in_backward():
    """In the exchange of sums too, only programs of the faulty member wait in vain."""
    layers, plan = layers_of("two directions", "gru", torch.float16, 64, B=3), tiles(64, block_h=16)
    members = Members(layers, T)
    with together(0):
        forward = members.forward(persistent, plan)
        right = members.backward(persistent, parts(64, 2), forward)
    with together(2, Fault("skipped word", (2, 0, 1), step=1, within="_exchange_sums")) as happened:
        first, second = members.backward(persistent, parts(64, 2), forward)
    assert "backward of gru" in happened.gave_up
    assert_only_member(1, happened)
    assert second[0].isnan().any()
    assert_same([list(first)], [list(right[0])])
