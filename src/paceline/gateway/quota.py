"""May this tenant send one more request now, and if not, when?

All keys of a tenant draw on one account: the requests that it has under way, and for its limits a
minute a token bucket each. Whatever a request costs is known only at its end: at entry its prompt
is estimated, and the difference settled when it is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil, inf

import msgspec

from paceline.domain.errors import RateLimited
from paceline.domain.outcome import Outcome
from paceline.domain.promise import Tenant
from paceline.domain.request import Request

MINUTE_S = 60.0
TOKENS_PER_BYTE = 0.25
"""Of a prompt, until its engine has counted them."""
STREAM_RETRY_S = 1.0
"""When to come back with too many requests under way: nobody knows when one of them will end."""
ROUNDING = 1e-6
"""Less than this, in seconds or in what is counted, is an error of rounding."""
CLIENT_LEFT = 499

Headers = tuple[tuple[str, str], ...]


class OverQuota(RateLimited):
    """A 429 that also says how the tenant's limits stand."""

    def __init__(self, message: str, *, retry_after_s: float, code: str, rate: Headers) -> None:
        super().__init__(message, retry_after_s=retry_after_s, code=code)
        self._rate = rate

    def headers(self) -> Headers:
        return (*super().headers(), *self._rate)


class Bucket:
    """A limit a minute: fills evenly, holds one minute's worth, and starts full.

    One minute's worth, because a client that sends all of it at once is within the words of its
    limit, and because "limit" and "remaining" then are what they say. The price: in the minute
    after a rest, up to twice the limit may pass.

    All its state is the moment at which it will be full again, as in the generic cell rate
    algorithm (ITU-T I.371, annex A). So another limit keeps the share that has been used.
    """

    __slots__ = ("full_at", "per_minute")

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self.full_at = -inf

    @property
    def size(self) -> float:
        """What it holds when full: at least one request, however small this gateway's share."""
        return max(self.per_minute, 1.0)

    def level(self, now: float) -> float:
        """What may be taken now; below 0 it is in debt."""
        return self.size - max(self.full_at - now, 0.0) * self.per_minute / MINUTE_S

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until it holds this much, or is full.

        What is larger than the whole bucket enters when that is full, and leaves a debt: it is
        late, but not refused for ever.
        """
        missing = min(amount, self.size) - self.level(now)
        wait_s = missing * MINUTE_S / self.per_minute
        return wait_s if wait_s > ROUNDING else 0.0

    def take(self, amount: float, now: float) -> None:
        """Take this much, into debt if need be; give it back if it is negative."""
        self.full_at = max(self.full_at, now) + amount * MINUTE_S / self.per_minute


class Account:
    """What one tenant has used, and may use."""

    __slots__ = ("buckets", "most_streams", "refused", "streams")

    def __init__(self) -> None:
        self.streams = 0
        """Requests under way."""
        self.most_streams = inf
        self.buckets: dict[str, Bucket] = {}
        """By what they count, in OpenAI's words: requests, tokens."""
        self.refused = 0
        """Requests that were over a limit."""

    def limit(self, tenant: Tenant, shared_by: int) -> None:
        """Set the limits, and keep what has been used."""
        most = tenant.max_streams
        self.most_streams = inf if most is None else max(most // shared_by, 1)
        limits = {"requests": tenant.requests_per_minute, "tokens": tenant.tokens_per_minute}
        for kind, limit in limits.items():
            if limit is None:
                self.buckets.pop(kind, None)
            else:
                share = limit / shared_by
                self.buckets.setdefault(kind, Bucket(share)).per_minute = share

    def admit(self, request: Request, now: float) -> Headers:
        """Let a request in; gives its rate headers."""
        if self.streams >= self.most_streams:
            told = f"{self.streams} requests are under way, as many as there may be at once"
            raise self._refusal("max_streams", told, STREAM_RETRY_S, now)
        needs = {"requests": 1.0, "tokens": estimate(request)}
        waits = {kind: bucket.wait_s(needs[kind], now) for kind, bucket in self.buckets.items()}
        longest = max(waits, key=waits.__getitem__, default=None)
        if longest is not None and waits[longest]:
            told = f"more than {self.buckets[longest].size:,.0f} {longest} in a minute"
            raise self._refusal(f"{longest}_per_minute", told, waits[longest], now)
        for kind, bucket in self.buckets.items():
            bucket.take(needs[kind], now)
        self.streams += 1
        return rate_headers(self.buckets, now)

    def _refusal(self, limit: str, told: str, wait_s: float, now: float) -> OverQuota:
        self.refused += 1
        return OverQuota(
            f"{told} ({limit}): try again in {duration(wait_s)}",
            retry_after_s=wait_s,
            code=limit,
            rate=rate_headers(self.buckets, now),
        )

    def ended(self, outcome: Outcome, now: float) -> None:
        """A request that was let in is over."""
        self.streams -= 1
        if tokens := self.buckets.get("tokens"):
            tokens.take(used(outcome) - estimate(outcome.request), now)


class Usage(msgspec.Struct, frozen=True):
    """How a tenant stands with its limits, for operators."""

    tenant: str
    streams: int
    """Requests under way."""
    left: dict[str, int]
    """Of each limit a minute: requests, tokens. Below 0 it is in debt."""
    refused: int
    """Requests over a limit since the start."""


class Quotas:
    """The accounts of all tenants. Who has none, such as anonymous clients, has no limits.

    With several gateways before one fleet, each grants an equal part of every limit. That is right
    as long as tenants spread their requests evenly; who always asks the same gateway gets only that
    one's part. `shared_by` counts for limits set from then on: change it, then `reload`.
    """

    def __init__(self, tenants: Iterable[Tenant] = (), shared_by: int = 1) -> None:
        self.shared_by = shared_by
        self._accounts: dict[str, Account] = {}
        self.reload(tenants)

    def reload(self, tenants: Iterable[Tenant]) -> None:
        """New limits. What was used stays used, by the tenant's name."""
        told = {tenant.name: tenant for tenant in tenants}
        kept = {n: a for n, a in self._accounts.items() if n in told or a.streams}
        self._accounts = kept
        for name, tenant in told.items():
            kept.setdefault(name, Account()).limit(tenant, self.shared_by)

    def admit(self, request: Request, now: float) -> Headers:
        """Let a request in, or raise `OverQuota`. Gives the rate headers of its answer.

        Each request let in must be told to `ended` once.
        """
        account = self._accounts.get(request.tenant)
        return account.admit(request, now) if account is not None else ()

    def ended(self, outcome: Outcome, now: float) -> None:
        """A request is over, in whatever way."""
        account = self._accounts.get(outcome.request.tenant)
        if account is not None:
            account.ended(outcome, now)

    def usage(self, now: float) -> list[Usage]:
        """How every tenant stands."""
        return [
            Usage(name, a.streams, {k: int(b.level(now)) for k, b in a.buckets.items()}, a.refused)
            for name, a in self._accounts.items()
        ]


def estimate(request: Request) -> float:
    """Tokens that a request is charged for when it comes in: its prompt."""
    if request.prompt_tokens is not None:
        return request.prompt_tokens
    return request.prompt_bytes * TOKENS_PER_BYTE


def used(outcome: Outcome) -> float:
    """Tokens that a request has cost. What no engine answered is free."""
    failed = outcome.status >= 400 and outcome.status != CLIENT_LEFT
    if failed or not outcome.worker:
        return 0.0
    prompt = outcome.prompt_tokens
    return (estimate(outcome.request) if prompt is None else prompt) + outcome.output_tokens


def rate_headers(buckets: Mapping[str, Bucket], now: float) -> Headers:
    """OpenAI's headers: what the limit is, what is left, and when nothing will be used any more.

    Source: platform.openai.com/docs/guides/rate-limits.
    """
    headers: list[tuple[str, str]] = []
    for kind, bucket in buckets.items():
        left = max(int(bucket.level(now) + ROUNDING), 0)
        headers += (
            (f"x-ratelimit-limit-{kind}", str(int(bucket.size))),
            (f"x-ratelimit-remaining-{kind}", str(left)),
            (f"x-ratelimit-reset-{kind}", duration(bucket.full_at - now)),
        )
    return tuple(headers)


def duration(seconds: float) -> str:
    """A time as OpenAI writes it (20ms, 1s, 6m0s), rounded up."""
    ms = ceil(max(seconds, 0.0) * 1000 - ROUNDING)
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, s = divmod(ceil(ms / 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h" * (hours > 0) + f"{minutes}m" * (hours + minutes > 0) + f"{s}s"
