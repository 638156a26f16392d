"""Layout of line charts on logarithmic axes. templates/chart.html draws them as SVG, in colours of the page's style sheet."""

import math
from typing import NamedTuple

from benchmarks.report.facts import Spread, figure

WIDTH, HEIGHT = 490, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 80, 12, 44
ROOM = 50  # a floor this many times below the fastest is not drawn: it would squeeze all else
MARKERS = (  # circle, square, triangle, diamond, triangle down, cross, plus, bar
    "M-4.2,0a4.2,4.2 0 1,0 8.4,0a4.2,4.2 0 1,0 -8.4,0Z", "M-3.7,-3.7h7.4v7.4h-7.4Z", "M0,-5L4.8,3.6H-4.8Z",
    "M0,-5.2L5.2,0L0,5.2L-5.2,0Z", "M0,5L4.8,-3.6H-4.8Z", "M-4,-4L4,4M-4,4L4,-4", "M-5,0H5M0,-5V5", "M-5,-1.6H5V1.6H-5Z",
)  # fmt: skip


class Series(NamedTuple):
    """A line with its spread. `style`: number of its colour and marker."""

    name: str
    points: list[tuple[float, Spread]]
    style: int


class _Axis:
    """A logarithmic axis from pixel `begin` to `end`."""

    def __init__(self, values: list[float], begin: float, end: float, room: float):
        low, high = math.log(min(values)), math.log(max(values))
        pad = max(room * (high - low), 0.12)
        self.low, self.high, self.begin, self.end = low - pad, high + pad, begin, end

    def at(self, value: float) -> float:
        return self.begin + (math.log(value) - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """The decades, divided until there are four ticks, or thinned to nine."""
        low, high = math.exp(self.low), math.exp(self.high)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(x / 10 for x in range(10, 100))):
            found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
            if len(found) >= 4:
                break
        return found[:: math.ceil(len(found) / 9)]

    def labels(self, ticks: list[float], gap: float) -> list[tuple[float, str]]:
        """(pixel, text) of the ticks whose labels do not touch."""
        kept: list[tuple[float, str]] = []
        for tick in ticks:
            if not kept or abs(self.at(tick) - kept[-1][0]) >= gap:
                kept.append((self.at(tick), number(tick)))
        return kept


def number(value: float) -> str:
    """The shortest text for a tick."""
    for unit, least, suffix in ((1e6, 1e6, "M"), (1e3, 1e4, "k")):
        if value >= least:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}" if value >= 1 else f"{value:.3g}"


def _apart(labels: list[tuple[float, str]], least: float) -> list[tuple[float, str]]:
    """(y, text), moved down until no label touches the one above, and all up if that runs below the plot."""
    placed: list[tuple[float, str]] = []
    for y, text in sorted(labels):
        placed.append((max(y, placed[-1][0] + least) if placed else y, text))
    over = max(0.0, placed[-1][0] - (HEIGHT - BOTTOM)) if placed else 0.0
    return [(y - over, text) for y, text in placed]


def layout(
    title: str, x_label: str, y_label: str, series: list[Series], floors: dict[str, list[tuple[float, float]]], unit: str
) -> dict:
    """Where everything stands: spreads over x, the terms of the floor, and the region below the largest of them.

    `title` says the chart in words, for those who cannot see it. `floors` has points of each term, at every x. `unit` is of the
    values, for the tooltips.
    """
    xs = sorted({x for one in series for x, _ in one.points})
    ys = [y for one in series for _, spread in one.points for y in (spread.p20, spread.p80)]
    floors = {name: [point for point in points if point[0] in xs] for name, points in floors.items()}
    lowest = min(ys) / ROOM
    top = [(x, max(y for points in floors.values() for at, y in points if at == x)) for x in xs] if floors else []
    terms = {name: points for name, points in floors.items() if any(y > lowest for _, y in points)}
    ys += [max(y, lowest) for points in terms.values() for _, y in points] if terms else [min(ys) / 1.6] * bool(top)
    x_axis, y_axis = _Axis(xs, LEFT, WIDTH - RIGHT, 0.04), _Axis(ys, HEIGHT - BOTTOM, TOP, 0.06)

    def path(points: list[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x_axis.at(x):.1f},{y_axis.at(max(y, lowest / 1e3)):.1f}" for x, y in points)

    def marks(one: Series) -> list[dict]:
        found = []
        for x, spread in sorted(one.points):
            words = f"{one.name}, {x_label.split(' (')[0]} = {x:g}: {figure(spread.p50)} {unit}"
            if spread.p20 != spread.p80:
                words += f" ({figure(spread.p20)} to {figure(spread.p80)})"
            low, y, high = map(y_axis.at, spread)
            found.append({"x": x_axis.at(x), "y": y, "low": low, "high": high, "words": words})
        return found

    lines = [
        {"style": one.style, "path": path([(x, spread.p50) for x, spread in sorted(one.points)]), "marks": marks(one)}
        for one in series
    ]
    far = f"floor far below: {number(min(top)[1])} to {number(max(top)[1])} {unit}" if top and not terms else ""
    ends = [(y_axis.at(points[-1][1]) + 4, name) for name, points in terms.items() if points[-1][1] > lowest]
    return {
        "title": title, "x_label": x_label, "y_label": y_label, "lines": lines, "far": far, "labels": _apart(ends, 13),
        "x_ticks": x_axis.labels(xs, 34), "y_ticks": y_axis.labels(y_axis.ticks(), 15),
        "terms": {name: path(points) for name, points in terms.items()}, "top": path(top) if terms else "",
        "first": x_axis.at(xs[0]), "last": x_axis.at(xs[-1]),
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "above": TOP, "right": WIDTH - RIGHT, "bottom": HEIGHT - BOTTOM,
    }  # fmt: skip
