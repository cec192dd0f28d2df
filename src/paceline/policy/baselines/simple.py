"""Which worker, by rules that need no memory of their own?"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from paceline.policy.fleet import Choice, Fleet, lowest, two_of
from paceline.policy.standing import Ask

CACHE_THRESHOLD = 0.3
"""Share of the prompt that must be cached for the cache to decide."""
BALANCE_ABSOLUTE = 8
BALANCE_RELATIVE = 1.5
"""The fleet is unbalanced if the busiest worker has over so many requests more than the idlest, and
over so many times as many. (The source's defaults are 64 and 1.5; 8 did best on the scenarios.)
"""

PRIORITY_LIMIT = 64
"""Requests on a worker from which on others wait; 64 did best of 32 to 192 on the scenarios."""


def at_random(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """Any.

    Source: folklore
    """
    return Choice(places[ask.seed % len(places)], "drawn")


def round_robin(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """Each in turn.

    Source: folklore
    """
    return Choice(places[fleet.turn % len(places)], "its turn")


def least_requests(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """The one with the fewest requests in flight from here.

    Source: `least_conn` of nginx,
    https://nginx.org/en/docs/http/ngx_http_upstream_module.html#least_conn
    """
    i = lowest(places, [fleet.load(i) for i in places], ask.seed)
    return Choice(i, f"fewest requests ({fleet.load(i)})")


def priority(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """The one with the fewest requests; none has more than `PRIORITY_LIMIT`, the rest wait by tier.

    Source: `priority` of LiteLLM's scheduler and vLLM's `--scheduling-policy priority`: a number
    that acts on a waiting queue, https://docs.litellm.ai/docs/scheduler
    """
    i = lowest(places, [fleet.load(i) for i in places], ask.seed)
    load = fleet.load(i)
    return Choice(i, f"fewest requests ({load})", wait=load >= PRIORITY_LIMIT)


def power_of_two(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """The one with fewer requests of two drawn ones.

    Source: Mitzenmacher 2001, The Power of Two Choices in Randomized Load Balancing
    """
    i = min(two_of(places, ask.seed), key=fleet.load)
    return Choice(i, f"fewer requests of two ({fleet.load(i)})")


def least_kv(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """The one whose KV cache is used least, as a share of its size, by what is in flight.

    Where a size is unknown the used tokens are compared.

    Source: `kv-cache-utilization-scorer` of the Gateway API Inference Extension,
    https://github.com/kubernetes-sigs/gateway-api-inference-extension
    """
    standings = [fleet.standing(i, ask.now) for i in places]
    if any(worker.kv_capacity == inf for worker in standings):
        used = [worker.kv_all for worker in standings]
        i = lowest(places, used, ask.seed)
        return Choice(i, f"least KV used ({min(used):.0f} tokens)")
    used = [worker.kv_all / worker.kv_capacity for worker in standings]
    i = lowest(places, used, ask.seed)
    return Choice(i, f"least KV used ({min(used):.0%})")


def prefix_affinity(fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
    """The one with the longest prefix cached; where it is short, the one with the least cached;
    in an unbalanced fleet the one with the fewest requests.

    Of several that hold the longest prefix the source takes any, this one the least loaded.

    Source: `cache_aware` policy of the SGLang router,
    https://github.com/sgl-project/sglang/blob/main/sgl-router/src/policies/cache_aware.rs
    """
    loads = [fleet.load(i) for i in places]
    low, high = min(loads), max(loads)
    if high - low > BALANCE_ABSOLUTE and high > BALANCE_RELATIVE * low:
        i = lowest(places, loads, ask.seed)
        return Choice(i, f"unbalanced ({low} to {high}): fewest requests")
    held = [ask.blocks_held.get(i, 0) for i in places]
    most = max(held)
    if most > CACHE_THRESHOLD * ask.blocks:
        holders = [i for i, blocks in zip(places, held, strict=True) if blocks == most]
        i = lowest(holders, [fleet.load(i) for i in holders], ask.seed)
        return Choice(i, f"holds {most} of {ask.blocks} blocks")
    i = lowest(places, [fleet.remembered(i) for i in places], ask.seed)
    return Choice(i, f"least cached ({fleet.remembered(i)} blocks)")
