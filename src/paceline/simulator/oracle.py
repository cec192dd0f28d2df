"""How well could one route who knew everything but the future arrivals?

The oracle weighs expected broken promises as `headroom` does, but is told what that must learn or
guess: true step times, the slowdown just now, what is cached and computed, how long each answer
will be, and how much of its promise each resident has used up. What `headroom` loses against it is
the price of learning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, exp, inf, log

from msgspec.structs import replace

from paceline.enginemodel import Load
from paceline.policy.disagg import Sharing
from paceline.policy.fleet import Choice, Fleet
from paceline.policy.headroom import CROWDED, DELAY_WEIGHT, LEAST_SPARE, WORK_WEIGHT
from paceline.policy.pressure import KV_FULL, peak_tokens
from paceline.policy.standing import LEAST_ROOM, Ask
from paceline.simulator.flight import NAME_TOKENS, Flight
from paceline.simulator.handing import HandOvers
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
        handovers: HandOvers,
        now: Callable[[], float],
    ) -> None:
        self._replicas = replicas
        self._flights = flights
        self._handovers = handovers
        self._now = now

    def __call__(self, fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
        return self._least(fleet, ask, [(place, None) for place in places])

    def ways(
        self, fleet: Sharing, ask: Ask, places: Sequence[int], sources: Sequence[int]
    ) -> Choice:
        """Each worker as it is, and with the prompt from each that would prefill it."""
        pairs = [(i, k) for i in places for k in sources if fleet.link(k, i) is not None]
        return self._least(fleet, ask, [*((place, None) for place in places), *pairs])

    def fetching(self, fleet: Sharing, ask: Ask, places: Sequence[int], source: int) -> Choice:
        """Each worker with the prompt that another one has prefilled."""
        choice = self._least(fleet, ask, [(place, source) for place in places])
        return replace(choice, source=None)

    def _least(self, fleet: Fleet, ask: Ask, ways: Sequence[tuple[int, int | None]]) -> Choice:
        """Of places that answer, each with the one that prefills, if that is another."""
        flight = self._flights[ask.request_id]
        costs = []
        for place, source in ways:
            giver = self._replicas[fleet.ids[source]] if source is not None else None
            costs.append(self._cost(self._replicas[fleet.ids[place]], flight, ask, giver))
        least_s = min(delay_s for _, delay_s, _, _ in costs)
        price = WORK_WEIGHT * sum(busy for _, _, _, busy in costs) / len(costs)
        totals = [
            risk + DELAY_WEIGHT * delay_s / least_s + price * work
            for risk, delay_s, work, _ in costs
        ]
        best = min(range(len(ways)), key=lambda k: (totals[k], k))
        place, source = ways[best]
        return Choice(place, f"least true cost {totals[best]:.3f}", source=source)

    def _cost(
        self, replica: Replica, flight: Flight, ask: Ask, source: Replica | None
    ) -> tuple[float, float, float, float]:
        """Expected broken promises, seconds of delay to all, work, and how busy the worker is."""
        now, profile, scheduler = self._now(), replica.profile, replica.scheduler
        slow = scheduler.slowdown
        prompt, answer = flight.prompt_tokens, flight.output_tokens
        cached = cached_on(replica, flight)
        work = own = prompt - cached
        if source is None:
            ttft_s = self._prefilled_s(replica, flight, own, cached)
        else:
            work, own = prompt - cached_on(source, flight), 1
            ttft_s = self._brought_s(source, replica, flight)
        coming = sum(f.prompt_tokens for f in replica.coming.values())
        streams = len(scheduler.decoding)
        everyone = len(replica.flights) + len(replica.coming)
        context = scheduler.context
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
        return risk, delay_s, work / ask.usual_tokens, 1.0 - spare

    def _prefilled_s(self, replica: Replica, flight: Flight, own: int, cached: int) -> float:
        """From a request's arrival until its prompt is prefilled after all that is there: whole
        chunks beside the decodes."""
        now, profile, scheduler = self._now(), replica.profile, replica.scheduler
        ahead = scheduler.prompt_left() + sum(f.prompt_tokens for f in replica.coming.values())
        streams = len(scheduler.decoding)
        room = max(profile.max_num_batched_tokens - streams, LEAST_ROOM)
        steps = ceil((ahead + own) / room)
        attention = 0.5 * ahead * ahead + own * (cached + 0.5 * own)
        each = Load(streams, round((ahead + own) / steps), scheduler.context, attention / steps)
        stuck_s = min(max(replica.hung_until - now, 0.0), FOREVER_S)
        under_way_s = replica.left_s() if replica.plan is not None else 0.0
        spent_s = now - flight.arrival.at_s + stuck_s + under_way_s
        return spent_s + scheduler.slowdown * steps * profile.step_seconds(each)

    def _brought_s(self, source: Replica, replica: Replica, flight: Flight) -> float:
        """The same with the prompt from another worker: when it is prefilled there and all that
        its machine has to send is sent, it comes, and a step gives the token."""
        ready_s = waited_s = self._now() - flight.arrival.at_s
        if flight.id not in source.scheduler.held:
            cached = cached_on(source, flight)
            ready_s = self._prefilled_s(source, flight, flight.prompt_tokens - cached, cached)
        before = 0
        for giver in self._replicas.values():
            if giver.node == source.node:
                there = [*giver.flights.values(), *giver.coming.values()]
                held = [
                    self._flights[name] for name in giver.scheduler.held if name in self._flights
                ]
                before += sum(f.prompt_tokens for f in there if f.handing)
                before += sum(f.prompt_tokens for f in held if f is not flight)
        sent_s = self._handovers.sending_s(source, replica, before)
        own_s = self._handovers.sending_s(source, replica, flight.prompt_tokens)
        scheduler = replica.scheduler
        step = Load(len(scheduler.decoding), 1, scheduler.context)
        step_s = scheduler.slowdown * replica.profile.step_seconds(step)
        return max(ready_s, waited_s + sent_s) + own_s + step_s


def cached_on(replica: Replica, flight: Flight) -> int:
    """Tokens of a prompt that a worker need not compute."""
    return min(replica.scheduler.pool.known(flight.names) * NAME_TOKENS, flight.prompt_tokens - 1)


def broken(promise_s: float, predicted_s: float) -> float:
    """The chance that a promise is broken; it is already where nothing of it is left.

    As `headroom.broken`, but asked of every resident of every worker.
    """
    if promise_s <= 0.0:
        return 1.0
    odds = STEEPNESS * log(promise_s / predicted_s)
    return 1.0 / (1.0 + exp(odds)) if odds < 30.0 else 0.0
