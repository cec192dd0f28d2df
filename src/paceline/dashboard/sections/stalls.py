"""When did tokens come late, and by whose fault?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log

from paceline import words
from paceline.dashboard.causes import look, named
from paceline.dashboard.parts import View, empty, missing, section, short_names, table
from paceline.dashboard.said import Stall, Stalls
from paceline.dashboard.sections.tokens import INNER, LEFT, RIGHT, WIDTH, Times
from paceline.dashboard.shape import Lane, by_cause, lanes
from paceline.dashboard.source import Missing
from paceline.markup import Markup, join, tag

LANES = 12
LANE, TALL = 26.0, 96.0
"""Pixels: a lane among others, and one of its own."""
LEAST_S, MOST_S = 0.01, 10.0
"""Lateness that is drawn as a dot, and as high as the lane."""
BAR = 3.0
"""Pixels that a stall is wide."""
NOTHING_LATE = (
    "No single gap was late, no first token, and no answer that has ended.",
    "A gap is late beyond its tier's worst gap; where none is promised, beyond three times its "
    "ITL. The mean of an answer is judged at its end.",
)


def stalls(answer: Stalls | Missing, view: View, times: Times) -> Markup:
    """The section over all workers: those that lost most, a lane each."""
    title = "Late tokens by cause"
    if isinstance(answer, Missing):
        return section("stalls", title, missing(answer, "record of late tokens"))
    shown = lanes(answer.workers, times.begin, LANES)
    if not shown:
        return section("stalls", title, empty(*NOTHING_LATE))
    names = short_names([lane.worker for lane in shown])
    height = LANE * len(shown)
    drawn = [times.ticks(height + 4, height)]
    for i, lane in enumerate(shown):
        base = LANE * (i + 1)
        drawn.append(_lane(lane.stalls, times, base, LANE - 5))
        drawn.append(_label(lane, names[lane.worker], base, view))
    everything = by_cause(stall for lane in shown for stall in lane.stalls)
    about = "Late tokens of the workers that lost most: " + _told(everything)
    return section(
        "stalls",
        title,
        legend(everything),
        _svg(drawn, height + 26, about),
        note="The workers that lost most; height is how late, on a logarithmic scale; "
        "at the right all of it.",
    )


def timeline(found: Sequence[Stall], times: Times) -> Markup:
    """One worker's, tall."""
    late = [stall for stall in found if stall.at >= times.begin]
    if not late:
        return empty(*NOTHING_LATE)
    lost = by_cause(late)
    scale = []
    for seconds in (LEAST_S, 0.1, 1.0, MOST_S):
        y = 4 + TALL - TALL * _height(seconds)
        scale.append(tag("path", d=f"M{LEFT:g} {y:.1f}h{INNER:g}", class_="grid"))
        label = words.promised(seconds)
        scale.append(tag("text", label, x=LEFT - 8, y=y + 4, class_="end"))
    drawn = [times.ticks(TALL + 4, TALL), *scale, _lane(late, times, 4 + TALL, TALL)]
    chart = _svg(drawn, TALL + 26, "Late tokens over time: " + _told(lost))
    return join([legend(lost), chart])


def newest(found: Sequence[Stall], most: int = 8) -> Markup:
    """The last ones in words."""
    rows = []
    for stall in sorted(found, key=lambda stall: -stall.at)[:most]:
        split = ", ".join(
            f"{words.plainly(cause)} {words.seconds(late_s)}"
            for cause, late_s in sorted(stall.split.items(), key=lambda item: -item[1])
        )
        rows.append(
            [
                words.clock(stall.at),
                WHAT.get(stall.what, stall.what),
                words.seconds(stall.seconds),
                words.seconds(stall.late_s),
                named(stall.cause),
                split,
                words.count(stall.streams),
            ]
        )
    heads = ["time", "what ", "took", "too late by", "cause ", "of which ", "streams"]
    return table(heads, rows, "log", "The newest")


WHAT = {
    "step": "gap of all its streams",
    "stream": "gap of one stream",
    "first_token": "first token",
    "mean": "all gaps of an answer",
}


def legend(lost: dict[str, float]) -> Markup:
    """Every cause that occurs, in words, with what it took."""
    items = [
        tag("li", named(cause), " ", tag("b", words.seconds(late_s)))
        for cause, late_s in lost.items()
    ]
    return tag("ul", *items, class_="legend")


def _svg(drawn: Iterable[Markup], height: float, about: str) -> Markup:
    box = f"0 0 {WIDTH:g} {height:g}"
    return tag(
        "figure", tag("svg", *drawn, viewBox=box, role="img", aria_label=about, class_="chart")
    )


def _label(lane: Lane, name: str, base: float, view: View) -> Markup:
    link = tag(
        "a",
        tag("text", name[-10:], x=LEFT - 8, y=base - 6, class_="end"),
        href=view.link("worker", worker=lane.worker),
        aria_label=f"{lane.worker}: {words.seconds(lane.late_s)} late",
    )
    lost = tag("text", words.seconds(lane.late_s), x=WIDTH - RIGHT + 8, y=base - 6, class_="name")
    return tag("g", link, lost)


def _lane(found: Iterable[Stall], times: Times, base: float, tall: float) -> Markup:
    """A bar a stall, its parts stacked by their share; one path for each cause."""
    ways: dict[str, list[str]] = {}
    for stall in found:
        x = min(times.x(stall.at), WIDTH - RIGHT - BAR)
        high = max(tall * _height(stall.late_s), 2.0)
        split = stall.split or {stall.cause: 1.0}
        total, up = sum(split.values()) or 1.0, base
        for cause, part in sorted(split.items(), key=lambda item: -item[1]):
            size = high * part / total
            if size >= 0.5:
                ways.setdefault(cause, []).append(
                    f"M{x:.1f} {up:.1f}h{BAR:g}v{-size:.1f}h{-BAR:g}z"
                )
                up -= size
    floor = tag("path", d=f"M{LEFT:g} {base:g}h{INNER:g}", class_="grid")
    drawn = [
        tag("path", tag("title", words.plainly(cause)), d="".join(way), **look(cause))
        for cause, way in ways.items()
    ]
    return tag("g", floor, *drawn)


def _height(late_s: float) -> float:
    share = log(max(late_s, LEAST_S) / LEAST_S) / log(MOST_S / LEAST_S)
    return min(0.06 + 0.94 * share, 1.0)


def _told(lost: dict[str, float]) -> str:
    return ", ".join(f"{words.plainly(c)} {words.seconds(s)}" for c, s in lost.items())
