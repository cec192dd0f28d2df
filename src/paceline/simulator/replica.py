"""What does one engine replica do, and what do gateways see of it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from math import inf
from random import Random
from typing import TYPE_CHECKING

from paceline.domain.facts import Step
from paceline.domain.worker import Worker, WorkerReport
from paceline.enginemodel import Generation, Profile, Scheduler, StepPlan
from paceline.kernel.rate import Rate
from paceline.simulator.clock import Clock
from paceline.simulator.flight import BYTES_PER_TOKEN, NAME_TOKENS, Flight
from paceline.simulator.gaps import Gaps
from paceline.simulator.links import Link

if TYPE_CHECKING:
    from paceline.simulator.gateway import Gateway

MOST_STEPS = 256
"""Steps that are run in one go at most."""
HELD_S = 30.0
"""How long engines keep what they have prefilled for others."""
RATE_S = 5.0
"""Time constant of the prefill rate."""


class Replica:
    """An engine model on the clock. Steps that are alike pass as one event, cut when need be."""

    def __init__(
        self,
        worker: Worker,
        profile: Profile,
        clock: Clock,
        rng: Random,
        gateways: Sequence[Gateway],
        speed: float = 1.0,
        link: Link | None = None,
        urgency: Mapping[str, int] | None = None,
    ) -> None:
        self.worker = worker
        self.profile = profile
        self.speed = speed
        self.up = False
        """Ready to serve."""
        self.start_up_s = 0.0
        self._preemptions = 0
        self.flights: dict[str, Flight] = {}
        """All that is here and not over, in the order of coming."""
        self.coming: dict[str, Flight] = {}
        """On its way here."""
        self._link = link
        """Which prompts share on their way; None: it is never full."""
        self._link_due = inf
        self._urgency = urgency
        """Which tiers are served first; None: first come, first served."""
        self.gateways = gateways
        self.streams = [0] * len(gateways)
        """Decoding streams by gateway."""
        self.plan: StepPlan | None = None
        self.began_at = 0.0
        """When the plan's first step began."""
        self.last_end = 0.0
        self.hung_until = 0.0
        self._clock = clock
        self._rng = rng
        self._plans = 0
        self._worst = 0
        """Which of the steps under way is the longest; 0 or less: it is over."""
        self._worse_s = 0.0
        """By how much it is longer than it would be by the others."""
        self._slowdown = 1.0 / speed
        self._end_due = inf
        self.prefill_rate = Rate(RATE_S)
        """Prompt tokens a second; what only an oracle may know."""
        self.scheduler = self._fresh()

    def _fresh(self) -> Scheduler:
        self._gaps = Gaps()
        self._told = 0
        scheduler = Scheduler(
            self.profile,
            by_priority=self._urgency is not None,
            rng=self._rng,
            name_tokens=NAME_TOKENS,
        )
        scheduler.slowdown = self._slowdown
        return scheduler

    @property
    def node(self) -> str:
        """The machine that it runs on."""
        return self.worker.node or self.worker.id

    @property
    def preemptions(self) -> int:
        """Over all of its lives."""
        return self._preemptions + self.scheduler.counters.preemptions

    # What happens to it.

    def ready(self, _: object = None) -> None:
        """It is ready to serve."""
        self.up = True

    def expect(self, flight: Flight, latency_s: float) -> None:
        """A request is sent: it comes in once it is prepared, has flown and is through."""
        self.coming[flight.id] = flight
        prepared_at = self._clock.now + max(self.profile.overhead_s - latency_s, 0.0)
        if self._link is None:
            deliver = partial(flight.gateway.deliver, flight)
            self._clock.at(prepared_at + latency_s, deliver, flight.leg)
        else:
            self._clock.at(prepared_at, partial(self._set_out, flight), flight.leg)

    def _set_out(self, flight: Flight, leg: int) -> None:
        assert self._link is not None
        if flight.leg == leg and flight.replica is self:
            size_bytes = BYTES_PER_TOKEN * flight.prompt_tokens
            self._link.start(self._clock.now, flight.id, size_bytes)
            self._await_link()

    def _await_link(self) -> None:
        assert self._link is not None
        self._link_due, _ = self._link.next_done()
        if self._link_due < inf:
            self._clock.at(self._link_due, self._through, self._link_due)

    def _through(self, due: float) -> None:
        if due != self._link_due:
            return  # another has come onto the link since
        assert self._link is not None
        for request_id in self._link.finish(due):
            flight = self.coming[request_id]
            flight.gateway.deliver(flight, flight.leg)
        self._await_link()

    def send(self, flight: Flight, received: bool = False) -> None:
        """A request comes in, perhaps with its prompt's cache. ValueError if it could never be
        finished."""
        priority = self._urgency[flight.request.tier] if self._urgency is not None else 0
        generation = Generation(
            flight.id,
            flight.prompt_tokens,
            flight.output_tokens,
            flight.names,
            priority,
            flight.handing,
            flight.prompt_tokens if received else 0,
        )
        self.scheduler.release(flight.id)  # of an earlier try
        self.scheduler.add(generation)
        self.flights[flight.id] = flight
        if self.plan is None:
            self._start(None)
        else:
            self._cut()

    def abort(self, flight: Flight) -> None:
        """A request is no longer wanted, wherever it is."""
        if self.coming.pop(flight.id, None) is not None and self._link is not None:
            self._link.drop(self._clock.now, flight.id)
            self._await_link()
        if self.flights.pop(flight.id, None) is None:
            return
        if self.plan is not None and (ended := self._ended()):
            self._advance(ended)
        if flight.id in self.scheduler.decoding:
            self.streams[flight.gateway.index] -= 1
        self.scheduler.abort(flight.id)
        self._cut()

    def fetched(self, request_id: str) -> None:
        """What was held for another worker is there now."""
        if self.scheduler.release(request_id):
            if self.plan is None:
                self._start(None)
            else:
                self._cut()

    def _give_up(self, held: tuple[Scheduler, str]) -> None:
        """Nobody has fetched it in time."""
        scheduler, request_id = held
        if scheduler is self.scheduler:
            self.fetched(request_id)

    def slow(self, factor: float) -> None:
        """From the next step on, steps take so many times as long as before."""
        self._slowdown = self.scheduler.slowdown = self._slowdown * factor
        self._cut()

    def hang(self, until: float) -> None:
        """Until then the step under way does not go on."""
        if until <= self.hung_until:
            return
        self.progress()
        self._cut()
        longer_s = until - max(self._clock.now, self.hung_until)
        self.hung_until = until
        if self.plan is not None:
            self._reschedule(self._end_due + longer_s)
        self._clock.at(until, self._start)

    def crash(self) -> None:
        """All that is here is lost."""
        for flight in self.flights.values():
            flight.gateway.count(flight)
        self.flights = {}
        self.up = False
        self.plan = None
        self._plans += 1
        self.hung_until = 0.0
        self._preemptions = self.preemptions
        self.streams = [0] * len(self.streams)
        self.scheduler = self._fresh()

    # What can be seen of it.

    def report(self, healthy: bool) -> WorkerReport:
        """What the engine says of itself."""
        if not healthy:
            return WorkerReport(False, "nobody answers")
        scheduler = self.scheduler
        return WorkerReport(
            True,
            running=scheduler.running,
            waiting=scheduler.waiting,
            kv_used=scheduler.kv_used,
            kv_capacity_tokens=scheduler.pool.blocks * self.profile.block_size,
            block_size=self.profile.block_size,
            preemptions_total=scheduler.counters.preemptions,
            max_model_len=self.profile.max_model_len,
        )

    def progress(self) -> None:
        """Tell the gateways of the steps under way that are over already."""
        plan = self.plan
        if plan is not None and plan.steps > 1 and (ended := self._ended()) > self._told:
            self._tell(plan, ended)

    @property
    def stepped_at(self) -> float:
        """When its last step ended."""
        if self.plan is not None and (ended := self._ended()):
            return self.began_at + self.plan.seconds_of(ended)
        return self.last_end

    def count(self, flight: Flight) -> None:
        """Take down which tokens of a request have come so far, and its longest gap."""
        if self.flights.get(flight.id) is not flight:
            return  # it is not here, or no more
        flight.came = self.produced(flight)
        flight.came_at = self.stepped_at if flight.joined else flight.done_at
        if flight.joined:
            longest_s = self._gaps.longest_s(flight.joined)
            if self.plan is not None and (ended := self._ended()):
                longest_s = max(longest_s, self._longest_s(ended, self.plan.seconds_of(ended)))
            flight.stall_s = max(flight.stall_s, longest_s)

    # What only an oracle may know.

    def left_s(self) -> float:
        """Until the step under way ends."""
        assert self.plan is not None
        ends_at = self.began_at + self.plan.seconds_of(self._ended() + 1)
        return max(ends_at - self._clock.now, 0.0)

    def produced(self, flight: Flight) -> int:
        """Tokens of the answer so far, without those of earlier workers."""
        if flight.id not in self.scheduler:  # its last step has just ended
            return flight.output_tokens
        return self.scheduler.produced(flight.id, self._ended() if self.plan is not None else 0)

    def residents(self, every: int, now: float) -> list[tuple[int, int, float, float]]:
        """Of every so-manyth request here: tokens of prompt and answer so far, tokens to come, the
        mean gap at which those still keep the ITL promise, and the request's weight."""
        flights = list(islice(self.flights.values(), 0, None, every))
        names = [flight.id for flight in flights]
        ended = self._ended() if self.plan is not None else 0
        found = []
        for flight, got in zip(flights, self.scheduler.produced_of(names, ended), strict=True):
            arrival, request, had = flight.arrival, flight.request, flight.had
            answer = arrival.output_tokens
            if got is None:  # its last step has just ended
                got = answer - had
            held = arrival.prompt_tokens + had + got
            left, allowed_s = answer - 1, request.promise.itl_s
            if flight.first_at < inf:
                allowed_s = allowed_s * left - (now - flight.first_at)
                left = answer - had - got or 1
                allowed_s /= left
            found.append((held, left, allowed_s, request.weight))
        return found

    # Its steps.

    def _start(self, _: object) -> None:
        now = self._clock.now
        if self.plan is not None or now < self.hung_until:
            return
        plan = self.scheduler.plan(MOST_STEPS)
        if plan is None:
            return
        for request_id, cached in plan.admitted.items():
            if not (flight := self.flights[request_id]).had:
                flight.cached_tokens = cached
        if plan.load.prefill:
            self.prefill_rate.add(plan.load.prefill, now)
        for request_id in plan.preempted:
            flight = self.flights[request_id]
            if flight.joined:
                self.streams[flight.gateway.index] -= 1
                self._settle(flight)
        self.plan, self.began_at, self._told = plan, now, 0
        self._worst = 1 + int(self._rng.random() * plan.steps) if plan.steps > 1 else 1
        self._worse_s = plan.longest_s - plan.seconds / plan.steps
        self._reschedule(now + plan.seconds)

    def _reschedule(self, end_due: float) -> None:
        self._plans += 1
        self._end_due = end_due
        self._clock.at(end_due, self._end, self._plans)

    def _ended(self) -> int:
        """How many of the steps under way are over."""
        assert self.plan is not None
        if self.plan.steps == 1 or self.hung_until > self._clock.now:
            return self._told
        return max(self.plan.ended_after(self._clock.now - self.began_at), self._told)

    def _cut(self) -> None:
        """Of the steps under way, the one that is being run is the last."""
        plan, now = self.plan, self._clock.now
        if plan is None or plan.steps == 1 or self.hung_until > now:
            return
        steps = self._ended() + 1
        if steps == plan.steps:
            return
        ends_at = max(self.began_at + plan.seconds_of(steps), now)
        self.plan = plan.first(steps)
        self._reschedule(ends_at)

    def _advance(self, steps: int) -> None:
        """The first so many of the steps under way are over; the rest is planned anew."""
        plan = self.plan
        assert plan is not None
        self._tell(plan, steps)
        self.scheduler.complete(plan, steps)
        self._gaps.add(
            self.scheduler.counters.steps, self._longest_s(steps, plan.seconds_of(steps))
        )
        self.last_end = self.began_at + plan.seconds_of(steps)
        self.plan, self._told = plan.after(steps), 0
        self._worst -= steps
        self.began_at = self.last_end

    def _end(self, number: int) -> None:
        plan = self.plan
        if number != self._plans or plan is None:
            return
        now, scheduler, flights = self._clock.now, self.scheduler, self.flights
        outcome = scheduler.complete(plan)
        step = scheduler.counters.steps
        self._gaps.add(step, self._longest_s(plan.steps, now - self.began_at))
        streams = self.streams.copy()
        for request_id in outcome.first:
            flight = flights[request_id]
            if flight.handing:
                continue
            flight.joined = step
            self.streams[flight.gateway.index] += 1
            flight.gateway.first_token(flight)
        for request_id in outcome.resumed:
            flight = flights[request_id]
            flight.stall_s = max(flight.stall_s, now - flight.done_at)
            flight.joined = step
            self.streams[flight.gateway.index] += 1
        self._tell(plan, plan.steps, streams, now)
        self.last_end = now
        self.plan = None
        for request_id in outcome.finished:
            flight = flights.pop(request_id)
            if flight.handing:
                self._clock.at(now + HELD_S, self._give_up, (scheduler, request_id))
                flight.gateway.prefilled(flight)
                continue
            self.streams[flight.gateway.index] -= 1
            self._settle(flight)
            flight.gateway.ended(flight)
        self._start(None)

    def _longest_s(self, steps: int, seconds: float) -> float:
        """The longest of the first so many of the steps under way, which took so long together."""
        plan = self.plan
        assert plan is not None
        longest_s = seconds - plan.seconds_of(steps - 1) if steps > 1 else seconds
        if 0 < (worst := self._worst) <= steps:
            usual_s = plan.seconds_of(worst) - plan.seconds_of(worst - 1)
            longest_s = max(longest_s, usual_s + self._worse_s)
        return longest_s

    def _settle(self, flight: Flight) -> None:
        """It decodes no more: take down its longest gap and its last token so far."""
        flight.stall_s = max(flight.stall_s, self._gaps.longest_s(flight.joined))
        flight.done_at = self.last_end
        flight.joined = 0

    def _tell(
        self, plan: StepPlan, ended: int, streams: Sequence[int] = (), now: float = 0.0
    ) -> None:
        """Show the steps that are over to the gateways that have streams here."""
        told, self._told = self._told, ended
        count = ended - told
        if not count:
            return
        ended_at = now or self.began_at + plan.seconds_of(ended)
        began_at = self.began_at + plan.seconds_of(told) if told else self.began_at
        for gateway, n in enumerate(streams or self.streams):
            if n:
                step = Step(ended_at, (ended_at - began_at) / count, n, n, count)
            elif self.streams[gateway]:  # only first tokens came
                step = Step(ended_at, 0.0, 0, 0)
            else:
                continue
            self.gateways[gateway].steps(self, step)
