"""The report as one HTML page that needs nothing else: style, charts and tables are in it, and no script."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

from benchmarks.report.charts import Series, key_mark, line_chart
from benchmarks.report.facts import BASELINE, MAIN, Entry, Facts, Group, Spread, describe, ratio
from benchmarks.report.tables import Table, how_words

__all__ = ["render"]

LEVELS = (0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)  # of speed-up, between the colours -4 to 4
AXES = {"H": "hidden size H", "T": "time steps T", "B": "batch B"}


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _level(speed_up: float) -> int:
    return sum(speed_up >= level for level in LEVELS) - 4


def _table(table: Table) -> str:
    parts = [f'<section><h2 id="{slug(table.heading)}">{escape(table.heading)}</h2>']
    if table.intro:
        parts.append(f"<p>{escape(table.intro)}</p>")
    if not table.rows:
        return "".join([*parts, "<p>None.</p></section>"])
    head = "".join(f'<th scope="col"{_number(number, table)}>{escape(name)}</th>' for number, name in enumerate(table.columns))
    rows = [
        f'<tr class="{kind}">{"".join(_cell(number, text, table) for number, text in enumerate(row))}</tr>'
        for row, kind in zip(table.rows, table.kinds, strict=True)
    ]

    def block(some: list[str], name: str) -> str:
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(some)}</tbody></table></div>"
        )

    shown, rest = rows[: table.shown], rows[table.shown :]
    if shown:
        parts.append(block(shown, table.heading))
    if rest:
        words = f"{len(rest)} more rows" if shown else f"{len(rest)} rows"
        parts.append(f"<details><summary>{words}</summary>{block(rest, f'{table.heading}, {words}')}</details>")
    return "".join([*parts, "</section>"])


def _number(number: int, table: Table) -> str:
    return ' class="number"' if number in table.numbers else ""


def _cell(number: int, text: str, table: Table) -> str:
    classes = ["number"] * (number in table.numbers) + ["verdict"] * (table.columns[number] in ("verdict", "status"))
    classes += ["long"] * (table.columns[number] in ("why", "value", "kernels"))
    words = escape(text).replace(" = ", "&nbsp;=&nbsp;")
    return f'<td class="{" ".join(classes)}">{words}</td>' if classes else f"<td>{words}</td>"


def _heat_map(facts: Facts, group: Group, provider: str, how: tuple[str, str]) -> str | None:
    """Speed-ups of one provider by H and B; None if it has none in the group."""
    hidden, batches = (sorted({getattr(case, name) for case in group.cases}) for name in "HB")
    at = {(case.H, case.B): case for case in group.cases}
    if not any(facts.speed_up(case, provider, how) for case in group.cases):
        return None
    rows = []
    for B in batches:
        cells = []
        for H in hidden:
            case = at.get((H, B))
            spread = facts.speed_up(case, provider, how) if case else None
            if spread:
                sign = {"win": "▲", "loss": "▼", "even": "="}[spread.verdict]
                kind = f'class="d{_level(spread.p50)}" title="{spread.words(ratio)}"'
                cells.append(f"<td {kind}>{ratio(spread.p50)}&#8239;{sign}</td>")
            else:
                entry = facts.of.get((case, provider)) if case else None
                words = entry.status if entry and entry.status != "ok" else ""
                why = escape(entry.why) if entry else "not in the file"
                cells.append(f'<td class="none" title="{why}">{escape(words)}</td>')
        rows.append(f'<tr><th scope="row">{B}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{H}</th>' for H in hidden)
    name = f"<strong>{escape(provider)}</strong>, {how_words(how)}"
    return (
        f"<figure><figcaption>{name}</figcaption>"
        '<div class="scroll" tabindex="0" role="region" '
        f'aria-label="speed-up of {escape(provider)}, {how_words(how)}, {escape(group.label)}"><table class="map"><thead><tr>'
        f'<th class="corner">B \\ H</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></figure>"
    )


def _scale() -> str:
    names = ["below 0.5", *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(LEVELS)), "2 and more"]
    cells = "".join(f'<td class="d{level}">{name}</td>' for level, name in zip(range(-4, 5), names, strict=True))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="colours"><table class="map scale-table"><tbody><tr>'
        f"{cells}</tr></tbody></table></div>"
    )


def _heat_maps(facts: Facts) -> str:
    parts = []
    warm = [how for how in facts.hows if how[1] == "warm"]
    for group in facts.groups("H", "B"):
        maps = [_heat_map(facts, group, provider, how) for provider in facts.providers for how in warm]
        if maps := [one for one in maps if one]:
            parts.append(f'<h3>{escape(group.label)}</h3><div class="maps">{"".join(maps)}</div>')
    intro = (
        f"Time of {BASELINE} over that of the provider, warm L2: above 1 the provider is faster. "
        "▲ faster, ▼ slower, = within the spread of the timings."
    )
    body = "".join(parts) if parts else "<p>No two cases differ in H or B alone.</p>"
    return _section("Speed-up by H and B", f"<p>{intro}</p>{_scale() if parts else ''}{body}")


def _section(heading: str, body: str) -> str:
    return f'<section><h2 id="{slug(heading)}">{escape(heading)}</h2>{body}</section>'


def _points(facts: Facts, group: Group, provider: str, axis: str, value: Callable[[Entry], Spread | None]) -> list:
    """(x, spread) of each case of `group` for which the provider has a value."""
    points = []
    for case in group.cases:
        entry = facts.of.get((case, provider))
        if entry and entry.status == "ok" and (spread := value(entry)):
            points.append((getattr(case, axis), spread))
    return points


def _a_step(entry: Entry) -> Spread | None:
    return Spread(*(p / entry.case.T for p in vars(entry.time).values())) if entry.time else None


def _chart(facts: Facts, group: Group, axis: str, what: str) -> str | None:
    """Time a step, or memory, of every provider that has any in `group`, over `axis`.

    Memory is what is kept for backward, in inference the peak.
    """
    kept = any(facts.of[pair].saved_bytes for pair in facts.of if pair[0] in group.cases)

    def memory(entry: Entry) -> Spread | None:
        amount = entry.saved_bytes if kept else entry.peak_bytes
        return Spread(*[amount / 2**20] * 3) if amount else None

    found = [(name, _points(facts, group, name, axis, _a_step if what == "time" else memory)) for name in facts.providers]
    series = [Series(name, points, facts.providers.index(name) % 8) for name, points in found if points]
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
    legend = "".join(f"<li>{key_mark(one.style)}{escape(one.name)}</li>" for one in series)
    chart = line_chart(f"{group.label}: {y_label} over {AXES[axis]}", AXES[axis], y_label, series, floors, unit)
    return f'<figure><figcaption>{escape(group.label)}</figcaption><ul class="legend">{legend}</ul>{chart}</figure>'


def _charts(facts: Facts, axis: str, what: str) -> Iterator[tuple[bool, str]]:
    """Charts over `axis`, of cases that differ in nothing else; first (True) the fullest of those that differ in H or B alone,
    in the middle of them."""
    families: dict[str, list[Group]] = {}
    for group in facts.groups(axis):
        if len({getattr(case, axis) for case in group.cases}) > 1:
            families.setdefault(describe(group.cases[0], tuple({"H", "B", "I", axis})), []).append(group)
    for groups in families.values():
        most = max(len(group.cases) for group in groups)
        full = [group for group in groups if len(group.cases) == most]
        first = full[(len(full) - 1) // 2]
        for group in groups:
            if chart := _chart(facts, group, axis, what):
                yield group is first, chart


def _chart_section(facts: Facts, heading: str, intro: str, axis: str, what: str = "time") -> str:
    charts = list(_charts(facts, axis, what))
    if not charts:
        return ""
    shown = "".join(chart for first, chart in charts if first)
    rest = [chart for first, chart in charts if not first]
    more = (
        f'<details><summary>{len(rest)} more, at other sizes</summary><div class="charts">{"".join(rest)}</div></details>'
        if rest else ""
    )  # fmt: skip
    return _section(heading, f'<p>{escape(intro)}</p><div class="charts">{shown}</div>{more}')


def render(facts: Facts, title: str, lead: str, tables: dict[str, list[Table]]) -> str:
    """The page. `tables`: "first", before the charts, and "last"."""
    how = how_words(facts.hows[0] if facts.hows else MAIN)
    spread = f"Markers are medians, {how}; whiskers reach from the 20th to the 80th percentile."
    source = "No floor: it is known for GPUs only."
    if facts.ceilings:
        source = "Shaded: below the floor, the largest of three terms (dashed): FLOPs, bytes and exchange. Ceilings: "
        source += f"{facts.ceilings.source}."
    kept = "Kept for backward in training, the peak of a call in inference."
    sections = [
        *(_table(table) for table in tables["first"]),
        _heat_maps(facts),
        *(_chart_section(facts, f"Time a step over {AXES[axis]}", f"{spread} {source}", axis) for axis in "HTB"),
        _chart_section(facts, "Memory over time steps T", kept, "T", "memory"),
        *(_table(table) for table in tables["last"]),
    ]
    body = "".join(sections)
    headings = [part.split("</h2>")[0].split(">")[-1] for part in sections if part]
    links = "".join(f'<li><a href="#{slug(heading)}">{heading}</a></li>' for heading in headings)
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{style}</style></head><body><header><h1>{escape(title)}</h1><p>{escape(lead)}</p>"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav></header><main>{body}</main>'
        "<footer>Written by python -m benchmarks.report.</footer></body></html>\n"
    )
