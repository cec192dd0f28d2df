"""How does a trace become heavier, lighter, shorter or mixed?

Two ways to change the load, which differ in what they keep. `sped_up` squeezes time: sessions and
bursts get shorter along with everything else. `repopulated` changes how many users there are: it
drops requests or adds copies, and every burst lasts as long as it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import inf
from random import Random

from msgspec.structs import replace

from paceline.workload.traces import BLOCK_TOKENS, Arrival

COPY_DELAY_S = 3.0
"""A copy comes up to this much after its original, so that copies don't arrive in lockstep."""
COPY_BLOCKS = 1 << 50
"""Added to a copy's block names: another population, which shares prefixes only within itself."""


def sped_up(arrivals: Iterable[Arrival], factor: float) -> list[Arrival]:
    """Time scaling: everything happens `factor` times as fast."""
    return [replace(arrival, at_s=arrival.at_s / factor) for arrival in arrivals]


def repopulated(arrivals: Iterable[Arrival], factor: float, rng: Random) -> list[Arrival]:
    """Thinning (`factor` below 1) or duplication (above) at random, in unchanged time.

    Each request comes `factor` times on average.
    """
    out: list[Arrival] = []
    for arrival in arrivals:
        copies = int(factor) + (rng.random() < factor % 1)
        out += [_copy(arrival, population, rng) for population in range(copies)]
    out.sort(key=lambda arrival: arrival.at_s)
    return out


def _copy(arrival: Arrival, population: int, rng: Random) -> Arrival:
    if population == 0:
        return arrival
    return replace(
        arrival,
        at_s=arrival.at_s + rng.random() * COPY_DELAY_S,
        blocks=tuple(block + population * COPY_BLOCKS for block in arrival.blocks),
    )


def mean_rate(arrivals: Sequence[Arrival]) -> float:
    """Requests per second over the whole trace; 0 if it has no extent."""
    span_s = arrivals[-1].at_s - arrivals[0].at_s if arrivals else 0.0
    return (len(arrivals) - 1) / span_s if span_s > 0 else 0.0


def limited(
    arrivals: Iterable[Arrival], count: int | None = None, duration_s: float = inf
) -> list[Arrival]:
    """The first `count` requests of the first `duration_s` seconds."""
    return [arrival for arrival in arrivals if arrival.at_s < duration_s][:count]


def clipped(
    arrivals: Iterable[Arrival], prompt_tokens: int | None = None, output_tokens: int | None = None
) -> list[Arrival]:
    """No prompt and no answer longer than this, for engines with a short context."""
    prompt_most, output_most = prompt_tokens or inf, output_tokens or inf
    return [
        replace(
            arrival,
            prompt_tokens=int(min(arrival.prompt_tokens, prompt_most)),
            output_tokens=int(min(arrival.output_tokens, output_most)),
            blocks=arrival.blocks[: -(-prompt_tokens // BLOCK_TOKENS)]
            if prompt_tokens
            else arrival.blocks,
        )
        for arrival in arrivals
    ]


def with_tiers(
    arrivals: Iterable[Arrival], shares: Mapping[str, float], rng: Random
) -> list[Arrival]:
    """Give each request a tier by chance, in these proportions."""
    tiers, weights = list(shares), list(accumulate(shares.values()))
    return [
        replace(arrival, tier=rng.choices(tiers, cum_weights=weights)[0]) for arrival in arrivals
    ]


def marked(arrivals: Iterable[Arrival], tier: str = "", tenant: str = "") -> list[Arrival]:
    """All requests from this tenant and tier."""
    return [replace(arrival, tier=tier, tenant=tenant) for arrival in arrivals]


def merged(*traces: Iterable[Arrival]) -> list[Arrival]:
    """Several traces at the same time."""
    together = [arrival for trace in traces for arrival in trace]
    return sorted(together, key=lambda arrival: arrival.at_s)
