"""How well could one route who knew everything but the future arrivals?

The oracle weighs expected broken promises as `headroom` does, but is told what that must learn or
guess: true step times, the slowdown just now, what is cached and computed, how long each answer
will be, and how much of its promise each resident has used up. What `headroom` loses against it is
the price of learning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, exp, inf, log

from paceline.enginemodel import Load
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
STEEPNESS = 1.7 / SPREAD
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
        every, slower_s = len(replica.flights) // LOOKED_AT + 1, itl_s - before_s
        residents = replica.residents(every, now)
        tokens = 0
        for held, left, allowed_s, weight in residents:
            tokens += held + left
            if left > 0 and 0.0 < allowed_s < inf:  # it has something to lose
                shared = answer / left if answer < left else 1.0
                after_s = before_s + shared * slower_s + own_s / left
                rise = broken(allowed_s, after_s) - broken(allowed_s, before_s)
                risk += every * weight * rise
        arriving = [flight, *replica.coming.values()]
        tokens = every * tokens + sum(f.prompt_tokens + f.output_tokens for f in arriving)
        if tokens > KV_FULL * profile.kv_tokens:  # else the peak is below it
            contexts = [f.prompt_tokens for f in arriving] + every * [
                held for held, *_ in residents
            ]
            to_come = [f.output_tokens for f in arriving] + every * [
                left for _, left, *_ in residents
            ]
            over = peak_tokens(contexts, to_come) / profile.kv_tokens - KV_FULL
            risk += CROWDED * max(over, 0.0)
        slower_s *= 0.5 * answer
        delay_s = ttft_s + answer * itl_s + everyone * (own_s + slower_s)
        return risk, delay_s, own / ask.usual_tokens, 1.0 - spare


def broken(promise_s: float, predicted_s: float) -> float:
    """The chance that a promise is broken; it is already where nothing of it is left.

    As `headroom.broken`, but asked of every resident of every worker.
    """
    if promise_s <= 0.0:
        return 1.0
    odds = STEEPNESS * log(promise_s / predicted_s)
    return 1.0 / (1.0 + exp(odds)) if odds < 30.0 else 0.0
