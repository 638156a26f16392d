"""How a group of recurrences runs (`rnnfast.kernels.groups`): how many members at once, and the chunk of a pipeline.

A model of time answers both. These are pure functions; nothing here asks a device, and nothing was measured.

A group of M members runs in parts of k members, one part after another, k = ceil(M / parts). A part runs in rounds, and a
round runs at most N time steps:

    directions    ceil(T / N) rounds, T steps
    layers        ceil(T / N) + k - 1 rounds, T + (k - 1) N steps: each layer is a chunk behind the one below

With s microseconds a step of all k members and F microseconds that a round costs besides its steps, a pipeline takes
(T / N + k - 1) (N s + F), which is least at N = sqrt(T F / ((k - 1) s)). The host has such costs of its own, and a round takes
what the GPU or what the host takes, the larger.

The arithmetic of the products W_ih x is left out. It is nearly the same for every way to run a group, and for cuDNN.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from rnnfast.reference import spec_of

if TYPE_CHECKING:
    from rnnfast.kernels.families import Plan
    from rnnfast.kernels.persistent.limits import GpuLimits, NoPlan

__all__ = [
    "CHUNK_ROWS",
    "ROWS",
    "Grouping",
    "Run",
    "Sizes",
    "best",
    "even",
    "fastest",
    "grouping",
    "plan_of",
    "run",
    "sizes_of",
    "step_us",
]

# Time steps x batch rows whose input side is computed by one GEMM, into one float32 buffer: enough to fill a GPU with the GEMM,
# few enough that for H up to 1024 the buffer (4 H floats a row) stays in the L2 of an H100 and never grows with T.
CHUNK_ROWS = 2048
ROWS = 8192  # members x time steps x batch rows of a round at most, so that its buffers do not grow with T


class Grouping(NamedTuple):
    """How the layers and directions of a module are grouped.

    Attributes:
        members: of a group.
        layers: whether they are the layers of a stack, a pipeline.
        calls: groups of the module, which run one after another.
    """

    members: int
    layers: bool
    calls: int


def grouping(layers: int, directions: int, by_layer: bool = False) -> Grouping:
    """The groups of a module: the layers of a stack with one direction, else the directions of each layer.

    Args:
        by_layer: whether each layer has to be a call of its own, as one with a projection does, one whose states are returned,
            and one with dropout inside a transform.
    """
    if directions == 1 and layers > 1 and not by_layer:
        return Grouping(layers, True, 1)
    return Grouping(directions, False, layers)


class Sizes(NamedTuple):
    """What a plan depends on besides the GPU, as in `rnnfast.kernels.persistent.plan.persistent_plan`; and which families run
    the cell, by `recurrent` and `rows` of `rnnfast.kernels.cells.Cell`."""

    gates: int
    B: int
    H: int
    itemsize: int
    precision: str
    backward: bool
    marked: bool = False
    extra: int = 0
    recurrent: bool = True
    rows: bool = False


def sizes_of(
    cell: str, B: int, H: int, itemsize: int, precision: str, backward: bool, marked: bool = False
) -> Sizes:  # fmt: skip
    """The `Sizes` of a cell in `rnnfast.reference.CELLS`, one of a user's own too."""
    spec = spec_of(cell)
    # tiles in float32 that a program keeps in registers beyond those of an LSTM
    extra = max(0, spec.carried - 1) + spec.held + spec.noise + max(0, spec.saved - 4) + max(0, spec.gates - 4)
    return Sizes(spec.gates, B, H, itemsize, precision, backward, marked, extra, spec.recurrent, spec.rows)


@dataclass(frozen=True)
class Run:
    """A way to run a group, and what it is predicted to take in microseconds, all parts together.

    Attributes:
        members: k, that run at once.
        chunk: N, the steps of a round.
        parts: that the group runs in.
        rounds: of one part.
        steps: the time steps, with those by which a pipeline fills and empties.
        starts: of the kernels of a family that runs many steps a launch, and their way to the first step.
        weights: their way from L2 into the kernels of such a family.
        clears: of the exchange, where programs wait for one another.
        products: the input sides of the chunks, or the gradients that go down, without their arithmetic.
        host: by how much the host takes longer than the GPU.
    """

    members: int
    chunk: int
    parts: int
    rounds: int
    steps: float
    starts: float
    weights: float
    clears: float
    products: float
    host: float

    @property
    def terms(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("steps", "starts", "weights", "clears", "products", "host")}

    @property
    def us(self) -> float:
        return sum(self.terms.values())


def plan_of(family: str, sizes: Sizes, members: int, gpu: GpuLimits | None) -> Plan | NoPlan:
    """The family's plan for `members` at once, or why there is none. gpu: None for a CPU, as in `rnnfast.kernels.families`."""
    from rnnfast.kernels.families import FAMILIES
    from rnnfast.kernels.persistent.limits import NoPlan

    refusal = FAMILIES[family].refusal(sizes.recurrent, sizes.rows)
    return NoPlan(refusal) if refusal else FAMILIES[family].plan(*sizes[:6], gpu, sizes.marked, members, sizes.extra)


def step_us(family: str, sizes: Sizes, members: int, gpu: GpuLimits) -> float | None:
    """Predicted microseconds that one time step of `members` at once takes the GPU; None if the family has no plan."""
    from rnnfast.kernels.families import FAMILIES
    from rnnfast.kernels.hardware import gigahertz

    if FAMILIES[family].refusal(sizes.recurrent, sizes.rows):
        return None
    clocks = FAMILIES[family].clocks(*sizes[:6], gpu, sizes.marked, members, sizes.extra)
    return None if clocks is None else clocks / gigahertz(gpu.name) / 1000


def even(T: int, chunk: int) -> int:
    """The chunk of as many rounds as `chunk` makes of T steps, so that the last round is not short."""
    return ceil(T / ceil(T / chunk))


def run(family: str, sizes: Sizes, T: int, members: int, parts: int, layers: bool, gpu: GpuLimits) -> Run | None:
    """The fastest way to run `parts` parts of `members` on a family; None if it has no plan for so many.

    Args:
        T: time steps.
        layers: whether they are the layers of a stack. One layer at once is no pipeline.
    """
    from rnnfast.kernels.families import FAMILIES
    from rnnfast.kernels.hardware import (
        CLEAR,
        L2_BYTES,
        LAUNCH,
        LAUNCH_HOST_US,
        PRODUCT,
        PRODUCT_HOST_US,
        PROLOGUE,
        gigahertz,
    )
    from rnnfast.kernels.persistent.limits import NoPlan

    us = step_us(family, sizes, members, gpu)
    its = FAMILIES[family]
    plan = plan_of(family, sizes, members, gpu)
    if us is None or isinstance(plan, NoPlan):
        return None
    clock = gigahertz(gpu.name) * 1000  # clocks a microsecond
    pipeline = layers and members > 1
    product = (PRODUCT + LAUNCH) / clock
    starts = weights = clears = host_round = 0.0
    if its.many_steps:
        starts = (LAUNCH + PROLOGUE) / clock
        weights = members * sizes.gates * sizes.H * sizes.H * sizes.itemsize / (L2_BYTES * gpu.sms) / clock * its.recurrent
        clears = (CLEAR + LAUNCH) / clock * its.waits
        host_round = LAUNCH_HOST_US * (1 + its.waits)
    fixed = starts + weights + clears
    host_step = 0.0 if its.many_steps else LAUNCH_HOST_US

    def timed(N: int) -> Run:
        chunks = ceil(T / N)
        rounds = chunks + (members - 1 if pipeline else 0)
        steps = T + (members - 1) * N if pipeline else T
        if not pipeline:  # forward each member's input side
            products = 0 if sizes.backward else members * chunks
        elif sizes.backward:  # what goes down, in one product
            products = rounds - 1
        else:  # the layers above in one product; the first layer's for as many chunks as are `CHUNK_ROWS`
            products = rounds - 1 + ceil(chunks / max(1, CHUNK_ROWS // (N * sizes.B)))
        ours = steps * us + rounds * fixed + products * product
        host = steps * host_step + rounds * host_round + products * PRODUCT_HOST_US
        times = parts * rounds
        return Run(
            members, N, parts, rounds, parts * steps * us, times * starts, times * weights, times * clears,
            parts * products * product, parts * max(0.0, host - ours),
        )  # fmt: skip

    if not pipeline:
        most = plan.steps or (T if sizes.backward else max(1, CHUNK_ROWS // (members * sizes.B)))
        return timed(even(T, min(T, most)))
    most = max(1, min(T, plan.steps or T, ROWS // (members * sizes.B)))
    lengths = {even(T, N) for N in _lengths(most)}
    return min(map(timed, sorted(lengths)), key=lambda found: found.us)


def _lengths(most: int) -> Iterator[int]:
    """Chunks to try, up to `most`: each is a twentieth longer than the one before, or one step."""
    chunk = 1
    while chunk < most:
        yield chunk
        chunk += max(1, chunk // 20)
    yield most


def best(family: str, sizes: Sizes, T: int, members: int, layers: bool, gpu: GpuLimits) -> Run | None:
    """The fastest way to run a group on a family; None if it has no plan."""
    found = [
        run(family, sizes, T, at_once, parts, layers, gpu)
        for parts in range(1, members + 1)
        for at_once in (ceil(members / parts),)
        if ceil(members / at_once) == parts  # else the same members at once take fewer parts
    ]
    return min(filter(None, found), key=lambda each: each.us, default=None)


def fastest(
    families: Collection[str], sizes: Sizes, T: int, members: int, layers: bool, gpu: GpuLimits
) -> tuple[str, Run] | None:
    """The family with the least predicted time, and how it runs the group; None if none of them has a plan."""
    found = [(family, best(family, sizes, T, members, layers, gpu)) for family in families]
    able = [(family, its) for family, its in found if its is not None]
    return min(able, key=lambda pair: pair[1].us, default=None)
