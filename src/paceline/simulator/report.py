"""How does a comparison read, in words, numbers and tables on a terminal?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import msgspec
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from paceline.simulator.compare import Comparison, Estimate, Standing, Verdict
from paceline.simulator.oracle import ORACLE
from paceline.simulator.result import CAUSES

MANY_POLICIES = 5
"""From so many on, a sweep has its policies in rows."""
SAID: dict[Verdict, str] = {"unsure": "not told apart"}
"""What a verdict is called in words, if not as it is."""
MARKS = "* the best, or tied with it; ? not told apart from it"


def as_json(comparisons: Sequence[Comparison]) -> bytes:
    """For programs: a list with one entry for each combination of swept settings."""
    return msgspec.json.format(msgspec.json.encode(comparisons), indent=2)


def for_terminal(comparisons: Sequence[Comparison]) -> Iterator[RenderableType]:
    """All that there is to print, one thing under the other."""
    for comparison in comparisons:
        yield Text(title(comparison), style="bold")
        yield Text(headline(comparison))
        yield ""
        for columns in (KEPT, WORTH, TIMES, measures_of(comparison)):
            if columns:
                yield figures_table(comparison, columns)
                yield ""
        yield tiers_table(comparison)
        yield ""
    if len(comparisons) > 1:
        if said := sweep_headline(comparisons):
            yield Text(said)
            yield ""
        yield sweep_table(comparisons)


def title(comparison: Comparison) -> str:
    return ", ".join([comparison.scenario, *(f"{k} {v}" for k, v in comparison.at.items())])


def headline(comparison: Comparison) -> str:
    """Who is best, and by how much, in a sentence."""
    best = comparison.best
    seeds = f"over {counted(len(comparison.seeds), 'seed')}"
    said = f"{best} keeps {_kept(comparison, best)} % of promises"
    others = [name for name in comparison.policies if name not in (best, ORACLE)]
    if not others:
        return f"{said} {seeds}."
    if len(comparison.seeds) < 2:
        return f"{said}, the most of {len(others) + 1}; one seed can't tell merit from chance."
    ties = [name for name in others if name in comparison.tied_with_best]
    unsure = comparison.not_told_apart
    clauses = [f" tied with {listed(ties)}"] if ties else []
    if behind := [comparison.difference(best, n) for n in others if n not in (*ties, *unsure)]:
        lead = min(behind, key=lambda difference: difference.attainment.mean)
        clauses.append(f" {share(lead.attainment)} points more than {lead.to}")
    said = f"{said}{',' * bool(clauses)}{' and'.join(clauses)}, {seeds}."
    if unsure:
        said = f"{said} It is not told apart from {listed(unsure)}: more seeds would tell."
    if ORACLE not in comparison.policies or best == ORACLE:
        return said
    return f"{said} The oracle, which need not learn or guess, keeps {_kept(comparison, ORACLE)} %."


def sweep_headline(comparisons: Sequence[Comparison]) -> str:
    """Who leads how often; nothing where there is nobody to lead."""
    if not any(len(c.policies) > 1 for c in comparisons):
        return ""
    leads = Counter(name for c in comparisons for name in c.tied_with_best)
    (first, times), *others = leads.most_common()
    settings = counted(len(comparisons), "setting")
    said = f"{first} is best, or tied with the best, in {times} of {settings}"
    said = f"{said}{''.join(f', {name} in {n}' for name, n in others)}."
    unsure = sum(bool(c.not_told_apart) for c in comparisons)
    if unsure:
        said = f"{said} In {unsure} not all are told apart from it: more seeds would tell."
    return said


def figures_table(comparison: Comparison, columns: Columns) -> Table:
    """One row a policy."""
    table = _table(columns)
    for name, standing in comparison.policies.items():
        table.add_row(_name(name, comparison), *(cell(standing) for cell in columns.values()))
    return table


def measures_of(comparison: Comparison) -> Columns:
    """How often it came to each of `MEASURES`; none where it never came to any."""
    figures = [s.figures[name] for s in comparison.policies.values() for name in MEASURES.values()]
    if not any(figure is not None and figure.mean for figure in figures):
        return {}
    return {head: _figure(name, partial(number, digits=0)) for head, name in MEASURES.items()}


def tiers_table(comparison: Comparison) -> Table:
    """Attainment by tier, and what broke the other promises."""
    tiers = comparison.tiers
    table = _table([*(f"{tier}, kept %" for tier in tiers), "broken by, % of requests"])
    table.columns[-1].justify = "left"
    for name, standing in comparison.policies.items():
        kept = (share(standing.tiers.get(tier)) for tier in tiers)
        causes = ", ".join(f"{cause} {percent(part)}" for cause, part in broken(comparison, name))
        table.add_row(_name(name, comparison), *kept, causes)
    return table


def sweep_table(comparisons: Sequence[Comparison]) -> Table:
    """Attainment at each combination of swept settings."""
    policies = list(dict.fromkeys(name for c in comparisons for name in c.policies))
    heads = [*comparisons[0].at, *policies]
    rows = [
        [*map(escape, c.at.values()), *(starred(c, name) for name in policies)] for c in comparisons
    ]
    if len(policies) >= MANY_POLICIES:
        heads, *rows = (list(column) for column in zip(heads, *rows, strict=True))
    table = _table(heads[1:], first=heads[0])
    table.title = sweep_title(policies)
    for row in rows:
        table.add_row(*row)
    return table


def sweep_title(policies: Sequence[str]) -> str:
    return f"Promises kept, % ({MARKS})" if len(policies) > 1 else "Promises kept, %"


def starred(comparison: Comparison, policy: str) -> str:
    """Attainment, and how it stands to the best."""
    if policy not in comparison.policies:
        return "-"
    return f"{_kept(comparison, policy)} {mark(comparison, policy)}"


def mark(comparison: Comparison, policy: str) -> str:
    """One of `MARKS`, or a space. Who plays alone has none."""
    if len(comparison.policies) == 1:
        return " "
    if policy in comparison.tied_with_best:
        return "*"
    return "?" if policy in comparison.not_told_apart else " "


def broken(comparison: Comparison, policy: str) -> list[tuple[str, float]]:
    """Causes of broken promises with their share of all requests, over all seeds."""
    totals = [result.total for result in comparison.of(policy)]
    requests = sum(total.requests for total in totals)
    counts = {cause: sum(total.missed.get(cause, 0) for total in totals) for cause in CAUSES}
    return [(cause, n / requests) for cause, n in counts.items() if n]


def share(estimate: Estimate | None) -> str:
    """In percent; of differences, in points."""
    return number(estimate, scale=100, digits=1)


def gained(standing: Standing) -> str:
    """Against the first policy, in points of attainment."""
    if standing.to_first is None:
        return "-"
    gain = standing.to_first.attainment
    return f"{'+' if gain.mean >= 0 else ''}{share(gain)}"


def judged(standing: Standing) -> str:
    """What that is worth."""
    if standing.to_first is None:
        return ""
    return SAID.get(standing.to_first.verdict, standing.to_first.verdict)


def number(estimate: Estimate | None, scale: float = 1.0, digits: int = 2) -> str:
    """A mean and, where there is one, its margin."""
    if estimate is None:
        return "-"
    margin = "" if estimate.margin is None else f" ± {estimate.margin * scale:.{digits}f}"
    return f"{estimate.mean * scale:.{digits}f}{margin}"


def milliseconds(estimate: Estimate | None) -> str:
    """Three digits, as no bucket tells more."""
    if estimate is None:
        return "-"
    ms = estimate.mean * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}"


def percent(part: float) -> str:
    """A share, with as many digits as it needs not to be 0."""
    return f"{part * 100:.1f}" if part >= 0.001 else f"{part * 100:.1g}"


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _figure(name: str, show: Callable[[Estimate | None], str]) -> Callable[[Standing], str]:
    return lambda standing: show(standing.figures[name])


def _times(*names: str) -> Callable[[Standing], str]:
    return lambda standing: " / ".join(milliseconds(standing.figures[name]) for name in names)


def _kv(standing: Standing) -> str:
    both = standing.figures["kv_mean"], standing.figures["kv_p99"]
    return " / ".join("-" if kv is None else f"{kv.mean:.0%}" for kv in both)


Columns = Mapping[str, Callable[[Standing], str]]

KEPT: Columns = {
    "kept, %": _figure("attainment", share),
    "against the first, points": gained,
    "verdict": judged,
}
"""What it is all about: narrow enough to be whole on 80 columns."""
WORTH: Columns = {
    "weighted, %": _figure("weighted_attainment", share),
    "goodput, requests/s": _figure("goodput_requests_per_s", number),
    "cost per M kept, tokens": _figure(
        "cost_per_million_kept_tokens", lambda n: number(n, digits=3)
    ),
}
TIMES: Columns = {
    "TTFT ms, p50 / p99": _times("ttft_p50_s", "ttft_p99_s"),
    "ITL ms, p50 / p99": _times("itl_p50_s", "itl_p99_s"),
    "stall ms, p99": _times("stall_p99_s"),
    "KV use, mean / p99": _kv,
    "preempted, requests": _figure("preemptions", lambda n: number(n, digits=0)),
}

MEASURES = {
    "turned away, requests": "shed",
    "degraded, requests": "degraded",
    "paused, times": "paused",
    "moved, times": "moved",
}
"""What gateways do when not all is well, by their figures."""


def _table(heads: Sequence[str] | Columns, first: str = "policy") -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column(first, no_wrap=True)
    for head in heads:
        # Where there is no room a figure goes on in the next line, and nothing is cut.
        table.add_column(head.replace(", ", ",\n"), justify="right", overflow="fold")
    return table


def _kept(comparison: Comparison, policy: str) -> str:
    return share(comparison.policies[policy].attainment)


def _name(policy: str, comparison: Comparison) -> Text:
    return Text(policy, style="bold" if policy in comparison.tied_with_best else "")
