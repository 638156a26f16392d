"""Line charts on logarithmic axes as SVG text. Colours come from the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from benchmarks.report.facts import Spread, figure

__all__ = ["MARKERS", "Series", "key_mark", "line_chart"]

WIDTH, HEIGHT = 490, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 80, 12, 44
ROOM = 50
MARKERS = ("circle", "square", "triangle", "diamond", "down", "cross", "plus", "bar")


@dataclass(frozen=True)
class Series:
    """A line with its spread. `style`: which colour and marker."""

    name: str
    points: list[tuple[float, Spread]]
    style: int


def _marker(style: int, x: float, y: float, title: str = "") -> str:
    shape = MARKERS[style % len(MARKERS)]
    r = 4.2
    if shape == "circle":
        body = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"'
    elif shape == "square":
        body = f'<rect x="{x - r + 0.5:.1f}" y="{y - r + 0.5:.1f}" width="{2 * r - 1:.1f}" height="{2 * r - 1:.1f}"'
    else:
        paths = {
            "triangle": "M0,-5L4.8,3.6H-4.8Z",
            "down": "M0,5L4.8,-3.6H-4.8Z",
            "diamond": "M0,-5.2L5.2,0L0,5.2L-5.2,0Z",
            "cross": "M-4,-4L4,4M-4,4L4,-4",
            "plus": "M-5,0H5M0,-5V5",
            "bar": "M-5,-1.6H5V1.6H-5Z",
        }
        body = f'<path d="{paths[shape]}" transform="translate({x:.1f} {y:.1f})"'
    return f'{body} class="mark s{style}"><title>{escape(title)}</title>{_end(body)}'


def _end(body: str) -> str:
    return f"</{body[1 : body.index(' ')]}>"


def key_mark(style: int) -> str:
    """The marker of a legend, with its line."""
    return (
        f'<svg class="key" viewBox="0 0 30 14" width="30" height="14" aria-hidden="true">'
        f'<path d="M1,7H29" class="line s{style}"/>{_marker(style, 15, 7)}</svg>'
    )


class _Axis:
    """A logarithmic axis from pixel `begin` to `end`."""

    def __init__(self, values: list[float], begin: float, end: float, room: float):
        low, high = math.log(min(values)), math.log(max(values))
        pad = max(room * (high - low), 0.12)
        self.low, self.high, self.begin, self.end = low - pad, high + pad, begin, end

    def at(self, value: float) -> float:
        return self.begin + (math.log(value) - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """1, 2, 5 of each decade, or the decades alone where those are many, or what divides a short axis."""
        low, high = math.exp(self.low), math.exp(self.high)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(x / 10 for x in range(10, 100))):
            found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
            if len(found) >= 4:
                break
        return found[:: math.ceil(len(found) / 9)]


def _spaced(ticks: list[float], axis: _Axis, gap: float) -> list[float]:
    """Those whose labels do not touch."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or abs(axis.at(tick) - axis.at(kept[-1])) >= gap:
            kept.append(tick)
    return kept


def number(value: float) -> str:
    """As short as it can be said."""
    for unit, least, suffix in ((1e6, 1e6, "M"), (1e3, 1e4, "k")):
        if value >= least:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}" if value >= 1 else f"{value:.3g}"


def _apart(labels: list[tuple[float, str, str]], least: float) -> list[tuple[float, str, str]]:
    """(y, text, class), moved down until none touches the one above, and all up where that runs below the plot."""
    placed: list[tuple[float, str, str]] = []
    for y, text, kind in sorted(labels):
        placed.append((max(y, placed[-1][0] + least) if placed else y, text, kind))
    over = max(0.0, placed[-1][0] - (HEIGHT - BOTTOM)) if placed else 0.0
    return [(y - over, text, kind) for y, text, kind in placed]


def line_chart(
    title: str, x_label: str, y_label: str, series: list[Series], floors: dict[str, list[tuple[float, float]]], unit: str
) -> str:
    """Spreads over x; beneath them the terms of the floor by name, dashed, and the region below the largest of them, shaded.

    Args:
        title: for those who cannot see the chart.
        x_label, y_label: of the axes, with the unit.
        series: what was measured.
        floors: points of each term, at every x; what lies more than `ROOM` times below the fastest is not drawn.
        unit: of the values, for the tooltips.
    """
    xs = sorted({x for one in series for x, _ in one.points})
    ys = [y for one in series for _, s in one.points for y in (s.p20, s.p80)]
    floors = {name: [point for point in points if point[0] in xs] for name, points in floors.items()}
    lowest = min(ys) / ROOM  # a floor far below would squeeze all else
    top = [(x, max(y for points in floors.values() for at, y in points if at == x)) for x in xs] if floors else []
    terms = {name: points for name, points in floors.items() if any(y > lowest for _, y in points)}
    ys += [max(y, lowest) for points in terms.values() for _, y in points] if terms else [min(ys) / 1.6] * bool(top)
    x_axis, y_axis = _Axis(xs, LEFT, WIDTH - RIGHT, 0.04), _Axis(ys, HEIGHT - BOTTOM, TOP, 0.06)

    def path(points: list[tuple[float, float]]) -> str:
        return "L".join(f"{x_axis.at(x):.1f},{y_axis.at(max(y, lowest / 1e3)):.1f}" for x, y in points)

    bottom = HEIGHT - BOTTOM
    out = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    for tick in _spaced(y_axis.ticks(), y_axis, 15):
        y = y_axis.at(tick)
        out.append(f'<path d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}" class="grid"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="tick end">{number(tick)}</text>')
    for tick in _spaced(xs, x_axis, 34):
        x = x_axis.at(tick)
        out.append(f'<path d="M{x:.1f},{bottom}v4" class="axis"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 17}" class="tick middle">{number(tick)}</text>')
    out.append(f'<path d="M{LEFT},{TOP}V{bottom}H{WIDTH - RIGHT}" class="axis"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="name middle">{escape(x_label)}</text>')
    half = (TOP + bottom) / 2
    out.append(f'<text transform="translate(13 {half}) rotate(-90)" class="name middle">{escape(y_label)}</text>')
    labels = []
    if terms:
        first, last, width, height = x_axis.at(xs[0]), x_axis.at(xs[-1]), WIDTH - RIGHT - LEFT, bottom - TOP
        out.append(f'<svg x="{LEFT}" y="{TOP}" width="{width}" height="{height}" viewBox="{LEFT} {TOP} {width} {height}">')
        below = f"M{first:.1f},{bottom}L{path(top)}L{last:.1f},{bottom}Z"
        out.append(f'<path d="{below}" class="below"><title>below the floor</title></path>')
        out.append(f'<path d="M{path(top)}" class="floor"/>')
        for i, (name, points) in enumerate(terms.items()):
            out.append(f'<path d="M{path(points)}" class="term t{i}"><title>{escape(name)}</title></path>')
            if points[-1][1] > lowest:
                labels.append((y_axis.at(points[-1][1]) + 4, name, "tick"))
        out.append("</svg>")
    elif top:
        words = f"floor far below: {number(min(top)[1])} to {number(max(top)[1])} {unit}"
        out.append(f'<text x="{LEFT + 8}" y="{bottom - 8}" class="tick">{words}</text>')
    for y, text, kind in _apart(labels, 13):
        out.append(f'<text x="{WIDTH - RIGHT + 5}" y="{y:.1f}" class="{kind}">{escape(text)}</text>')
    for one in series:
        points = sorted(one.points, key=lambda point: point[0])
        out.append(f'<path d="M{path([(x, s.p50) for x, s in points])}" class="line s{one.style}"/>')
        for value, s in points:
            x = x_axis.at(value)
            out.append(f'<path d="M{x:.1f},{y_axis.at(s.p20):.1f}V{y_axis.at(s.p80):.1f}" class="whisker s{one.style}"/>')
            words = f"{one.name}, {x_label.split(' (')[0]} = {value:g}: {figure(s.p50)} {unit}"
            if s.p20 != s.p80:
                words += f" ({figure(s.p20)} to {figure(s.p80)})"
            out.append(_marker(one.style, x, y_axis.at(s.p50), words))
    return "".join([*out, "</svg>"])
