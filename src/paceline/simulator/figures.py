"""Which charts show what came of a comparison?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite
from statistics import fmean

from paceline.markup import Markup, join, tag
from paceline.simulator.charts import (
    SMALL,
    Axis,
    Band,
    Line,
    Point,
    Rule,
    chart,
    linear_axis,
    log_axis,
    names_axis,
    nines_axis,
    sample,
)
from paceline.simulator.compare import Comparison, Estimate
from paceline.simulator.faults import times
from paceline.simulator.result import QUANTILES, Result, Times
from paceline.simulator.scenario import Fault, Scenario

HIGHEST = 0.999
"""The last share that quantile curves show."""
PLAIN = 15
"""A line style of an unobtrusive colour, without dashes."""
Styles = Mapping[str, int]
"""Which line style each policy has, in all charts."""


def legend(policies: Sequence[str], styles: Styles) -> Markup:
    items = (tag("li", sample(styles[name]), f" {name}") for name in policies)
    return tag("ul", *items, class_="legend")


def over_time(
    scenario: Scenario, comparison: Comparison, order: Sequence[str], styles: Styles
) -> Markup:
    """A panel a policy, with the first policy behind as a faint line; faults as shaded bands."""
    curves = {name: _attainment_series(comparison.of(name)) for name in order}
    least = min((p.y for points in curves.values() for p in points if p.y is not None), default=0.0)
    low = max(0.0, int(min(least, 89.9) / 10) * 10)
    results = comparison.results
    x = _time_axis(scenario, results[0])
    y = linear_axis("kept, %", low, 100.0)
    bands = list(_bands(scenario, x))
    first = next(iter(comparison.policies))
    behind = Line(first, styles[first], curves[first], faint=True)
    panels = [panel("Requests a second", _arrivals(results, x, bands))]
    for name in order:
        lines = [Line(name, styles[name], curves[name])]
        about = f"Share of promises kept over time with {name}"
        drawn = chart(about, x, y, [behind, *lines] if name != first else lines, bands, frame=SMALL)
        panels.append(panel(name, drawn))
    note = f"Pooled over seeds, by time of arrival. Faint: {first}." if len(order) > 1 else ""
    return join([tag("p", note, class_="note"), tag("div", *panels, class_="panels")])


def _attainment_series(runs: Sequence[Result]) -> list[Point]:
    points = []
    for slot, at in enumerate(_slot_times(runs[0])):
        arrivals = sum(run.series.arrivals[slot] for run in runs)
        kept = sum((run.series.attainment[slot] or 0) * run.series.arrivals[slot] for run in runs)
        points.append(Point(at, 100 * kept / arrivals if arrivals else None))
    return points


def _arrivals(results: Sequence[Result], x: Axis, bands: Sequence[Band]) -> Markup:
    """What all policies had to deal with."""
    slot_s = results[0].series.slot_s or 1.0
    slots = zip(*(result.series.arrivals for result in results), strict=True)
    rates = [fmean(slot) / slot_s for slot in slots]
    points = [Point(at, y) for at, y in zip(_slot_times(results[0]), rates, strict=True)]
    y = linear_axis("requests/s", 0.0, max(*rates, 1e-9) * 1.05)
    about = "Arrivals over time, in requests a second"
    return chart(about, x, y, [Line("arrivals", PLAIN, points)], bands, frame=SMALL, markers=0)


def _slot_times(result: Result) -> list[float]:
    """The middle of each slot."""
    series = result.series
    return [series.from_s + (slot + 0.5) * series.slot_s for slot in range(len(series.arrivals))]


def _time_axis(scenario: Scenario, result: Result) -> Axis:
    unit_s, unit = (60, "minutes") if scenario.seconds > 600 else (1, "seconds")
    low, high = result.series.from_s, max(scenario.seconds, result.series.from_s + 1e-6)
    axis = linear_axis(f"{unit} since the start", low / unit_s, high / unit_s)
    ticks = tuple((value * unit_s, text) for value, text in axis.ticks)
    return Axis(axis.label, low, high, ticks)


def _bands(scenario: Scenario, x: Axis) -> Iterator[Band]:
    """Troubles, and workers that join on the way."""
    for fault in scenario.faults:
        for at_s in times(fault, scenario.seconds):
            if at_s < x.high and at_s + fault.for_s > x.low:
                yield Band(at_s, at_s + fault.for_s, _fault(fault))
    for workers in scenario.workers:
        if x.low < workers.added_s < x.high:
            yield Band(workers.added_s, workers.added_s, f"{workers.names[0]} added")


def _fault(fault: Fault) -> str:
    slower = f"{fault.factor:g}x slower"
    what = {"slow": slower, "link": f"link {slower}"}.get(fault.kind, fault.kind)
    return f"{'all' if fault.worker == '*' else fault.worker} {what}"


def curves(
    scenario: Scenario, comparison: Comparison, order: Sequence[str], styles: Styles
) -> Markup:
    """TTFT and ITL by percentile for each tier, with its promise as a line."""
    panels = []
    for tier in comparison.tiers:
        promise = scenario.tiers[tier].promise
        for what, bound_s in (("TTFT", promise.ttft_s), ("ITL", promise.itl_s)):
            lines = []
            for name in order:
                runs = [run for run in comparison.of(name) if tier in run.tiers]
                lines.append(
                    Line(name, styles[name], _curve([_times(r, tier, what) for r in runs]))
                )
            if any(line.points for line in lines):
                drawn = _percentiles(f"{what} of {tier} by percentile", lines, bound_s)
                panels.append(panel(f"{what}, {tier}", drawn))
    return tag("div", *panels, class_="panels wide")


def _percentiles(about: str, lines: Sequence[Line], bound_s: float) -> Markup:
    seconds = [point.y for line in lines for point in line.points if point.y is not None]
    rules = [] if bound_s == inf else [Rule(bound_s, f"promised: {span(bound_s)}")]
    high = max(*seconds, *(rule.y for rule in rules))
    y = log_axis("", min(seconds) / 1.1, high * 1.25, span)
    return chart(about, nines_axis("% of requests are faster", HIGHEST), y, lines, rules=rules)


def _times(run: Result, tier: str, what: str) -> Times:
    group = run.tiers[tier]
    return group.ttft_s if what == "TTFT" else group.itl_s


def _curve(runs: Sequence[Times]) -> list[Point]:
    """The mean of each quantile over seeds."""
    curves = [run.curve for run in runs if run.curve]
    means = [fmean(values) for values in zip(*curves, strict=True)]
    return [Point(q, y) for q, y in zip(QUANTILES, means, strict=False) if q <= HIGHEST]


def swept(
    group: Sequence[Comparison], key: str, styles: Styles, figure: str, label: str, scale: float
) -> Markup:
    """A figure over the values of one setting, a line a policy, with intervals."""
    x, places = _value_axis(key, [comparison.at[key] for comparison in group])
    lines = []
    for name, style in styles.items():
        points = [
            _point(at, comparison.policies[name].figures[figure], scale)
            for at, comparison in sorted(zip(places, group, strict=True), key=lambda pair: pair[0])
            if name in comparison.policies
        ]
        lines.append(Line(name, style, points))
    highest = max((p.y for line in lines for p in line.points if p.y is not None), default=0.0)
    y = linear_axis(label, 0.0, 100.0 if figure == "attainment" else highest * 1.05 or 1.0)
    return chart(f"{label} over {key}", x, y, lines, markers=len(places))


def _point(at: float, estimate: Estimate | None, scale: float) -> Point:
    if estimate is None:
        return Point(at, None)
    if estimate.low is None or estimate.high is None:
        return Point(at, estimate.mean * scale)
    return Point(at, estimate.mean * scale, estimate.low * scale, estimate.high * scale)


def _value_axis(key: str, values: Sequence[str]) -> tuple[Axis, list[float]]:
    """Numbers stand where they belong, words side by side."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = [inf]
    if not all(map(isfinite, numbers)):
        return names_axis(key, values), [float(i) for i in range(len(values))]
    low, high = min(numbers), max(numbers)
    room = 0.06 * (high - low) or 0.5
    ticks = tuple(zip(numbers, values, strict=True))
    return Axis(key, low - room, high + room, ticks), numbers


def panel(title: str, drawn: Markup) -> Markup:
    return tag("figure", tag("figcaption", title), drawn)


def span(seconds: float) -> str:
    """A length of time, in the unit that suits it."""
    if seconds < 1:
        return f"{seconds * 1e3:g} ms"
    return f"{seconds:g} s" if seconds <= 600 else f"{seconds / 60:.3g} min"
