"""Who uses how much, how are they served, and what does it cost?"""

from __future__ import annotations

from typing import TypeGuard

from paceline import words
from paceline.dashboard.parts import bar, empty, missing, section, table
from paceline.dashboard.said import (
    Batch,
    Batches,
    Cost,
    Figures,
    Spent,
    Summary,
    Tenant,
    Tenants,
)
from paceline.dashboard.source import Missing
from paceline.markup import Markup, tag

MOST_BATCHES = 20


def tenants(answer: Tenants | Missing, summary: Summary | Missing) -> Markup:
    if isinstance(answer, Missing):
        return section("tenants", "Tenants", missing(answer, "tenants"))
    seen = (
        {} if isinstance(summary, Missing) else {g.of.get("tenant", ""): g for g in summary.groups}
    )
    rows = [_tenant(tenant, seen.pop(tenant.name, Figures())) for tenant in answer.tenants]
    rows += [_tenant(Tenant(name), figures) for name, figures in seen.items()]
    if not rows:
        what = "List them under `tenants` to give them keys, tiers and limits."
        return section("tenants", "Tenants", empty("No tenants.", what))
    heads = ["tenant ", "tier ", "kept", "requests/s", "streams ", "tokens/min ", "requests/min "]
    heads += ["refused"]
    note = "Kept and requests/s over 10 minutes; refused by a limit since the start."
    return section("tenants", "Tenants", table(heads, rows, "plain", "Tenants"), note=note)


def _tenant(tenant: Tenant, seen: Figures) -> list[str]:
    left = tenant.usage.left
    return [
        tenant.name or "anonymous",
        tenant.tier or words.NONE,
        words.share(seen.attainment),
        words.count(seen.requests_per_s) if seen.requests else words.NONE,
        _use(tenant.usage.streams, tenant.max_streams),
        _use(_used(tenant.tokens_per_minute, left.get("tokens")), tenant.tokens_per_minute),
        _use(_used(tenant.requests_per_minute, left.get("requests")), tenant.requests_per_minute),
        words.count(tenant.usage.refused),
    ]


def _used(limit: int | None, left: float | None) -> float | None:
    return None if limit is None or left is None else max(limit - left, 0.0)


def _use(used: float | None, limit: int | None) -> Markup:
    """How much of a limit is taken, if there is one."""
    if limit is None:
        return tag("span", words.count(used) if used else "no limit", class_="quiet")
    share = (used or 0.0) / limit
    look = "full" if share >= 0.9 else ""
    said = f"{words.count(used or 0)} of {words.count(limit)}"
    return tag("span", bar(share, look), tag("small", said), class_="use")


def any_batches(answer: Batches | Missing) -> TypeGuard[Batches]:
    """Does anybody say of which batch requests are? Else there is no section."""
    return not isinstance(answer, Missing) and bool(answer.groups)


def batches(answer: Batches | Missing) -> Markup:
    if not any_batches(answer):
        return Markup()
    rows = [_batch(batch, answer.at) for batch in answer.groups[:MOST_BATCHES]]
    heads = ["batch ", "tenant ", "done", "failed", "under way", "waiting", "tokens", "cost"]
    heads += ["a million tokens", "last seen"]
    known = len(answer.groups)
    note = "Each since its first request."
    if known > MOST_BATCHES:
        note += f" The last {MOST_BATCHES} of {known}; all: /paceline/v1/cost?by=batch."
    return section("batches", "Batches", table(heads, rows, "plain", "Batches"), note=note)


def _batch(batch: Batch, at: float) -> list[str]:
    there = batch.under_way + batch.waiting
    return [
        batch.of.get("batch", ""),
        batch.of.get("tenant", ""),
        words.count(batch.done),
        words.count(batch.failed),
        words.count(batch.under_way),
        words.count(batch.waiting),
        words.count(batch.output_tokens),
        words.money(batch.cost),
        words.money(batch.cost_per_million_tokens),
        "now" if there else f"{words.span(max(at - batch.last_seen, 0.0))} ago",
    ]


def cost(by_tier: Cost | Missing) -> Markup:
    if isinstance(by_tier, Missing):
        return section("cost", "Cost", missing(by_tier, "cost"))
    if not by_tier.total.cost:
        what = "Give workers a `cost_per_hour`."
        return section("cost", "Cost", empty("Nothing costs anything.", what))
    rows = [_spent(group.of.get("tier", "") or "all", group) for group in by_tier.groups]
    idle = by_tier.unallocated
    rows.append(["idle", words.money(idle.cost), words.span(idle.worker_s), *[words.NONE] * 3])
    rows.append(_spent("all", by_tier.total))
    heads = ["tier ", "cost", "worker time", "tokens", "a million tokens", "a million that kept"]
    note = f"Over {words.span(by_tier.covered_s)}, in the currency of cost_per_hour."
    return section("cost", "Cost", table(heads, rows, "plain", "Cost by tier"), note=note)


def _spent(name: str, spent: Spent) -> list[str]:
    return [
        name,
        words.money(spent.cost),
        words.span(spent.worker_s),
        words.count(spent.output_tokens),
        words.money(spent.cost_per_million_tokens),
        words.money(spent.cost_per_million_kept_tokens),
    ]
