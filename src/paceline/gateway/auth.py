"""Who asks, and what may they have?

A key leads to a tenant, the tenant to its tier. What a request says of itself can only lower
that: a lower tier, a looser promise. A claim to more is ignored, so that a client never needs to
know its tier.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from math import isfinite
from operator import attrgetter

from paceline.domain.errors import InvalidRequest, Unauthorized
from paceline.domain.promise import ANONYMOUS, Promise, Tenant, Tier

TTFT_HEADERS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
TPOT_HEADERS = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")
OBJECTIVE_HEADERS = ("x-gateway-inference-objective", "x-llm-d-inference-objective")

OWN_TIER = frozenset({"auto", "default", "priority", "scale", "standard_only"})
"""Values of `service_tier` (OpenAI's, Anthropic's) that ask for no less than one has."""
LOWEST_TIER = "flex"

FOUND_BY = 16
"""Bytes of a key's digest by which its tenant is looked up."""

_by_rank = attrgetter("rank")


class Directory:
    """All tenants by key, all tiers by name."""

    def __init__(
        self,
        tiers: Mapping[str, Tier],
        tenants: Iterable[Tenant],
        default_tier: str,
        anonymous: bool,
    ) -> None:
        self.tiers = dict(tiers)
        self._by_key = {tenant.key_sha256[:FOUND_BY]: tenant for tenant in tenants}
        self._anonymous = Tenant(ANONYMOUS, default_tier) if anonymous else None
        ranked = sorted(tiers.values(), key=_by_rank, reverse=True)
        self._lowest = ranked[-1]
        self._urgency = {tier.name: place for place, tier in enumerate(ranked)}

    def urgency(self, tier: str) -> int:
        """0 for the tier that is served first, 1 for the next, and so on."""
        return self._urgency[tier]

    def identify(self, headers: Mapping[str, str]) -> Tenant:
        """Who sent these headers (lower-case names); 401 if nobody who may ask."""
        key = _key(headers)
        if key and (tenant := self._owner(key)):
            return tenant
        # A wrong key is an error, not an anonymous request: its owner expects a better tier. Where
        # no keys exist none can be wrong, and most clients insist on sending one.
        if self._anonymous is not None and not (key and self._by_key):
            return self._anonymous
        if key:
            raise Unauthorized("The API key is not known here.")
        raise Unauthorized("An API key is needed: send it as `Authorization: Bearer KEY`.")

    def _owner(self, key: str) -> Tenant | None:
        """Whose key this is.

        The first half of the digest finds a candidate; the whole is compared in constant time.
        """
        digest = hashlib.sha256(key.encode()).digest()
        tenant = self._by_key.get(digest[:FOUND_BY])
        if tenant is not None and hmac.compare_digest(tenant.key_sha256, digest):
            return tenant
        return None

    def resolve(
        self, tenant: Tenant, headers: Mapping[str, str], service_tier: str | None
    ) -> tuple[Tier, Promise]:
        """The tier and promise of a request: the tenant's own, or less where it asks for less."""
        own = self.tiers[tenant.tier]
        asked = [self.tiers.get(_first(headers, OBJECTIVE_HEADERS) or "", own)]
        if service_tier is not None:
            asked.append(self._service_tier(service_tier, own))
        tier = min(own, *asked, key=_by_rank)
        # A tier of less weight may still promise more in one respect; that is not handed out.
        promise = own.promise.loosest(tier.promise)
        return tier, promise.lowered(
            ttft_s=_seconds(headers, TTFT_HEADERS), itl_s=_seconds(headers, TPOT_HEADERS)
        )

    def _service_tier(self, name: str, own: Tier) -> Tier:
        if name in self.tiers:
            return self.tiers[name]
        if name in OWN_TIER:
            return own
        if name == LOWEST_TIER:
            return self._lowest
        known = ", ".join(sorted({*OWN_TIER, LOWEST_TIER, *self.tiers}))
        raise InvalidRequest(
            f"There is no service tier {name!r}; there are {known}.", param="service_tier"
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
