"""Which workers must stay fast enough for those of more weight?

Who protects only the residents of a worker loses the fleet: where those of more weight are few,
others may fill it up to their own, looser promise; then nobody of more weight goes there any more,
so that it fills up further, until the few workers that are left to them are too few.

So as many workers as they need stay within their promise: those that are nearest to it now. What
they need follows from what they ask for. Tokens decoded at a rate d by n workers within a promise L
are d L / n streams on each, whose step takes a + b d L / n, with the share U / n of the time that
their prefill takes stretched by 1 / (1 - U / n); so that it is no longer than L,

    n >= (b d + U) L / (L - a)

the time that they keep one worker busy, a second, over the share of L that a bare step leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, sqrt

from paceline.policy.headroom import Forecast
from paceline.policy.standing import Ask, Claim, Standing

SPARE = 0.85
"""Workers reserved beyond those that would do if requests came evenly: times the root of those, for
so requests come in bunches (square-root staffing, Halfin and Whitt 1981)."""
WITHIN = 0.9
"""Share of the promise that others may fill a reserved worker up to."""


def limits(ask: Ask, forecasts: Sequence[tuple[Standing, Forecast]]) -> list[float]:
    """The ITL that the request may bring each worker to, in seconds; infinite if any."""
    allowed = [inf] * len(forecasts)
    for claim in ask.claims:
        for i in _reserved(claim, forecasts):
            allowed[i] = min(allowed[i], WITHIN * claim.itl_s)
    return allowed


def _reserved(claim: Claim, forecasts: Sequence[tuple[Standing, Forecast]]) -> Iterable[int]:
    """The workers that are kept for a claim: of those that can keep its promise, the fastest."""
    shares = [_share(claim, worker, seen.slowdown) for worker, seen in forecasts]
    able = sorted(
        (i for i, share in enumerate(shares) if share > 0.0), key=lambda i: forecasts[i][1].before_s
    )
    missing = 1.0 + SPARE * sqrt(sum(shares) / max(len(able), 1))
    for i in able:
        if missing <= 0.0:
            return
        missing -= shares[i]
        yield i


def _share(claim: Claim, worker: Standing, slowdown: float) -> float:
    """How much of a claim one worker could meet by itself; 0 if it is too slow for its promise."""
    curve = worker.curve
    pace = worker.itl.factor * slowdown
    least_s = pace * curve.least_s
    busy = pace * (
        curve.stream_s * claim.output_rate
        + curve.kv_s * claim.read_rate
        + worker.token_s * claim.prompt_rate
    )
    return max(claim.itl_s - least_s, 0.0) / (claim.itl_s * max(busy, 1e-9))
