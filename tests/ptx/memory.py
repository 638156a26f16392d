"""Memory that knows who touched it: out of bounds, words never written, and accesses that nothing orders.

Every access carries its thread and how many barriers that thread has passed. Two accesses to the same bytes, at least one a
write, are a race unless one of these orders them:

- They are by one thread.
- They are by threads of one CTA, with a ``bar.sync`` between.
- They are by threads of one warp, with a ``bar.warp.sync`` between.
- Both are strong: they then are an exchange of words, each of which is its own flag.
- Both are writes of the same value. Threads that hold copies of a value all store it, and any of them may be the last.
- One stores to global memory what is there already, which no other access can tell.

The bytes that a ``cp.async`` writes are nobody's from the copy to its wait.

An access is an int64 with a field for each: from the top, CTA, barriers, syncs of the warp since the barrier, warp, lane,
whether it is strong. So to compare a shadow's worth of them takes a few operations.
"""

from __future__ import annotations

import numpy as np

STRONG, LANE, WARP, SYNC, EPOCH, CTA = 0, 1, 9, 17, 29, 49  # lowest bit of each field
SEVERAL_LANES, SEVERAL_WARPS, SEVERAL_CTAS = 0xFF << LANE, 0xFFFF << LANE, 0x1FFF << CTA
NEVER = -1
UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):
    """What a kernel must not do."""


class Race(Fault):
    """Two accesses, one of them a write, that nothing orders."""


class Unwritten(Fault):
    """A read of bytes that nobody has written."""


class OutOfBounds(Fault):
    """An access outside of every tensor, or at an address that is no multiple of its size."""


class Deadlock(Fault):
    """No warp can go on, or all go on and on."""


def stamp(cta: int, epoch: int, sync: int, warp: int, lanes: np.ndarray | int = SEVERAL_LANES >> LANE) -> np.ndarray:
    """The access of each of the `lanes`, or of a whole warp at once."""
    return np.asarray((cta << CTA) | (epoch << EPOCH) | (sync << SYNC) | (warp << WARP)) | (np.asarray(lanes) << LANE)


def who(access: int) -> str:
    lane, warp = access >> LANE & 0xFF, access >> WARP & 0xFF
    thread = "several warps" if warp == 0xFF else f"warp {warp}" + ("" if lane == 0xFF else f" lane {lane}")
    return f"{thread} of CTA {access >> CTA}, after {access >> EPOCH & 0xFFFFF} barriers"


def _conflicts(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Which accesses are not ordered after those before."""
    differs = before ^ now
    apart = differs >> CTA != 0
    unsynced = (differs >> SYNC == 0) & (differs & SEVERAL_LANES != 0)
    inside = (differs >> EPOCH == 0) & ((differs & (0xFF << WARP) != 0) | unsynced)
    return (before != NEVER) & (apart | inside) & (before & now & 1 == 0)


def _merged(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """One access for two reads: the later, and of everybody whom a write may yet conflict with."""
    if before.max() == NEVER:
        return now
    differs = np.where(before == NEVER, 0, before ^ now)
    ctas = differs >> CTA != 0
    warps = (differs >> EPOCH == 0) & (differs & (0xFF << WARP) != 0)
    lanes = (differs >> SYNC == 0) & (differs & SEVERAL_LANES != 0)
    several = np.where(ctas, SEVERAL_CTAS, 0) | np.where(warps, SEVERAL_WARPS, 0) | np.where(lanes, SEVERAL_LANES, 0)
    weak = (several != 0) & (before & 1 == 0)
    return (now | several) & ~weak.astype(np.int64)


class Space:
    """A piece of memory: the shared memory of a CTA, or one tensor's storage.

    Args:
        data: (bytes,) uint8.
        granule: bytes that the shadow tells apart, the least that the kernel accesses.
        written: (bytes,) bool, what has a value at the start.
        name: for messages.
        own: whether it is one CTA's, so that a barrier orders all before it.
    """

    def __init__(self, data: np.ndarray, granule: int, written: np.ndarray, name: str, own: bool):
        self.data, self.granule, self.name, self.own = data, granule, name, own
        self.views = {size: data[: len(data) // size * size].view(uint) for size, uint in UINTS.items()}
        granules = -(-len(data) // granule)
        padded = np.zeros(granules * granule, bool)
        padded[: len(data)] = written
        self.written = padded.reshape(granules, granule).any(1)
        self.reads = np.full(granules, NEVER, np.int64)
        self.writes = np.full(granules, NEVER, np.int64)
        self.pending, self.copying = np.zeros(granules, bool), 0  # what cp.async is writing, and how many do

    def granules(self, offsets: np.ndarray, size: int, accesses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in the shadow `size` bytes at each of the offsets are, and whose each is."""
        first, count = offsets // self.granule, size // self.granule
        if count <= 1:
            return first, accesses
        return (first[:, None] + np.arange(count)).ravel(), np.repeat(accesses, count)

    def check(self, offsets: np.ndarray, size: int, alignment: int) -> None:
        if len(offsets) and (offsets.min() < 0 or offsets.max() + size > len(self.data)):
            raise OutOfBounds(f"bytes {offsets.min()} to {offsets.max() + size} of the {len(self.data)} of {self.name}")
        if (offsets & (alignment - 1)).any():
            raise OutOfBounds(f"an address in {self.name} is no multiple of {alignment}")

    def conflicts(self, before: np.ndarray, now: np.ndarray) -> np.ndarray | None:
        """Which accesses are not ordered after those before; None if all are."""
        oldest = now[0] >> EPOCH << EPOCH if self.own else 0
        if before.max() < oldest:
            return None
        found = _conflicts(before, now)
        return found if found.any() else None

    def race(self, conflicts: np.ndarray, before: np.ndarray, now: np.ndarray, where: np.ndarray, what: str) -> Race:
        at = int(np.argmax(conflicts))
        place = f"byte {where[at] * self.granule} of {self.name}"
        return Race(f"{what}: {place}, {who(int(before[at]))}; then {who(int(now[at]))}")

    def load(self, offsets: np.ndarray, size: int, count: int, accesses: np.ndarray) -> np.ndarray:
        """`count` elements of `size` bytes from each offset, (count, offsets)."""
        self.check(offsets, size * count, size * count)
        where, now = self.granules(offsets, size * count, accesses)
        if not self.written[where].all():
            raise Unwritten(f"byte {where[np.argmin(self.written[where])] * self.granule} of {self.name} is read")
        if self.copying and self.pending[where].any():
            raise Race(f"cp.async, then a read without its wait: {self.name}")
        before = self.writes[where]
        if (conflicts := self.conflicts(before, now)) is not None:
            raise self.race(conflicts, before, now, where, "a write, then a read")
        merged = _merged(self.reads[where], now)
        self.reads[where] = merged
        twice = self.reads[where] != merged
        if twice.any():
            self.reads[where[twice]] |= SEVERAL_LANES
        return np.stack([self.views[size][offsets // size + i] for i in range(count)])

    def claim(self, offsets: np.ndarray, size: int, values: np.ndarray, accesses: np.ndarray) -> np.ndarray:
        """A write of `values` (count, offsets) is allowed and from now on has been. Returns its granules."""
        count = len(values)
        self.check(offsets, size * count, size * count)
        where, now = self.granules(offsets, size * count, accesses)
        if self.copying and self.pending[where].any():
            raise Race(f"cp.async, then a write without its wait: {self.name}")
        there = np.stack([self.views[size][offsets // size + i] for i in range(count)])
        equal = np.repeat((there == values).T.ravel(), len(where) // values.size)
        before = self.writes[where]
        self.writes[where] = now if self.own else np.where(equal, before, now)
        if (conflicts := self.conflicts(before, now)) is not None:
            conflicts &= ~equal
            if conflicts.any():
                raise self.race(conflicts, before, now, where, "a write, then a write of something else")
            self.writes[where] = _merged(before, now)
        before = self.reads[where]
        if (conflicts := self.conflicts(before, now)) is not None:
            if not self.own:
                conflicts &= ~equal
            if conflicts.any():
                raise self.race(conflicts, before, now, where, "a read, then a write")
        self.written[where] = True
        return where

    def begin_copy(self, granules: np.ndarray) -> None:
        self.pending[granules] = True
        self.copying += 1

    def end_copy(self, granules: np.ndarray) -> None:
        self.pending[granules] = False
        self.copying -= 1

    def put(self, offsets: np.ndarray, size: int, values: np.ndarray) -> None:
        """Change the bytes, `values` (count, offsets)."""
        for i, value in enumerate(values):
            at = offsets // size + i
            self.views[size][at] = value
            if (self.views[size][at] != value).any():
                raise Race(f"lanes of one store give different values to one place of {self.name}")

    def store(self, offsets: np.ndarray, size: int, values: np.ndarray, accesses: np.ndarray) -> None:
        self.claim(offsets, size, values, accesses)
        self.put(offsets, size, values)
