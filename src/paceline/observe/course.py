"""Where has a request been on its way, as far as that can make it late?"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from types import MappingProxyType

import msgspec

from paceline.domain.request import Request
from paceline.observe.timeline import Mark
from paceline.policy.causes import Cause, Split, add


class Course(msgspec.Struct, gc=False):
    """A request on its way."""

    request: Request
    arrived_at: float
    ready_at: float
    """Since when it waits at the gateway, if it does."""
    queued_s: float = 0.0
    worker: str = ""
    uncached: float = 0.0
    sent: Mark | None = None
    begun: Mark | None = None
    """Its first token on this worker."""
    handed_at: float = inf
    """When another worker was to prefill its prompt..."""
    fetched_from: float = inf
    """...and from when on that could be fetched."""
    prefilled_by: str = ""
    """That worker."""
    share: float = 1.0
    """Its own, of the prompt tokens that were then before that worker."""
    preemptions: int = 0
    """Of its worker, before that."""
    legs: tuple[tuple[Mark, Mark], ...] = ()
    """Where it decoded before."""
    extra: Mapping[Cause, float] = MappingProxyType({})
    """What was lost before its first token, apart from waiting here and where it came from."""
    gaps: tuple[tuple[str, Cause, float], ...] = ()
    """That going elsewhere made in its answer: the worker that it left, why, and seconds."""
    off_at: float = inf
    """When it left the worker that had begun its answer..."""
    off_from: str = ""
    """...which is that one."""
    off_because: Cause = Cause.LOST_WORKER
    broken: bool = False
    """Its promise is lost already."""

    @property
    def of(self) -> tuple[str, str, str, str, str]:
        request = self.request
        return request.id, request.model, request.tier, request.tenant, self.worker

    def of_worker(self, worker_id: str) -> tuple[str, str, str, str, str]:
        """The same, where another worker is to blame that it was on."""
        return (*self.of[:-1], worker_id)

    def lose(self, split: Split) -> None:
        """So much was lost between workers."""
        self.extra = add(dict(self.extra), split)

    def handed(self, worker_id: str, share: float, now: float) -> None:
        """Another worker is to prefill its prompt. Of that worker's steps nothing is seen."""
        self.queued_s += now - self.ready_at
        self.worker = self.prefilled_by = worker_id
        self.share = share
        self.handed_at = self.ready_at = now

    def prefilled(self, at: float) -> None:
        """Its prompt can be fetched."""
        if self.handed_at < inf:
            seconds = max(at - self.handed_at, 0.0)
            own_s = self.share * seconds
            self.lose({Cause.OWN_PREFILL: own_s, Cause.OTHERS_PREFILL: seconds - own_s})
            self.fetched_from, self.handed_at = at, inf
            if self.sent is None:
                self.ready_at = at

    def goes_on(self, at: float) -> None:
        """Another worker has given the next token of its answer."""
        self.gaps += ((self.off_from, self.off_because, max(at - self.off_at, 0.0)),)
        self.off_at = inf


def allowed_s(request: Request, seconds: float, split: Split) -> float:
    """What one gap may take; where nothing is promised, what the batch's steps do."""
    promise = request.promise
    allowed = min(promise.itl_s, promise.stall_s)
    return allowed if allowed < inf else min(split.get(Cause.BATCH, 0.0), seconds)
