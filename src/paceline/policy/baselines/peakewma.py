"""Which worker has answered fast of late, for the requests that it has?"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    Fact,
    FirstTokenSeen,
    StreamEnded,
    StreamStopped,
    WorkerRemoved,
)
from paceline.policy.fleet import Choice, Fleet, two_of
from paceline.policy.standing import Ask

DECAY_S = 10.0
"""Time constant with which a peak is forgotten; 10 s in Finagle, Linkerd and Envoy."""
UNPROVEN_S = 1e5
"""Latency of a worker that has work and has never answered: it gets no more before it does."""


class PeakEwma:
    """Of two drawn ones the one with less latency × (requests in flight + 1), where latency is an
    average that jumps to every peak and decays.

    Finagle takes the latency of the whole response. That of a stream tells the length of its
    answer, so Linkerd ends it at the first data: here too it is the time to the first token, while
    a request counts as in flight until its end.

    Source: `PeakEwma` of Finagle, https://twitter.github.io/finagle/guide/Clients.html, and its
    heir in Linkerd, https://linkerd.io/2016/03/16/beyond-round-robin-load-balancing-for-latency/
    """

    def __init__(self) -> None:
        self._latency: dict[str, _Peak] = {}
        """By worker."""
        self._waiting: dict[str, tuple[str, float]] = {}
        """Requests without a first token: where, and since when."""

    def __call__(self, fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
        drawn = two_of(places, ask.seed)
        costs = [self._cost(fleet.ids[i], fleet.load(i), ask.now) for i in drawn]
        cost, i = min(zip(costs, drawn, strict=True), key=lambda pair: pair[0])
        self._waiting[ask.request_id] = fleet.ids[i], ask.now
        return Choice(i, f"less of two: {cost:.3f} s of latency × requests")

    def _cost(self, worker: str, load: int, now: float) -> float:
        latency = self._latency.get(worker)
        if latency is None:
            return UNPROVEN_S + load if load else 0.0
        latency.observe(0.0, now)
        return latency.seconds * (load + 1)

    def learn(self, fact: Fact, now: float) -> None:
        """A wait ends with the first token, or without one."""
        match fact:
            case (
                FirstTokenSeen() | StreamEnded() | DispatchFailed() | StreamStopped() | ClientLeft()
            ):
                worker, since = self._waiting.pop(fact.request_id, ("", now))
                if worker:
                    at = fact.at if isinstance(fact, FirstTokenSeen) else now
                    self._latency.setdefault(worker, _Peak(at)).observe(at - since, at)
            case WorkerRemoved():
                self._latency.pop(fact.worker_id, None)


class _Peak:
    """A moving average that follows every rise at once, over samples at uneven times."""

    __slots__ = ("at", "seconds")

    def __init__(self, at: float) -> None:
        self.at = at
        self.seconds = 0.0

    def observe(self, seconds: float, at: float) -> None:
        """A latency was seen; 0 only lets the average decay."""
        old = exp(-max(at - self.at, 0.0) / DECAY_S)
        decayed = self.seconds * old + seconds * (1.0 - old)
        self.seconds = seconds if seconds > self.seconds else decayed
        self.at = max(at, self.at)
