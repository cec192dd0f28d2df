"""Why did this token come late?

A step of a worker gives all its streams their next token, so it is explained once for all of them:

    seconds = batch + prefill + gateway + link + hang + slow

`batch` and `prefill` are what the learned model says of the step's load at the speed of the
worker's like; what the gateway's own event loop was late by is `gateway`; the rest is the worker's,
or the link's where tokens that were held up come all at once afterwards. The parts of successive
steps are summed (`Sums`), so that what a stream's whole answer met is the difference of two sums.

Lateness is what goes beyond the promise. What had to be done anyway (one's own prompt, the batch's
tokens) uses up what was promised first; the other causes share the rest in proportion.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from math import ceil, inf

import msgspec

from paceline.domain.promise import Promise
from paceline.policy.standing import Curve
from paceline.policy.windows import PastStep

STALL_GAPS = 3.0
"""Times the promised ITL from which on a gap is late where no worst stall is promised."""
NOTICED_S = 1.0
"""Where no gap is promised at all: a pause that every reader notices."""
HANG_S, HANG_STEPS = 1.0, 20.0
"""A step counts as hung from so many seconds and so many times its expected length on."""
DISTURBED = 1.2
"""Slowdown from which on what a step with prefill took too long is the worker's and not the
prompt's, whose cost may not be known well."""


UNSURE = 1.5
"""Times what is known of a prompt's cost that it may have cost where it is not known in which steps
it was."""


class Cause(StrEnum):
    """What can make a token late, in the order of its way."""

    GATEWAY_QUEUE = "gateway_queue"
    """It waited at the gateway: no worker had room."""
    ENGINE_QUEUE = "engine_queue"
    """It waited in the engine while others decoded."""
    OWN_PREFILL = "own_prefill"
    """Its own prompt took so long."""
    OTHERS_PREFILL = "others_prefill"
    """Prompts of others were prefilled, before its own or in the steps of its tokens."""
    BATCH = "batch"
    """A step takes so long with so many streams and so much context."""
    PREEMPTION = "preemption"
    """The engine threw it out of its KV cache, and computed it anew."""
    TRANSFER = "transfer"
    """Its KV cache was on its way from one worker to another."""
    SLOW_WORKER = "slow_worker"
    """The worker was slower than such work usually is, there or at its like."""
    HANG = "hang"
    """The worker did nothing for very long."""
    LOST_WORKER = "lost_worker"
    """Its worker failed, and it had to go elsewhere."""
    PAUSE = "pause"
    """It was taken off its worker for others."""
    LINK = "link"
    """It was held up between worker and gateway."""
    GATEWAY = "gateway"
    """The gateway itself was busy with something else."""


Split = dict[Cause, float]
"""Seconds by cause; all above 0."""
Sums = list[float]
"""Of steps: seconds by what they went into (`AGAIN`: into what was preempted before), prompt tokens
prefilled, their number, and the seconds that they would have taken at their worker's own best."""
BATCH, PREFILL, SLOW, LINK, GATEWAY, HANG, AGAIN, TOKENS, STEPS, AT_BEST = range(10)
NOTHING: Sums = [0.0] * 10
NECESSARY = (Cause.BATCH, Cause.OWN_PREFILL)
PROMPT_CAUSES = (Cause.OWN_PREFILL, Cause.OTHERS_PREFILL)


class Speed(msgspec.Struct, frozen=True, gc=False):
    """How fast a worker is."""

    curve: Curve
    """Of its own steps, at its usual speed."""
    like: float = 1.0
    """Times that its usual step takes as long as those of its like; at least 1."""
    aged: float = 1.0
    """Times that its usual step takes as long as at its own best; at least 1."""
    slowdown: float = 1.0
    """Times as long as usual that its steps take just now."""
    budget: float = 2048.0
    """Tokens that a step may hold."""


def late_after_s(promise: Promise) -> float:
    """From how many seconds on a single gap counts as late."""
    if promise.stall_s < inf:
        return promise.stall_s
    return STALL_GAPS * promise.itl_s if promise.itl_s < inf else NOTICED_S


def step_sums(step: PastStep, speed: Speed, lag_s: float = 0.0) -> Sums:
    """Into what one step's seconds went, `lag_s` of which the gateway did not look.

    `slow` may be negative: noise, or tokens that catch up. Over many steps that evens out.
    """
    curve, like = speed.curve, max(speed.like, speed.aged)
    batch_s = (curve.at(step.streams) + curve.kv_s * step.kv) / like
    prefill_s, tokens = 0.0, step.prefill
    if tokens:
        q = sum([t * (context + t / 2) for t, context in step.chunks])
        more_s = curve.at(step.streams + tokens) - curve.at(step.streams)
        prefill_s = (more_s + curve.q_s * q) / like
    steps = ceil(tokens / speed.budget) if step.idle and tokens else 1
    batch_s *= steps  # to an idle worker's first token
    rest_s = step.seconds - batch_s - prefill_s
    best_s = (batch_s + prefill_s) * like / speed.aged
    if rest_s <= 0.0:
        return [batch_s, prefill_s, rest_s, 0.0, 0.0, 0.0, 0.0, tokens, steps, best_s]
    gateway_s = min(lag_s, rest_s)
    rest_s -= gateway_s
    expected_s = batch_s + prefill_s
    link_s = hang_s = 0.0
    if step.idle:  # it began when a request was sent: the way is part of it
        link_s = max(rest_s - max(speed.slowdown * like - 1.0, 0.0) * expected_s, 0.0)
        rest_s -= link_s
    elif step.each > 1.5 and step.seconds / step.each < 2.0 * expected_s * speed.slowdown * like:
        link_s, rest_s = rest_s, 0.0  # the worker went on: several tokens of each came at once
    elif rest_s > max(HANG_S, HANG_STEPS * expected_s):
        more_s = min(rest_s, UNSURE * prompt_s(curve, step.streams, step.unplaced) / like)
        prefill_s, hang_s, rest_s = prefill_s + more_s, rest_s - more_s, 0.0
    elif (tokens or step.spoiled) and speed.slowdown * like < DISTURBED:
        prefill_s, rest_s = prefill_s + rest_s, 0.0
    return [batch_s, prefill_s, rest_s, link_s, gateway_s, hang_s, 0.0, tokens, steps, best_s]


def prompt_s(curve: Curve, streams: float, tokens: int) -> float:
    """What a prompt adds to a step of so many streams."""
    return curve.at(streams + tokens) - curve.at(streams) + curve.q_s * tokens * (tokens / 2)


def of_gaps(sums: Sums) -> Split:
    """Seconds of steps as a stream meets them that only decodes."""
    batch_s, prefill_s, slow_s, link_s, gateway_s, hang_s, again_s, *_ = sums
    if slow_s < 0.0:  # quicker than expected: so were the batch and the prompts
        usual_s = batch_s + prefill_s
        share = max(1.0 + slow_s / usual_s, 0.0) if usual_s > 0.0 else 0.0
        batch_s, prefill_s, slow_s = batch_s * share, prefill_s * share, 0.0
    return _positive(
        {
            Cause.BATCH: batch_s,
            Cause.OTHERS_PREFILL: prefill_s,
            Cause.SLOW_WORKER: slow_s,
            Cause.LINK: link_s,
            Cause.GATEWAY: gateway_s,
            Cause.HANG: hang_s,
            Cause.PREEMPTION: again_s,
        }
    )


def of_first_token(
    queued_s: float, there_s: float, sums: Sums, uncached: float, budget: float, waits: bool = True
) -> Split:
    """Seconds until a first token: at the gateway, and at a worker whose steps meanwhile are told.

    An engine prefills in order, so all prompt tokens of those steps but one's own were before it;
    a step holds `budget` of them. Steps that were not needed for any were spent in the queue, or
    on the way if nobody `waits` in the engine.
    """
    seen_s = sum(sums[:TOKENS])
    split = of_gaps(sums)
    if seen_s > there_s:  # steps that began before it was sent, as it seems
        split = {cause: s * there_s / seen_s for cause, s in split.items()}
    tokens = max(sums[TOKENS], uncached, 1.0)
    own = min(uncached / tokens, 1.0)
    needed = min(ceil(tokens / max(budget, 1.0)) / sums[STEPS], 1.0) if sums[STEPS] else 0.0
    batch_s, prefill_s = split.pop(Cause.BATCH, 0.0), split.pop(Cause.OTHERS_PREFILL, 0.0)
    worked_s, link_s = prefill_s + batch_s * needed, split.get(Cause.LINK, 0.0)
    split[Cause.OWN_PREFILL] = own * worked_s
    split[Cause.OTHERS_PREFILL] = (1.0 - own) * worked_s
    split[Cause.GATEWAY_QUEUE] = queued_s
    idle_s = batch_s * (1.0 - needed)
    split[Cause.ENGINE_QUEUE] = idle_s if waits else 0.0
    unseen_s = max(there_s - seen_s, 0.0)
    split[Cause.LINK] = link_s + unseen_s + (0.0 if waits else idle_s)
    return _positive(split)


def beyond(split: Mapping[Cause, float], allowed_s: float) -> Split:
    """What of the seconds by cause is lateness; empty if they are within what is allowed."""
    total_s = sum(split.values())
    late_s = total_s - allowed_s
    if late_s <= 0.0:
        return {}
    needed_s = sum([split.get(cause, 0.0) for cause in NECESSARY])
    avoidable_s = total_s - needed_s
    others = min(late_s / avoidable_s, 1.0) if avoidable_s > 0.0 else 0.0
    rest = min(max(late_s - avoidable_s, 0.0) / needed_s, 1.0) if needed_s > 0.0 else 0.0
    return _positive(
        {cause: s * (rest if cause in NECESSARY else others) for cause, s in split.items()}
    )


def dominant(split: Mapping[Cause, float]) -> Cause:
    """The cause of most of it."""
    return max(split, key=lambda cause: (split[cause], cause))


def scaled(split: Split, seconds: float) -> Split:
    """The same shares, of so many seconds."""
    total_s = sum(split.values())
    return {cause: s * seconds / total_s for cause, s in split.items()} if total_s else {}


def add(split: Split, other: Mapping[Cause, float]) -> Split:
    """Sums by cause, in place."""
    for cause, seconds in other.items():
        split[cause] = split.get(cause, 0.0) + seconds
    return split


def _positive(split: Split) -> Split:
    return {cause: seconds for cause, seconds in split.items() if seconds > 1e-9}
