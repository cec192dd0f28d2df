"""How slow were tokens over time? A heat map, with the promises and two quantiles drawn in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, log, log2

import msgspec

from paceline import words
from paceline.dashboard.heat import LEVELS, Heat, heat
from paceline.dashboard.parts import SPANS, View, chips, empty, missing, section
from paceline.dashboard.said import History, Tier, Tiers
from paceline.dashboard.source import Missing
from paceline.markup import Markup, join, tag

WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 1200.0, 66.0, 64.0, 8.0, 17.0, 22.0
"""Pixels; charts over time share them, so that they line up."""
INNER = WIDTH - LEFT - RIGHT
LEAST_S = 60.0
"""The shortest time that is looked back."""
TICKS_S = (5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


Height = Callable[[float], float]
"""From seconds to pixels."""


class Times(msgspec.Struct, frozen=True):
    """The axis of time, from left to right."""

    begin: float
    end: float

    def x(self, at: float) -> float:
        span = max(self.end - self.begin, 1e-9)
        return LEFT + INNER * min(max((at - self.begin) / span, 0.0), 1.0)

    def ticks(self, y: float, height: float) -> Markup:
        """Times of the day below, about eight of them, and lines up to the top."""
        step = next((s for s in TICKS_S if s >= (self.end - self.begin) / 9), TICKS_S[-1])
        drawn = []
        at = ceil(self.begin / step) * step
        while at <= self.end:
            x = self.x(at)
            drawn.append(tag("path", d=f"M{x:.1f} {y - height:.1f}V{y + 4:.1f}", class_="grid"))
            text = words.clock(at)
            drawn.append(tag("text", text[:5] if step >= 60 else text, x=x, y=y + 16, class_="mid"))
            at += step
        return tag("g", *drawn)


def times_of(answer: History | Missing, span_s: float, at: float) -> Times:
    """What all charts over time look back to: no further than there is something to see."""
    begin = at - span_s
    if isinstance(answer, Missing) or not answer.slots:
        return Times(begin, at)
    return Times(max(begin, min(answer.slots[0].begin, at - LEAST_S)), at)


def tokens(answer: History | Missing, tiers: Tiers | Missing, view: View, times: Times) -> Markup:
    """The section over all workers."""
    title = "Inter-token latency"
    if isinstance(answer, Missing):
        return section("tokens", title, missing(answer, "history"))
    spans = [
        (words.span(seconds), view.link("tokens", span=name), view.seconds == seconds)
        for name, seconds in SPANS.items()
    ]
    note = "Share of tokens by the gap before them. Lines: median and 99th percentile."
    chart = heat_of(answer, tiers, "all workers", times)
    return section("tokens", title, chips("Looking back", spans), chart, note=note)


def heat_of(history: History, tiers: Tiers | Missing, whose: str, times: Times) -> Markup:
    """The chart, or why there is none."""
    bounds = [] if isinstance(tiers, Missing) else [t for t in tiers.tiers if t.promise.itl_s]
    grid = heat(history, [tier.promise.itl_s or 0.0 for tier in bounds])
    if not grid.tokens:
        return empty("No tokens yet.", f"None came from {whose} in this time.")
    return _chart(grid, bounds, whose, times)


def _chart(grid: Heat, tiers: Sequence[Tier], whose: str, times: Times) -> Markup:
    rows = len(grid.bounds_s) - 1
    height = rows * ROW
    low, top = log(grid.bounds_s[0]), log(grid.bounds_s[-1])

    def y(seconds: float) -> float:
        share = (log(max(seconds, 1e-9)) - low) / (top - low)
        return TOP + height * (1.0 - min(max(share, 0.0), 1.0))

    about = f"Heat map of inter-token latency of {whose}"
    last = next((c for c in reversed(grid.columns) if c.p50 is not None), None)
    if last is not None:
        about += f": median now {words.seconds(last.p50)}, p99 {words.seconds(last.p99)}"
    box = f"0 0 {WIDTH:g} {TOP + height + BOTTOM:g}"
    return tag(
        "figure",
        tag(
            "svg",
            tag("rect", x=LEFT, y=TOP, width=INNER, height=height, class_="ground"),
            _cells(grid, times, rows),
            times.ticks(TOP + height, height),
            _scale(grid, y),
            _line([(times.x(c.at + c.seconds / 2), c.p50) for c in grid.columns], y, "p50"),
            _line([(times.x(c.at + c.seconds / 2), c.p99) for c in grid.columns], y, "p99"),
            _bounds(tiers, y),
            viewBox=box,
            role="img",
            aria_label=about,
            class_="chart heat",
        ),
        tag("figcaption", _legend()),
    )


def _cells(grid: Heat, times: Times, rows: int) -> Markup:
    """One path a level: few elements, however many cells."""
    ways: dict[int, list[str]] = {}
    for column in grid.columns:
        left, right = times.x(column.at), times.x(column.at + column.seconds)
        for row, level in enumerate(column.levels):
            if level:
                up = TOP + (rows - 1 - row) * ROW
                way = f"M{left:.1f} {up:g}H{right:.1f}v{ROW:g}H{left:.1f}z"
                ways.setdefault(level, []).append(way)
    return tag(
        "g",
        *(tag("path", d="".join(way), class_=f"h{level}") for level, way in sorted(ways.items())),
    )


def _scale(grid: Heat, y: Height) -> Markup:
    """A label at every doubling of a millisecond."""
    doublings = [log2(bound * 1e3) for bound in grid.bounds_s]
    shown = [2.0 ** round(n) / 1e3 for n in doublings[1:-1] if abs(n - round(n)) < 0.01]
    labels = [(b, f"{b * 1e3:g} ms" if b < 1.0 else f"{b:.0f} s") for b in shown]
    return tag(
        "g", *(tag("text", text, x=LEFT - 8, y=y(b) + 4, class_="end") for b, text in labels)
    )


def _line(points: Sequence[tuple[float, float | None]], y: Height, look: str) -> Markup:
    known = [(x, y(value)) for x, value in points if value is not None]
    if not known:
        return Markup("")
    way = "M" + "L".join(f"{x:.1f} {up:.1f}" for x, up in known)
    x, up = known[-1]
    return tag(
        "g",
        tag("path", d=way, class_=f"line {look} under"),
        tag("path", d=way, class_=f"line {look}"),
        tag("circle", cx=x, cy=up, r=3.0),
        tag("text", look, x=WIDTH - RIGHT + 8, y=up + 4, class_="name"),
    )


def _bounds(tiers: Sequence[Tier], y: Height) -> Markup:
    """What was promised, named at the right end; tiers of one bound share a label."""
    names: dict[float, list[str]] = {}
    for tier in tiers:
        if tier.promise.itl_s:
            names.setdefault(tier.promise.itl_s, []).append(tier.name)
    drawn = []
    for bound, of in names.items():
        up = y(bound)
        drawn.append(tag("path", d=f"M{LEFT:g} {up:.1f}H{WIDTH - RIGHT:g}", class_="bound"))
        label = ", ".join(of) + f" ≤ {words.promised(bound)}"
        drawn.append(tag("text", label, x=LEFT + 6, y=up - 4, class_="bound"))
    return tag("g", *drawn)


def _legend() -> Markup:
    steps = [
        tag("svg", tag("rect", width=22, height=11, class_=f"h{i + 1}"), width=22, height=11)
        for i in range(len(LEVELS))
    ]
    return join(["share of a moment's tokens: few ", *steps, f" over {LEVELS[-1]:.0%}"])
