"""Which workers are unwell, whether or not that has cost a promise yet?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from paceline.policy.causes import PROMPT_CAUSES, Cause
from paceline.policy.gpus import with_gpus
from paceline.policy.look import (
    SURELY_LOST,
    Finding,
    Look,
    WorkerLook,
    found,
    hurt_by,
    matters,
    promises_lost,
)
from paceline.policy.pace import SLOW

SURELY = 1.2
"""A worker is slow if the kernel reckons with so much, and the engine, where it tells, has measured
so much..."""
OUTDATED_S = 60.0
"""...and not so long ago: who is slow gets little work that could show it."""
UNSEEN_S = 5.0
"""From when on it is said that it was not seen since."""
STRANGERS = 4
"""Requests from elsewhere, and no fewer than from here, by which a worker is slowed."""
PREEMPTED = 3
"""Preemptions from which on a KV cache counts as too full; one is enough while requests wait."""
FAILED = 3
"""Requests that a worker must fail to be in trouble while it says that it is well."""
AWAY_S, AWAY_TIMES = 0.05, 3.0
"""A link is slow that takes so much, and so many times, longer than others..."""
ASKED_S = 0.5
"""...or on which an engine takes so much longer to be asked how it is, twice in a row."""
THRASHED = 0.5
"""Share of the usual prefix hits that are left when a cache thrashes..."""
THRASH_TOKENS = 2000.0
"""...and prompt tokens that must have been looked up for it to be seen."""
FULL = 0.9
"""Share of a KV cache in use from which on it is full."""


def lost_workers(look: Look) -> Iterator[Finding]:
    """Who does not answer?"""
    for w in look.workers:
        if not w.healthy or (w.failed >= FAILED and not w.hangs):
            why = w.because or w.failure
            finding = found(
                look,
                w,
                "lost_worker",
                (Cause.LOST_WORKER,),
                f"{w.id} {'fails requests' if w.healthy else 'does not answer'}: {why}.",
                "Look at its log; restart it, or remove it from the fleet.",
                requests_failed=w.failed,
                last_reason=w.failure or w.because,
            )
            yield with_gpus(finding, w)


def hung_workers(look: Look) -> Iterator[Finding]:
    """Who answers, and does nothing?"""
    for w in look.workers:
        silent = w.silent_s > w.hang_s
        if w.healthy and (w.hangs or silent) and not _is_far(look, w, w.took_s):
            times = max(w.times, w.times_itself)
            if not silent and times >= SLOW and _are_strangers(w, w.foreign):
                yield foreign_load(look, w, times)  # it was busy with them
                continue
            says = (
                f"{w.id} has given no token for {w.silent_s:.1f} s, though it has work."
                if silent
                else f"{w.id} hung: {w.hangs} requests were taken off it."
            )
            finding = found(
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
            yield with_gpus(finding, w)


def slow_workers(look: Look) -> Iterator[Finding]:
    """Whose steps take longer than such work takes?"""
    for w in look.workers:
        known = w.steps > 0.0 and w.stepped_s < OUTDATED_S
        denied = 0.0 < w.told_times < SURELY  # by the engine, at least until its last report
        denied |= w.told_times == 0.0 and _is_far(look, w, w.took_worst_s)  # it cannot tell in time
        if not known or denied or w.hangs:
            continue
        worse = w.times_itself >= SLOW and w.slowdown >= SURELY  # than it was
        times = w.times_itself if worse else w.times
        if worse or (  # others are slower by nature
            times >= SLOW and matters(look, hurt_by(look, (Cause.SLOW_WORKER,), w.model, w.id))
        ):
            than = "they used to take there" if worse else "they take at its like"
            if _are_strangers(w, w.foreign):
                yield foreign_load(look, w, times)
                continue
            if _are_strangers(w, w.perhaps_foreign):
                continue  # its next report will tell
            finding = found(
                look,
                w,
                "slow_worker",
                (Cause.SLOW_WORKER, Cause.OTHERS_PREFILL),
                f"Steps of {w.id} take {times:.1f} times as long as {than}{_unseen(w)}.",
                "Look at its GPU's clocks, temperature and neighbours; drain it if it stays so.",
                times_as_slow=times,
                step_ms=1e3 * (w.normal_s + w.slow_s) / w.steps,
                normal_step_ms=1e3 * w.normal_s / w.steps,
                last_step_ago_s=w.stepped_s,
            )
            yield with_gpus(finding, w)


def _unseen(w: WorkerLook) -> str:
    return f"; no step of it was seen for {w.stepped_s:.0f} s" if w.stepped_s >= UNSEEN_S else ""


def _are_strangers(w: WorkerLook, requests: int) -> bool:
    return requests >= max(STRANGERS, w.streams + w.arriving)


def foreign_load(look: Look, w: WorkerLook, times: float) -> Finding:
    """It is not slow: it works for others."""
    return found(
        look,
        w,
        "foreign_load",
        (Cause.SLOW_WORKER, Cause.ENGINE_QUEUE, *((Cause.HANG, Cause.LOST_WORKER) * bool(w.hangs))),
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
        if kv_is_short(look, w):
            yield found(
                look,
                w,
                "kv_pressure",
                (Cause.PREEMPTION, Cause.PAUSE, Cause.ENGINE_QUEUE),
                f"The KV cache of {w.id} is full ({w.kv_used:.0%}): its engine threw out "
                f"{w.preemptions} streams in {look.window_s:.0f} s, and {w.waiting} wait in it.",
                "Give the engine more KV cache (memory utilisation, FP8 cache), let it take fewer "
                "sequences at once, or add workers.",
                preemptions=w.preemptions,
                kv_used_share=w.kv_used,
                engine_waiting=w.waiting,
            )


def kv_is_short(look: Look, w: WorkerLook) -> bool:
    """Has its KV cache no room for what it has?"""
    full = w.kv_used >= FULL and w.waiting > 0
    if w.preemptions >= PREEMPTED or (w.preemptions and full):
        return True
    waited = Cause.ENGINE_QUEUE, Cause.PREEMPTION
    return full and matters(look, hurt_by(look, waited, w.model, w.id))


def cache_thrash(look: Look) -> Iterator[Finding]:
    """Which engine no longer finds the prefixes that it used to find?"""
    for w in look.workers:
        share = w.hits / w.queries if w.queries else 0.0
        if (
            w.queries >= THRASH_TOKENS
            and w.kv_used >= FULL
            and share < THRASHED * w.usual_hits
            and matters(look, hurt_by(look, PROMPT_CAUSES, w.model, w.id))
        ):
            yield found(
                look,
                w,
                "cache_thrash",
                PROMPT_CAUSES,
                f"{w.id} finds {share:.0%} of prompts in its cache, where it used to find "
                f"{w.usual_hits:.0%}: it is full, and prefixes push each other out.",
                "Give the engine more KV cache, or spread conversations over more workers.",
                hits_share=share,
                usual_hits_share=w.usual_hits,
                kv_used_share=w.kv_used,
            )


def _others(look: Look, w: WorkerLook) -> list[WorkerLook]:
    """Known workers that serve the same."""
    return [o for o in look.workers if o.model == w.model and o.id != w.id and o.steps]


def _is_far(look: Look, w: WorkerLook, took_s: float) -> bool:
    """Does it take far longer to be asked how it is than others? Then it does not hang."""
    if took_s <= ASKED_S:
        return False
    others = _others(look, w)
    usual_s = median([o.took_s for o in others]) if others else 0.0
    return bool(others) and took_s > max(usual_s + ASKED_S, AWAY_TIMES * usual_s)


def slow_links(look: Look) -> Iterator[Finding]:
    """Between whom and the gateway are tokens held up?"""
    lost_on = promises_lost(look, (Cause.LINK,))
    for w in look.workers:
        held_up = w.seen_times >= SLOW and 0.0 < w.told_times < SURELY
        near = max(w.overhead_s, w.took_s) <= AWAY_S
        if near and not held_up and lost_on[w.id] < SURELY_LOST:
            continue  # as nearly all
        lost = hurt_by(look, (Cause.LINK,), w.model, w.id)
        signs = _link_signs(look, w, held_up, lost.promises_lost if matters(look, lost) else 0)
        shown = [sign for sign in signs if sign.shows]
        if shown:
            rest = [sign for sign in signs if not sign.shows]
            yield found(
                look,
                w,
                "slow_link",
                (Cause.LINK,),
                f"Requests to {w.id} and its tokens are held up on their way: "
                f"{'; '.join(sign.says for sign in shown)}.",
                "Look at the network between gateway and worker (loss, proxies, zones), and at "
                "the load of the engine's HTTP server.",
                **{name: value for sign in (*shown, *rest) for name, value in sign.evidence},
            )


class _Sign(NamedTuple):
    """By which a slow link may be known."""

    shows: bool
    says: str
    evidence: Sequence[tuple[str, float]]


def _link_signs(look: Look, w: WorkerLook, held_up: bool, promises: int) -> list[_Sign]:
    """The surest first. `promises`: broken on the way, if they matter."""
    others = _others(look, w)
    usual_s = median([o.overhead_s for o in others]) if others else 0.0
    usual_took_s = median([o.took_s for o in others]) if others else 0.0
    late = bool(others) and w.overhead_s > max(usual_s + AWAY_S, AWAY_TIMES * usual_s)
    return [
        _Sign(
            _is_far(look, w, w.took_s),
            f"to ask it how it is takes {1e3 * w.took_s:,.0f} ms, "
            f"{1e3 * usual_took_s:,.0f} ms elsewhere",
            (("asking_ms", 1e3 * w.took_s), ("asking_elsewhere_ms", 1e3 * usual_took_s)),
        ),
        _Sign(
            late and w.steps > 0.0,
            f"first tokens take {1e3 * w.overhead_s:,.0f} ms beyond the engine's own work, "
            f"{1e3 * usual_s:,.0f} ms elsewhere",
            (("overhead_ms", 1e3 * w.overhead_s), ("overhead_elsewhere_ms", 1e3 * usual_s)),
        ),
        _Sign(
            held_up,
            f"gaps between tokens are {w.seen_times:.1f} times as long as they should be here, "
            f"{w.told_times:.1f} times by the engine's own measure",
            (("gaps_times_as_long", w.seen_times), ("by_the_engines_measure", w.told_times)),
        ),
        _Sign(
            promises > 0,
            f"that broke {promises} promises",
            (),
        ),
    ]
