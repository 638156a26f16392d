"""The tables of the report as rows of text. Templates lay them out."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from benchmarks.floor.published import PUBLISHED, Published
from benchmarks.report.facts import BASE, WIDE, Entry, Facts, Spread, changes, describe, figure, ratio


class Table(NamedTuple):
    """Rows of text under a heading."""

    heading: str
    intro: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    kinds: list[str]  # "win", "loss", "even" or "" for each row; none: "" for all
    numbers: Iterable[int] = ()  # the columns that are set to the right
    shown: int = 20  # the rows that the page shows before it folds the rest away

    @property
    def rows_with_kinds(self) -> list[tuple[tuple[str, ...], str]]:
        return list(zip(self.rows, self.kinds or [""] * len(self.rows), strict=True))


def how_words(how: tuple[str, str]) -> str:
    name = how[0].replace("cuda", "CUDA")
    return name if how[1] == "warm" else f"{name}, {how[1]} L2"


WORDS = {"win": "faster", "even": "within spread", "loss": "slower", "unclear": "no verdict", "same": "torch.nn's code"}
DECIDED = ("win", "even", "loss")
NO_VERDICT = (
    f"A call has no verdict if its 80th percentile is more than {WIDE} times its 20th. A call that runs torch.nn's own code has"
    " none either: what differs is noise, and the little that rnnfast adds on the host."
)


def comparison_table(facts: Facts, heading: str, intro: str, chosen: Iterable[Entry], shown: int = 20) -> Table:
    chosen = list(chosen)
    hows = [how for how in facts.hows if any(how in entry.speed_ups for entry in chosen)]
    rows = []
    for entry in chosen:
        cells = [entry.speed_ups[how].words(ratio) if how in entry.speed_ups else "" for how in hows]
        us = figure(entry.time.p50 / entry.case.T)
        rows.append((describe(entry.case), entry.provider, WORDS[entry.verdict(entry.worst)], *cells, us))
    columns = ("case", "provider", "verdict", *(f"speed-up {how_words(how)}" for how in hows), "µs a step")
    return Table(heading, intro, columns, rows, [entry.verdict(entry.worst) for entry in chosen], range(3, len(columns)), shown)


def summary_table(facts: Facts) -> Table:
    """A line for each provider: how often it is faster, slower, right, and how often it fails."""
    rows = []
    for provider in facts.providers:
        entries = [entry for entry in facts.entries if entry.provider == provider]
        verdicts = [entry.verdict(entry.main) for entry in entries if entry.speed_ups]
        decided = [entry.main.p50 for entry in entries if entry.speed_ups and entry.verdict(entry.main) in DECIDED]
        counts, figures = [str(verdicts.count(kind)) if verdicts else "" for kind in WORDS], [""] * 3
        if decided:
            mean = math.exp(sum(map(math.log, decided)) / len(decided))
            figures = [ratio(x) for x in (mean, min(decided), max(decided))]
        failed = sum(entry.status != "ok" for entry in entries)
        rows.append((provider, str(len(entries)), *counts, str(failed), *figures))
    how = how_words(facts.hows[0]) if facts.hows else "eager"
    intro = f"Speed-up is the time of {BASE} over that of the provider, {how}. {NO_VERDICT} The last columns leave out both."
    columns = ("provider", "cases", *WORDS.values(), "not timed", "geometric mean", "worst", "best")
    return Table("Summary", intro, columns, rows, [], range(1, len(columns)))


def failure_table(facts: Facts) -> Table:
    """Rows without a time. Rows of one provider with one reason stand together."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for entry in facts.failures:
        found.setdefault((entry.provider, entry.status, entry.why), []).append(describe(entry.case))
    rows = [
        (provider, status, str(len(cases)), cases[0] + f"; and {len(cases) - 1} more" * (len(cases) > 1), why)
        for (provider, status, why), cases in found.items()
    ]
    kinds = ["" if row[1] == "unavailable" else "loss" for row in rows]
    intro = "Wrong results get no time; a provider that failed, or is not installed, says why."
    return Table("Not timed", intro, ("provider", "status", "cases", "which", "why"), rows, kinds, {2})


def memory_table(facts: Facts) -> Table:
    """Bytes kept for backward and peak, each beside torch.nn's."""
    rows, kinds = [], []
    for entry in facts.entries:
        base = facts.of.get((entry.case, BASE))
        if entry.provider == BASE or base is None or (entry.saved_bytes is None and entry.peak_bytes is None):
            continue
        pairs = ((entry.saved_bytes, base.saved_bytes), (entry.peak_bytes, base.peak_bytes))
        ratios = [own / theirs if own is not None and theirs else None for own, theirs in pairs]
        cells = [
            "" if each is None else figure(each / unit)
            for pair, ratio in zip(pairs, ratios, strict=True)
            for each, unit in ((pair[0], 2**20), (pair[1], 2**20), (ratio, 1))
        ]
        rows.append((describe(entry.case), entry.provider, *cells))
        kinds.append("" if ratios[0] is None else Spread(*[1 / max(ratios[0], 1e-9)] * 3).verdict)
    columns = ("case", "provider", "kept MiB", "torch.nn's", "ratio", "peak MiB", "torch.nn's", "ratio")
    intro = "Kept for backward, without input and parameters, and the peak of a call above what was allocated before it."
    return Table("Memory of each case", intro, columns, rows, kinds, range(2, 8), shown=0)


def floor_table(facts: Facts) -> Table | None:
    """The floor of every case, its terms, and how near the fastest provider comes. None without a GPU."""
    rows = []
    for case in facts.cases:
        least = facts.floor(case)
        timed = [(entry.time.p50, entry.provider) for entry in facts.entries if entry.case == case and entry.time]
        if least and timed:
            us, who = min(timed)
            floor_us = least.seconds * 1e6
            cells = [figure(seconds * 1e6 / case.T) for seconds in (least.compute, least.hbm, least.l2, least.exchange)]
            rows.append((describe(case), figure(floor_us / case.T), *cells, figure(us / case.T), who, figure(us / floor_us)))
    if not rows:
        return None
    columns = ("case", "floor", "FLOPs", "HBM", "L2", "exchange", "fastest", "by", "times the floor")
    intro = f"Microseconds a step. The floor is the largest of its four terms. Ceilings: {facts.ceilings.source}."
    return Table("Floor of each case", intro, columns, rows, [], {1, 2, 3, 4, 5, 6, 8}, shown=0)


def _beside(facts: Facts, published: Published, provider: str) -> str:
    """What the file has of `provider` beside a published figure: ms a call, or times padded."""
    entry = facts.of.get((published.case, provider))
    if entry is None or entry.time is None:
        return ""
    if published.times_padded is None:
        return figure(entry.time.p50 / 1000)
    padded = facts.of.get((replace(published.case, model=""), provider))
    return f"{figure(entry.time.p50 / padded.time.p50)} times padded" if padded and padded.time else ""


def published_table(facts: Facts) -> Table | None:
    """What others have published of the cases of the file, beside the times in the file. None if they have published nothing.

    No column divides a time of one machine by that of another.
    """
    rows = []
    for one in (published for case in facts.cases for published in PUBLISHED if published.case == case):
        times_padded = f"{figure(one.times_padded)} times padded" if one.times_padded else ""
        value = times_padded or figure(one.us_per_step * one.case.T / 1000)
        found = {name: _beside(facts, one, name) for name in facts.providers}
        others = ", ".join(f"{name} {text}" for name, text in found.items() if text and name != BASE)
        rows.append((describe(one.case), one.provider, one.gpu, value, found.get(BASE, ""), others, one.source))
    if not rows:
        return None
    columns = ("case", "published: who", "where", "published: ms a call", "here: torch.nn", "here: the others", "source")
    intro = "Others have published these times, and nobody measured them here. Only the columns that begin with here are from "
    intro += f"{facts.title}, in ms a call. Machines, versions and ways of timing differ, so a published time over one from "
    intro += "here is no speed-up. Times padded: a call with lengths over the same layer on padded input, both on one machine."
    return Table("Published by others, not measured here", intro, columns, rows, [], {3, 4})


def row_table(facts: Facts) -> Table:
    """Every row of the file, with what no other table has: its error, its compile time, its GPU kernels."""
    rows = []
    for entry in facts.entries:
        times = [figure(entry.times[how].p50 / entry.case.T) if how in entry.times else "" for how in facts.hows]
        worst = f"{figure(entry.error['worst'])} ({entry.error['tensor']})" if entry.error else ""
        compiled = figure(entry.compile_s) if entry.compile_s is not None else ""
        kernels = ", ".join(f"{one['name']} ({one['launches']}: {figure(one['us'])} µs)" for one in entry.kernels)
        rows.append((describe(entry.case), entry.provider, entry.status, *times, worst, compiled, kernels))
    columns = ("case", "provider", "status", *(f"µs a step {how_words(how)}" for how in facts.hows))
    columns += ("error / allowed", "compile s", "kernels")
    intro = "Medians; the largest error over the one that is allowed; seconds of the first call, where it compiles; the GPU "
    intro += "kernels of one call, each with the number of its launches and their time together."
    return Table("Every row", intro, columns, rows, [], range(3, len(columns) - 1), shown=0)


def environment_table(facts: Facts) -> Table:
    rows = [(str(name), str(value)) for part in (facts.environment, facts.settings) for name, value in part.items()]
    return Table("Environment and settings", "", ("what", "value"), rows, [])


def change_tables(before: Facts, after: Facts) -> list[Table]:
    """The changes, the largest slow-down first, and what else differs between the two runs."""
    found = sorted(changes(before, after), key=lambda one: -one[0].p50)
    kinds, rows = [change.inverse.verdict for change, *_ in found], []
    for kind, (change, case, provider, how, sides, relative) in zip(kinds, found, strict=True):
        unit, scale, digits = (f"of {BASE}'s", 1, ratio) if relative else ("µs a step", case.T, figure)
        words = [side.scaled(1 / scale).words(digits) for side in sides]
        verdict = WORDS[kind] if kind != "even" else "noise"
        rows.append((describe(case), provider, how_words(how), verdict, f"{change.p50 - 1:+.1%}", unit, *words))
    counts = map(kinds.count, ("loss", "even", "win", "unclear"))
    intro = "{} slower, {} within the spread of both runs (noise), {} faster, {} without a verdict. ".format(*counts)
    intro += "Change is that of the time; a change counts only where the spreads (20th to 80th percentile) do not meet."
    columns = ("case", "provider", "how", "verdict", "change", "time", "before", "after")
    tables = [Table("Before and after", intro, columns, rows, kinds, {4, 6, 7})]
    rows = []
    for case, provider in dict.fromkeys([*before.of, *after.of]):
        old, new = (facts.of.get((case, provider)) for facts in (before, after))
        if old is None or new is None:
            rows.append((describe(case), provider, "before only" if old else "after only"))
        elif old.status != new.status:
            rows.append((describe(case), provider, f"{old.status} before, {new.status} after"))
    if rows:
        kinds = ["loss" if row[2].startswith("ok") else "" for row in rows]
        tables.append(Table("In one file only, or of another status", "", ("case", "provider", "where"), rows, kinds))
    sides = [before.environment, after.environment]
    names = [name for name in dict.fromkeys([*sides[0], *sides[1]]) if sides[0].get(name) != sides[1].get(name)]
    rows = [(name, *(str(side.get(name, "")) for side in sides)) for name in names]
    if rows:
        intro = "A change can come from any of these."
        tables.append(Table("What differs between the runs", intro, ("what", "before", "after"), rows, []))
    return tables
