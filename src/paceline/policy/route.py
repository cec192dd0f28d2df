"""Which worker gets this request?

Every policy has one signature: it sees the workers of the model (`Fleet`), the request (`Ask`) and
the places that may be chosen, and gives a `Choice`. None rolls dice of its own. Those with a memory
are classes, and each kernel makes one of its own (`Learner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import msgspec

from paceline.domain.commands import RunnerUp
from paceline.policy import baselines
from paceline.policy.admit import is_open
from paceline.policy.fleet import Choice, Fleet, Learner, Policy
from paceline.policy.headroom import (
    BALANCE_WEIGHT,
    DELAY_WEIGHT,
    WORK_WEIGHT,
    Forecast,
    forecast,
    harm,
    loss,
    prediction,
)
from paceline.policy.reserve import limits
from paceline.policy.standing import Ask, Standing

__all__ = ["POLICIES", "Choice", "Fleet", "Learner", "Policy", "headroom"]

LOOKED_AT = 16
"""Workers that headroom looks at; of a larger fleet a seeded sample, and those with the prefix."""
HOLDERS = 4
TIE = 0.01
"""Costs this close are equal: a seeded choice keeps several gateways from herding."""
PAUSING = frozenset({"headroom"})
"""Policies that hold requests back for want of KV cache, so that it helps to pause some."""


def headroom(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """The one where promises are kept most surely, then where least time is lost."""
    options = []
    for i in _shortlist(ask, places):
        worker = fleet.standing(i, ask.now)
        options.append(_Option(i, worker, forecast(worker, ask, ask.cached.get(i, 0.0))))
    allowed = _fair(ask, options) if ask.claims and not ask.overdue else options
    fair = allowed or options
    wait = not allowed or not any(is_open(each.worker, ask, each.seen) for each in fair)
    costs = _costs(ask, fair, options)
    least = min(costs)
    equal = [k for k, cost in enumerate(costs) if cost <= least + TIE]
    k = equal[ask.seed % len(equal)]
    chosen, seen = fair[k], fair[k].seen
    because = (
        f"least cost {costs[k]:.3f} of {len(options)}: "
        f"TTFT {seen.ttft_s * 1e3:.0f} ms, ITL {seen.itl_s * 1e3:.1f} ms"
    )
    return Choice(
        chosen.place,
        because,
        prediction(chosen.worker, ask, seen, ask.cached.get(chosen.place, 0.0)),
        wait,
        runner_up=_runner_up(fleet, fair, costs, k),
        cost=costs[k],
    )


class _Option(msgspec.Struct, frozen=True, gc=False):
    """A worker, and what would come of choosing it."""

    place: int
    worker: Standing
    seen: Forecast


def _costs(ask: Ask, fair: Sequence[_Option], options: Sequence[_Option]) -> list[float]:
    """What it costs to take each of the fair ones; infinite where two others are surely better.

    No part of a cost is below 0. So who costs more than the best two by delay, work and balance
    alone need not be asked which promises it breaks, which takes longer than all the rest.
    """
    forecasts = [option.seen for option in options]
    weight = DELAY_WEIGHT / min([seen.delay_s for seen in forecasts])
    price = WORK_WEIGHT * sum([seen.busy for seen in forecasts]) / len(forecasts)
    backlog_s = sum([seen.backlog_s for seen in forecasts])
    balance = BALANCE_WEIGHT * len(forecasts) / (backlog_s or 1.0)
    at_least = []
    for k, option in enumerate(fair):
        seen = option.seen
        rest = weight * seen.delay_s + price * seen.work + balance * seen.backlog_s
        at_least.append((rest, k))
    at_least.sort()
    costs = [inf] * len(fair)
    least = second = inf
    for rest, k in at_least:
        if rest > second and rest > least + TIE:
            break
        worker, seen = fair[k].worker, fair[k].seen
        costs[k] = cost = (
            ask.weight * loss(worker, ask, seen)
            + harm(worker, ask, seen)
            + weight * seen.delay_s
            + price * seen.work
            + balance * seen.backlog_s
        )
        if cost < least:
            least, second = cost, least
        elif cost < second:
            second = cost
    return costs


def _runner_up(
    fleet: Fleet, options: Sequence[_Option], costs: list[float], chosen: int
) -> RunnerUp | None:
    """The next best, for those who ask why."""
    others = costs[:chosen] + costs[chosen + 1 :]
    if not others:
        return None
    least = min(others)
    k = others.index(least)
    other = options[k + (k >= chosen)]
    more = least - costs[chosen]
    return RunnerUp(fleet.ids[other.place], more, other.seen.ttft_s, other.seen.itl_s)


def _fair(ask: Ask, options: Sequence[_Option]) -> list[_Option]:
    """Those that the request leaves fast enough for whoever has more weight; and idle ones."""
    allowed = limits(ask, [(option.worker, option.seen) for option in options])
    return [
        option
        for option, itl_s in zip(options, allowed, strict=True)
        if option.seen.itl_s <= itl_s or not option.worker.everyone
    ]


def _shortlist(ask: Ask, places: Sequence[int]) -> Sequence[int]:
    """Everybody, or of a large fleet an even sample from a seeded start and the prefix's holders.

    Of 16 drawn, one is among the best tenth of any fleet four times out of five, at a bounded cost.
    """
    count = len(places)
    if count <= LOOKED_AT:
        return places
    sample = [places[(ask.seed + k * count // LOOKED_AT) % count] for k in range(LOOKED_AT)]
    holders = sorted(ask.cached, key=lambda i: (-ask.cached[i], i))[:HOLDERS]
    return sample + [i for i in holders if i in places and i not in sample]


POLICIES: dict[str, Policy | type[Learner]] = {
    "headroom": headroom,
    "random": baselines.at_random,
    "round-robin": baselines.round_robin,
    "least-requests": baselines.least_requests,
    "power-of-two": baselines.power_of_two,
    "priority": baselines.priority,
    "least-kv": baselines.least_kv,
    "prefix-affinity": baselines.prefix_affinity,
    "kv-cost": baselines.KvCost,
    "kv-cost-output": baselines.KvCostOutput,
    "peak-ewma": baselines.PeakEwma,
    "global-latency": baselines.GlobalLatency,
}
