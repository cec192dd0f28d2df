"""What is wrong with the fleet, how is it known, who is hurt, and what can be done?

Two kinds of evidence: what was lost of late, by cause (`Loss`), and how each worker stands
(`WorkerLook`). A trouble that shows in a worker itself (it is slow, hangs, preempts) is found
before it costs a promise (`unwell`); what only shows in what it costs (prompts among decodes, a
full fleet) is found when the costs matter: no fleet keeps every promise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import msgspec

from paceline.policy.causes import Cause
from paceline.policy.gpus import activity
from paceline.policy.look import (
    LEAST_LOST,
    LOST_SHARE,
    SURELY_LOST,
    Evidence,
    Finding,
    Hurt,
    Look,
    WorkerLook,
    found,
    hurt_by,
    matters,
    promises_lost,
    rounded,
)
from paceline.policy.unwell import (
    cache_thrash,
    hung_workers,
    kv_pressure,
    lost_workers,
    slow_links,
    slow_workers,
)

ONE_WORKER = 0.6
"""Share of a model's losses from which on they are one worker's affair."""
LAG_SHARE = 0.2
"""Share of time by which the gateway's event loop may be late."""
UNEVEN = 2.5
"""Times the load of the others that one worker has, if routing is unbalanced."""
REFUSALS = 5
LINE_S, LEAST_LINE = 3.0, 5
"""The line at the gateway is long if it would take so long at the pace of late, and is no less."""
CAUSES = frozenset(("lost_worker", "hung_worker", "slow_worker", "gateway_saturated"))
CONSEQUENCES = frozenset(("fleet_full", "engine_queue", "unbalanced_routing"))
"""Where something is broken, those are more likely to come from it: they are named after it."""


def diagnose(look: Look) -> list[Finding]:
    """All troubles, those that cost most promises first.

    A lost promise counts for one of them: the first in the order of checks that explains it.
    """
    findings: list[Finding] = []
    for check in CHECKS:
        new = list(check(look))
        findings += new
        if new:
            rest = [loss for loss in look.losses if not any(f.explains(loss) for f in new)]
            look = msgspec.structs.replace(look, losses=rest)
    short = {finding.model for finding in findings if finding.kind in CAUSES}
    findings.sort(
        key=lambda f: (
            f.kind in CONSEQUENCES and f.model in short,
            -f.hurt.promises_lost,
            -f.hurt.seconds_lost,
        )
    )
    return findings


# What shows in what it costs.

WAITED = (Cause.GATEWAY_QUEUE, Cause.ENGINE_QUEUE, Cause.OTHERS_PREFILL)
"""What makes first tokens late where too little is prefilled, one's own prompt apart."""
BACKLOG_STEPS = 2.0
"""Steps of prompts before a prefill worker from which on it is short."""


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
        "waiting for room or by steps of too many streams and prompts.",
        "Add workers; until then let lower tiers be shed or degraded (`overload`).",
    ),
    Costly(
        "slow_transfer",
        (Cause.TRANSFER,),
        "KV caches on their way between workers {where} broke {lost} promises.",
        "Look at the network between the workers; prefill short prompts in place.",
    ),
)
CROWDED = (Cause.OTHERS_PREFILL, Cause.ENGINE_QUEUE)
"""What a full fleet brings with it: engines have more to prefill and to hold than is good."""


def _costly(look: Look, model: str) -> Iterator[Costly]:
    """While a long line waits, what crowds the engines is one trouble with what makes it wait."""
    pace = (look.requests - look.overdue) / look.window_s
    full = look.waiting.get(model, 0) >= max(LEAST_LINE, LINE_S * pace)
    for trouble in COSTLY:
        if full and trouble.kind == "fleet_full":
            causes = (*trouble.causes, *CROWDED)
            yield msgspec.structs.replace(trouble, causes=causes)
        elif not full or not set(trouble.causes) <= set(CROWDED):
            yield trouble


def costly(look: Look) -> Iterator[Finding]:
    """What broke promises, and where?"""
    for model in sorted({loss.model for loss in look.losses}):
        for trouble in _costly(look, model):
            lost = hurt_by(look, trouble.causes, model)
            if not matters(look, lost):
                continue
            worker = None
            if trouble.kind != "fleet_full":  # that is never one worker's affair
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
                evidence=rounded(_load(look, model, worker)),
                hurt=lost,
                causes=trouble.causes,
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
        "requests_over": look.requests - look.overdue,
        "overdue": look.overdue,
        "waiting_at_gateway": look.waiting.get(model, 0),
        "waiting_in_engines": sum(w.waiting for w in seen),
        "streams_a_worker": sum(w.streams for w in seen) / count,
        "prefill_time_share": sum(w.prefill_share for w in seen) / count,
        "kv_used_share": max((w.kv_used for w in seen), default=0.0),
        **activity([gpu for w in seen for gpu in w.gpus]),
    }


def phase_imbalance(look: Look) -> Iterator[Finding]:
    """Are there too few workers for the one phase, and enough for the other?"""
    for model in sorted({w.model for w in look.workers if w.role != "both"}):
        of = [w for w in look.workers if w.model == model]
        prefilling = [w for w in of if w.role == "prefill"]
        decoding = [w for w in of if w.role == "decode"]
        if not prefilling or not decoding:
            continue
        backlog = sum(w.ahead for w in prefilling) / len(prefilling)
        waited = sum(_lost(look, w, WAITED) for w in prefilling)
        steps_ahead = backlog / max(min(w.budget for w in prefilling), 1.0)
        crowded = (Cause.BATCH, Cause.PREEMPTION)
        starved = steps_ahead > BACKLOG_STEPS or waited > sum(_lost(look, w, crowded) for w in of)
        short, causes = ("prefill", WAITED) if starved else ("decode", crowded)
        lost = hurt_by(look, causes, model)
        if not matters(look, lost):
            continue
        yield Finding(
            kind="phase_imbalance",
            model=model,
            since=look.now,
            says=f"{model} has too few workers for {short}: {lost.promises_lost} promises were "
            f"broken while the others keep up.",
            remedy=f"Give {short} more workers, or let some serve both.",
            evidence=rounded(
                {
                    "prefill_workers": len(prefilling),
                    "decode_workers": len(decoding),
                    "prompt_tokens_ahead_a_prefill_worker": backlog,
                    "streams_a_decode_worker": sum(w.streams for w in decoding) / len(decoding),
                }
            ),
            hurt=lost,
            causes=causes,
        )


def _lost(look: Look, worker: WorkerLook, causes: Sequence[Cause]) -> int:
    return hurt_by(look, causes, worker.model, worker.id).promises_lost


def unbalanced(look: Look) -> Iterator[Finding]:
    """Has one worker far more to do than its like, and loses promises by it?"""
    causes = (Cause.BATCH, Cause.ENGINE_QUEUE, Cause.OTHERS_PREFILL, Cause.PREEMPTION)
    lost_on = promises_lost(look, causes)
    for w in look.workers:
        if lost_on[w.id] < SURELY_LOST:
            continue
        like = [o for o in look.workers if o.model == w.model and o.role == w.role and o.healthy]
        others = [o.streams + o.arriving for o in like if o.id != w.id]
        mine, lost = w.streams + w.arriving, hurt_by(look, causes, w.model, w.id)
        if others and mine > UNEVEN * (median(others) + 2.0) and matters(look, lost):
            yield found(
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
        evidence=rounded({"late_time_share": look.lag_share, "worst_ms": 1e3 * look.worst_lag_s}),
        hurt=Hurt(
            promises,
            sum(loss.seconds for loss in losses),
            sum(loss.gaps for loss in losses),
            sum(w.streams for w in look.workers),
            dict(tiers),
            dict(tenants),
        ),
        causes=(Cause.GATEWAY,),
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
