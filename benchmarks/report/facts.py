"""Computes the facts in one or two results files: speed-ups with their spread, losses, failures, changes. It has no layout."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from benchmarks.floor.ceilings import Ceilings, of_results
from benchmarks.floor.work import Floor, floor
from benchmarks.timing import results
from benchmarks.timing.cases import Case
from benchmarks.timing.providers import BASE, OWN_LAYER

OURS = "rnnfast"  # how the names of our providers begin
WIDE = 2  # a spread from the 20th to the 80th percentile that grows by more than this factor allows no verdict
MAIN = ("eager", "warm")


class Spread(NamedTuple):
    """The 20th, 50th and 80th percentile of something."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, found: dict) -> "Spread":
        return cls(found["p20"], found["p50"], found["p80"])

    def over(self, other: "Spread") -> "Spread":
        """The quotient, with the widest spread that the two allow."""
        return Spread(self.p20 / other.p80, self.p50 / other.p50, self.p80 / other.p20)

    def scaled(self, scale: float) -> "Spread":
        return Spread(*(value * scale for value in self))

    @property
    def inverse(self) -> "Spread":
        return Spread(1 / self.p80, 1 / self.p50, 1 / self.p20)

    @property
    def verdict(self) -> str:
        """For a speed-up: "win" or "loss", "even" where 1 lies within the spread, or "unclear" where the spread is `WIDE`."""
        return "unclear" if self.p80 > WIDE * self.p20 else "win" if self.p20 > 1 else "loss" if self.p80 < 1 else "even"

    def words(self, digits: Callable[[float], str]) -> str:
        return f"{digits(self.p50)} ({digits(self.p20)} to {digits(self.p80)})"


def figure(number: float) -> str:
    """A number with three significant digits."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:.{digits}f}"


def ratio(number: float) -> str:
    """A speed-up: two decimals, one from 10 on, and two significant digits below 0.01."""
    return f"{number:.1f}" if number >= 9.995 else f"{number:.2f}" if number >= 0.01 else f"{number:.2g}"


class Entry:
    """A row of the file: what one provider did with one case. `times` are microseconds a call, by (how, L2)."""

    def __init__(self, row: dict):
        self.case, self.provider = results.key(row)
        self.ours = self.provider.startswith(OURS)
        self.status, self.note, self.error = row["status"], row["note"], row["error"]
        self.same_code = self.ours and OWN_LAYER in self.note  # it runs torch.nn's code: what differs from torch.nn is noise
        self.times = {(timing["how"], timing["l2"]): Spread.of(timing) for timing in row["timings"]}
        self.ratio = Spread.of(row["ratio"]) if row["ratio"] else None
        self.peak_bytes, self.saved_bytes = row["peak_bytes"], row["saved_bytes"]
        self.compile_s, self.kernels = row["compile_s"], row["kernels"]
        # torch.nn's time over the provider's, of pairs measured side by side where the file has them; none for torch.nn
        self.speed_ups: dict[tuple[str, str], Spread] = {}

    @property
    def time(self) -> Spread | None:
        """Microseconds a call, eager with a warm L2 if the file has that."""
        return self.times.get(MAIN) or next(iter(self.times.values()), None)

    @property
    def worst(self) -> Spread:
        """The smallest speed-up."""
        return min(self.speed_ups.values(), key=lambda spread: spread.p50)

    @property
    def main(self) -> Spread:
        return self.speed_ups.get(MAIN, self.worst)

    def verdict(self, spread: Spread) -> str:
        """That of one of the speed-ups, or "same" for torch.nn's own code."""
        return "same" if self.same_code else spread.verdict

    @property
    def why(self) -> str:
        """Why there is no time."""
        words = [self.note] if self.note else []
        if self.error:
            words.append(f"{self.error['tensor']} has {figure(self.error['worst'])} times the error that is allowed")
        return "; ".join(words)


class Group(NamedTuple):
    """Cases that differ in few fields. `label` says what they share."""

    label: str
    cases: list[Case]


def describe(case: Case, free: tuple[str, ...] = ()) -> str:
    """A case in words, without the fields in `free`."""
    words = [f"{case.cell} {'TF32' if case.tf32 else case.dtype} {case.mode}"]
    if case.layers > 1 and "layers" not in free:
        words.append(f"{case.layers} layers")
    words += ["two directions"] * (case.directions == 2) + ["packed"] * case.packed + [case.around.words] * bool(case.model)
    words += [f"{name} = {getattr(case, name):,}" for name in "TBH" if name not in free]
    if case.I == case.H:
        words += ["I = H"]
    elif "I" not in free:
        words += [f"I = {case.I}"]
    return ", ".join(words)


class Facts:
    """One results file."""

    def __init__(self, loaded: dict):
        self.environment: dict = loaded["environment"]
        self.settings: dict = loaded["settings"]
        self.entries = [Entry(row) for row in loaded["rows"]]
        self.failures = [entry for entry in self.entries if entry.status != "ok"]
        self.title: str = self.environment.get("gpu") or self.environment.get("cpu") or "unknown machine"
        self.ceilings: Ceilings | None = of_results(loaded)
        self.of: dict[tuple[Case, str], Entry] = {(entry.case, entry.provider): entry for entry in self.entries}
        for entry in self.entries:
            base = self.of.get((entry.case, BASE), entry)
            if entry.provider != BASE:
                entry.speed_ups = {how: base.times[how].over(entry.times[how]) for how in entry.times if how in base.times}
                if entry.ratio and MAIN in entry.times:
                    entry.speed_ups[MAIN] = entry.ratio.inverse

    @cached_property
    def cases(self) -> list[Case]:
        return list(dict.fromkeys(entry.case for entry in self.entries))

    @cached_property
    def providers(self) -> list[str]:
        """Ours first, then torch.nn, then the others as they come."""
        names = list(dict.fromkeys(entry.provider for entry in self.entries))
        return sorted(names, key=lambda name: (not name.startswith(OURS), name != BASE))

    @cached_property
    def hows(self) -> list[tuple[str, str]]:
        found = dict.fromkeys(how for entry in self.entries for how in entry.times)
        return sorted(found, key=lambda how: (how != MAIN, how[1] != "warm", how))

    @cached_property
    def compared(self) -> list[Entry]:
        """The entries that can be compared with torch.nn, the worst first."""
        return sorted((entry for entry in self.entries if entry.speed_ups), key=lambda entry: entry.worst.p50)

    def floor(self, case: Case) -> Floor | None:
        return floor(case, self.ceilings) if self.ceilings else None

    def groups(self, *free: str) -> list[Group]:
        """Groups of at least two cases that differ in `free` alone. The input size may follow H."""
        found: dict[tuple[Case, bool], list[Case]] = {}
        for case in self.cases:
            square = "H" in free and case.I == case.H
            alike = replace(case, **{name: 1 for name in (*free, *["I"] * square)})
            found.setdefault((alike, square), []).append(case)
        return [Group(describe(cases[0], free), cases) for cases in found.values() if len(cases) > 1]


def changes(before: Facts, after: Facts) -> Iterator[tuple]:
    """(change, case, provider, how, (before, after), relative) for each time in both files.

    If both have the ratio to torch.nn, the change is that of the ratio (`relative`). The machine's load affects a ratio less.
    """
    for pair in (pair for pair in before.of if pair in after.of):
        old, new = before.of[pair], after.of[pair]
        for how in (how for how in old.times if how in new.times):
            relative = bool(how == MAIN and old.ratio and new.ratio and pair[1] != BASE)
            spreads = (old.ratio, new.ratio) if relative else (old.times[how], new.times[how])
            yield spreads[1].over(spreads[0]), *pair, how, spreads, relative
