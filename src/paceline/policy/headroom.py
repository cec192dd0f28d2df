"""Which worker keeps the promises best, the new request's and those of the residents?

For every worker the request's TTFT and ITL are predicted, and what it does to the residents.
The worker of least cost is taken, where cost is

    loss     = 1 - P(TTFT kept) * P(ITL kept)                              of the request itself
    harm     = sum over residents of the rise of their P(ITL broken)
    delay    = seconds of waiting that the choice causes to anybody, over the best worker's
    work     = prompt tokens to prefill, at a price that rises with how busy the fleet is
    balance  = work that the worker has before it, over that of the others

that is, the expected number of promises that the choice breaks now, a little for the time that it
takes, and what it costs those who come later: a prefix prefilled twice is time that a busy fleet
does not have, and a worker with more work before it than others is where the next promise breaks.
P follows a logistic curve in log(predicted / promise), as wide as predictions have been wrong of
late. Loss and harm decide where a promise is at stake, delay where none is, or none can be kept:
there the fast and the empty worker win by exactly what they save.
(docs/design/0003 says why not "least cost among those with enough headroom", 0007 and 0008 the
rest.)
"""

from __future__ import annotations

from math import ceil, exp, inf, log

import msgspec
from msgspec.structs import replace

from paceline.domain.commands import Prediction
from paceline.policy.pressure import KV_FULL
from paceline.policy.standing import Ask, Standing, Supply

DELAY_WEIGHT = 0.05
"""Cost of causing once more the delay of the best worker, in broken promises."""
WORK_WEIGHT = 3.0
"""Price of prefilling as much as a request usually needs, in broken promises, if prefill took all
of the fleet's time; none while it is idle."""
BALANCE_WEIGHT = 0.2
"""Cost of having before one what the others have on average, in broken promises."""
TO_COME = 0.3
"""Share of a resident's answer that is slowed: half of it is still to come, on average, and the
newcomer does not stay for all of that."""
AHEAD_WEIGHT = 4.0
"""What a token to prefill counts in the backlog beside one of context."""
LEAST_SPARE = 0.1
"""Share of time that decode steps are left with, however much prefill there is."""
CROWDED = 100.0
"""Cost of exceeding that by the whole cache, in broken promises."""


class Forecast(msgspec.Struct, frozen=True, gc=False):
    """What the request would meet on one worker, in seconds."""

    ttft_s: float
    itl_s: float
    before_s: float
    """ITL of the residents as it is."""
    after_s: float
    """And with the request, whose prefill is spread over the tokens of an answer."""
    delay_s: float
    """Time of all that the choice takes: the request's own, and what the residents lose."""
    work: float
    """Prompt tokens to prefill, in requests as they usually are."""
    busy: float
    """Share of the worker's time that prefill takes."""
    kv_left: float
    """Share of the KV cache that is left at the worst moment to come; where that is far from full,
    only what is held now is looked at."""
    backlog_s: float
    """Work before the worker, in seconds of prefill: prompts ahead, and half of the context of its
    streams, which has still to be read over and over."""
    slowdown: float
    """Factor on the worker's step times just now."""
    harm: float = 0.0
    """What is not of the residents' ITL: `supplied` tells."""


def forecast(worker: Standing, ask: Ask, cached: float) -> Forecast:
    """What the request would meet on a worker that has `cached` tokens of its prompt.

    TTFT: prompts ahead and this one go in chunks beside the decodes, so many full steps and a last
    one, over which their attention work is spread evenly (chunked prefill, Agrawal et al. 2024).
    ITL: steps without prefill over the share of time that prefill leaves them, `base / (1 − U)`.
    """
    slow = worker.slowdown(ask.now)
    curve, ahead, room = worker.curve, worker.ahead, worker.room
    prompt, answer = ask.prompt_tokens, ask.output_tokens
    own = prompt - cached
    if own < 1.0:
        own = 1.0
    in_all = ahead + own
    full = 0 if in_all <= room else ceil(in_all / room) - 1
    last = in_all - full * room
    attention_s = curve.q_s * (0.5 * ahead * ahead + own * (cached + 0.5 * own))
    last_s = curve.at(worker.streams + last) + worker.kv_decode_s
    prefill_s = full * worker.full_s + last_s + attention_s
    ttft_s = worker.ttft.factor * (worker.overhead_s + slow * (worker.under_way_s + prefill_s))
    token_s = slow * worker.token_s
    own_s = token_s * own
    spare = 1.0 - worker.prefill_share * slow
    if spare < LEAST_SPARE:
        spare = LEAST_SPARE
    own_kv = prompt + 0.5 * answer
    pace = worker.itl.factor * slow
    before_s = pace * worker.before_s / spare
    itl_s = pace * (worker.joined_s + curve.kv_s * own_kv) / spare
    slower_s = 0.5 * answer * (itl_s - before_s)
    if worker.outlook is None:
        kv_left = KV_FULL - (worker.kv_all + own_kv) / worker.kv_capacity
    else:
        peak = worker.outlook.peak_with(prompt, ask.output_left)
        kv_left = (worker.kv_limit - peak) / worker.kv_capacity
    seen = Forecast(
        ttft_s,
        itl_s,
        before_s,
        before_s + TO_COME * (itl_s - before_s + own_s / (answer if answer > 16.0 else 16.0)),
        ttft_s + answer * itl_s + worker.everyone * (own_s + slower_s),
        own / ask.usual_tokens,
        1.0 - spare,
        kv_left,
        token_s * (worker.to_read + AHEAD_WEIGHT * in_all),
        slow,
    )
    return seen if worker.supply is None else supplied(seen, worker.supply)


def residents_itl_s(worker: Standing, now: float) -> float:
    """The ITL of the residents as it is, in seconds, by step times alone."""
    slow = worker.slowdown(now)
    return slow * worker.before_s / max(1.0 - worker.prefill_share * slow, LEAST_SPARE)


def supplied(seen: Forecast, supply: Supply) -> Forecast:
    """What comes on top of what the worker does itself, where workers can share a request."""
    return replace(
        seen,
        ttft_s=supply.ttft_s + seen.ttft_s,
        delay_s=supply.ttft_s + seen.delay_s,
        work=supply.work + seen.work,
        busy=max(supply.busy, seen.busy),
        backlog_s=supply.backlog_s + seen.backlog_s,
        harm=supply.harm,
    )


def broken(promise_s: float, predicted_s: float, spread: float) -> float:
    """The chance that a promise is broken (1.7: a logistic is nearly a normal curve)."""
    odds = 1.7 / spread * log(promise_s / predicted_s)
    return 1.0 / (1.0 + exp(odds)) if odds < 30.0 else 0.0


def strain(promise_s: float, predicted_s: float, spread: float) -> float:
    """As `broken`, but beyond the promise it goes on rising as steeply as it does there.

    A stream that is late can still be saved, and one more newcomer must not seem free for the
    reason that all is lost already: so a fleet falls over.
    """
    odds = 1.7 / spread * log(predicted_s / promise_s)
    if odds > 0.0:
        return 0.5 + 0.25 * odds
    return 1.0 / (1.0 + exp(-odds)) if odds > -30.0 else 0.0


def loss(worker: Standing, ask: Ask, seen: Forecast) -> float:
    """The chance that the request's own promise is broken there."""
    promise, share, kept = ask.promise, 1.0 - ask.margin, 1.0
    if promise.ttft_s < inf:
        kept -= broken(max(promise.ttft_s * share, 1e-3), seen.ttft_s, worker.ttft.spread)
    if promise.itl_s < inf:
        kept *= 1.0 - broken(promise.itl_s * share, seen.itl_s, worker.itl.spread)
    return 1.0 - kept


def harm(worker: Standing, ask: Ask, seen: Forecast, cautious: bool = False) -> float:
    """The promises of residents that the choice breaks, expected and weighted."""
    share, spread = 1.0 - ask.margin, worker.itl.spread
    before_s, after_s = seen.before_s, seen.after_s
    if cautious:
        before_s, after_s = worker.itl.cautious(before_s), worker.itl.cautious(after_s)
    total = seen.harm
    if seen.kv_left < 0.0:
        total -= CROWDED * seen.kv_left
    for itl_s, weight, residents in worker.promised:
        promise_s = itl_s * share
        rise = strain(promise_s, after_s, spread) - strain(promise_s, before_s, spread)
        total += weight * residents * rise
    return total


def headroom(worker: Standing, ask: Ask, seen: Forecast) -> float:
    """Least of (promise - predicted)/promise, for the request and the residents, and KV room."""
    promise, least = ask.promise, seen.kv_left
    if promise.ttft_s > 0.0:
        least = min(least, 1.0 - seen.ttft_s / promise.ttft_s)
    if promise.itl_s > 0.0:
        least = min(least, 1.0 - seen.itl_s / promise.itl_s)
    for itl_s, _, _ in worker.promised:
        least = min(least, 1.0 - seen.after_s / itl_s)
    return least


def prediction(worker: Standing, ask: Ask, seen: Forecast, cached: float) -> Prediction:
    """What was expected of the worker chosen, to be compared with what comes."""
    return Prediction(
        seen.ttft_s,
        seen.itl_s,
        headroom(worker, ask, seen),
        worker.ttft.spread,
        worker.itl.spread,
        round(cached),
        worker.ttft.factor,
        worker.itl.factor,
    )
