"""Were the promises kept, and how well did it go?

Attainment is over all requests that were due: whoever was refused, failed or left unfinished counts
as a miss. Times are over those who got a first token.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil, inf
from typing import TextIO

import msgspec
from rich.table import Table

from paceline.domain.promise import Promise
from paceline.workload.histogram import merged, quantile_s
from paceline.workload.outcome import Outcome

Promises = Mapping[str, Promise]
"""By tier; "" is for tiers that are not named."""

OVERALL = "all"
BEHIND_TOO_FAR_S = 0.05
"""From this p99 on, the driver itself is what was measured."""


class Times(msgspec.Struct, frozen=True):
    """Quantiles in seconds; None where there is nothing to measure."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


class Summary(msgspec.Struct, frozen=True):
    """One tier, or all."""

    requests: int
    ok: int
    refused: int
    failed: int
    """Neither answered whole nor refused."""
    kept: int
    missed: dict[str, int]
    """By the first of failed, ttft, itl, stall that applies."""
    attainment: float
    goodput_requests_per_s: float
    goodput_tokens_per_s: float
    tokens_per_s: float
    output_tokens: int
    ttft_s: Times
    itl_s: Times
    """Of the requests' mean gaps."""
    gap_s: Times
    """Of all gaps, divided by the tokens after them; within 2.2 %."""
    stall_s: Times
    """Of the requests' worst gaps."""
    workers: dict[str, float]
    """Share of the requests that each worker answered."""
    promise: Promise | None = None


class Report(msgspec.Struct, frozen=True):
    tiers: dict[str, Summary]
    """In order of name; `all` comes last."""
    span_s: float
    """From the first arrival to the last end; what rates are over."""
    behind_p99_s: float
    """How late the driver was in sending."""
    errors: dict[str, int]
    """The most frequent ones."""


def summarize(outcomes: Sequence[Outcome], promises: Promises) -> Report:
    by_tier: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_tier[outcome.tier].append(outcome)
    start_s = min((o.at_s for o in outcomes), default=0.0)
    span_s = max((o.ended_s for o in outcomes), default=0.0) - start_s
    tiers = {
        tier or "(none)": _summary(by_tier[tier], promises, span_s)
        for tier in sorted(by_tier)
        if len(by_tier) > 1 or tier
    }
    return Report(
        tiers=tiers | {OVERALL: _summary(outcomes, promises, span_s)},
        span_s=span_s,
        behind_p99_s=_times([o.behind_s for o in outcomes]).p99 or 0.0,
        errors=dict(Counter(o.error for o in outcomes if o.error).most_common(5)),
    )


def promise_for(tier: str, promises: Promises) -> Promise:
    return promises.get(tier) or promises.get("") or Promise()


def _summary(outcomes: Sequence[Outcome], promises: Promises, span_s: float) -> Summary:
    misses = [o.miss(promise_for(o.tier, promises)) for o in outcomes]
    kept = [o for o, miss in zip(outcomes, misses, strict=True) if not miss]
    refused = sum(o.refused for o in outcomes)
    ok = sum(o.ok for o in outcomes)
    begun = [o for o in outcomes if o.ttft_s is not None]
    several = [o for o in begun if o.gaps]
    gaps = merged(o.gaps for o in several)
    workers = Counter(o.worker for o in outcomes if o.worker)
    asked = {promise_for(o.tier, promises) for o in outcomes}
    tokens = sum(o.output_tokens for o in outcomes)
    per_s = 1 / span_s if span_s > 0 else 0.0
    return Summary(
        requests=len(outcomes),
        ok=ok,
        refused=refused,
        failed=len(outcomes) - ok - refused,
        kept=len(kept),
        missed=dict(sorted(Counter(miss for miss in misses if miss).items())),
        attainment=len(kept) / len(outcomes) if outcomes else 0.0,
        goodput_requests_per_s=len(kept) * per_s,
        goodput_tokens_per_s=sum(o.output_tokens for o in kept) * per_s,
        tokens_per_s=tokens * per_s,
        output_tokens=tokens,
        ttft_s=_times([o.ttft_s for o in begun if o.ttft_s is not None]),
        itl_s=_times([o.itl_s for o in several]),
        gap_s=Times(None, *(quantile_s(gaps, q) for q in (0.5, 0.9, 0.99))),
        stall_s=_times([o.stall_s for o in several]),
        workers={worker: n / workers.total() for worker, n in sorted(workers.items())},
        promise=asked.pop() if len(asked) == 1 else None,
    )


def _times(seconds: list[float]) -> Times:
    """The mean and nearest-rank quantiles."""
    if not seconds:
        return Times(None, None, None, None)
    seconds.sort()
    p50, p90, p99 = (seconds[ceil(q * len(seconds)) - 1] for q in (0.5, 0.9, 0.99))
    return Times(sum(seconds) / len(seconds), p50, p90, p99)


def as_json(report: Report) -> bytes:
    """For programs. What is not promised is null, as JSON knows no infinity."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2)


CSV_FIELDS = tuple(field for field in Outcome.__struct_fields__ if field != "gaps")


def write_csv(outcomes: Iterable[Outcome], file: TextIO) -> None:
    """One row a request, so that anything can be computed anew."""
    rows = csv.writer(file)
    rows.writerow(CSV_FIELDS)
    for outcome in outcomes:
        rows.writerow([getattr(outcome, field) for field in CSV_FIELDS])


def as_table(report: Report) -> Table:
    """For people: one column a tier."""
    table = Table(title=f"{report.span_s:.1f} s, times in ms", title_justify="left")
    table.add_column("", no_wrap=True)
    for tier in report.tiers:
        table.add_column(tier, justify="right")
    for name, cell in ROWS.items():
        cells = [cell(summary) for summary in report.tiers.values()]
        if any(cells):
            table.add_row(name, *cells)
    return table


def remarks(report: Report) -> list[str]:
    """What a reader should know before believing the table."""
    lines = [f"{n} x {error}" for error, n in report.errors.items()]
    if report.behind_p99_s > BEHIND_TOO_FAR_S:
        lines.append(
            f"The driver sent requests up to {report.behind_p99_s:.2f} s late (p99): "
            "its own machine was too busy, and the times above include that."
        )
    return lines


def _count(n: int) -> str:
    return str(n) if n else ""


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


def _shares(workers: Mapping[str, float]) -> str:
    if len(workers) > 8:
        least, most = min(workers.values()), max(workers.values())
        return f"{len(workers)}, {least:.1%} to {most:.1%} each"
    return ", ".join(f"{worker} {share:.0%}" for worker, share in workers.items())


def _promise(promise: Promise | None) -> str:
    if promise is None:
        return ""
    bounds = (promise.ttft_s, promise.itl_s, promise.stall_s)
    return "/".join("-" if bound == inf else f"{bound * 1e3:g}" for bound in bounds)


ROWS: dict[str, Callable[[Summary], str]] = {
    "promised TTFT/ITL/gap": lambda s: _promise(s.promise),
    "requests": lambda s: str(s.requests),
    "ok": lambda s: str(s.ok),
    "refused": lambda s: _count(s.refused),
    "failed": lambda s: _count(s.failed),
    "promise kept": lambda s: f"{s.attainment:.1%}",
    "missed by": lambda s: ", ".join(f"{cause} {n}" for cause, n in s.missed.items()),
    "goodput requests/s": lambda s: f"{s.goodput_requests_per_s:.2f}",
    "goodput tokens/s": lambda s: f"{s.goodput_tokens_per_s:.0f}",
    "tokens/s": lambda s: f"{s.tokens_per_s:.0f}",
    "TTFT p50": lambda s: _ms(s.ttft_s.p50),
    "TTFT p90": lambda s: _ms(s.ttft_s.p90),
    "TTFT p99": lambda s: _ms(s.ttft_s.p99),
    "ITL mean": lambda s: _ms(s.itl_s.mean),
    "ITL p50": lambda s: _ms(s.itl_s.p50),
    "ITL p99": lambda s: _ms(s.itl_s.p99),
    "gaps p50": lambda s: _ms(s.gap_s.p50),
    "gaps p99": lambda s: _ms(s.gap_s.p99),
    "worst gap p50": lambda s: _ms(s.stall_s.p50),
    "worst gap p99": lambda s: _ms(s.stall_s.p99),
    "workers": lambda s: _shares(s.workers),
}
