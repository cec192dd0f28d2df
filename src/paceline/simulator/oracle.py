"""How well could one route who knew everything but the future arrivals?

The oracle weighs expected broken promises as `headroom` does, but is told what that must learn or
guess: true step times, the slowdown just now, what is cached and computed, how long each answer
will be, and how much of its promise each resident has used up. What `headroom` loses against it is
the price of learning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, inf

from paceline.enginemodel import Load
from paceline.policy import headroom
from paceline.policy.fleet import Choice, Fleet
from paceline.policy.headroom import CROWDED, DELAY_WEIGHT, LEAST_SPARE, WORK_WEIGHT
from paceline.policy.pressure import KV_FULL, peak_tokens
from paceline.policy.standing import LEAST_ROOM, Ask
from paceline.simulator.flight import NAME_TOKENS, Flight
from paceline.simulator.replica import Replica

ORACLE = "oracle"
"""Its name among the policies."""
SPREAD = 0.1
"""What is left unknown: who comes next. Standard deviation of log(outcome / predicted)."""
LOOKED_AT = 64
"""Residents of a worker that are looked at one by one; of more an even sample stands for all."""
FOREVER_S = 3600.0
"""What hangs for longer might as well."""


class Oracle:
    """A policy that looks into the engines."""

    def __init__(
        self,
        replicas: Mapping[str, Replica],
        flights: Mapping[str, Flight],
        now: Callable[[], float],
    ) -> None:
        self._replicas = replicas
        self._flights = flights
        self._now = now

    def __call__(self, fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
        flight = self._flights[ask.request_id]
        costs = []
        for place in places:
            replica = self._replicas[fleet.ids[place]]
            costs.append(self._cost(replica, flight, ask))
        least_s = min(delay_s for _, delay_s, _, _ in costs)
        price = WORK_WEIGHT * sum(busy for _, _, _, busy in costs) / len(costs)
        totals = [
            risk + DELAY_WEIGHT * delay_s / least_s + price * work
            for risk, delay_s, work, _ in costs
        ]
        best = min(range(len(places)), key=lambda k: (totals[k], places[k]))
        return Choice(places[best], f"least true cost {totals[best]:.3f}")

    def _cost(
        self, replica: Replica, flight: Flight, ask: Ask
    ) -> tuple[float, float, float, float]:
        """Expected broken promises, seconds of delay to all, work, and how busy the worker is."""
        now, profile, scheduler = self._now(), replica.profile, replica.scheduler
        slow = scheduler.slowdown
        stuck_s = min(max(replica.hung_until - now, 0.0), FOREVER_S)
        prompt, answer = flight.prompt_tokens, flight.output_tokens
        cached = min(scheduler.pool.known(flight.names) * NAME_TOKENS, prompt - 1)
        own = prompt - cached
        coming = sum(f.prompt_tokens for f in replica.coming.values())
        ahead = scheduler.prompt_left() + coming
        streams = len(scheduler.decoding)
        everyone = len(replica.flights) + len(replica.coming)
        context = scheduler.context
        # First token: whole chunks beside the decodes.
        room = max(profile.max_num_batched_tokens - streams, LEAST_ROOM)
        steps = ceil((ahead + own) / room)
        attention = 0.5 * ahead * ahead + own * (cached + 0.5 * own)
        each = Load(streams, round((ahead + own) / steps), context, attention / steps)
        under_way_s = replica.left_s() if replica.plan is not None else 0.0
        ttft_s = now - flight.arrival.at_s + stuck_s + under_way_s
        ttft_s += slow * steps * profile.step_seconds(each)
        # Tokens: steps of everybody over the share of time that prefill leaves.
        quiet_s = profile.step_seconds(Load(streams, 0, context))
        token_s = (
            profile.step_seconds(Load(streams, own, context, 0.5 * own * own)) - quiet_s
        ) / own
        spare = max(1.0 - replica.prefill_rate.at(now) * token_s * slow, LEAST_SPARE)
        waiting = sum(f.prompt_tokens for f in replica.flights.values() if not f.begun)
        before_s = (
            slow * profile.step_seconds(Load(everyone, 0, context + waiting + coming)) / spare
        )
        mine = prompt + answer // 2
        joined = Load(everyone + 1, 0, context + waiting + coming + mine)
        itl_s = slow * profile.step_seconds(joined) / spare
        own_s = slow * token_s * own
        risk = broken(flight.promise.itl_s, itl_s)
        if not flight.had:  # else its first token came long ago
            risk += broken(flight.promise.ttft_s, ttft_s)
        risk *= ask.weight
        contexts, to_come = [prompt], [answer]
        every = len(replica.flights) // LOOKED_AT + 1
        for k, resident in enumerate(replica.flights.values()):
            if k % every:
                continue
            left, allowed_s = replica.allowance(resident, now)
            contexts += every * [replica.context_of(resident)]
            to_come += every * [left]
            if left > 0 and resident.promise.itl_s < inf:
                shared = min(left, answer) / left
                after_s = before_s + shared * (itl_s - before_s) + own_s / left
                rise = broken(allowed_s, after_s) - broken(allowed_s, before_s)
                risk += every * resident.request.weight * rise
        contexts += [f.prompt_tokens for f in replica.coming.values()]
        to_come += [f.output_tokens for f in replica.coming.values()]
        over = peak_tokens(contexts, to_come) / profile.kv_tokens - KV_FULL
        risk += CROWDED * max(over, 0.0)
        slower_s = 0.5 * answer * (itl_s - before_s)
        delay_s = ttft_s + answer * itl_s + everyone * (own_s + slower_s)
        return risk, delay_s, own / ask.usual_tokens, 1.0 - spare


def broken(promise_s: float, predicted_s: float) -> float:
    """The chance that a promise is broken; it is already where nothing of it is left."""
    return headroom.broken(promise_s, predicted_s, SPREAD) if promise_s > 0.0 else 1.0
