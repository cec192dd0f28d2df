"""How does a comparison read in a browser? One page that needs no network and no script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from math import inf
from statistics import fmean

from paceline.markup import Markup, join, tag
from paceline.simulator import report
from paceline.simulator.charts import bar, patterns
from paceline.simulator.compare import CLOSE, Comparison, Estimate
from paceline.simulator.figures import Styles, curves, legend, over_time, panel, span, swept
from paceline.simulator.result import CAUSES
from paceline.simulator.scenario import Scenario

DRAWN = "share of requests"
"""The head of a column of bars."""


def page(scenario: Scenario, comparisons: Sequence[Comparison]) -> str:
    """The whole report: of one comparison, or of those of a sweep."""
    name = scenario.name or comparisons[0].scenario
    policies = dict.fromkeys(policy for c in comparisons for policy in c.policies)
    styles = {policy: style for style, policy in enumerate(policies)}
    kind = tag("p", "Paceline simulation", class_="kind")
    about = tag("p", scenario.about, class_="about")
    body = tag(
        "main",
        patterns(CAUSES),
        tag("header", kind, tag("h1", name), about, tag("p", _played(scenario, comparisons))),
        _sweep(comparisons, styles) if len(comparisons) > 1 else "",
        *(_comparison(scenario, c, styles, folded=len(comparisons) > 1) for c in comparisons),
        NOTES,
    )
    title = tag("title", f"{name}: promises kept")
    document = tag(
        "html",
        tag("head", META, title, tag("style", _style())),
        tag("body", body),
        lang="en",
    )
    return f"<!doctype html>\n{document}\n"


def _played(scenario: Scenario, comparisons: Sequence[Comparison]) -> str:
    """What was played, in numbers."""
    first = comparisons[0]
    requests = fmean(result.total.requests for c in comparisons for result in c.results)
    parts = [
        report.counted(sum(workers.count for workers in scenario.workers), "worker"),
        f"about {requests:,.0f} requests in {span(first.results[0].seconds)}",
        *(f"{tier}: {_promised(scenario, tier)}" for tier in scenario.tiers),
    ]
    return "; ".join(parts) + "."


def _promised(scenario: Scenario, tier: str) -> str:
    of = scenario.tiers[tier]
    bounds = {"TTFT": of.ttft_s, "ITL": of.itl_s, "stall": of.stall_s, "answer": of.deadline_s}
    told = [f"{name} within {span(bound)}" for name, bound in bounds.items() if bound < inf]
    return ", ".join(told) or "nothing promised"


# One comparison.


def _comparison(scenario: Scenario, comparison: Comparison, styles: Styles, folded: bool) -> Markup:
    order = sorted(comparison.policies, key=lambda name: -comparison.policies[name].attainment.mean)
    parts = [
        tag("p", report.headline(comparison), class_="headline"),
        tag("h2", "Promises kept"),
        _kept_table(comparison, order),
        tag("h2", "Promises broken, and by what"),
        _broken_table(comparison, order),
        tag("h2", "Promises kept over time"),
        over_time(scenario, comparison, order, styles),
        tag("h2", "How long it took"),
        legend(order, styles),
        curves(scenario, comparison, order, styles),
        tag("h2", "Times, cost and resources"),
        tag("p", "Over all tiers; times of requests that got tokens.", class_="note"),
        *_figures_tables(comparison, order),
        tag("h2", "Workers"),
        *(_workers_table(comparison, name) for name in order),
    ]
    if not folded:
        return tag("section", *parts)
    played = ", ".join(f"{key} {value}" for key, value in comparison.at.items())
    return tag("details", tag("summary", f"{played}: {report.headline(comparison)}"), *parts[1:])


def _kept_table(comparison: Comparison, order: Sequence[str]) -> Markup:
    tiers = comparison.tiers if len(comparison.tiers) > 1 else ()
    rows = []
    for name in order:
        standing = comparison.policies[name]
        kept = standing.attainment
        look = "best" if name in comparison.tied_with_best else "other"
        drawn = bar([(look, kept.mean)], kept.low, kept.high)
        cells = [cell(standing) for cell in report.KEPT.values()]
        shares = [report.share(standing.tiers.get(tier)) for tier in tiers]
        rows.append([_named(comparison, name), drawn, *cells, *shares])
    caption = (
        "Means over seeds, ± half of the 95 % interval, which is drawn on the bar as far as it "
        "is possible."
    )
    heads = ["policy", DRAWN, *report.KEPT, *(f"{tier}, %" for tier in tiers)]
    return _table(caption, heads, rows)


def _broken_table(comparison: Comparison, order: Sequence[str]) -> Markup:
    """The same as kept, the other way round and magnified, by cause."""
    broken = {name: dict(report.broken(comparison, name)) for name in order}
    causes = [cause for cause in CAUSES if any(cause in parts for parts in broken.values())]
    most = max((sum(parts.values()) for parts in broken.values()), default=0.0) or 1.0
    rows = []
    for name in order:
        parts, kept = broken[name], comparison.policies[name].attainment
        low, high = _mirrored(kept, most)
        stack = [(cause, parts.get(cause, 0.0) / most) for cause in causes]
        shares = [report.percent(parts[cause]) if cause in parts else "-" for cause in causes]
        total = report.percent(sum(parts.values()))
        rows.append([_named(comparison, name), bar(stack, low, high), total, *shares])
    keys = [join([bar([(cause, 1.0)], width=14), f" {cause}, %"]) for cause in causes]
    caption = f"The whole width is {most:.1%} of the requests. A promise has only its first cause."
    return _table(caption, ["policy", DRAWN, "broken, %", *keys], rows)


def _mirrored(kept: Estimate, most: float) -> tuple[float | None, float | None]:
    """The interval of what was broken, with `most` as 1."""
    if kept.low is None or kept.high is None:
        return None, None
    return (1 - kept.high) / most, (1 - kept.low) / most


def _figures_tables(comparison: Comparison, order: Sequence[str]) -> Iterator[Markup]:
    """Several, as one would be wider than the page."""
    for columns in (report.TIMES, report.WORTH, report.measures_of(comparison)):
        if columns:
            rows = [
                [name, *(cell(comparison.policies[name]) for cell in columns.values())]
                for name in order
            ]
            yield _table("", ["policy", *columns], rows)


def _workers_table(comparison: Comparison, policy: str) -> Markup:
    runs = comparison.of(policy)
    names = dict.fromkeys(worker for result in runs for worker in result.workers)
    everything = sum(use.requests for result in runs for use in result.workers.values()) or 1
    rows = []
    for name in names:
        uses = [result.workers[name] for result in runs if name in result.workers]
        requests = sum(use.requests for use in uses)
        kept = sum(use.requests * (use.attainment or 0.0) for use in uses)
        means = [[use.kv_mean, use.running_mean, use.waiting_mean] for use in uses]
        kv, running, waiting = (_mean(values) for values in zip(*means, strict=True))
        rows.append(
            [
                name,
                f"{requests / everything:.1%}",
                f"{kept / requests:.1%}" if requests else "-",
                "-" if kv is None else f"{kv:.0%}",
                *("-" if n is None else f"{n:.1f}" for n in (running, waiting)),
            ]
        )
    heads = ["worker", "of requests", "kept", "KV use", "running", "waiting"]
    return tag("details", tag("summary", policy), _table("", heads, rows), class_="workers")


def _sweep(comparisons: Sequence[Comparison], styles: Styles) -> Markup:
    """Attainment and goodput over the first swept setting; a pair of charts for all others."""
    key = next(iter(comparisons[0].at))
    groups: dict[str, list[Comparison]] = {}
    for c in comparisons:
        others = ", ".join(f"{k} {v}" for k, v in c.at.items() if k != key)
        groups.setdefault(others, []).append(c)
    panels = []
    for others, group in groups.items():
        panels.append(panel(others, swept(group, key, styles, "attainment", "kept, %", 100.0)))
        goodput = swept(group, key, styles, "goodput_requests_per_s", "goodput, requests/s", 1.0)
        panels.append(panel(others, goodput))
    said = report.sweep_headline(comparisons)
    return tag(
        "section",
        tag("p", said, class_="headline") if said else "",
        tag("h2", f"Over {key}"),
        legend(list(styles), styles),
        tag("div", *panels, class_="panels wide"),
        _sweep_table(comparisons, list(styles)),
    )


def _sweep_table(comparisons: Sequence[Comparison], policies: Sequence[str]) -> Markup:
    rows = []
    for c in comparisons:
        kept = [report.starred(c, name) for name in policies]
        rows.append([", ".join(c.at.values()), *kept])
    return _table(report.sweep_title(policies), [", ".join(comparisons[0].at), *policies], rows)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    looks = {DRAWN: {"class_": "drawn"}}
    head = tag("tr", *(tag("th", text, scope="col", **looks.get(text, {})) for text in heads))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    told = tag("caption", caption) if caption else ""
    return tag("div", tag("table", told, tag("thead", head), tag("tbody", *body)), class_="scroll")


def _named(comparison: Comparison, policy: str) -> Markup:
    """A policy and how it stands to the best, in words."""
    leads = "best" if policy == comparison.best else "tied with best"
    stands = {"*": leads, "?": "not told apart"}.get(report.mark(comparison, policy))
    return join([policy, " ", tag("small", stands)] if stands else [policy])


def _style() -> Markup:
    return Markup(files("paceline.simulator").joinpath("page.css").read_text("utf-8"))


META = Markup(
    '<meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
)

NOTES = tag(
    "footer",
    tag("h2", "How to read this"),
    tag(
        "p",
        "A promise is kept if time to first token (TTFT), mean time between tokens (ITL) and worst "
        "gap (stall) all stay within the tier's bounds, and so does the whole answer where there "
        "is a deadline. Requests that were turned away, failed, broke off or were left unfinished "
        "count as broken promises; one that was degraded is measured by what its own tier "
        "promises. Intervals are 95 % of "
        "Student's t over seeds; differences are paired by seed, and called tied if 0 is in their "
        f"interval and all of it within {CLOSE * 100:.0f} points, or if they are below a tenth of "
        "a point. A wider interval around 0 shows nothing: not told apart. Timing comes from a "
        "model of the engines, not from real ones. Times are within 2.2 %.",
    ),
)
