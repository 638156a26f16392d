"""Runs a decoded kernel: all CTAs of a grid at once, one warp at a time, in an order drawn from a seed.

A warp goes on for a random number of turns, then another does. Stores to global memory may stay unseen by other CTAs for any
while, and be seen word by word in any order; the CTA that stored them sees them at its next load of that place.
"""

from __future__ import annotations

import bisect
import random
from typing import NamedTuple

import numpy as np

from tests.ptx.decode import Code, Jump, Plain, Turn
from tests.ptx.memory import Deadlock, Fault, OutOfBounds, Space, stamp

TURNS = 10_000  # of each warp, after which nothing having changed in global memory means that nothing will
BURSTS = (1, 1, 2, 4, 16, 64)
LANES = np.arange(32)


class Region(NamedTuple):
    """Global memory from the address `begin`."""

    begin: int
    space: Space


class Posted(NamedTuple):
    """A store that not every CTA sees yet."""

    space: Space
    offsets: np.ndarray
    size: int
    values: np.ndarray


class Cta:
    def __init__(self, number: int, warps: int, shared: Space):
        self.number, self.warps, self.shared = number, warps, shared
        self.epoch = 0  # barriers passed
        self.arrived: list[Warp] = []
        self.posted: list[Posted] = []


class Warp:
    """A warp: registers, where it is, and what it does to memory."""

    def __init__(self, machine: Machine, cta: Cta, number: int, registers: list[np.ndarray]):
        self.machine, self.cta, self.number, self.registers = machine, cta, number, registers
        self.at = 0
        self.syncs = 0
        self.looks = 0  # at the clock
        self.copies: list[list] = [[]]  # groups of cp.async; the last is not committed
        self.restamp()

    def restamp(self) -> None:
        self.whole = int(stamp(self.cta.number, self.cta.epoch, self.syncs, self.number))
        self.stamps = stamp(self.cta.number, self.cta.epoch, self.syncs, self.number, LANES)

    def accesses(self, on: np.ndarray | None, strong: int) -> np.ndarray:
        return (self.stamps if on is None else self.stamps[on]) | strong

    def load(self, space: str, at: np.ndarray, size: int, count: int, strong: int, on: np.ndarray | None) -> np.ndarray:
        accesses = self.accesses(on, strong)
        if space == "shared":
            return self.cta.shared.load(at, size, count, accesses)
        values = np.empty((count, len(at)), f"u{size}")
        for region, which in self.machine.regions_of(at):
            offsets = at[which] - region.begin
            self.machine.show_own(self.cta, region.space, offsets, size * count)
            values[:, which] = region.space.load(offsets, size, count, accesses[which])
        return values

    def store(self, space: str, at: np.ndarray, size: int, values: np.ndarray, strong: int, on: np.ndarray | None) -> None:
        accesses = self.accesses(on, strong)
        if space == "shared":
            self.cta.shared.store(at, size, values, accesses)
            return
        for region, which in self.machine.regions_of(at):
            offsets = at[which] - region.begin
            self.machine.show_own(self.cta, region.space, offsets, size * len(values))
            region.space.claim(offsets, size, values[:, which], accesses[which])
            self.machine.post(self.cta, Posted(region.space, offsets, size, values[:, which]))

    def load_rows(self, at: np.ndarray) -> np.ndarray:
        """Rows of 8 elements of 16 bits, read by the warp as one, (rows, 8)."""
        rows = self.cta.shared.load(at, 2, 8, np.full(len(at), self.whole))
        return np.ascontiguousarray(rows.T)

    def arrive(self) -> None:
        self.machine.wait_at_barrier(self)

    def sync(self) -> None:
        self.syncs += 1
        self.restamp()

    def copy(self, target: np.ndarray, source: np.ndarray, size: int, present: np.ndarray, on: np.ndarray) -> None:
        words = np.zeros((size // 4, len(on)), np.uint32)
        full = np.flatnonzero(present == size)
        assert (present[present != size] == 0).all(), "part of a cp.async"
        if len(full):
            words[:, full] = self.load("global", source[full], 4, size // 4, 0, on[full])
        granules = self.cta.shared.claim(target, 4, words, self.accesses(on, 0))
        self.cta.shared.begin_copy(granules)
        self.copies[-1].append((target, words, on, granules))

    def commit(self) -> None:
        self.copies.append([])

    def wait(self, left: int) -> None:
        while len(self.copies) > left + 1:
            for target, words, on, granules in self.copies.pop(0):
                self.cta.shared.end_copy(granules)
                self.cta.shared.store(target, 4, words, self.accesses(on, 0))


class Machine:
    """One launch.

    Args:
        code: the kernel.
        grid: CTAs along x, y and z.
        warps: of a CTA.
        shared: bytes of shared memory of a CTA.
        parameters: the bits of each, by name.
        regions: global memory, by address.
        seed: of the order.
    """

    def __init__(
        self,
        code: Code,
        grid: tuple[int, int, int],
        warps: int,
        shared: int,
        parameters: dict[str, int],
        regions: list[Region],
        seed: int,
    ):
        self.code, self.random, self.numpy = code, random.Random(seed), np.random.default_rng(seed)
        self.regions = sorted(regions, key=lambda region: region.begin)
        self.begins = [region.begin for region in self.regions]
        self.turns = 0  # since global memory last changed
        self.executed = 0
        start = list(code.start)
        for name, at in code.parameters.items():
            start[at] = np.full(32, parameters[name], np.uint64)
        self.ready: list[Warp] = []
        self.ctas: list[Cta] = []
        for number in range(grid[0] * grid[1] * grid[2]):
            space = Space(
                np.full(shared, 0xA5, np.uint8), code.granules["shared"], np.zeros(shared, bool), "shared memory", True
            )
            cta = Cta(number, warps, space)
            self.ctas.append(cta)
            place = {"x": number % grid[0], "y": number // grid[0] % grid[1], "z": number // (grid[0] * grid[1])}
            for warp in range(warps):
                registers = list(start)
                for name, at in code.special.items():
                    register, _, axis = name.partition(".")
                    values = {"%tid": LANES + 32 * warp if axis == "x" else 0 * LANES, "%laneid": LANES}
                    values["%ctaid"] = np.full(32, place.get(axis, 0))
                    registers[at] = values[register].astype(np.uint32)
                self.ready.append(Warp(self, cta, warp, registers))
        self.alive = len(self.ready)

    def regions_of(self, at: np.ndarray) -> list[tuple[Region, slice | np.ndarray]]:
        """The tensor of each address."""
        first, last = int(at.min()), int(at.max())
        index = bisect.bisect_right(self.begins, first) - 1
        if index == bisect.bisect_right(self.begins, last) - 1:
            if index < 0:
                raise OutOfBounds(f"address {first:#x} is before every tensor")
            return [(self.regions[index], slice(None))]
        indices = np.searchsorted(self.begins, at, "right") - 1
        if indices.min() < 0:
            raise OutOfBounds(f"address {first:#x} is before every tensor")
        return [(self.regions[i], np.flatnonzero(indices == i)) for i in np.unique(indices)]

    def post(self, cta: Cta, store: Posted) -> None:
        self.turns = 0
        cta.posted.append(store)
        if self.random.random() < 0.5:
            self.show(cta, 1.0)

    def show_own(self, cta: Cta, space: Space, offsets: np.ndarray, size: int) -> None:
        """The CTA sees what it stored there."""
        if cta.posted:
            first, last = offsets.min(), offsets.max() + size
            for store in cta.posted:
                if (
                    store.space is space
                    and store.offsets.min() < last
                    and first < store.offsets.max() + store.size * len(store.values)
                ):
                    self.show(cta, 1.0)
                    return

    def show(self, cta: Cta, share: float) -> None:
        """Everybody sees about this share of what the CTA stored."""
        posted, cta.posted = cta.posted, []
        for store in posted:
            now = self.numpy.random(len(store.offsets)) < share  # below 1
            store.space.put(store.offsets[now], store.size, store.values[:, now])
            if not now.all():
                cta.posted.append(store._replace(offsets=store.offsets[~now], values=store.values[:, ~now]))
        self.turns = 0

    def wait_at_barrier(self, warp: Warp) -> None:
        cta = warp.cta
        cta.arrived.append(warp)
        self.ready.remove(warp)
        if len(cta.arrived) == cta.warps:
            cta.epoch += 1
            for other in cta.arrived:
                other.syncs = 0
                other.restamp()
            self.ready += cta.arrived
            cta.arrived = []

    def run(self) -> None:
        while self.alive:
            if not self.ready:
                raise Deadlock("every warp waits at a barrier that others do not come to")
            if self.turns > TURNS * self.alive:
                if not any(cta.posted for cta in self.ctas):
                    raise Deadlock(f"nothing was stored in {self.turns} turns of {self.alive} warps; {self.where()}")
                self.show_all()
            warp = self.random.choice(self.ready)
            for _ in range(self.random.choice(BURSTS)):
                if not self.turn(warp):
                    break
            cta = self.random.choice(self.ctas)
            if cta.posted:
                self.show(cta, self.random.random())
        self.show_all()

    def stands_still(self) -> bool:
        """Whether global memory has not changed for long, though not for so long that it never will."""
        return self.turns > TURNS // 20 * self.alive

    def where(self) -> str:
        """What some warp is about to do."""
        warp = self.random.choice(self.ready)
        return f"warp {warp.number} of CTA {warp.cta.number} is at {self.code.instructions[warp.at]}"

    def show_all(self) -> None:
        for cta in self.ctas:
            self.show(cta, 1.0)

    def turn(self, warp: Warp) -> bool:
        """Runs the warp until it has touched memory or gone back; whether it can go on."""
        self.turns += 1
        steps, registers = self.code.steps, warp.registers
        while warp.at < len(steps):
            step = steps[warp.at]
            warp.at += 1
            self.executed += 1
            if type(step) is Plain:
                step.run(registers)
            elif type(step) is Turn:
                try:
                    step.run(warp)
                except Fault as fault:
                    message = f"{fault}; at {step.instruction} by warp {warp.number} of CTA {warp.cta.number}"
                    raise type(fault)(message) from None
                return warp not in warp.cta.arrived
            elif self.jumps(warp, step):
                back = step.target < warp.at
                warp.at = step.target
                if back:
                    return True
        self.alive -= 1
        self.ready.remove(warp)
        self.turns = 0
        return False

    def jumps(self, warp: Warp, step: Jump) -> bool:
        if step.guard is None:
            return True
        on = warp.registers[step.guard]
        if on.all() or not on.any():
            return bool(on[0]) != step.negated
        raise NotImplementedError(f"the lanes of a warp part ways at instruction {warp.at - 1}")
