"""What is told of one run?"""

from __future__ import annotations

import msgspec

QUANTILES = (
    *(0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925),
    *(0.95, 0.97, 0.98, 0.99, 0.995, 0.999),
)
"""Of `Times.curve`: closer where promises break."""

CAUSES = ("ttft", "itl", "stall", "deadline", "shed", "failed", "unfinished")
"""Why a promise was not kept: the first that applies, failures before times."""


class Times(msgspec.Struct, frozen=True):
    """How long it took, in seconds; None where there was nothing to measure."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    curve: tuple[float, ...]
    """At `QUANTILES`; empty where there was nothing to measure."""


class Group(msgspec.Struct, frozen=True):
    """All requests, or those of one tier or tenant."""

    requests: int
    kept: int
    attainment: float
    """Share of requests whose promise was kept; 0 without requests."""
    statuses: dict[str, int]
    """How many ended as ok, shed, failed, broke, unfinished."""
    missed: dict[str, int]
    """By cause; a stream that broke counts as failed."""
    output_tokens: int
    kept_tokens: int
    """Output tokens of the requests whose promise was kept."""
    ttft_s: Times
    """Of those with a first token."""
    itl_s: Times
    """Of the mean gaps of those with several tokens."""
    stall_s: Times
    """Of their worst gaps."""
    degraded: int = 0
    """Requests that were served as less than what they came as."""
    paused: int = 0
    """How often answers were taken off their workers for others."""
    moved: int = 0
    """How often they were taken off to go on elsewhere, or lost by a worker and not given up."""


class WorkerUse(msgspec.Struct, frozen=True):
    requests: int
    """Whose last worker it was."""
    attainment: float | None
    """Of these requests; None without any."""
    kv_mean: float | None
    running_mean: float | None
    """Requests in its batch."""
    waiting_mean: float | None
    """Requests in its own queue."""


class Series(msgspec.Struct, frozen=True):
    """The run in slots of equal length, by arrival. None where no request tells."""

    from_s: float
    slot_s: float
    arrivals: tuple[int, ...]
    attainment: tuple[float | None, ...]
    ttft_p99_s: tuple[float | None, ...]
    itl_mean_s: tuple[float | None, ...]


class Result(msgspec.Struct, frozen=True):
    """One scenario, played with one policy and one seed. It says nothing of wall time."""

    scenario: str
    policy: str
    seed: int
    seconds: float
    """From the end of the warm-up to the end of arrivals: what rates are over."""
    attainment: float
    weighted_attainment: float
    """Each request counts as much as its tier's weight."""
    goodput_requests_per_s: float
    """Of requests whose promise was kept."""
    goodput_tokens_per_s: float
    kv_mean: float | None
    """Share of the workers' KV cache in use, at all probes of all workers."""
    kv_p99: float | None
    preemptions: int
    cost_per_million_tokens: float | None
    """Of output; in the scenario's currency."""
    cost_per_million_kept_tokens: float | None
    total: Group
    tiers: dict[str, Group]
    tenants: dict[str, Group]
    workers: dict[str, WorkerUse]
    series: Series
