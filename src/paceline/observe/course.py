"""Where has a request been on its way, as far as that can make it late?"""

from __future__ import annotations

from math import inf

from paceline.domain.request import Request
from paceline.observe.timeline import Mark
from paceline.policy.causes import Cause, Split, add


class Course:
    """A request on its way."""

    __slots__ = (
        "arrived_at",
        "begun",
        "broken",
        "extra",
        "fetched_from",
        "handed_at",
        "legs",
        "off_at",
        "off_because",
        "preemptions",
        "prefilled_by",
        "queued_s",
        "ready_at",
        "request",
        "sent",
        "share",
        "uncached",
        "worker",
    )

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.arrived_at = self.ready_at = now
        """`ready_at`: since when it waits at the gateway, if it does."""
        self.queued_s = 0.0
        self.worker = ""
        self.uncached = 0.0
        self.sent: Mark | None = None
        self.begun: Mark | None = None
        """Its first token on this worker."""
        self.handed_at = self.fetched_from = inf
        """When another worker was to prefill its prompt, and from when on that could be fetched."""
        self.prefilled_by = ""
        """That worker."""
        self.share = 1.0
        """Its own, of the prompt tokens that were then before that worker."""
        self.preemptions = 0
        """Of its worker, before that."""
        self.legs: list[tuple[Mark, Mark]] = []
        """Where it decoded before."""
        self.extra: Split = {}
        """What was lost between workers."""
        self.off_at = inf
        """When it left the worker that had begun its answer."""
        self.off_because = Cause.LOST_WORKER
        self.broken = False
        """Its promise is lost already."""

    @property
    def of(self) -> tuple[str, str, str, str, str]:
        request = self.request
        return request.id, request.model, request.tier, request.tenant, self.worker

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
            add(self.extra, {Cause.OWN_PREFILL: own_s, Cause.OTHERS_PREFILL: seconds - own_s})
            self.fetched_from, self.handed_at = at, inf
            if self.sent is None:
                self.ready_at = at


def allowed_s(request: Request, seconds: float, split: Split) -> float:
    """What one gap may take; where nothing is promised, what the batch's steps do."""
    promise = request.promise
    allowed = min(promise.itl_s, promise.stall_s)
    return allowed if allowed < inf else min(split.get(Cause.BATCH, 0.0), seconds)
