"""What is wrong with the fleet, how is it known, who is hurt, and what can be done?

Two kinds of evidence: what was lost of late, by cause (`Loss`), and how each worker stands
(`WorkerLook`). A trouble that shows in a worker itself (it is slow, hangs, preempts) is found
before it costs a promise; what only shows in what it costs (prompts among decodes, a full fleet)
is found when the costs are more than `LOST_SHARE` of the requests: no fleet keeps every promise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median

import msgspec

from paceline.policy.causes import Cause
from paceline.policy.look import Evidence, Finding, Hurt, Look, WorkerLook, hurt_by

LOST_SHARE = 0.02
LEAST_LOST = 5
"""Promises that must be lost to a cause, of all requests of the window, for it to be a trouble."""
ONE_WORKER = 0.6
"""Share of a model's losses from which on they are one worker's affair."""
SLOW = 1.4
"""Times as long as normal that a worker's steps take for it to be slow..."""
SURELY = 1.2
"""...if the kernel reckons with so much, and the engine, where it tells, has measured so much..."""
LEAST_STEPS = 10.0
"""...of so many steps..."""
OUTDATED_S = 60.0
"""...and not so long ago: who is slow gets little work that could show it."""
STRANGERS = 4
"""Requests from elsewhere, and no fewer than from here, by which a worker is slowed."""
PREEMPTED = 3
"""Preemptions from which on a KV cache counts as too full."""
FAILED = 3
"""Requests that a worker must fail to be in trouble while it says that it is well."""
AWAY_S, AWAY_TIMES = 0.05, 3.0
"""A link is slow that takes so much, and so many times, longer than others."""
LAG_SHARE = 0.2
"""Share of time by which the gateway's event loop may be late."""
UNEVEN = 2.5
"""Times the load of the others that one worker has, if routing is unbalanced."""
REFUSALS = 5
THRASHED = 0.5
"""Share of the usual prefix hits that are left when a cache thrashes..."""
THRASH_TOKENS = 2000.0
"""...and prompt tokens that must have been looked up for it to be seen."""
FULL = 0.9
"""Share of a KV cache in use from which on it is full."""
CAUSES = frozenset(("lost_worker", "hung_worker", "slow_worker", "gateway_saturated"))
CONSEQUENCES = frozenset(("fleet_full", "engine_queue", "unbalanced_routing"))
"""Where something is broken, those are more likely to come from it: they are named after it."""


def diagnose(look: Look) -> list[Finding]:
    """All troubles, those that cost most promises first."""
    findings = [finding for check in CHECKS for finding in check(look)]
    short = {finding.model for finding in findings if finding.kind in CAUSES}
    findings.sort(
        key=lambda f: (
            f.kind in CONSEQUENCES and f.model in short,
            -f.hurt.promises_lost,
            -f.hurt.seconds_lost,
        )
    )
    return findings


def _found(
    look: Look,
    worker: WorkerLook,
    kind: str,
    causes: Iterable[Cause],
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
        evidence=_rounded(evidence),
        hurt=hurt_by(look, causes, worker.model, worker.id),
    )


def _rounded(evidence: Evidence) -> Evidence:
    """Digits after the third are noise."""
    return {
        name: float(f"{value:.3g}") if isinstance(value, float) else value
        for name, value in evidence.items()
    }


# What shows in the workers.


def lost_workers(look: Look) -> Iterator[Finding]:
    """Who does not answer?"""
    for w in look.workers:
        if not w.healthy or (w.failed >= FAILED and not w.hangs):
            why = w.because or w.failure
            yield _found(
                look,
                w,
                "lost_worker",
                (Cause.LOST_WORKER,),
                f"{w.id} {'fails requests' if w.healthy else 'does not answer'}: {why}.",
                "Look at its log; restart it, or remove it from the fleet.",
                requests_failed=w.failed,
                last_reason=w.failure or w.because,
            )


def hung_workers(look: Look) -> Iterator[Finding]:
    """Who answers, and does nothing?"""
    for w in look.workers:
        if w.healthy and (w.hangs or w.silent_s > w.hang_s):
            says = (
                f"{w.id} has given no token for {w.silent_s:.1f} s, though it has work."
                if w.silent_s > w.hang_s
                else f"{w.id} hung: {w.hangs} requests were taken off it."
            )
            yield _found(
                look,
                w,
                "hung_worker",
                (Cause.HANG, Cause.LOST_WORKER),
                says,
                "Look at the engine's log and its GPU; restart it if it does not go on.",
                silent_s=w.silent_s,
                requests_taken_off=w.hangs,
                requests_there=w.streams + w.arriving,
            )


def slow_workers(look: Look) -> Iterator[Finding]:
    """Whose steps take longer than such work takes?"""
    for w in look.workers:
        known = w.steps >= LEAST_STEPS and w.stepped_s < OUTDATED_S
        denied = 0.0 < w.told_times < SURELY  # by the engine, at least until its last report
        if not known or denied or w.hangs:
            continue
        worse = w.times_itself >= SLOW and w.slowdown >= SURELY  # than it was
        times = w.times_itself if worse else w.times
        lost = hurt_by(look, (Cause.SLOW_WORKER,), w.model, w.id)
        if worse or (times >= SLOW and _matters(look, lost)):  # others are slower by nature
            than = "they used to take there" if worse else "they take at its like"
            if _has_strangers(w):
                yield foreign_load(look, w, times)
                continue
            yield _found(
                look,
                w,
                "slow_worker",
                (Cause.SLOW_WORKER,),
                f"Steps of {w.id} take {times:.1f} times as long as {than}.",
                "Look at its GPU's clocks, temperature and neighbours; drain it if it stays so.",
                times_as_slow=times,
                step_ms=1e3 * (w.normal_s + w.slow_s) / w.steps,
                normal_step_ms=1e3 * w.normal_s / w.steps,
                slowdown_now=w.slowdown,
                seen_s_ago=w.stepped_s,
            )


def _has_strangers(w: WorkerLook) -> bool:
    return w.foreign >= max(STRANGERS, w.streams + w.arriving)


def foreign_load(look: Look, w: WorkerLook, times: float) -> Finding:
    """It is not slow: it works for others."""
    return _found(
        look,
        w,
        "foreign_load",
        (Cause.SLOW_WORKER, Cause.ENGINE_QUEUE),
        f"{w.id} has {w.foreign} requests that did not come through this gateway; its steps take "
        f"{times:.1f} times as long as they would.",
        "Let all clients of the engine ask this gateway, or give them engines of their own.",
        foreign_requests=w.foreign,
        own_requests=w.streams + w.arriving,
        times_as_slow=times,
    )


def kv_pressure(look: Look) -> Iterator[Finding]:
    """Which engine throws streams out of its KV cache?"""
    for w in look.workers:
        if _kv_is_short(look, w):
            yield _found(
                look,
                w,
                "kv_pressure",
                (Cause.PREEMPTION, Cause.PAUSE, Cause.ENGINE_QUEUE),
                f"The KV cache of {w.id} is full ({w.kv_used:.0%}): its engine threw out "
                f"{w.preemptions} streams in {look.window_s:.0f} s, and {w.waiting} wait in it.",
                "Give the engine more KV cache (memory utilisation, FP8 cache), let it take fewer "
                "sequences at once, or add workers.",
                preemptions=w.preemptions,
                kv_used=w.kv_used,
                engine_waiting=w.waiting,
            )


def _kv_is_short(look: Look, w: WorkerLook) -> bool:
    if w.preemptions >= PREEMPTED:
        return True
    waited = hurt_by(look, (Cause.ENGINE_QUEUE, Cause.PREEMPTION), w.model, w.id)
    return w.kv_used >= FULL and w.waiting > 0 and _matters(look, waited)


def cache_thrash(look: Look) -> Iterator[Finding]:
    """Which engine no longer finds the prefixes that it used to find?"""
    for w in look.workers:
        share = w.hits / w.queries if w.queries else 0.0
        lost = hurt_by(look, PROMPT_CAUSES, w.model, w.id)
        if (
            w.queries >= THRASH_TOKENS
            and w.kv_used >= FULL
            and share < THRASHED * w.usual_hits
            and _matters(look, lost)
        ):
            yield _found(
                look,
                w,
                "cache_thrash",
                PROMPT_CAUSES,
                f"{w.id} finds {share:.0%} of prompts in its cache, where it used to find "
                f"{w.usual_hits:.0%}: it is full, and prefixes push each other out.",
                "Give the engine more KV cache, or spread conversations over more workers.",
                hits_share=share,
                usual_hits_share=w.usual_hits,
                kv_used=w.kv_used,
            )


def slow_links(look: Look) -> Iterator[Finding]:
    """Between whom and the gateway are tokens held up?"""
    for w in look.workers:
        others = [o.overhead_s for o in look.workers if o.model == w.model and o.id != w.id]
        usual_s = median(others) if others else 0.0
        held_up = w.seen_times >= SLOW and 0.0 < w.told_times < SURELY
        far = others and w.overhead_s > max(usual_s + AWAY_S, AWAY_TIMES * usual_s)
        lost = hurt_by(look, (Cause.LINK,), w.model, w.id)
        if far or held_up or _matters(look, lost):
            yield _found(
                look,
                w,
                "slow_link",
                (Cause.LINK,),
                f"Requests to {w.id} and its tokens are held up on their way: first tokens take "
                f"{1e3 * w.overhead_s:.0f} ms beyond the engine's own work"
                + (f", {1e3 * usual_s:.0f} ms elsewhere." if others else "."),
                "Look at the network between gateway and worker (loss, proxies, zones), and at "
                "the load of the engine's HTTP server.",
                overhead_ms=1e3 * w.overhead_s,
                overhead_elsewhere_ms=1e3 * usual_s,
                gaps_times_as_long=w.seen_times,
                by_the_engines_measure=w.told_times,
            )


# What shows in what it costs.

PROMPT_CAUSES = (Cause.OWN_PREFILL, Cause.OTHERS_PREFILL)
FIRST_TOKEN_CAUSES = (Cause.GATEWAY_QUEUE, Cause.ENGINE_QUEUE, *PROMPT_CAUSES)


def _matters(look: Look, lost: Hurt) -> bool:
    return lost.promises_lost >= max(LEAST_LOST, LOST_SHARE * look.requests)


class Costly(msgspec.Struct, frozen=True):
    """A trouble that is known by what it costs."""

    kind: str
    causes: tuple[Cause, ...]
    says: str
    """Of what {where} happens to {lost} promises."""
    remedy: str


COSTLY = (
    Costly(
        "prefill_in_decode",
        (Cause.OTHERS_PREFILL,),
        "Prompts that are prefilled among decodes {where} broke {lost} promises.",
        "Lower the tokens a step may hold (vLLM: --max-num-batched-tokens), or send long prompts "
        "to prefill workers of their own.",
    ),
    Costly(
        "engine_queue",
        (Cause.ENGINE_QUEUE,),
        "Requests wait in the engine {where}: {lost} promises were broken by that.",
        "Let the engine take more sequences at once (vLLM: --max-num-seqs), keep others from "
        "sending past this gateway, or add workers.",
    ),
    Costly(
        "long_prompts",
        (Cause.OWN_PREFILL,),
        "Prompts {where} take longer to prefill than is promised for a first token: {lost} "
        "promises were broken by that.",
        "Promise such tenants a later first token, or add prefill workers.",
    ),
    Costly(
        "fleet_full",
        (Cause.GATEWAY_QUEUE, Cause.BATCH, Cause.PAUSE),
        "More is asked {where} than the fleet can do in time: {lost} promises were broken by "
        "waiting for room or by steps of too many streams.",
        "Add workers; until then let lower tiers be shed or degraded (`overload`).",
    ),
    Costly(
        "slow_transfer",
        (Cause.TRANSFER,),
        "KV caches on their way between workers {where} broke {lost} promises.",
        "Look at the network between the workers; prefill short prompts in place.",
    ),
)


def costly(look: Look) -> Iterator[Finding]:
    """What broke promises, and where?"""
    full = [w.id for w in look.workers if _kv_is_short(look, w)]
    queued = (Cause.ENGINE_QUEUE, Cause.PREEMPTION)
    losses = [x for x in look.losses if x.cause not in queued or x.worker not in full]
    look = msgspec.structs.replace(look, losses=losses)  # without what `kv_pressure` has named
    for model in sorted({loss.model for loss in look.losses}):
        for trouble in COSTLY:
            lost = hurt_by(look, trouble.causes, model)
            if not _matters(look, lost):
                continue
            worker = _one_worker(look, trouble.causes, model, lost.promises_lost)
            if worker is not None:
                lost = hurt_by(look, trouble.causes, model, worker.id)
            yield Finding(
                kind=trouble.kind,
                model=model,
                worker=worker.id if worker is not None else "",
                node=worker.node if worker is not None else "",
                since=min(
                    x.since for x in look.losses if x.model == model and x.cause in trouble.causes
                ),
                says=trouble.says.format(
                    where=f"on {worker.id}" if worker is not None else f"of {model}",
                    lost=lost.promises_lost,
                ),
                remedy=trouble.remedy,
                evidence=_rounded(_load(look, model, worker)),
                hurt=lost,
            )


def _one_worker(
    look: Look, causes: Sequence[Cause], model: str, promises: int
) -> WorkerLook | None:
    """The worker whose affair it is, if it is one's among several."""
    alike = [w for w in look.workers if w.model == model]
    if len(alike) < 2:
        return None
    for w in alike:
        if hurt_by(look, causes, model, w.id).promises_lost >= ONE_WORKER * promises:
            return w
    return None


def _load(look: Look, model: str, worker: WorkerLook | None) -> Evidence:
    """How much there is to do."""
    seen = [worker] if worker is not None else [w for w in look.workers if w.model == model]
    count = max(len(seen), 1)
    return {
        "requests_over": look.requests,
        "waiting_at_gateway": look.waiting.get(model, 0),
        "waiting_in_engines": sum(w.waiting for w in seen),
        "streams_a_worker": sum(w.streams for w in seen) / count,
        "prefill_share_of_time": sum(w.prefill_share for w in seen) / count,
        "kv_used": max((w.kv_used for w in seen), default=0.0),
    }


def phase_imbalance(look: Look) -> Iterator[Finding]:
    """Are there too few workers for the one phase, and enough for the other?"""
    for model in sorted({w.model for w in look.workers if w.role != "both"}):
        of = [w for w in look.workers if w.model == model]
        prefilling = [w for w in of if w.role == "prefill"]
        decoding = [w for w in of if w.role == "decode"]
        if not prefilling or not decoding:
            continue
        first = hurt_by(look, (*FIRST_TOKEN_CAUSES, Cause.TRANSFER), model)
        later = hurt_by(look, (Cause.BATCH, Cause.PREEMPTION), model)
        backlog = sum(w.ahead for w in prefilling) / len(prefilling)
        steps_ahead = backlog / max(min(w.budget for w in prefilling), 1.0)
        short = "prefill" if steps_ahead > 2.0 else "decode"
        lost = first if short == "prefill" else later
        if not _matters(look, lost):
            continue
        yield Finding(
            kind="phase_imbalance",
            model=model,
            since=look.now,
            says=f"{model} has too few workers for {short}: {lost.promises_lost} promises were "
            f"broken while the others keep up.",
            remedy=f"Give {short} more workers, or let some serve both.",
            evidence={
                "prefill_workers": len(prefilling),
                "decode_workers": len(decoding),
                "prompt_tokens_ahead_a_prefill_worker": backlog,
                "streams_a_decode_worker": sum(w.streams for w in decoding) / len(decoding),
            },
            hurt=lost,
        )


def unbalanced(look: Look) -> Iterator[Finding]:
    """Has one worker far more to do than its like, and loses promises by it?"""
    causes = (Cause.BATCH, Cause.ENGINE_QUEUE, Cause.OTHERS_PREFILL, Cause.PREEMPTION)
    for w in look.workers:
        like = [o for o in look.workers if o.model == w.model and o.role == w.role and o.healthy]
        others = [o.streams + o.arriving for o in like if o.id != w.id]
        mine, lost = w.streams + w.arriving, hurt_by(look, causes, w.model, w.id)
        if others and mine > UNEVEN * (median(others) + 2.0) and _matters(look, lost):
            yield _found(
                look,
                w,
                "unbalanced_routing",
                causes,
                f"{w.id} has {mine} requests, where others like it have {median(others):.0f}.",
                "Use `routing.policy: headroom`; look for tenants whose shared prefix keeps all "
                "their requests on one worker, and for clients that go past the gateway.",
                requests=mine,
                requests_elsewhere=median(others),
            )


# What shows at the gateway.


def gateway_saturated(look: Look) -> Iterator[Finding]:
    """Is the gateway itself too busy?"""
    losses = [loss for loss in look.losses if loss.cause is Cause.GATEWAY]
    promises = sum(loss.promises for loss in losses)
    if look.lag_share < LAG_SHARE and promises < max(LEAST_LOST, LOST_SHARE * look.requests):
        return
    tiers: Counter[str] = Counter()
    tenants: Counter[str] = Counter()
    for loss in losses:
        tiers.update(loss.tiers)
        tenants.update(loss.tenants)
    yield Finding(
        kind="gateway_saturated",
        since=min((loss.since for loss in losses), default=look.now),
        says=f"The gateway came to its own work {1e3 * look.worst_lag_s:.0f} ms late at worst, "
        f"and was late for {look.lag_share:.0%} of the time.",
        remedy="Give the gateway a CPU core of its own, or run several gateways.",
        evidence={"late_share_of_time": look.lag_share, "worst_ms": 1e3 * look.worst_lag_s},
        hurt=Hurt(
            promises,
            sum(loss.seconds for loss in losses),
            sum(w.streams for w in look.workers),
            dict(tiers),
            dict(tenants),
        ),
    )


def quota(look: Look) -> Iterator[Finding]:
    """Who asks for more than it may?"""
    for tenant, refused in sorted(look.refusals.items()):
        if refused >= REFUSALS:
            yield Finding(
                kind="quota",
                tenant=tenant,
                since=look.now,
                says=f"{tenant} was refused {refused} requests in {look.window_s:.0f} s: they "
                "were over its limits.",
                remedy="Raise the tenant's limits, or have it send less.",
                evidence={"refused": refused},
                hurt=Hurt(tenants={tenant: refused}),
            )


CHECKS: tuple[Callable[[Look], Iterator[Finding]], ...] = (
    lost_workers,
    hung_workers,
    slow_workers,
    kv_pressure,
    slow_links,
    gateway_saturated,
    cache_thrash,
    phase_imbalance,
    unbalanced,
    costly,
    quota,
)
"""Of those that cost as much, the first ones come first."""
