"""Which cause has each late token?

Watches a kernel from beside: it gets every fact after the kernel has handled it, and the commands
that followed. Steps are explained once for all their streams (`Timeline`); a request keeps three
marks on its worker's timeline, so that a broken promise is explained by the difference of sums. No
work is done for a token, and little for one that is in time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any

import structlog

from paceline.domain.commands import Command, Dispatch, Fail, Move, Pause, Prefill, Shed
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    Fact,
    FirstTokenSeen,
    Prefilled,
    RequestArrived,
    StepsSeen,
    StreamBroke,
    StreamEnded,
    StreamStopped,
    WorkerReported,
)
from paceline.domain.promise import Promise
from paceline.kernel import Kernel
from paceline.observe.course import Course, allowed_s
from paceline.observe.lag import Lags
from paceline.observe.losses import Losses, of_request, of_step
from paceline.observe.timeline import PATIENCE_S, REPORT_S, LateStep, Mark, between
from paceline.observe.workers import Track, look_at
from paceline.policy.causes import (
    NOTHING,
    PROMPT_CAUSES,
    Cause,
    Split,
    Sums,
    add,
    beyond,
    dominant,
    late_after_s,
    of_first_token,
    of_gaps,
    scaled,
)

LOOK_S = 1.0
"""How often the workers are looked at."""
AT_ONCE = 8
"""Steps of a worker that are taken in together while nothing is late: that takes half as long."""
ALONE = 1.5
"""Times the longest gap of all streams that a single one's gap must be to be its own."""

log = structlog.get_logger("paceline")


class Stalls:
    """Explains what is late. `lag` tells it when the gateway itself was."""

    def __init__(self, kernel: Kernel) -> None:
        self.losses = Losses()
        self.tracks: dict[str, Track] = {}
        """By worker."""
        self.lags = Lags()
        self._kernel = kernel
        self._courses: dict[str, Course] = {}
        self._promises: dict[str, Promise] = {}
        """The last one of each tier."""
        self._floor_s = inf
        """The shortest gap that is late for anybody."""
        self._doubts: deque[tuple[float, Callable[[], None]]] = deque()
        """What waits for a worker's next report."""
        self._look_at = -inf
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            RequestArrived: self._arrived,
            FirstTokenSeen: self._first_token,
            Prefilled: self._prefilled,
            StepsSeen: self._steps,
            StreamEnded: self._ended,
            StreamStopped: self._stopped,
            StreamBroke: self._broke,
            DispatchFailed: self._failed,
            ClientLeft: self._left,
            WorkerReported: self._reported,
        }

    def saw(self, now: float, fact: Fact, commands: Sequence[Command]) -> None:
        """The kernel has handled a fact."""
        try:
            handler = self._handlers.get(type(fact))
            if handler is not None:
                handler(fact, now)
            for command in commands:
                self._commanded(command, now)
            if now >= self._look_at:
                self._look_at = now + LOOK_S
                self.look(now)
        except Exception:  # what is explained here is not worth a stream
            log.exception("a bug kept something late from being explained")

    def lag(self, at: float, seconds: float) -> None:
        """The event loop came to what was due so many seconds late."""
        self.lags.add(at, seconds)

    def awaiting(self) -> Iterator[Course]:
        """Those that no worker has, to write the answer."""
        known = self._kernel.requests
        return (c for name, c in self._courses.items() if c.sent is None and name in known)

    def look(self, now: float) -> None:
        """Some time has passed."""
        workers = self._kernel.workers
        self.catch_up(now)
        while self._doubts and self._doubts[0][0] <= now:
            self._doubts.popleft()[1]()
        for track in self.tracks.values():
            track.timeline.settle(now - PATIENCE_S)
            if track.timeline.late or track.pending:
                self._explain(track, now)
        gone = ({*self.tracks, *self.losses.late} - {""}).difference(workers)
        for worker_id in gone:
            self.tracks.pop(worker_id, None)
        self.losses.forget(gone)
        look_at(workers, self.tracks, now)
        if len(self._courses) > 2 * len(self._kernel.requests) + 100:
            known = self._kernel.requests
            self._courses = {name: c for name, c in self._courses.items() if name in known}

    def _track(self, worker_id: str) -> Track:
        found = self.tracks.get(worker_id)
        return found if found is not None else self.tracks.setdefault(worker_id, Track())

    # Steps.

    def _steps(self, fact: StepsSeen, now: float) -> None:
        state = self._kernel.workers.get(fact.worker_id)
        if state is None:
            return
        track = self._track(fact.worker_id)
        track.state = state
        track.unread += 1
        if track.unread >= AT_ONCE or track.timeline.late or track.pending:
            self._take_in(track, now)

    def catch_up(self, now: float) -> None:
        """Take in all that was seen: somebody wants to know."""
        for track in self.tracks.values():
            if track.unread:
                self._take_in(track, now)

    def _take_in(self, track: Track, now: float) -> None:
        track.take_in(self.lags, self._floor_s)
        if track.timeline.late or track.pending:
            self._explain(track, now)

    def _reported(self, fact: WorkerReported, now: float) -> None:
        state = self._kernel.workers.get(fact.worker_id)
        if state is not None:
            track = self._track(fact.worker_id)
            self._take_in(track, now)
            track.reported(state, fact.report)

    def _explain(self, track: Track, now: float) -> None:
        for late in track.timeline.explained(now):
            self._late_step(track, late)
        pending = track.pending
        while pending and pending[0][0].after is not None:
            pending.popleft()[1]()

    def _late_step(self, track: Track, late: LateStep) -> None:
        """A gap of all streams of a worker: who had less patience?"""
        began_at = late.at - late.seconds
        split = of_gaps(late.sums)
        tiers: dict[str, int] = {}
        tenants: dict[str, int] = {}
        broken: dict[str, int] = {}
        lost: dict[str, Split] = {}
        worst: Split = {}
        for name in track.state.ledger.entries if track.state is not None else ():
            course = self._courses.get(name)
            if course is None or course.begun is None or course.begun.at > began_at + 1e-3:
                continue
            request = course.request
            if late.seconds <= late_after_s(request.promise):
                continue
            tiers[request.tier] = tiers.get(request.tier, 0) + 1
            tenants[request.tenant] = tenants.get(request.tenant, 0) + 1
            if late.seconds > request.promise.stall_s and not course.broken:
                course.broken = True
                broken[request.tier] = broken.get(request.tier, 0) + 1
            share = beyond(split, allowed_s(request, late.seconds, split))
            add(lost.setdefault(request.tier, {}), share)
            if sum(share.values()) > sum(worst.values()):
                worst = share
        if worst:
            assert track.state is not None
            event = of_step(late.at, late.seconds, worst, track.state.worker, tiers, tenants)
            self.losses.add(event, lost, broken)

    # Requests.

    def _arrived(self, fact: RequestArrived, now: float) -> None:
        request = fact.request
        if request.id not in self._courses:
            self._courses[request.id] = Course(request, now, now)
        if self._promises.get(request.tier) is not request.promise:
            self._promises[request.tier] = request.promise
            self._floor_s = min(self._floor_s, late_after_s(request.promise))

    def _commanded(self, command: Command, now: float) -> None:
        course = self._courses.get(command.request_id)
        if course is None:
            return
        match command:
            case Dispatch():
                self._sent(course, command.worker_id, now)
                if not command.prefilled_at:  # whatever there was before
                    course.handed_at = course.fetched_from = inf
                elif course.fetched_from == inf:
                    course.fetched_from = now  # both work on it at once
            case Prefill():
                self._handed(course, command.worker_id, now)
            case Shed():
                self._without(course, Cause.GATEWAY_QUEUE, now)
            case Fail():
                self._without(course, Cause.LOST_WORKER, now)
            case Pause():
                course.off_because = Cause.PAUSE
            case Move():
                hangs = command.because.endswith(" hangs")
                course.off_because = Cause.HANG if hangs else Cause.SLOW_WORKER
                if hangs:
                    self._track(course.worker).troubled("hang", command.because, now)

    def _sent(self, course: Course, worker_id: str, now: float) -> None:
        course.worker, course.begun = worker_id, None
        course.queued_s += now - course.ready_at
        course.sent = self._track(worker_id).timeline.mark(now)
        entry = self._kernel.workers[worker_id].ledger.entries.get(course.request.id)
        course.uncached = entry.uncached if entry is not None else 0.0

    def _handed(self, course: Course, worker_id: str, now: float) -> None:
        ledger = self._kernel.workers[worker_id].ledger
        entry = ledger.entries.get(course.request.id)
        share = entry.uncached / ledger.ahead if entry is not None and ledger.ahead > 0.0 else 1.0
        course.handed(worker_id, min(share, 1.0), now)

    def _prefilled(self, fact: Prefilled, now: float) -> None:
        course = self._courses.get(fact.request_id)
        if course is not None:
            course.prefilled(fact.at)

    def _first_token(self, fact: FirstTokenSeen, now: float) -> None:
        course = self._courses.get(fact.request_id)
        if course is None or course.sent is None or course.begun is not None:
            return
        track = self._track(course.worker)
        course.begun = mark = track.timeline.mark(fact.at)
        course.preemptions = track.preemptions
        if course.off_at < inf:  # its answer goes on
            course.goes_on(fact.at)
        elif fact.at - course.arrived_at > course.request.promise.ttft_s and not course.legs:
            self._came(course, track, mark)

    def _came(self, course: Course, track: Track, mark: Mark) -> None:
        """A request's very first token, which was late."""
        sent, allowed_s = course.sent, course.request.promise.ttft_s
        assert sent is not None
        seconds = mark.at - course.arrived_at
        course.broken = True
        queued_s, uncached, extra, of = course.queued_s, course.uncached, course.extra, course.of
        course.extra, fetched_from, prefilled_by = {}, course.fetched_from, course.prefilled_by
        budget = track.timeline.speed.budget

        def explain() -> None:
            sums = between(sent, mark)
            if fetched_from < inf:  # the steps meanwhile were others' affair
                moved_s = max(mark.at - max(sent.at, fetched_from), 0.0)
                split = {Cause.GATEWAY_QUEUE: queued_s, Cause.TRANSFER: moved_s}
            else:
                there_s, waits = mark.at - sent.at, track.has_queue
                split = of_first_token(queued_s, there_s, sums, uncached, budget, waits)
            elsewhere = dominant(add(split, extra)) in PROMPT_CAUSES and fetched_from < inf
            where = (*of[:-1], prefilled_by) if elsewhere else of
            self._lost(mark.at, "first_token", seconds, split, allowed_s, where, 1)

        track.pending.append((mark, explain))

    def _ended(self, fact: StreamEnded, now: float) -> None:
        course = self._over(fact.request_id, now)
        if course is None or course.sent is None:
            return
        request = course.request
        mean_late = fact.itl_s > request.promise.itl_s
        if course.begun is not None and not mean_late and fact.stall_s <= self._floor_s:
            return  # as nearly all
        stall_late, track = fact.stall_s > late_after_s(request.promise), self._track(course.worker)
        if course.begun is None:
            if not request.streaming and now - course.arrived_at > request.promise.ttft_s:
                self._came(course, track, track.timeline.mark(now))
            return
        if not mean_late and not stall_late:
            return
        end = track.timeline.mark(now)
        legs = [*course.legs, (course.begun, end)]
        span_s = fact.itl_s * max(fact.output_tokens - 1, 0)

        def explain() -> None:
            sums = NOTHING
            for first, last in legs:
                if first.sums is not None and last.sums is not None:
                    sums = [a + b for a, b in zip(sums, between(first, last), strict=True)]
            self._explain_answer(course, track, fact, end.at, span_s, sums)

        def wait() -> None:
            """A gap of its own may be told of by the engine's next report."""
            if self._is_own(course, track, fact.stall_s):
                self._doubts.append((end.at + REPORT_S, explain))
            else:
                explain()

        track.pending.append((end, wait))

    def _is_own(self, course: Course, track: Track, stall_s: float) -> bool:
        """Was its longest gap not one of all streams of its worker?"""
        if course.legs or course.begun is None or stall_s <= late_after_s(course.request.promise):
            return False
        shared = track.timeline.worst(course.begun.at)
        return shared is None or stall_s > ALONE * shared.seconds

    def _explain_answer(
        self,
        course: Course,
        track: Track,
        fact: StreamEnded,
        at: float,
        span_s: float,
        sums: Sums,
    ) -> None:
        """An answer whose gaps were too long, one or on average."""
        promise, split, gaps = course.request.promise, of_gaps(sums), course.gaps
        if self._is_own(course, track, fact.stall_s):
            thrown_out = track.preemptions > course.preemptions
            cause = Cause.PREEMPTION if thrown_out else Cause.LINK
            gaps = ((course.worker, cause, fact.stall_s),)
            split = scaled(split, max(sum(split.values()) - fact.stall_s, 0.0))
        for _, cause, seconds in gaps:
            add(split, {cause: seconds})
        broken = not course.broken and not promise.kept(0.0, fact.itl_s, fact.stall_s)
        if fact.itl_s > promise.itl_s:
            allowed_s = promise.itl_s * max(fact.output_tokens - 1, 0)
            short_s = span_s - sum(split.values())
            if short_s > 0.0:  # what no step accounts for was on its way
                add(split, {Cause.LINK: short_s})
            longest = max(gaps, key=lambda gap: gap[2], default=(course.worker, None, 0.0))
            left = longest[0] if dominant(split) is longest[1] else course.worker
            self._lost(at, "mean", span_s, split, allowed_s, course.of_worker(left), int(broken))
            broken = False
        for worker_id, cause, seconds in sorted(gaps, key=lambda gap: -gap[2]):
            seconds = min(seconds, fact.stall_s)  # when it left is known to a step or two
            if seconds > late_after_s(promise):
                allowed_s = min(promise.itl_s, promise.stall_s, 0.5 * seconds)
                lost, of = {cause: seconds}, course.of_worker(worker_id)
                self._lost(at, "stream", seconds, lost, allowed_s, of, int(broken))
                broken = False
        if broken:  # by a gap of all streams: counted there, but not as a promise
            worst = track.timeline.worst(course.begun.at) if course.begun is not None else None
            split = of_gaps(worst.sums) if worst is not None else {Cause.LINK: fact.stall_s}
            self._lost(at, "stream", fact.stall_s, split, promise.stall_s, course.of, 1)

    def _lost(
        self,
        at: float,
        what: str,
        seconds: float,
        split: Split,
        allowed_s: float,
        of: tuple[str, str, str, str, str],
        promises: int,
    ) -> None:
        late = beyond(scaled(split, seconds), allowed_s)
        if late:
            event = of_request(at, what, seconds, late, of)
            self.losses.add(event, {of[2]: event.split}, {of[2]: promises})

    def _without(self, course: Course, cause: Cause, now: float) -> None:
        """There is no answer, or no more of it."""
        self._over(course.request.id, now)
        seconds = max(now - course.arrived_at, 1e-3)
        promises = int(not course.broken)
        self._lost(now, "none", seconds, {cause: seconds}, 0.0, course.of, promises)

    # Off a worker.

    def _stopped(self, fact: StreamStopped, now: float) -> None:
        course = self._courses.get(fact.request_id)
        if course is not None and course.worker == fact.worker_id:
            self._off(course, now)

    def _broke(self, fact: StreamBroke, now: float) -> None:
        course = self._courses.get(fact.request_id)
        if fact.blame:
            self._track(fact.worker_id).troubled("lost", fact.because, now)
        if course is None:
            return
        if fact.resumable:
            course.off_because = Cause.LOST_WORKER
            self._off(course, now)
        else:
            self._without(course, Cause.LOST_WORKER, now)

    def _failed(self, fact: DispatchFailed, now: float) -> None:
        if fact.blame:
            self._track(fact.worker_id).troubled("lost", fact.because, now)
        course = self._courses.get(fact.request_id)
        if course is not None and course.worker == fact.worker_id:
            course.off_because = Cause.LOST_WORKER
            self._off(course, now)

    def _off(self, course: Course, now: float) -> None:
        """It is no longer on its worker, and goes on elsewhere."""
        track = self._track(course.worker)
        self._take_in(track, now)
        timeline = track.timeline
        if course.begun is not None:
            course.off_from = course.worker
            course.off_at = min(max(timeline.reached, course.begun.at), now)
            course.legs += ((course.begun, timeline.mark(course.off_at)),)
        elif course.sent is not None and course.off_at == inf:
            course.lose({course.off_because: max(now - course.sent.at, 0.0)})
        course.ready_at, course.begun, course.sent = now, None, None

    def _left(self, fact: ClientLeft, now: float) -> None:
        self._over(fact.request_id, now)

    def _over(self, request_id: str, now: float) -> Course | None:
        course = self._courses.pop(request_id, None)
        if course is not None:
            self.losses.request_over(now)
        return course
