"""What one or two results files say: speed-ups with their spread, losses, failures, changes; no layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.ceilings import Ceilings, of_results
from benchmarks.roofline import Floor, floor

__all__ = [
    "BASELINE",
    "MAIN",
    "Change",
    "Comparison",
    "Entry",
    "Facts",
    "Group",
    "Spread",
    "changes",
    "describe",
    "figure",
    "ratio",
]

BASELINE = "torch.nn"
OURS = "rnnfast"  # how the names of our providers begin
MAIN = ("eager", "warm")


@dataclass(frozen=True)
class Spread:
    """The 20th, 50th and 80th percentile of something."""

    p20: float
    p50: float
    p80: float

    def over(self, other: Spread) -> Spread:
        """The quotient, with the widest spread that the two allow."""
        return Spread(self.p20 / other.p80, self.p50 / other.p50, self.p80 / other.p20)

    @property
    def inverse(self) -> Spread:
        return Spread(1 / self.p80, 1 / self.p50, 1 / self.p20)

    @property
    def verdict(self) -> str:
        """Of a speed-up: "win" or "loss", or "even" where 1 lies within the spread."""
        return "win" if self.p20 > 1 else "loss" if self.p80 < 1 else "even"

    def words(self, digits: Callable[[float], str]) -> str:
        return f"{digits(self.p50)} ({digits(self.p20)} to {digits(self.p80)})"


def figure(number: float) -> str:
    """With three digits that count."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:.{digits}f}"


def ratio(number: float) -> str:
    """A speed-up: two decimals, one beyond 10, and two digits that count where it is tiny."""
    return f"{number:.1f}" if number >= 9.995 else f"{number:.2f}" if number >= 0.01 else f"{number:.2g}"


def _spread(of: dict) -> Spread:
    return Spread(of["p20"], of["p50"], of["p80"])


class Entry:
    """A row of the file: what one provider did with one case."""

    def __init__(self, row: dict):
        self.case, self.provider = results.key(row)
        self.status: str = row["status"]
        self.note: str = row["note"]
        self.error: dict | None = row["error"]
        self.times = {(timing["how"], timing["l2"]): _spread(timing) for timing in row["timings"]}
        self.ratio = _spread(row["ratio"]) if row["ratio"] else None
        self.peak_bytes: int | None = row["peak_bytes"]
        self.saved_bytes: int | None = row["saved_bytes"]
        self.compile_s: float | None = row["compile_s"]
        self.kernels: list[str] = row["kernels"]

    @property
    def ours(self) -> bool:
        return self.provider.startswith(OURS)

    @property
    def time(self) -> Spread | None:
        """Microseconds a call, eager with a warm L2, or whatever there is."""
        return self.times.get(MAIN) or next(iter(self.times.values()), None)

    @property
    def why(self) -> str:
        """Why there is no time."""
        words = [self.note] if self.note else []
        if self.error:
            words.append(f"{self.error['tensor']} has {figure(self.error['worst'])} times the error that is allowed")
        return "; ".join(words)


@dataclass(frozen=True)
class Comparison:
    """One provider beside torch.nn on one case: speed-ups by (how, l2)."""

    entry: Entry
    speed_ups: dict[tuple[str, str], Spread]

    @property
    def worst(self) -> Spread:
        return min(self.speed_ups.values(), key=lambda spread: spread.p50)

    @property
    def main(self) -> Spread:
        return self.speed_ups.get(MAIN, self.worst)


@dataclass(frozen=True)
class Group:
    """Cases that are alike but for the fields in `free`; `label` says what they share."""

    label: str
    cases: tuple[Case, ...]


def describe(case: Case, free: tuple[str, ...] = ()) -> str:
    """A case in words, without the fields in `free`."""
    dtype = "TF32" if case.tf32 else case.dtype
    words = [f"{case.cell} {dtype} {case.mode}"]
    if case.layers > 1 and "layers" not in free:
        words.append(f"{case.layers} layers")
    words += ["two directions"] * (case.directions == 2) + ["packed"] * case.packed
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
        self.ceilings: Ceilings | None = of_results(loaded)
        self.of: dict[tuple[Case, str], Entry] = {(entry.case, entry.provider): entry for entry in self.entries}

    @cached_property
    def cases(self) -> list[Case]:
        return list(dict.fromkeys(entry.case for entry in self.entries))

    @cached_property
    def providers(self) -> list[str]:
        """Ours first, then torch.nn, then the others as they come."""
        names = list(dict.fromkeys(entry.provider for entry in self.entries))
        return sorted(names, key=lambda name: (not name.startswith(OURS), name != BASELINE))

    @cached_property
    def hows(self) -> list[tuple[str, str]]:
        found = dict.fromkeys(how for entry in self.entries for how in entry.times)
        return sorted(found, key=lambda how: (how != MAIN, how[1] != "warm", how))

    def speed_up(self, case: Case, provider: str, how: tuple[str, str] = MAIN) -> Spread | None:
        """torch.nn's time over the provider's; from the pairs measured side by side where the file has them."""
        entry, base = self.of.get((case, provider)), self.of.get((case, BASELINE))
        if entry is None or provider == BASELINE or how not in entry.times:
            return None
        if how == MAIN and entry.ratio:
            return entry.ratio.inverse
        return base.times[how].over(entry.times[how]) if base and how in base.times else None

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """All that can be compared with torch.nn, the worst first."""
        found = []
        for entry in self.entries:
            speed_ups = {how: spread for how in self.hows if (spread := self.speed_up(entry.case, entry.provider, how))}
            if speed_ups:
                found.append(Comparison(entry, speed_ups))
        return sorted(found, key=lambda comparison: comparison.worst.p50)

    @property
    def failures(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status != "ok"]

    def floor(self, case: Case) -> Floor | None:
        return floor(case, self.ceilings) if self.ceilings else None

    def groups(self, *free: str) -> list[Group]:
        """Groups of at least two cases that differ in `free` alone; the input size may follow H."""
        found: dict[tuple[Case, bool], list[Case]] = {}
        for case in self.cases:
            square = "H" in free and case.I == case.H
            alike = replace(case, **{name: 1 for name in (*free, *["I"] * square)})
            found.setdefault((alike, square), []).append(case)
        return [Group(describe(cases[0], free), tuple(cases)) for cases in found.values() if len(cases) > 1]

    @property
    def title(self) -> str:
        return self.environment.get("gpu") or self.environment.get("cpu") or "unknown machine"


@dataclass(frozen=True)
class Change:
    """A provider on a case, before and after. `change`: the quotient of the times, or of the times over torch.nn's."""

    case: Case
    provider: str
    how: tuple[str, str]
    before: Spread
    after: Spread
    relative: bool

    @property
    def change(self) -> Spread:
        return self.after.over(self.before)

    @property
    def verdict(self) -> str:
        return self.change.inverse.verdict


def changes(before: Facts, after: Facts) -> Iterator[Change]:
    """Of all that both files have; the ratio to torch.nn where both have it, since it leaves out the machine's moods."""
    for pair in (pair for pair in before.of if pair in after.of):
        old, new = before.of[pair], after.of[pair]
        for how in (how for how in old.times if how in new.times):
            relative = how == MAIN and old.ratio is not None and new.ratio is not None and pair[1] != BASELINE
            spreads = (old.ratio, new.ratio) if relative else (old.times[how], new.times[how])
            yield Change(*pair, how, *spreads, relative)
