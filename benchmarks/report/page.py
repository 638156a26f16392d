"""The report as one HTML page that needs nothing else, and as Markdown. Both are templates; the page has no script."""

import itertools
import re
from collections.abc import Iterator

import jinja2

from benchmarks.report import charts
from benchmarks.report.charts import Series
from benchmarks.report.facts import BASE, MAIN, Entry, Facts, Group, Spread, describe, ratio
from benchmarks.report.tables import DECIDED, Table, how_words

LEVELS = (0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)  # speed-ups between the colours -4 to 4
SCALE = ["below 0.5", *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(LEVELS)), "2 and more"]
AXES = {"H": "hidden size H", "T": "time steps T", "B": "batch B"}
TEMPLATES = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks.report"), autoescape=jinja2.select_autoescape())
TEMPLATES.filters["slug"] = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
TEMPLATES.globals["markers"] = charts.MARKERS


def _heat_map(facts: Facts, group: Group, provider: str, how: tuple[str, str]) -> dict | None:
    """Speed-ups of one provider by H and B. None if it has none in the group."""
    at = {(case.H, case.B): facts.of.get((case, provider)) for case in group.cases}
    if not any(entry and how in entry.speed_ups for entry in at.values()):
        return None
    hidden, batches = (sorted({size[axis] for size in at}) for axis in (0, 1))

    def cell(H: int, B: int) -> tuple[str, str, str]:
        entry = at.get((H, B))
        spread = entry.speed_ups.get(how) if entry else None
        if entry and spread:
            verdict = entry.verdict(spread)
            sign = {"win": "▲", "loss": "▼", "even": "=", "unclear": "?", "same": "≡"}[verdict]
            level = sum(spread.p50 >= level for level in LEVELS) - 4 if verdict in DECIDED else 0
            return f"d{level}", f"{ratio(spread.p50)}\u202f{sign}", spread.words(ratio)
        return "none", entry.status if entry and entry.status != "ok" else "", entry.why if entry else "not in the file"

    rows = [(B, [cell(H, B) for H in hidden]) for B in batches]
    return {"provider": provider, "how": how_words(how), "label": group.label, "hidden": hidden, "rows": rows}


def _heat_maps(facts: Facts) -> Iterator[tuple[str, list[dict]]]:
    warm = [how for how in facts.hows if how[1] == "warm"]
    for group in facts.groups("H", "B"):
        if maps := [*filter(None, (_heat_map(facts, group, name, how) for name in facts.providers for how in warm))]:
            yield group.label, maps


def _chart(facts: Facts, group: Group, axis: str, what: str) -> str | None:
    """Time a step, or memory, of every provider with figures in `group`, over `axis`. None if no provider has any.

    Memory is what is kept for backward, in inference the peak.
    """
    kept = any(facts.of[pair].saved_bytes for pair in facts.of if pair[0] in group.cases)

    def value(entry: Entry) -> Spread | None:
        if what == "time":
            return entry.time.scaled(1 / entry.case.T) if entry.time else None
        amount = entry.saved_bytes if kept else entry.peak_bytes
        return Spread(*[amount / 2**20] * 3) if amount else None

    series = []
    for number, name in enumerate(facts.providers):
        entries = [entry for case in group.cases if (entry := facts.of.get((case, name))) and entry.status == "ok"]
        if points := [(getattr(entry.case, axis), spread) for entry in entries if (spread := value(entry))]:
            series.append(Series(name, points, number % 8))
    if not series:
        return None
    floors: dict[str, list[tuple[float, float]]] = {}
    for case in sorted(group.cases, key=lambda case: getattr(case, axis)):
        if what == "time" and (least := facts.floor(case)):
            terms = {"FLOPs": least.compute, "bytes": max(least.hbm, least.l2), "exchange": least.exchange}
            for name, seconds in terms.items():
                floors.setdefault(name, []).append((getattr(case, axis), seconds * 1e6 / case.T))
    words = {"time": ("time (µs a step)", "µs a step"), "memory": ("kept for backward (MiB)" if kept else "peak (MiB)", "MiB")}
    y_label, unit = words[what]
    plan = charts.layout(f"{group.label}: {y_label} over {AXES[axis]}", AXES[axis], y_label, series, floors, unit)
    return TEMPLATES.get_template("chart.html").module.figure(group.label, series, plan)


def _section(facts: Facts, heading: str, intro: str, axis: str, what: str = "time") -> dict:
    """Charts over `axis`, each of cases that differ in nothing else.

    Of the charts that differ in H or B alone, one with the most cases is shown. The rest is folded away.
    """
    families: dict[str, list[Group]] = {}
    for group in facts.groups(axis):
        if len({getattr(case, axis) for case in group.cases}) > 1:
            families.setdefault(describe(group.cases[0], tuple({"H", "B", "I", axis})), []).append(group)
    shown, rest = [], []
    for groups in families.values():
        most = max(len(group.cases) for group in groups)
        full = [group for group in groups if len(group.cases) == most]
        for group in groups:
            if chart := _chart(facts, group, axis, what):
                (shown if group is full[(len(full) - 1) // 2] else rest).append(chart)
    return {"heading": heading, "intro": intro, "shown": shown, "rest": rest}


def render(facts: Facts, title: str, tables: dict[str, list[Table]]) -> tuple[str, str]:
    """The page and the Markdown. `tables`: those "first", before the charts, and those "last"."""
    ours = [name for name in facts.providers if any(entry.ours for entry in facts.compared if entry.provider == name)]
    verdicts = {name: [entry.verdict(entry.main) for entry in facts.compared if entry.provider == name] for name in ours}
    macros = TEMPLATES.get_template("words.txt").module
    intro = macros.intro(how_words(facts.hows[0] if facts.hows else MAIN), facts.ceilings)
    lead = macros.lead(facts, verdicts)
    kept = "Kept for backward in training, the peak of a call in inference."
    found = [_section(facts, f"Time a step over {AXES[axis]}", intro, axis) for axis in "HTB"]
    found = [one for one in [*found, _section(facts, "Memory over time steps T", kept, "T", "memory")] if one["shown"]]
    headings = [table.heading for table in tables["first"]] + ["Speed-up by H and B"] + [one["heading"] for one in found]
    headings += [table.heading for table in tables["last"]]
    values = {"title": title, "lead": lead, "headings": headings, "charts": found, "scale": SCALE, "base": BASE, **tables}
    html = TEMPLATES.get_template("page.html").render(maps=list(_heat_maps(facts)), **values)
    return html, TEMPLATES.get_template("report.md").render(values)
