"""How does the fleet stand, and what is wrong with it? Looked at now and then, and when asked."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

import msgspec

from paceline.domain.gpu import Gpu
from paceline.kernel import Kernel
from paceline.kernel.watch import HANG_STEPS, LEAST_HANG_S, LEAST_SAMPLES
from paceline.kernel.worker import WorkerState
from paceline.observe.losses import WINDOW_S, Late
from paceline.observe.overdue import overdue
from paceline.observe.stalls import Stalls
from paceline.observe.workers import Track
from paceline.policy.causes import PREFILL, TOKENS, Cause
from paceline.policy.diagnose import diagnose
from paceline.policy.gpus import misleading
from paceline.policy.look import Finding, Look, WorkerLook
from paceline.policy.pace import Slower

LAG_S = 10.0
"""Over so many seconds the event loop is judged."""
HUNG_STEPS = 3.0
"""Times that a step with all prompts ahead in it may take, until its worker seems to hang."""
FRESH_S = 1.0
"""Findings that are no older need not be looked for again."""
AT_ONCE = 8
"""Workers looked at together: it keeps tokens waiting for a tenth of a millisecond."""
GONE_S = 15.0
"""A trouble that was not found for so long is over."""


class Diagnosis:
    """What is wrong, and since when."""

    def __init__(
        self,
        kernel: Kernel,
        stalls: Stalls,
        clocks: tuple[Callable[[], float], Callable[[], float]],
        refusals: Callable[[], Mapping[str, int]] = dict,
        gpus: Callable[[str], Sequence[Gpu]] = lambda worker_id: (),
    ) -> None:
        """`clocks`: the host's, and the one on the wall. `refusals`: over a quota so far, by
        tenant. `gpus`: what is known of a worker's."""
        self._kernel = kernel
        self._stalls = stalls
        self._now, self._wall = clocks
        self._refusals = refusals
        self._gpus = gpus
        self._refused: list[tuple[float, Mapping[str, int]]] = []
        self._known: dict[tuple[str, str, str, str], tuple[float, float]] = {}
        """Troubles by what they are about: since when, and when last found."""
        self._looked = Look(now=0.0, window_s=WINDOW_S)
        """By which that was found."""
        self._found: list[Finding] = []
        self._notes: list[str] = []
        self._found_at = -inf

    async def refreshed(self) -> list[Finding]:
        """What is wrong, worst first. Tokens have their turn between some workers and others."""
        now, workers = self._now(), []
        if now - self._found_at > FRESH_S:
            self._stalls.catch_up(now)
            for nth, worker_id in enumerate(sorted(self._kernel.workers), 1):
                workers.append(self._worker(worker_id, now))
                if nth % AT_ONCE == 0:
                    await asyncio.sleep(0)
            self._found, self._found_at = self.findings(now, workers), now
        return self._found

    def findings(self, now: float, workers: Sequence[WorkerLook | None] = ()) -> list[Finding]:
        """What is wrong now, worst first. `workers`: as just looked at, if they were."""
        found, known = [], self._known
        look = self._looked = self.look(now, workers)
        self._notes = list(misleading(look))
        for finding in diagnose(look):
            since, last = known.get(finding.about, (finding.since, now))
            since = min(since, finding.since) if now - last < GONE_S else finding.since
            known[finding.about] = since, now
            found.append(msgspec.structs.replace(finding, since=since))
        self._known = {about: seen for about, seen in known.items() if now - seen[1] < GONE_S}
        return found

    def _worker(self, worker_id: str, now: float) -> WorkerLook | None:
        """How a worker has been doing; None: it has left."""
        state, track = self._kernel.workers.get(worker_id), self._stalls.tracks.get(worker_id)
        if state is None:
            return None
        return worker_look(state, track or Track(), now, self._gpus(worker_id))

    def slower(self, worker_id: str) -> Slower | None:
        """How much slower than it should be is a worker? None: that is not known."""
        track = self._stalls.tracks.get(worker_id)
        if track is None or not (pace := track.pace).steps:
            return None
        found = any((f.kind, f.worker) == ("slow_worker", worker_id) for f in self._found)
        return Slower(pace.times_itself, pace.times, self._now() - track.timeline.reached, found)

    def look(self, now: float, workers: Sequence[WorkerLook | None] = ()) -> Look:
        """All that findings rest on."""
        stalls, kernel = self._stalls, self._kernel
        stalls.catch_up(now)
        lags = stalls.lags.since(now - LAG_S)
        late = overdue(stalls.awaiting(), now)
        awaited = sum(loss.promises for loss in late)
        looks = workers or [self._worker(worker_id, now) for worker_id in sorted(kernel.workers)]
        return Look(
            now=now,
            window_s=WINDOW_S,
            requests=stalls.losses.requests(now) + awaited,
            overdue=awaited,
            workers=[look for look in looks if look is not None],
            losses=[*stalls.losses.recent(now), *late],
            waiting=self._waiting(),
            lag_share=sum(lags) / LAG_S,
            worst_lag_s=max(lags, default=0.0),
            refusals=self._newly_refused(now),
        )

    def _waiting(self) -> Counter[str]:
        """Requests here that are promised a first token, by model: batch work may wait."""
        if not any(self._kernel.held().values()):
            return Counter()
        lives = self._kernel.requests.values()
        return Counter(
            live.request.model for live in lives if live.waits and live.request.promise.ttft_s < inf
        )

    def _newly_refused(self, now: float) -> dict[str, int]:
        """Requests over a quota within the window, by tenant."""
        so_far = dict(self._refusals())
        self._refused = [seen for seen in self._refused if seen[0] > now - WINDOW_S]
        before = self._refused[0][1] if self._refused else so_far
        if not self._refused or now - self._refused[-1][0] >= 1.0:
            self._refused.append((now, so_far))
        new = {tenant: count - before.get(tenant, 0) for tenant, count in so_far.items()}
        return {tenant: count for tenant, count in new.items() if count > 0}

    # As JSON.

    async def to_json(self) -> dict[str, Any]:
        """What `/paceline/v1/diagnosis` says. Times are Unix seconds."""
        now, offset = self._now(), self._wall() - self._now()
        findings = []
        for finding in await self.refreshed():
            shown = msgspec.to_builtins(finding)
            findings.append({**shown, "since": finding.since + offset})
        look = self._looked
        return {
            "at": now + offset,
            "window_s": WINDOW_S,
            "requests": look.requests,
            "promises_lost": sum(loss.promises for loss in look.losses),
            "overdue": look.overdue,
            "findings": findings,
            "notes": self._notes,
        }

    def stalls_json(self, worker: str | None, limit: int) -> dict[str, Any]:
        """What `/paceline/v1/stalls` says: newest last."""
        offset, losses = self._wall() - self._now(), self._stalls.losses
        self._stalls.catch_up(self._now())
        workers = losses.late if worker is None else {worker: losses.late.get(worker, ())}
        return {
            "at": self._wall(),
            "causes": [cause.value for cause in Cause],
            "workers": {
                worker_id: [_late(late, offset) for late in list(kept)[-limit:]]
                for worker_id, kept in workers.items()
            },
            "lost": [
                {
                    "model": model,
                    "tier": tier,
                    "worker": worker_id,
                    "cause": cause.value,
                    **msgspec.to_builtins(total),
                }
                for (model, tier, worker_id, cause), total in losses.totals.items()
            ],
        }


def _late(late: Late, offset: float) -> dict[str, Any]:
    shown = msgspec.to_builtins(late)
    return {**shown, "at": late.at + offset, "streams": late.streams}


def worker_look(
    state: WorkerState, track: Track, now: float, gpus: Sequence[Gpu] = ()
) -> WorkerLook:
    """How one worker has been doing."""
    report, ledger, worker = state.report, state.ledger, state.worker
    samples = track.samples
    window = track.spent(now - WINDOW_S)
    busy_s = sum(window[:TOKENS])
    first = samples[0] if samples else None
    queries = (report.prefix_queries_total or 0.0) if report else 0.0
    hits = (report.prefix_hits_total or 0.0) if report else 0.0
    hangs = track.since("hang", now - WINDOW_S)
    lost = track.since("lost", now - WINDOW_S)
    speed = track.timeline.speed
    step_s = track.usual_s * speed.slowdown
    full_s = speed.curve.at(ledger.streams + ledger.ahead) * speed.slowdown
    seen = ledger.streams > ledger.blind or ledger.ahead > 0.0
    learned = state.timing.samples >= LEAST_SAMPLES
    return WorkerLook(
        id=worker.id,
        model=worker.model,
        node=worker.node,
        role=worker.role,
        healthy=report is not None and report.healthy,
        because=(report.because if report is not None else "it has not answered yet"),
        hangs=len(hangs),
        silent_s=now - state.last_step_at if seen and learned and ledger.entries else 0.0,
        hang_s=max(LEAST_HANG_S, HANG_STEPS * step_s, HUNG_STEPS * full_s),
        failed=len(lost),
        failure=lost[-1].because if lost else "",
        streams=ledger.streams,
        arriving=len(ledger.entries) - ledger.streams,
        ahead=ledger.ahead,
        **msgspec.structs.asdict(track.pace),
        stepped_s=now - track.timeline.reached,
        prefill_share=window[PREFILL] / busy_s if busy_s > 0.0 else 0.0,
        slowdown=speed.slowdown * speed.aged,
        told_times=track.told,
        seen_times=track.seen,
        budget=float(state.windows.budget),
        overhead_s=state.windows.overhead_s,
        took_s=min(track.took_s),
        took_worst_s=max(track.took_s),
        kv_used=(report.kv_used or 0.0) if report else 0.0,
        preemptions=state.preemptions - first.preemptions if first else 0,
        waiting=(report.waiting or 0) if report else 0,
        foreign=min(track.foreign),
        perhaps_foreign=max(track.foreign),
        queries=queries - first.queries if first else 0.0,
        hits=hits - first.hits if first else 0.0,
        usual_hits=hits / queries if queries else 0.0,
        since=min([trouble.at for trouble in (*hangs, *lost)], default=0.0),
        gpus=gpus,
    )
