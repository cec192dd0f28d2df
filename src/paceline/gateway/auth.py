"""Who asks, and what may they have?

A key leads to a tenant, the tenant to its tier. What a request says of itself can only lower
that: a lower tier, a looser promise. A claim to more is ignored, so that a client never needs to
know its tier.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from math import isfinite

from paceline.domain.errors import InvalidRequest, Unauthorized
from paceline.domain.promise import ANONYMOUS, Promise, Tenant, Tier

TTFT_HEADERS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
TPOT_HEADERS = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")
OBJECTIVE_HEADERS = ("x-gateway-inference-objective", "x-llm-d-inference-objective")

OWN_TIER = frozenset({"auto", "default", "priority", "scale", "standard_only"})
"""Values of `service_tier` (OpenAI's, Anthropic's) that ask for no less than one has."""
LOWEST_TIER = "flex"


class Directory:
    """All tenants by key, all tiers by name."""

    def __init__(
        self,
        tiers: Mapping[str, Tier],
        tenants: Iterable[Tenant],
        default_tier: str,
        anonymous: bool,
    ) -> None:
        self._tiers = dict(tiers)
        self._by_key = {tenant.key_sha256: tenant for tenant in tenants}
        self._anonymous = Tenant(ANONYMOUS, default_tier) if anonymous else None
        ranked = sorted(tiers.values(), key=_rank, reverse=True)
        self._lowest = ranked[-1]
        self._urgency = {tier.name: place for place, tier in enumerate(ranked)}

    def urgency(self, tier: str) -> int:
        """0 for the tier that is served first, 1 for the next, and so on."""
        return self._urgency[tier]

    def identify(self, headers: Mapping[str, str]) -> Tenant:
        """Who sent these headers (lower-case names); 401 if nobody who may ask.

        The look-up by digest need not run in constant time: its timing could only tell how much
        of a SHA-256 was right, and nobody can choose a key by the digits of its SHA-256.
        """
        key = _key(headers)
        if key and (tenant := self._by_key.get(hashlib.sha256(key.encode()).digest())):
            return tenant
        # A wrong key is an error, not an anonymous request: its owner expects a better tier. Where
        # no keys exist none can be wrong, and most clients insist on sending one.
        if self._anonymous is not None and not (key and self._by_key):
            return self._anonymous
        if key:
            raise Unauthorized("The API key is not known here.")
        raise Unauthorized("An API key is needed: send it as `Authorization: Bearer KEY`.")

    def resolve(
        self, tenant: Tenant, headers: Mapping[str, str], service_tier: str | None
    ) -> tuple[Tier, Promise]:
        """The tier and promise of a request: the tenant's own, or less where it asks for less."""
        own = self._tiers[tenant.tier]
        asked = [self._tiers.get(_first(headers, OBJECTIVE_HEADERS) or "", own)]
        if service_tier is not None:
            asked.append(self._service_tier(service_tier, own))
        tier = min(own, *asked, key=_rank)
        promise = _loosest(own.promise, tier.promise)
        return tier, promise.lowered(
            ttft_s=_seconds(headers, TTFT_HEADERS), itl_s=_seconds(headers, TPOT_HEADERS)
        )

    def _service_tier(self, name: str, own: Tier) -> Tier:
        if name in self._tiers:
            return self._tiers[name]
        if name in OWN_TIER:
            return own
        if name == LOWEST_TIER:
            return self._lowest
        known = ", ".join(sorted({*OWN_TIER, LOWEST_TIER, *self._tiers}))
        raise InvalidRequest(
            f"There is no service tier {name!r}; there are {known}.", param="service_tier"
        )


def _rank(tier: Tier) -> tuple[float, float, float, float]:
    """Low tiers first: by weight, then by how little is promised."""
    promise = tier.promise
    return (tier.weight, -promise.ttft_s, -promise.itl_s, -promise.stall_s)


def _loosest(one: Promise, other: Promise) -> Promise:
    """A tier of less weight may still promise more in one respect; that is not handed out."""
    return Promise(
        ttft_s=max(one.ttft_s, other.ttft_s),
        itl_s=max(one.itl_s, other.itl_s),
        stall_s=max(one.stall_s, other.stall_s),
    )


def _key(headers: Mapping[str, str]) -> str:
    """The key as OpenAI's clients send it, or Anthropic's; empty without one."""
    authorization = headers.get("authorization", "")
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer":
        key = authorization
    return key.strip() or headers.get("x-api-key", "").strip()


def _first(headers: Mapping[str, str], names: Iterable[str]) -> str | None:
    return next((headers[name] for name in names if name in headers), None)


def _seconds(headers: Mapping[str, str], names: Iterable[str]) -> float:
    """The header's milliseconds in seconds; 0, which asks for nothing, without it."""
    for name in names:
        if name in headers:
            try:
                ms = float(headers[name])
            except ValueError:
                ms = 0.0
            if not (isfinite(ms) and ms > 0):
                raise InvalidRequest(f"{name} must be milliseconds above 0.", param=name)
            return ms / 1000
    return 0.0
