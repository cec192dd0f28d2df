"""What has been promised to whom?"""

from __future__ import annotations

from math import inf

import msgspec


class Promise(msgspec.Struct, frozen=True, omit_defaults=True):
    """Bounds on token timing. Infinite means that nothing is promised (JSON leaves it out)."""

    ttft_s: float = inf
    """Time to the first token, from the arrival of the request at the gateway."""
    itl_s: float = inf
    """Mean gap between two tokens of the stream."""
    stall_s: float = inf
    """The worst single gap."""

    def kept(self, ttft_s: float, itl_s: float, stall_s: float) -> bool:
        """Were these outcomes within the promise?"""
        return ttft_s <= self.ttft_s and itl_s <= self.itl_s and stall_s <= self.stall_s

    def lowered(self, ttft_s: float = 0.0, itl_s: float = 0.0) -> Promise:
        """The promise after a client asked for these bounds: they can loosen it, never tighten."""
        return self.loosest(Promise(ttft_s, itl_s, 0.0))

    def loosest(self, other: Promise) -> Promise:
        """In each respect the one that promises less."""
        return Promise(
            max(self.ttft_s, other.ttft_s),
            max(self.itl_s, other.itl_s),
            max(self.stall_s, other.stall_s),
        )


class Tier(msgspec.Struct, frozen=True):
    """A promise with what it is worth and what to do when it cannot be kept."""

    name: str
    promise: Promise = Promise()
    attain: float = 0.95
    """Share of requests for which the promise shall be kept."""
    weight: float = 1.0
    overload: str = "queue"
    """When the promise cannot be kept: queue, shed or degrade."""
    preemptible: bool = False
    """Its streams may be paused for tiers of more weight."""
    deadline_s: float = inf
    """From arrival to the end of the answer."""
    degrade_to: str = ""
    """With `overload` degrade: a lower tier, or another model."""

    @property
    def rank(self) -> tuple[float, float, float, float]:
        """Low tiers first: by weight, then by how little is promised."""
        promise = self.promise
        return (self.weight, -promise.ttft_s, -promise.itl_s, -promise.stall_s)


class Tenant(msgspec.Struct, frozen=True):
    """Who asks, and how much. The key itself is never kept, only its SHA-256."""

    name: str
    tier: str
    key_sha256: bytes = b""
    max_streams: int | None = None
    """Requests under way at once; None: any number."""
    tokens_per_minute: int | None = None
    """Of prompt and output; None: any number."""
    requests_per_minute: int | None = None
    """None: any number."""


ANONYMOUS = "anonymous"
