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
        streams, kv = view.streams, view.kv
        all_streams, all_kv = streams + view.arriving, kv + view.kv_arriving
        # What is ahead and the own prompt go in chunks beside the decodes: so many full steps
        # and a last one, whose attention work is taken to be spread evenly.
        room = np.maximum(view.budget - streams, 64.0)
        work = view.ahead + own
        full_steps = np.ceil(work / room) - 1.0
        q = 0.5 * view.ahead**2 + own * (cached + 0.5 * own)
        q_each = q / (full_steps + 1.0)
        none = np.zeros_like(own)
        decode_s, probe_s, full_s, last_s, before_s, joined_s = view.slowdown(
            ask.now
        ) * view.base_s(
            np.array(
                (
                    streams,
                    streams + PROBE,
                    streams + room,
                    streams + work - full_steps * room,
                    all_streams,
                    all_streams + 1.0,
                )
            ),
            np.array((kv, kv, kv, kv, all_kv, all_kv + own_kv)),
            np.array((none, none + 0.5 * PROBE**2, q_each, q_each, none, none)),
        )
        under_way_s = np.where(all_streams > 0, 0.5 * decode_s, 0.0)
        self.ttft_s = view.overhead_s + under_way_s + full_steps * full_s + last_s
        # Time between tokens: steps without prefill, stretched by the share of time that prefill
        # takes; for residents also this prompt's own prefill, spread over the tokens of an answer.
        token_s = (probe_s - decode_s) / PROBE
        spare = 1.0 - np.minimum(view.prefill_rate * token_s, MAX_PREFILL_SHARE)
        self.before_s = before_s / spare
        self.itl_s = joined_s / spare
        prefill_s = own * token_s
        self.after_s = self.itl_s + prefill_s / max(ask.output_tokens, 16.0)
        slower_s = 0.5 * ask.output_tokens * (self.itl_s - self.before_s)
        self.delay_s = (
            self.ttft_s + ask.output_tokens * self.itl_s + all_streams * (prefill_s + slower_s)
        )
        self.kv_left = KV_FULL - (all_kv + view.ahead + own_kv) / view.kv_capacity


def loss(promise_s: float, predicted_s: Array, spread: Array) -> Array:
    """-log of the chance that a promise is kept (1.7: a logistic is nearly a normal curve)."""
    if promise_s == np.inf:
        return np.zeros_like(predicted_s)
    ratio = np.log(max(promise_s, 1e-3) / predicted_s) * (1.7 / spread)
    odds: Array = np.logaddexp(0.0, -ratio)
    return odds


def cost(view: FleetView, ask: Ask, forecast: Forecast) -> Array:
    """Cost of every worker, in units of -log P."""
    itl_spread = np.maximum(view.spread, ITL_SPREAD)
    kept = 1.0 - ask.margin
    own = loss(kept * ask.promise.ttft_s, forecast.ttft_s, np.maximum(view.spread, TTFT_SPREAD))
    own = own + loss(kept * ask.promise.itl_s, forecast.itl_s, itl_spread)
    harm = np.zeros_like(own)
    for itl_s, residents in view.promised.items():
        if itl_s != np.inf:
            rise = loss(kept * itl_s, forecast.after_s, itl_spread)
            harm += residents * (rise - loss(kept * itl_s, forecast.before_s, itl_spread))
    delay = DELAY_WEIGHT * forecast.delay_s / forecast.delay_s.min()
    crowded = np.maximum(-forecast.kv_left, 0.0) * 100.0
    total: Array = ask.weight * own + harm + delay + crowded
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
