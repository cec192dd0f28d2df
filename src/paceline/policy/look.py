"""What does whoever looks for trouble in a fleet get to see, and what is found?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from paceline.domain.gpu import Gpu
from paceline.policy.causes import Cause
from paceline.policy.pace import Pace

LOST_SHARE = 0.02
LEAST_LOST = 5
"""Promises that must be lost to a cause, of all requests of the window, for it to be a trouble;"""
GAP_WORTH = 0.25
"""of which a late gap that has broken none is worth so much: it shows the same;"""
SURELY_LOST = 2
"""but so many must be lost in any case."""

Evidence = dict[str, float | str]


class Loss(msgspec.Struct):
    """What one cause took on one worker, within the window."""

    model: str
    worker: str
    """Empty: before any worker was chosen."""
    cause: Cause
    promises: int = 0
    """Requests whose promise it broke."""
    gaps: int = 0
    """Streams that it made wait, each time."""
    seconds: float = 0.0
    tiers: dict[str, int] = msgspec.field(default_factory=dict)
    tenants: dict[str, int] = msgspec.field(default_factory=dict)
    since: float = 0.0


class WorkerLook(Pace, frozen=True, kw_only=True):
    """One worker over the window, and the pace of its last steps."""

    id: str
    model: str
    node: str = ""
    role: str = "both"
    healthy: bool = True
    because: str = ""
    """Why it is not."""
    hangs: int = 0
    """Requests taken off it because it hung."""
    silent_s: float = 0.0
    """For so long nothing has come, though it has work."""
    hang_s: float = 1.0
    """From when on that is a hang."""
    failed: int = 0
    """Requests that it failed."""
    failure: str = ""
    """The last one's reason."""
    streams: int = 0
    arriving: int = 0
    ahead: float = 0.0
    """Prompt tokens sent and not yet prefilled."""
    stepped_s: float = 0.0
    """So long ago was the last of its steps."""
    prefill_share: float = 0.0
    """Of the time of its steps."""
    slowdown: float = 1.0
    """By which the kernel reckons just now, times what has become usual since its best."""
    told_times: float = 0.0
    """As many times as long as it should be was a gap between tokens, by the engine's own measure,
    between its last two reports..."""
    seen_times: float = 0.0
    """...and as seen from here; 0: not known."""
    budget: float = 0.0
    overhead_s: float = 0.0
    took_s: float = 0.0
    """How long it takes to ask it how it is, the last two times at least..."""
    took_worst_s: float = 0.0
    """...and at worst."""
    kv_used: float = 0.0
    preemptions: int = 0
    waiting: int = 0
    """In the engine, as it says."""
    foreign: int = 0
    """Requests that it has, and that no gateway known here has sent, by its last two reports..."""
    perhaps_foreign: int = 0
    """...and by one of them."""
    queries: float = 0.0
    hits: float = 0.0
    usual_hits: float = 0.0
    """Share of prompt tokens found in its cache, since it runs."""
    since: float = 0.0
    """When its trouble began, if it has any."""
    gpus: Sequence[Gpu] = ()
    """That it runs on, if somebody tells of them; with a lowered clock, as they were then."""


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """All that is looked at."""

    now: float
    window_s: float
    requests: int = 0
    """That ended within the window, or are overdue..."""
    overdue: int = 0
    """...so many: their first token is awaited for longer than promised."""
    workers: Sequence[WorkerLook] = ()
    losses: Sequence[Loss] = ()
    waiting: dict[str, int] = msgspec.field(default_factory=dict)
    """Requests at the gateway that are promised a first token, by model."""
    lag_share: float = 0.0
    """Of time by which the event loop was late."""
    worst_lag_s: float = 0.0
    refusals: dict[str, int] = msgspec.field(default_factory=dict)
    """Requests over a quota within the window, by tenant."""


class Hurt(msgspec.Struct, frozen=True):
    """Who has lost what."""

    promises_lost: int = 0
    seconds_lost: float = 0.0
    late_gaps: int = 0
    """Of streams, each time; first tokens and answers that were late count as one."""
    streams: int = 0
    """That are there now."""
    tiers: dict[str, int] = msgspec.field(default_factory=dict)
    tenants: dict[str, int] = msgspec.field(default_factory=dict)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One trouble."""

    kind: str
    model: str = ""
    worker: str = ""
    node: str = ""
    tenant: str = ""
    since: float
    says: str
    remedy: str
    evidence: Evidence
    hurt: Hurt
    causes: tuple[Cause, ...] = ()
    """Of late tokens, that it explains."""

    @property
    def about(self) -> tuple[str, str, str, str]:
        """What stays the same while it lasts."""
        return self.kind, self.model, self.worker, self.tenant

    def explains(self, loss: Loss) -> bool:
        """Is it why this was lost?"""
        return (
            loss.cause in self.causes
            and self.model in ("", loss.model)
            and self.worker in ("", loss.worker)
        )


def hurt_by(look: Look, causes: Iterable[Cause], model: str, worker: str = "") -> Hurt:
    """What these causes took from a model's requests, on one worker or on all."""
    wanted = set(causes)
    losses = [
        loss
        for loss in look.losses
        if loss.cause in wanted and loss.model == model and worker in ("", loss.worker)
    ]
    tiers: Counter[str] = Counter()
    tenants: Counter[str] = Counter()
    for loss in losses:
        tiers.update(loss.tiers)
        tenants.update(loss.tenants)
    return Hurt(
        sum(loss.promises for loss in losses),
        sum(loss.seconds for loss in losses),
        sum(loss.gaps for loss in losses),
        sum(w.streams for w in look.workers if w.model == model and worker in ("", w.id)),
        dict(tiers),
        dict(tenants),
    )


def promises_lost(look: Look, causes: Iterable[Cause]) -> Counter[str]:
    """What these causes broke, by worker: on most of them nothing that is worth a closer look."""
    wanted, lost = set(causes), Counter[str]()
    for loss in look.losses:
        if loss.cause in wanted:
            lost[loss.worker] += loss.promises
    return lost


def matters(look: Look, lost: Hurt) -> bool:
    """Is it more than what no fleet can help?"""
    further = max(lost.late_gaps - lost.promises_lost, 0)
    enough = lost.promises_lost + GAP_WORTH * further >= LEAST_LOST
    return enough and lost.promises_lost >= max(SURELY_LOST, LOST_SHARE * look.requests)


def found(
    look: Look,
    worker: WorkerLook,
    kind: str,
    causes: Sequence[Cause],
    says: str,
    remedy: str,
    **evidence: float | str,
) -> Finding:
    """A trouble of one worker."""
    return Finding(
        kind=kind,
        model=worker.model,
        worker=worker.id,
        node=worker.node,
        since=worker.since or look.now,
        says=says,
        remedy=remedy,
        evidence=rounded(evidence),
        hurt=hurt_by(look, causes, worker.model, worker.id),
        causes=tuple(causes),
    )


def rounded(evidence: Evidence) -> Evidence:
    """Digits after the third are noise."""
    return {
        name: float(f"{value:.3g}") if isinstance(value, float) else value
        for name, value in evidence.items()
    }
