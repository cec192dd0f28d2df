"""Which worker keeps the promises best, the new request's and those of the residents?

For every worker the request's TTFT and ITL are predicted, and what it does to the residents.
The worker of least cost is taken, where cost is

    loss   = -log P(TTFT kept) - log P(ITL kept)                           of the request itself
    harm   = sum over residents of the rise of their -log P(ITL kept)
    delay  = seconds of waiting that the choice causes to anybody, over the best worker's

P follows a logistic curve in log(promise / predicted), as wide as predictions have been wrong.
Loss and harm decide where a promise is at stake, delay where none is: there the cached, the fast
and the empty worker win by exactly what they save. (docs/design/0003-routing-cost.md says why not
"least cost among those with enough headroom".)
"""

from __future__ import annotations

import numpy as np

from paceline.domain.commands import Prediction
from paceline.policy.steptime import Array
from paceline.policy.view import Ask, FleetView

DELAY_WEIGHT = 0.05
"""Cost of one worker's causing twice the delay of the best one, in units of -log P."""
TTFT_SPREAD = 0.3
"""Least standard deviation of log(TTFT / predicted); steps alone spread less."""
ITL_SPREAD = 0.1
MAX_PREFILL_SHARE = 0.9
PROBE = 512.0
"""Prompt tokens by which the cost of a prefill token is measured."""
KV_FULL = 0.95
"""Share of the KV cache from which on a worker counts as full."""
TIE = 0.01
"""Costs this close are equal: a seeded choice keeps several gateways from herding."""


class Forecast:
    """What the request would meet on each worker. All are arrays over workers, in seconds."""

    __slots__ = ("after_s", "before_s", "delay_s", "itl_s", "kv_left", "ttft_s")

    def __init__(self, view: FleetView, ask: Ask) -> None:
        cached = np.zeros(len(view.ids))
        for place, tokens in ask.cached.items():
            cached[place] = tokens
        own = np.maximum(ask.prompt_tokens - cached, 1.0)
        own_kv = ask.prompt_tokens + 0.5 * ask.output_tokens
        streams, kv, ahead = view.streams, view.kv, view.ahead
        everyone = streams + view.arriving
        # What is ahead and the own prompt go in chunks beside the decodes: so many full steps
        # and a last one, over which their attention work is spread evenly.
        room = np.maximum(view.budget - streams, 64.0)
        work = ahead + own
        full_steps = np.ceil(work / room) - 1.0
        q_each = (0.5 * ahead * ahead + own * (cached + 0.5 * own)) / (full_steps + 1.0)
        tokens, context, attention = map(np.zeros, 3 * ((7, len(own)),))
        tokens[:4] = streams
        tokens[1] += PROBE
        tokens[2] += room
        tokens[3] += work - full_steps * room
        tokens[4] = np.minimum(streams + ahead, view.budget)
        tokens[5:] = everyone
        tokens[6] += 1.0
        context[:5] = kv
        context[5:] = kv + view.kv_arriving
        context[6] += own_kv
        attention[1] = 0.5 * PROBE * PROBE
        attention[2:4] = q_each
        steps_s = view.base_s(tokens, context, attention)
        steps_s *= view.slowdown(ask.now, steps_s[4])
        decode_s, probe_s, full_s, last_s, _, before_s, joined_s = steps_s
        under_way_s = np.where(everyone > 0, 0.5 * decode_s, 0.0)
        self.ttft_s = view.overhead_s + under_way_s + full_steps * full_s + last_s
        # Between tokens there are steps without prefill, stretched by the share of time that
        # prefill takes; residents also wait for this prompt, which is spread over an answer.
        token_s = (probe_s - decode_s) / PROBE
        spare = 1.0 - np.minimum(view.prefill_rate * token_s, MAX_PREFILL_SHARE)
        self.before_s = before_s / spare
        self.itl_s = joined_s / spare
        prefill_s = own * token_s
        self.after_s = self.itl_s + prefill_s / max(ask.output_tokens, 16.0)
        slower_s = 0.5 * ask.output_tokens * (self.itl_s - self.before_s)
        served_s = self.ttft_s + ask.output_tokens * self.itl_s
        self.delay_s = served_s + everyone * (prefill_s + slower_s)
        self.kv_left = KV_FULL - (context[6] + ahead) / view.kv_capacity


def loss(promise_s: Array, predicted_s: Array, spread: Array) -> Array:
    """-log of the chance that a promise is kept (1.7: a logistic is nearly a normal curve)."""
    odds: Array = np.logaddexp(0.0, np.log(predicted_s / promise_s) * (1.7 / spread))
    return odds


def cost(view: FleetView, ask: Ask, forecast: Forecast) -> Array:
    """Cost of every worker, in units of -log P."""
    promise = ask.promise
    itl_spread = np.maximum(view.spread, ITL_SPREAD)
    cases: list[
        tuple[float, Array, Array, Array | float]
    ] = []  # promise, predicted, spread, weight
    if promise.ttft_s < np.inf:
        ttft_spread = np.maximum(view.spread, TTFT_SPREAD)
        cases.append((promise.ttft_s, forecast.ttft_s, ttft_spread, ask.weight))
    if promise.itl_s < np.inf:
        cases.append((promise.itl_s, forecast.itl_s, itl_spread, ask.weight))
    for itl_s, residents in view.promised.items():
        if itl_s < np.inf:
            cases.append((itl_s, forecast.after_s, itl_spread, residents))
            cases.append((itl_s, forecast.before_s, itl_spread, -residents))
    total: Array = DELAY_WEIGHT * forecast.delay_s / forecast.delay_s.min()
    total += np.maximum(-forecast.kv_left, 0.0) * 100.0
    if cases:
        promises, predicted, spreads, weights = zip(*cases, strict=True)
        kept = np.maximum(np.array(promises) * (1.0 - ask.margin), 1e-3)[:, None]
        losses = loss(kept, np.array(predicted), np.array(spreads))
        for row, weight in zip(losses, weights, strict=True):
            total += row * weight
    return total


def headroom(view: FleetView, ask: Ask, forecast: Forecast, i: int) -> float:
    """Least of (promise - predicted)/promise on worker `i`, for the request and the residents."""
    pairs = [
        (ask.promise.ttft_s, forecast.ttft_s[i]),
        (ask.promise.itl_s, forecast.itl_s[i]),
        *((itl_s, forecast.after_s[i]) for itl_s, n in view.promised.items() if n[i]),
    ]
    rooms = [1.0 - float(s) / promise for promise, s in pairs if 0 < promise < np.inf]
    return min([1.0, *rooms, float(forecast.kv_left[i])])


def prediction(view: FleetView, ask: Ask, forecast: Forecast, i: int) -> Prediction:
    """What was expected of worker `i`, to be compared with what comes."""
    return Prediction(
        ttft_s=float(forecast.ttft_s[i]),
        itl_s=float(forecast.itl_s[i]),
        headroom=headroom(view, ask, forecast, i),
        cached_tokens=round(ask.cached.get(i, 0.0)),
    )
