"""What is the kernel told of a simulated request?

Bytes for tokens, as a live gateway knows it, and what its tier says.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from paceline.domain.request import Request
from paceline.domain.way_down import with_way_down
from paceline.simulator.flight import BYTES_PER_TOKEN, NAME_TOKENS, names_of
from paceline.simulator.scenario import SimTier
from paceline.simulator.traffic import Fragile
from paceline.workload.traces import Arrival


def request_of(name: str, arrival: Arrival, tiers: Mapping[str, SimTier], rng: Random) -> Request:
    """The request, by the tier that it came with."""
    bytes_each = BYTES_PER_TOKEN * (0.9 + 0.2 * rng.random())
    tier = tiers[arrival.tier]
    request = Request(
        id=name,
        model=arrival.model,
        tenant=arrival.tenant,
        tier=arrival.tier,
        promise=tier.promise,
        weight=tier.weight,
        prompt_bytes=round(arrival.prompt_tokens * bytes_each),
        max_tokens=arrival.max_tokens,
        blocks=names_of(arrival),
        seed=rng.getrandbits(32),
        block_bytes=round(NAME_TOKENS * bytes_each),
        overload=tier.overload,
        preemptible=tier.preemptible,
        resumable=not isinstance(arrival, Fragile),
        deadline_s=tier.deadline_s,
    )
    return with_way_down(request, tiers, model_of=str)  # models have one name here
