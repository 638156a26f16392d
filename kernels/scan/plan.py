"""Plans of the scan kernels, and a model of their time: pure functions from sizes and the limits of a GPU.

The programs know nothing of one another, and there are no weights. So a step takes the longest of three times:

    memory    what all cells read and write: `cell_bytes` each
    issue     the instructions of a cell; those of a few warps wait for one another, those of many take turns
    trip      a load comes AHEAD steps after it was sent, so a step takes at least a trip / AHEAD

A large layer is bound by memory, a small one by the instructions of one cell, one after another. AHEAD is the least with which
a trip takes no longer than the others. Nothing here has been measured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from rnnfast.kernels.hardware import ISSUE, MEMORY_TRIP, memory_clocks
from rnnfast.kernels.persistent.limits import GPUS, GpuLimits

__all__ = ["ScanPlan", "ScanTime", "cell_bytes", "predicted", "scan_clocks", "scan_plan"]

MOST_WARPS = 4  # of a program
PROGRAMS = 16  # of an SM, from which on a program has several warps; an SM holds at most 32
AHEAD_TILES = 48  # registers of a thread for what is loaded ahead: with the cell and the pointers below 255, see docs/scan.md
SIDE_ROWS = 2048  # time steps x batch rows of all members of a forward launch, or more where the input side is still in L2
SIDE_BYTES = 32 << 20  # of that input side, a buffer in float32; an L2 holds 40 MB or more
SECONDS = 0.25  # that a launch may take by the model: a display's watchdog ends a kernel after two
SLOW_CLOCK = 1e9  # hertz, for that: below what any of these GPUs runs at


@dataclass(frozen=True)
class ScanPlan:
    """The whole launch of a scan kernel, for one direction (forward or backward) and any number of members of a group.

    A program runs BLOCK_H units of BLOCK_B batch rows, a unit and row a thread. It loads AHEAD steps before it uses them. At
    most `steps` time steps a launch.
    """

    BLOCK_B: int
    BLOCK_H: int
    AHEAD: int
    num_warps: int
    steps: int

    def grid(self, B: int, H: int, members: int = 1) -> tuple[int, int, int]:
        return -(-B // self.BLOCK_B), -(-H // self.BLOCK_H), members

    def launch_words(self, T: int) -> str:
        return f"one launch for {min(self.steps, T)} time steps"

    def words(self, B: int, members: int = 1) -> str:
        """The plan in words, the same for any batch and any number of members at once."""
        return (
            f"a program runs {self.BLOCK_H} units of {self.BLOCK_B} rows, loads {self.AHEAD} steps ahead, "
            f"{self.num_warps} warp{'s' * (self.num_warps > 1)}"
        )


@dataclass(frozen=True)
class ScanTime:
    """A time step of all cells of a launch, in SM clocks, by each of the three bounds; they overlap."""

    memory: float
    issue: float
    trip: float

    @property
    def total(self) -> float:
        return max(self.memory, self.issue, self.trip)


def cell_bytes(gates: int, saved: int, carried: int, itemsize: int, backward: bool, training: bool = True) -> int:
    """Bytes that a unit of a batch row reads and writes in a step: the floor, to which time over all steps is proportional.

    Forward reads the input side in float32 and writes h, and in training the carried states in float32 and what is saved.
    Backward reads the gradient of h, h, the carried states and what was saved, each once, and writes the gate gradients.
    """
    if backward:
        return itemsize * (2 + saved + gates) + 4 * carried
    return 4 * gates + itemsize + training * (itemsize * saved + 4 * carried)


def instructions_estimate(gates: int, backward: bool, extra: int) -> float:
    """Instructions of a cell in a step, fitted to machine code (docs/scan.md: two cells, float16, sm_90, Triton 3.9). Noise is
    not in it: Philox takes some 90."""
    return (20 if backward else 0) + 20 * gates + 5 * extra


def predicted(
    gates: int, B: int, H: int, itemsize: int, backward: bool, limits: GpuLimits, ahead: int, members: int = 1, extra: int = 0
) -> ScanTime:
    """The predicted time of a step of all members. A cell is taken to save as many tiles as it has gates, none with one, and to
    carry a state from three gates on."""
    saved, carried = (gates if gates > 1 else 0), int(gates >= 3)
    cells = B * H * members
    warps = cells / 32 / limits.sms / 4  # that share a scheduler, if all were resident
    return ScanTime(
        memory=memory_clocks(cells * cell_bytes(gates, saved, carried, itemsize, backward), limits.name),
        issue=max(ISSUE, warps) * instructions_estimate(gates, backward, extra),
        trip=MEMORY_TRIP / ahead,
    )


def block(B: int, H: int, threads: int) -> tuple[int, int]:
    """Batch rows and units of a program, powers of two, so that few threads have nothing to do; of equals, the most units, as
    those lie side by side in memory."""
    shapes = [(threads // units, units) for units in (16 << n for n in range(4)) if units <= threads]
    return min(reversed(shapes), key=lambda shape: -(-B // shape[0]) * -(-H // shape[1]))


@functools.lru_cache(maxsize=1024)  # asked at every call of a layer
def scan_plan(
    gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, limits: GpuLimits | None, marked: bool = False,
    members: int = 1, extra: int = 0,
) -> ScanPlan:  # fmt: skip
    """The launch for any size. Arguments as in `rnnfast.kernels.persistent.plan.persistent_plan`; on a CPU, which has no
    limits, those of an H100 count. `precision` is that of products, of which there are none."""
    limits = limits or GPUS["H100"]
    programs = B * H * members // (32 * limits.sms * PROGRAMS)
    warps = min(MOST_WARPS, max(1, 1 << (programs.bit_length() - 1 if programs else 0)))
    tiles = (gates + 3 if backward else gates) + marked + extra  # that a step loads
    time = functools.partial(predicted, gates, B, H, itemsize, backward, limits, members=members, extra=extra)
    ahead = 2
    while 2 * ahead * tiles <= AHEAD_TILES and time(ahead).trip > max(time(ahead).issue, time(ahead).memory):
        ahead *= 2
    steps = int(SECONDS * SLOW_CLOCK / time(ahead).total)
    if not backward:
        steps = min(steps, max(SIDE_ROWS // (B * members), SIDE_BYTES // (B * H * members * gates * 4)))
    return ScanPlan(*block(B, H, 32 * warps), ahead, warps, max(1, steps))


def scan_clocks(gates, B, H, itemsize, precision, backward, limits, marked=False, members: int = 1, extra: int = 0) -> float:
    """Predicted SM clocks of a time step of all members, from the arguments of `scan_plan`."""
    plan = scan_plan(gates, B, H, itemsize, precision, backward, limits, marked, members, extra)
    return predicted(gates, B, H, itemsize, backward, limits, plan.AHEAD, members, extra).total
