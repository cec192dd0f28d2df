"""How is a chart drawn, as SVG within a page that needs nothing else?

What a reader can't tell by colour, dashes and markers tell; every chart has a label in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil, floor, inf, log10

import msgspec

from paceline.markup import Markup, plain, tag


class Axis(msgspec.Struct, frozen=True):
    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    warp: Callable[[float], float] = float

    def place(self, value: float) -> float:
        """From 0 at the low end to 1 at the high one; what lies outside stays at the end."""
        low, high = self.warp(self.low), self.warp(self.high)
        within = min(max(value, self.low), self.high)
        return (self.warp(within) - low) / (high - low)


class Point(msgspec.Struct, frozen=True):
    x: float
    y: float | None
    """None: nothing is known here, and the line is broken."""
    low: float | None = None
    high: float | None = None
    """An interval around y."""


class Line(msgspec.Struct, frozen=True):
    name: str
    style: int
    points: Sequence[Point]
    faint: bool = False
    """Only there to compare with."""


class Band(msgspec.Struct, frozen=True):
    """A stretch of the x axis; a moment if both ends are the same."""

    low: float
    high: float
    label: str


class Rule(msgspec.Struct, frozen=True):
    """A value on the y axis that means something."""

    y: float
    label: str


class Frame(msgspec.Struct, frozen=True):
    """Where a chart stands in its picture, in pixels."""

    width: float = 520
    height: float = 250
    left: float = 52
    right: float = 14
    top: float = 20
    bottom: float = 38

    def x(self, share: float) -> float:
        return self.left + share * (self.width - self.left - self.right)

    def y(self, share: float) -> float:
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


WIDE = Frame()
SMALL = Frame(width=350, height=170, left=46, top=18, bottom=34)

LETTER = 6.0
"""Pixels that a letter of a label takes, about."""
COLOURS = 8
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2 1 2 1 2")
MARKERS = ("circle", "square", "diamond", "up", "down", "bow")
"""Colours, dashes and markers come in turns; with 8, 5 and 6 no two of 120 lines are alike."""

HATCHES = ("", "M0 6L6 0", "M3 0V6", "M0 0L6 6", "M0 6L6 0M0 0L6 6", "M0 3H6", "M0 1H6M0 4H6")


def chart(
    about: str,
    x: Axis,
    y: Axis,
    lines: Sequence[Line],
    bands: Sequence[Band] = (),
    rules: Sequence[Rule] = (),
    frame: Frame = WIDE,
    markers: int = 6,
) -> Markup:
    """Lines over two axes, each with about so many markers. `about` says in words what is seen."""
    parts = [
        *(_band(band, x, frame) for band in bands),
        _grid(x, y, frame),
        *(_line(line, x, y, frame, markers) for line in lines),
        *(_rule(rule, y, frame) for rule in rules if y.low <= rule.y <= y.high),
        *_band_labels(bands, x, frame),
    ]
    box = f"0 0 {plain(frame.width)} {plain(frame.height)}"
    return tag("svg", *parts, viewBox=box, role="img", aria_label=about)


def bar(
    parts: Iterable[tuple[str, float]],
    low: float | None = None,
    high: float | None = None,
    width: float = 260,
) -> Markup:
    """Shares of the width in a row, filled as named, and an interval of where they end."""
    drawn, start = [], 0.0
    for name, part in parts:
        size = {"x": start * width, "width": part * width}
        drawn.append(tag("rect", class_=f"fill-{name}", y=3, height=12, **size))
        start += part
    if low is not None and high is not None:
        left, right = (min(max(end, 0.0), 1.0) * (width - 2) + 1 for end in (low, high))
        way = f"M{plain(left)} 5V13M{plain(left)} 9H{plain(right)}M{plain(right)} 5V13"
        drawn.append(tag("path", d=way, class_="whisker"))
    box = f"0 0 {plain(width)} 18"
    return tag("svg", *drawn, width=width, height=18, viewBox=box, class_="bar", aria_hidden="true")


def patterns(names: Sequence[str]) -> Markup:
    """Fills that differ by more than colour, for all pictures of a page: `fill-NAME` of `bar`."""
    fills = []
    for name, hatch in zip(names, HATCHES, strict=False):
        ground = tag("rect", width=6, height=6, class_=f"ground-{name}")
        lines = tag("path", d=hatch, class_="hatch")
        size = {"width": 6.0, "height": 6.0}
        fills.append(
            tag("pattern", ground, lines, id=f"fill-{name}", patternUnits="userSpaceOnUse", **size)
        )
    return tag("svg", tag("defs", *fills), width=0, height=0, class_="unseen", aria_hidden="true")


def sample(style: int) -> Markup:
    """A line's look, for a legend."""
    path = _path([(1, 6), (33, 6)], style)
    drawn = tag("g", path, _marker(17, 6, style), class_=f"line c{style % COLOURS}")
    return tag("svg", drawn, width=34, height=12, viewBox="0 0 34 12", aria_hidden="true")


def linear_axis(
    label: str, low: float, high: float, show: Callable[[float], str] = "{:g}".format
) -> Axis:
    """With about five ticks, at multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    ticks = [round(n * step, 12) for n in range(first, last + 1)]
    return Axis(label, low, high, tuple((tick, show(tick)) for tick in ticks))


def log_axis(label: str, low: float, high: float, show: Callable[[float], str]) -> Axis:
    """With ticks at simple multiples of powers of ten: the fewer, the more powers there are."""
    decades = log10(high / low)
    factors = next(factors for most, factors in TICKS if decades < most)
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    shown = tuple((tick, show(tick)) for tick in ticks if low <= tick <= high)
    return Axis(label, low, high, shown, log10)


TICKS = ((1.0, (1, 1.5, 2, 3, 5, 7)), (2.0, (1, 2, 5)), (3.0, (1, 3)), (inf, (1,)))
"""By decades of a logarithmic axis."""


def nines_axis(label: str, high: float) -> Axis:
    """Shares of which 0.9, 0.99 and 0.999 stand equally far apart: where promises break."""
    shares = (0.0, 0.5, 0.9, 0.99, 0.999)
    ticks = tuple((share, f"{share * 100:g}") for share in shares if share <= high)
    return Axis(label, 0.0, high, ticks, lambda share: -log10(1 - share))


def names_axis(label: str, names: Sequence[str]) -> Axis:
    """Names side by side, at 0, 1, 2, ..."""
    ticks = tuple((float(i), name) for i, name in enumerate(names))
    return Axis(label, -0.5, len(names) - 0.5, ticks)


def _grid(x: Axis, y: Axis, frame: Frame) -> Markup:
    """Ticks, their labels, and what the axes mean."""
    left, right, bottom, top = frame.x(0), frame.x(1), frame.y(0), frame.y(1)
    parts = [
        tag("text", y.label, x=2, y=11),
        tag("text", x.label, x=right, y=frame.height - 4, class_="end"),
    ]
    for value, text in y.ticks:
        at = frame.y(y.place(value))
        parts.append(_stroke([(left, at), (right, at)], "grid"))
        parts.append(tag("text", text, x=left - 6, y=at + 4, class_="end"))
    for value, text in x.ticks:
        at = frame.x(x.place(value))
        parts.append(_stroke([(at, bottom), (at, bottom + 4)], "rim"))
        parts.append(tag("text", text, x=at, y=bottom + 16, class_="middle"))
    return tag("g", *parts, _stroke([(left, top), (left, bottom), (right, bottom)], "rim"))


def _line(line: Line, x: Axis, y: Axis, frame: Frame, markers: int) -> Markup:
    spots: list[list[tuple[float, float]]] = [[]]
    whiskers = []
    for point in line.points:
        if point.y is None:
            spots.append([])
            continue
        at = frame.x(x.place(point.x))
        spots[-1].append((at, frame.y(y.place(point.y))))
        if point.low is not None and point.high is not None:
            ends = [(at, frame.y(y.place(end))) for end in (point.low, point.high)]
            whiskers.append(_stroke(ends, "whisker"))
    paths = [_path(piece, line.style) for piece in spots if len(piece) > 1]
    places = [spot for piece in spots for spot in piece]
    every = max(1, len(places) // markers) if markers else 0
    marked = places[every // 2 :: every] if every and not line.faint else ()
    marks = [_marker(*spot, line.style) for spot in marked]
    look = "faint" if line.faint else f"line c{line.style % COLOURS}"
    return tag("g", tag("title", line.name), *whiskers, *paths, *marks, class_=look)


def _band(band: Band, x: Axis, frame: Frame) -> Markup:
    left, right = frame.x(x.place(band.low)), frame.x(x.place(band.high))
    top, bottom = frame.y(1), frame.y(0)
    title = tag("title", band.label)
    if right - left < 1:
        return tag("g", title, _stroke([(left, top), (left, bottom)], "moment"))
    size = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    return tag("rect", title, class_="band", **size)


def _band_labels(bands: Sequence[Band], x: Axis, frame: Frame) -> list[Markup]:
    """Each label once, above the chart; one that would cover another stands below it."""
    labels: dict[str, Markup] = {}
    free_from = [0.0, 0.0]
    for band in sorted(bands, key=lambda band: band.low):
        wide = LETTER * len(band.label)
        at = min(frame.x(x.place(band.low)) + 3, frame.x(1) - wide)
        row = next((row for row, free in enumerate(free_from) if free <= at), None)
        if row is not None and band.label not in labels:
            free_from[row] = at + wide + LETTER
            place = {"x": at, "y": frame.y(1) - 5 + 13 * row}
            labels[band.label] = tag("text", band.label, class_="remark", **place)
    return list(labels.values())


def _rule(rule: Rule, y: Axis, frame: Frame) -> Markup:
    at = frame.y(y.place(rule.y))
    line = _stroke([(frame.x(0), at), (frame.x(1), at)], "rule")
    return tag("g", line, tag("text", rule.label, x=frame.x(0) + 5, y=at - 4, class_="remark"))


def _path(spots: Sequence[tuple[float, float]], style: int) -> Markup:
    return _stroke(spots, "", DASHES[style % len(DASHES)])


def _stroke(spots: Sequence[tuple[float, float]], look: str, dashes: str = "") -> Markup:
    way = "M" + "L".join(f"{plain(x)} {plain(y)}" for x, y in spots)
    named = {"class_": look} if look else {}
    dashed = {"stroke_dasharray": dashes} if dashes else {}
    return tag("path", d=way, **named, **dashed)


def _marker(x: float, y: float, style: int) -> Markup:
    shape = MARKERS[style % len(MARKERS)]
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=3)
    corners = {
        "square": ((-3, -3), (3, -3), (3, 3), (-3, 3)),
        "diamond": ((0, -4), (4, 0), (0, 4), (-4, 0)),
        "up": ((0, -4), (4, 3), (-4, 3)),
        "down": ((0, 4), (4, -3), (-4, -3)),
        "bow": ((-4, -3), (4, 3), (4, -3), (-4, 3)),
    }[shape]
    return tag("polygon", points=" ".join(f"{plain(x + dx)},{plain(y + dy)}" for dx, dy in corners))
