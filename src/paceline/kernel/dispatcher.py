"""Who of those that wait goes where, and who is turned away?

Requests wait here and not in engines (late binding), so that whoever needs it most goes first, to
wherever room comes first. With room at hand a request waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import msgspec

from paceline.domain.commands import (
    Command,
    Degrade,
    Dispatch,
    Fail,
    Hold,
    Pause,
    Prefill,
    Shed,
)
from paceline.domain.request import Event, Request
from paceline.kernel.handover import HandOver
from paceline.kernel.ledger import Entry
from paceline.kernel.legs import Legs
from paceline.kernel.live import Live
from paceline.kernel.pool import Pool
from paceline.kernel.retries import RetryBudget
from paceline.kernel.room import Room
from paceline.kernel.worker import WorkerState
from paceline.policy.fleet import Choice, Policy
from paceline.policy.lengths import own_share

LOOK_S = 0.05
"""How often those who wait are looked at, whatever happens: urgency grows with time."""
OUTPUT_COST = 2.0
"""What an output token counts in fair shares, in prompt tokens (VTC, Sheng et al. 2024)."""
USUAL_RATE = 0.05
"""How fast the mean of predicted TTFTs follows the last ones."""
PAUSED_SHARE = 0.25
"""Of a worker's preemptible streams, those that are paused at one look."""
SURE = 1.5
"""Times the usual TTFT of a request that is sent that must be left for its promise to be kept."""
NO_WORKER_S = 5.0
"""When to come back where no worker is there at all."""


class Bounds(msgspec.Struct, frozen=True):
    """How long requests may wait, and how many."""

    hold_s: float
    """For a worker to become usable."""
    max_wait_s: float
    """For room on one."""
    max_waiting: int
    """Of one model and tier."""


class Dispatcher:
    """The requests that wait, of all models, and the policy that places them."""

    def __init__(
        self, bounds: Bounds, policy: Policy, pools: dict[str, Pool], requests: dict[str, Live]
    ) -> None:
        self._bounds = bounds
        self._legs = Legs(policy)
        self._pools = pools
        self._requests = requests
        self._rooms: dict[str, Room] = {}
        self._retries = RetryBudget()
        self.look_at = inf
        """When `look` is wanted; infinite while nobody waits."""
        self.usual_s = 0.0
        """Predicted TTFT of those sent in time, lately: the others may take any way."""

    def counts(self) -> dict[str, int]:
        """How many requests wait, by model."""
        return {model: len(room) for model, room in self._rooms.items()}

    # What comes in.

    def arrived(self, live: Live, now: float) -> list[Command]:
        """A new request: it goes at once, if there is room and nobody to go before it."""
        room = self._rooms.get(live.request.model)
        if room is None or not len(room):
            choice = self._choose(live, now)
            if choice is not None and not choice.wait:
                return self._send(live, choice, now)
            return self._wait(live, now)
        commands = self._wait(live, now)
        if live.waits and room.waiting.leads(live, now):
            commands += self.serve(live.request.model, now)
        return commands

    def returned(self, live: Live, now: float) -> list[Command]:
        """A request is back from a worker: it goes elsewhere as soon as may be."""
        room = self._room(live)
        room.enter(now)
        room.returning.append(live)
        live.waits = live.returns = True
        commands = self.serve(live.request.model, now)
        return commands if not live.waits else [*commands, *self._hold(live, "no room yet", now)]

    def handed(self, live: Live, now: float) -> list[Command]:
        """A prompt is prefilled: it goes to the worker that is to answer before all others."""
        room = self._room(live)
        room.enter(now)
        room.handed.append(live)
        live.waits = True
        commands = self.serve(live.request.model, now)
        return commands if not live.waits else [*commands, *self._hold(live, "no room yet", now)]

    def paused(self, live: Live, now: float) -> list[Command]:
        """A request was taken off its worker to make room: it waits for its turn as others do."""
        return self._wait(live, now)

    def discard(self, live: Live) -> None:
        """A request waits no more."""
        if live.waits:
            room = self._room(live)
            if live.handover is not None:
                room.handed.remove(live)
            elif live.returns:
                room.returning.remove(live)
            else:
                room.waiting.discard(live.request.id)
            live.waits = live.returns = False

    def look(self, now: float) -> list[Command]:
        """Time has passed: whoever waits may go, or may have waited for too long."""
        commands: list[Command] = []
        self.look_at = inf
        for model, room in list(self._rooms.items()):
            if len(room):
                self._void(room, now)
                commands += self._too_late(model, room, now)
                commands += self.serve(model, now)
                commands += self._make_room(room, now)
            if len(room):
                self.look_at = now + LOOK_S
        return commands

    # Who goes.

    def serve(self, model: str, now: float) -> list[Command]:
        """There may be room: send whoever is to go."""
        room = self._rooms.get(model)
        if room is None or not len(room):
            return []
        commands: list[Command] = []
        kept = self._send_handed(room, commands, now) if room.handed else ()
        while room.returning and (sent := self._send_again(room.returning[0], now)) is not None:
            room.returning.popleft()
            commands += sent
        while (sent := self._send_next(room, kept, now)) is not None:
            commands += sent
        return commands

    def _send_handed(self, room: Room, commands: list[Command], now: float) -> Sequence[int]:
        """Those that are prefilled, in order; gives the place that the next of them waits for."""
        while room.handed:
            live = room.handed[0]
            if live.handover is None or not live.handover.holds(now):
                self._void(room, now)
                continue
            choice = self._choose(live, now, overdue=True)
            if choice is None or choice.wait:
                return [choice.place] if choice is not None else ()
            room.handed.popleft()
            commands += self._send(live, choice, now)
        return ()

    def _void(self, room: Room, now: float) -> None:
        """What was prefilled and can't be fetched any more must be prefilled again."""
        for live in list(room.handed):
            if live.handover is not None and not live.handover.holds(now):
                room.handed.remove(live)
                live.handover.over()
                live.handover = None
                live.returns = True
                room.returning.append(live)

    def _make_room(self, room: Room, now: float) -> list[Command]:
        """Pause streams that may be paused for one of more weight that can wait no longer."""
        for live in room.waiting.heads(now):
            if now + 2.0 * live.needs_s < live.deadline or live.request.preemptible:
                continue
            choice = self._choose(live, now)
            if choice is not None and choice.wait and choice.source is None:
                worker = self._pools[live.request.model].at(choice.place)
                return self._pauses(worker, live.request)
        return []

    def _pauses(self, worker: WorkerState, request: Request) -> list[Command]:
        """Of those that may go, a part: the newest, whose streams have least to lose."""
        may = [self._requests[name] for name in worker.ledger.entries]
        may = [
            live
            for live in may
            if live.request.preemptible and live.request.weight < request.weight and live.may_leave
        ]
        because = f"{request.tier} needs the room"
        paused = may[-max(1, round(PAUSED_SHARE * len(may))) :] if may else []
        return [live.leave(Pause, because) for live in paused]

    def _send_again(self, live: Live, now: float) -> list[Command] | None:
        if not self._retries.spend(now):
            return None
        choice = self._choose(live, now, overdue=True)
        if choice is None or choice.wait:
            self._retries.refund()
            return None
        return self._send(live, choice, now)

    def _send_next(self, room: Room, keep: Sequence[int], now: float) -> list[Command] | None:
        """The first that may go. Whoever must wait keeps the place that suits it best."""
        kept = list(keep)
        overdue = room.waiting.overdue
        for live in room.waiting.heads(now):
            choice = self._choose(live, now, kept, live is overdue)
            if choice is None:
                continue
            if not choice.wait:
                return self._send(live, choice, now)
            if live is not overdue and now + live.needs_s < live.deadline:
                kept.append(choice.place if choice.source is None else choice.source)
        return None

    def _choose(
        self, live: Live, now: float, kept: Sequence[int] = (), overdue: bool = False
    ) -> Choice | None:
        """Where it would go; None where no worker may be chosen."""
        pool = self._pools.get(live.request.model)
        if pool is None:
            return None
        places: Sequence[int] = pool.usable(now, live.avoids)
        if live.handover is not None:
            places = self._legs.takers(pool, live.handover, places, now)
        if not places:
            return None
        ask = pool.ask(live.request, now - live.arrived_at, now, live.produced, overdue)
        if live.ask is None:
            pool.demand.came(live.request, ask, now)
        live.ask = ask
        choice = self._legs.choose(pool, live, ask, places, pool.sources(now, live.avoids), kept)
        if choice is None:
            return None
        if choice.predicted is not None:
            live.needs_s = choice.predicted.ttft_s
        return choice

    def elsewhere(self, live: Live, worker: WorkerState, given: int, now: float) -> Choice | None:
        """Another worker for a stream of so many tokens; None if none is open to it."""
        if live.predicted is None:
            return None  # its policy foresees nothing, and may take the question for a choice
        pool = self._pools[live.request.model]
        places = [place for place in pool.usable(now, live.tried) if place != worker.place]
        ask = pool.ask(live.request, 0.0, now, given, overdue=True)
        choice = self._legs.choose(pool, live, ask, places, ()) if places else None
        return choice if choice is not None and not choice.wait else None

    def _send(self, live: Live, choice: Choice, now: float) -> list[Command]:
        """To the worker that answers; or first, or at once, to one that prefills for it."""
        if choice.source is None:
            return [self._dispatch(live, choice, now)]
        prefill = self._prefill(live, choice, now)
        assert live.handover is not None
        return [prefill, self._dispatch(live, choice, now)] if live.handover.paired else [prefill]

    def _prefill(self, live: Live, choice: Choice, now: float) -> Prefill:
        pool = self._pools[live.request.model]
        worker, entry = self._entry(live, choice, pool.at(choice.source or 0), now)
        entry.passes_on, entry.left = True, 0.0
        raw_s = choice.predicted.ttft_s / choice.predicted.ttft_factor if choice.predicted else 0.0
        link = pool.link(worker.place, choice.place)
        assert link is not None
        live.handover = HandOver(live.request.id, worker, link, entry.prompt, now, raw_s)
        live.move(Event.PREFILL)
        self._sent(live, choice, worker, entry, now)
        pool.dispatched(entry.uncached)
        because, predicted = choice.because, choice.predicted
        return Prefill(live.request.id, worker.worker.id, because, predicted, live.attempt)

    def _dispatch(self, live: Live, choice: Choice, now: float) -> Dispatch:
        pool, handover = self._pools[live.request.model], live.handover
        worker, entry = self._entry(live, choice, pool.at(choice.place), now)
        if handover is not None:
            link = pool.link(handover.worker.place, choice.place)
            assert link is not None
            handover.fetch(entry, link, choice.predicted)
        live.predicted, live.left = choice.predicted, ""
        live.move(Event.DISPATCHED)
        self._sent(live, choice, worker, entry, now)
        if handover is None:
            pool.dispatched(entry.uncached)
        return Dispatch(
            live.request.id,
            worker.worker.id,
            choice.because,
            choice.predicted,
            live.attempt,
            live.produced,
            handover.worker.worker.id if handover is not None else "",
            choice.runner_up,
        )

    def _entry(
        self, live: Live, choice: Choice, worker: WorkerState, now: float
    ) -> tuple[WorkerState, Entry]:
        """What will stand in the worker's books."""
        ask = live.ask
        assert ask is not None
        if not live.attempt:
            self._retries.first_attempt()
        live.attempt += live.handover is None  # two workers that share it are one attempt
        live.worker = worker
        return worker, Entry(
            live.request,
            ask.prompt_tokens,
            ask.cached.get(worker.place, 0.0),
            now,
            live.deadline,
            live.produced,
            ask.output_left,
            own_share(self._pools[live.request.model].turn),
        )

    def _sent(
        self, live: Live, choice: Choice, worker: WorkerState, entry: Entry, now: float
    ) -> None:
        """It goes to the worker, and waits no more."""
        request, ask, pool = live.request, live.ask, self._pools[live.request.model]
        assert ask is not None
        if choice.predicted is not None and now + choice.predicted.ttft_s <= live.deadline:
            self.usual_s += USUAL_RATE * (choice.predicted.ttft_s - self.usual_s)
        worker.sent(entry, choice.predicted, now)
        if worker.on_trial:
            pool.regroup()
        pool.prefixes.insert(worker.place, request.blocks)
        if request.token_blocks and pool.blocks.follows(worker.place):
            pool.soon.sent(worker.place, request.token_blocks, now)
        pool.touch(worker)
        room = self._rooms.get(request.model)
        if room is not None and live.waits and not entry.fetches:
            room.pace.passed(now, busy=True)
            room.pace.sent(live.cost)
            if not live.returns:
                room.waiting.taken(live)
                room.waiting.served(live, entry.uncached + OUTPUT_COST * ask.output_tokens)
        live.waits = live.returns = False

    # Who waits, and for how long.

    def _wait(self, live: Live, now: float) -> list[Command]:
        room, request = self._room(live), live.request
        room.enter(now)
        live.needs_s = SURE * (live.needs_s or self.usual_s)
        if not live.produced and room.waiting.of_tier(request) >= self._bounds.max_waiting:
            return [self._shed(live, room, f"too many requests of {request.tier} wait", now)]
        if request.overload == "shed" and self._hopeless(live, room, now):
            return [self._shed(live, room, "its promise could not be kept", now)]
        room.waiting.add(live)
        live.waits = True
        return self._hold(live, "no worker has room for it yet", now)

    def _hold(self, live: Live, because: str, now: float) -> list[Command]:
        self.look_at = min(self.look_at, now + LOOK_S)
        if live.told_wait:
            return []
        live.told_wait = True
        return [Hold(live.request.id, because)]

    def _hopeless(self, live: Live, room: Room, now: float) -> bool:
        """Will its promise be lost by the time that its turn comes?"""
        return now + self._wait_s(live, room, now) + live.needs_s > live.deadline

    def _wait_s(self, live: Live, room: Room, now: float) -> float:
        """Until its turn comes, by the pace of late."""
        room.pace.passed(now, busy=len(room) > 0)
        return room.pace.seconds_for(room.waiting.ahead_of(live)[1])

    def _too_late(self, model: str, room: Room, now: float) -> list[Command]:
        """Who has waited for too long, or has lost what it waited for?"""
        commands: list[Command] = []
        bounds, pool = self._bounds, self._pools.get(model)
        if pool is not None and pool.usable(now):
            room.down_since = inf
        elif now < room.down_since:
            room.down_since = now
        down = now >= room.down_since + bounds.hold_s
        for live in room.waiting.expired(now, bounds.hold_s if down else bounds.max_wait_s):
            live.waits = False
            if live.request.preemptible and not down:  # it has all the time in the world
                live.arrived_at = now
                commands += self._wait(live, now)
            else:
                commands.append(self._given_up(live, room, down, now))
        for live in [
            live for live in room.returning if down or now > live.arrived_at + bounds.max_wait_s
        ]:
            self.discard(live)
            commands.append(self._given_up(live, room, down, now))
        for live in room.waiting.newly_lost(now):
            rule = live.request.overload
            if rule == "shed":
                self.discard(live)
                commands.append(self._shed(live, room, "its promise cannot be kept any more", now))
            elif rule == "degrade" and live.request.instead is not None:
                self.discard(live)
                commands += self._degrade(live, live.request.instead, now)
        return commands

    def _given_up(self, live: Live, room: Room, down: bool, now: float) -> Shed | Fail:
        if live.because or live.produced:
            live.move(Event.GAVE_UP)
            del self._requests[live.request.id]
            return Fail(live.request.id, live.because or "no worker has room", live.timed_out)
        if down:
            because = f"no worker of {live.request.model} is available"
            return self._shed(live, room, because, now, unavailable=True)
        return self._shed(live, room, "it has waited for too long", now)

    def _shed(
        self, live: Live, room: Room, because: str, now: float, unavailable: bool = False
    ) -> Shed:
        """Turn it away, until it would be served in time."""
        after_s = NO_WORKER_S
        if not unavailable:
            patience_s = min(live.request.promise.ttft_s, self._bounds.max_wait_s)
            after_s = max(self._wait_s(live, room, now) + live.needs_s - patience_s, 1.0)
        live.move(Event.SHED)
        del self._requests[live.request.id]
        return Shed(live.request.id, because, after_s, unavailable)

    def _degrade(self, live: Live, instead: Request, now: float) -> list[Command]:
        because = f"the promise of {live.request.tier} cannot be kept any more"
        live.becomes(instead)
        told = Degrade(instead.id, instead.tier, instead.model, because)
        return [told, *self.arrived(live, now)]

    def _room(self, live: Live) -> Room:
        return self._rooms.setdefault(live.request.model, Room())
