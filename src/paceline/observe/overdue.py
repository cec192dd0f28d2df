"""Which promises are lost already, though nothing has come that could be late?

A first token that is awaited for longer than promised is late, whenever it comes. It is counted as
soon as that is so, where it is certain what it waits for: room at the gateway, or a worker that
prefills for others. What happens inside an engine is explained when the token has come.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from paceline.observe.course import Course
from paceline.policy.causes import Cause
from paceline.policy.look import Loss

MOST = 1000
"""Counted at most, the oldest first: more would change no finding, and tokens wait meanwhile."""


def overdue(courses: Iterable[Course], now: float) -> list[Loss]:
    """What is lost to waiting that goes on. It is counted anew each time, and kept nowhere."""
    lost: dict[tuple[str, str, Cause], Loss] = {}
    counted = 0
    for course in courses:
        request, due_at = course.request, course.arrived_at + course.request.promise.ttft_s
        cause = awaited(course, now) if now > due_at else None
        if cause is None:
            continue
        counted += 1
        if counted > MOST:
            break
        key = request.model, "" if cause is Cause.GATEWAY_QUEUE else course.worker, cause
        loss = lost.get(key)
        if loss is None:
            loss = lost[key] = Loss(*key, since=due_at)
        loss.since = min(loss.since, due_at)
        loss.promises += 1
        loss.gaps += 1
        loss.seconds += now - due_at
        loss.tiers[request.tier] = loss.tiers.get(request.tier, 0) + 1
        loss.tenants[request.tenant] = loss.tenants.get(request.tenant, 0) + 1
    return list(lost.values())


def awaited(course: Course, now: float) -> Cause | None:
    """What its first token has waited for; None: it has come, or it cannot be told."""
    if course.broken or course.sent is not None or course.legs or course.extra:
        return None
    if now - course.handed_at < course.queued_s or course.handed_at == inf:
        return Cause.GATEWAY_QUEUE
    return Cause.OWN_PREFILL if course.share > 0.5 else Cause.OTHERS_PREFILL
