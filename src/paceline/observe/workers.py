"""What has each worker been doing lately, compared with its like?"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from statistics import median_low

import msgspec

from paceline.domain.worker import WorkerReport
from paceline.kernel.worker import WorkerState
from paceline.observe.lag import Lags
from paceline.observe.losses import WINDOW_S
from paceline.observe.timeline import MADE_UP, Mark, Timeline
from paceline.policy.causes import BATCH, GATEWAY, NOTHING, PREFILL, STEPS, TOKENS, Speed, Sums
from paceline.policy.pace import Pace, of_late
from paceline.policy.standing import Curve

LIKE_STREAMS, LIKE_KV = 32.0, 32_000.0
"""The step by which workers are compared."""
LIKE_STEPS = 400
"""Steps from which on a worker is known well enough for that."""
LEAST_GAPS = 10
"""Gaps and steps that must lie between two reports for them to be compared."""
UNLIKE = 1.15
"""Times as slow as its like from which on a worker is not like them."""
STEADY = 1.3
"""Times slower than at its best up to which a worker is as usual, and its best follows..."""
FOLLOW_S, FORGET_S = 1000.0, 1e6
"""...with the first of these time constants. Who is slower is measured by the same best for days:
one that stays slow must not be called well."""
MOST_TROUBLES = 64
MOST_PENDING = 4096
"""Requests of one worker whose lateness waits to be explained."""


class Trouble(msgspec.Struct, frozen=True):
    """A worker failed a request."""

    at: float
    what: str
    """hang or lost."""
    because: str


class Sample(msgspec.Struct, frozen=True, gc=False):
    """A worker at one moment. Counters only grow."""

    at: float
    sums: tuple[float, ...]
    """Seconds of its steps by what they went into (`policy.causes`)."""
    preemptions: int
    queries: float
    hits: float
    """Prompt tokens asked of and found in its prefix cache."""


class Track:
    """What is kept of one worker."""

    def __init__(self) -> None:
        self.timeline = Timeline()
        self.usual_s = _typical_s(self.timeline.speed.curve)
        """A typical step, at its usual speed."""
        self.state: WorkerState | None = None
        self.unread = 0
        """Steps seen that are not taken in yet."""
        self.pending: deque[tuple[Mark, Callable[[], None]]] = deque(maxlen=MOST_PENDING)
        """What can be explained once the mark is known."""
        self.samples: deque[Sample] = deque(maxlen=int(WINDOW_S) + 1)
        self.troubles: deque[Trouble] = deque(maxlen=MOST_TROUBLES)
        self._like_s = 0.0
        """What a typical step takes at its like; 0: not known yet."""
        self._best = 0.0
        """The scale of its step times (`StepTimeEstimator.scale`) at its best; 0: not known yet."""
        self.foreign = (0, 0)
        """Requests of others there, as of its last two reports."""
        self.took_s = (0.0, 0.0)
        """How long its last two reports took to come."""
        self.told = self.seen = 0.0
        """Between its last two reports, how many times as long as it should be was a gap between
        tokens, by the engine's own measure and as seen from here? 0: not known."""
        self._preempted = 0
        self._report: tuple[float, float, Sums] | None = None
        self._theta: tuple[float, ...] = ()

    def take_in(self, lags: Lags, late_s: float) -> None:
        """Its last steps, which the kernel keeps until then; `late_s`: from when on one is late."""
        self.unread = 0
        if self.state is None:
            return
        self.learn(self.state)
        stepped, settled = self.timeline.stepped, self.state.windows.settled
        while settled:
            step = settled.popleft()
            began_at = step.began_at
            lag_s = lags.between(began_at, step.ended_at) if began_at <= lags.last_at else 0.0
            stepped(step, lag_s, late_s)

    def learn(self, state: WorkerState) -> None:
        """Keep up with what the kernel learns of it."""
        self.state = state
        timing, speed = state.timing, self.timeline.speed
        if timing.coefficients is not self._theta:
            self._theta = timing.coefficients
            self._renew(Curve(self._theta))
        elif abs(timing.slowdown - speed.slowdown) > 0.02 * speed.slowdown:
            self._renew(speed.curve)

    def _renew(self, curve: Curve) -> None:
        """Its speed is another, or what it is compared with."""
        assert self.state is not None
        usual_s = self.usual_s = _typical_s(curve)
        like = usual_s / self._like_s if self._like_s else 1.0
        aged = self.state.timing.scale / self._best if self._best else 1.0
        self.timeline.speed = Speed(
            curve,
            like if like > UNLIKE else 1.0,
            max(aged, 1.0),
            self.state.timing.slowdown,
            float(self.state.windows.budget),
        )

    @property
    def known(self) -> bool:
        """Was enough seen of it to judge it?"""
        return self.timeline.sums[STEPS] >= LIKE_STEPS

    @property
    def preemptions(self) -> int:
        """By its engine, since it is known."""
        return self.state.preemptions if self.state is not None else 0

    @property
    def has_queue(self) -> bool:
        """Do requests wait in the engine, as far as it says?"""
        report = self.state.report if self.state is not None else None
        return report is None or report.waiting is None or report.waiting > 0

    @property
    def pace(self) -> Pace:
        """Of its last steps."""
        return of_late(self.timeline.last) if self.known else Pace()

    def _age(self, scale: float, seconds: float) -> None:
        """Compare with its best: what is learned of a slow worker is soon its usual speed."""
        best = min(self._best or scale, scale)
        patience_s = FOLLOW_S if scale < STEADY * best else FORGET_S
        self._best = best + min(seconds / patience_s, 1.0) * (scale - best)

    def reported(self, state: WorkerState, report: WorkerReport) -> None:
        """The engine told what it has, and how long its gaps were: compare with what is known."""
        there = len(state.ledger.entries) + state.elsewhere.requests
        told = (report.running or 0) + (report.waiting or 0)
        self.took_s = (self.took_s[1], report.took_s)
        self.foreign = (self.foreign[1], max(told - there, 0))
        before, self._preempted = self._preempted, state.preemptions
        self.timeline.told(self._held_up(report), self._preempted > before)

    def _held_up(self, report: WorkerReport) -> bool:
        """Were its gaps not late where they were made, though they were here?"""
        gaps, seconds, sums = report.gaps_total, report.gaps_s_total, self.timeline.sums
        if gaps is None or seconds is None:
            return False
        before, self._report = self._report, (gaps, seconds, sums.copy())
        if before is None or seconds < before[1]:
            return False
        spent = [b - a for a, b in zip(before[2], sums, strict=True)]
        if min(gaps - before[0], spent[STEPS]) < LEAST_GAPS:
            if spent[STEPS]:
                self.told = self.seen = 0.0  # something came, and too little to compare
            return False
        normal_s = (spent[BATCH] + spent[PREFILL]) / spent[STEPS]
        self.told = (seconds - before[1]) / (gaps - before[0]) / normal_s
        came_s = sum(spent[:TOKENS]) - spent[GATEWAY]
        self.seen = came_s / spent[STEPS] / normal_s
        return self.seen > 1.0 and self.told - 1.0 < MADE_UP * (self.seen - 1.0)

    def troubled(self, what: str, because: str, now: float) -> None:
        """It failed a request."""
        self.troubles.append(Trouble(now, what, because))

    def sample(self, state: WorkerState, like_s: float, now: float) -> None:
        """Look at it; a typical step takes `like_s` at its like."""
        self._like_s = like_s
        if self.known:
            self._age(state.timing.scale, now - self.samples[-1].at if self.samples else 0.0)
        self._renew(self.timeline.speed.curve)
        report = state.report
        self.samples.append(
            Sample(
                now,
                tuple(self.timeline.sums),
                state.preemptions,
                (report.prefix_queries_total or 0.0) if report else 0.0,
                (report.prefix_hits_total or 0.0) if report else 0.0,
            )
        )

    def spent(self, since: float) -> Sums:
        """What its steps went into since then."""
        first = next((sample for sample in self.samples if sample.at >= since), None)
        if first is None:
            return NOTHING
        return [b - a for a, b in zip(first.sums, self.timeline.sums, strict=True)]

    def since(self, what: str, after: float) -> list[Trouble]:
        """Troubles of one kind, after a moment."""
        return [
            trouble for trouble in self.troubles if trouble.what == what and trouble.at >= after
        ]


def look_at(workers: Mapping[str, WorkerState], tracks: dict[str, Track], now: float) -> None:
    """Look at all workers, each compared with those that serve the same at the same price."""
    kinds: dict[tuple[str, str, float], list[float]] = {}
    for worker_id, state in workers.items():
        track = tracks.get(worker_id)
        if track is None:
            track = tracks[worker_id] = Track()
        track.learn(state)
        if track.known:
            kinds.setdefault(_kind(state), []).append(track.usual_s)
    usual = {kind: median_low(seconds) for kind, seconds in kinds.items()}
    for worker_id, state in workers.items():
        track = tracks[worker_id]
        track.sample(state, usual[_kind(state)] if track.known else 0.0, now)


def _typical_s(curve: Curve) -> float:
    return curve.at(LIKE_STREAMS) + curve.kv_s * LIKE_KV


def _kind(state: WorkerState) -> tuple[str, str, float]:
    worker = state.worker
    return worker.model, worker.role, worker.cost_per_hour
