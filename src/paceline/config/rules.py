"""Do the settings agree with each other? What no single setting can tell.

Each rule yields the places that are wrong and what is wrong there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

from paceline.config.settings import TRANSFERS, Config, WorkerSettings
from paceline.domain.promise import ANONYMOUS

Problem = tuple[str, str]

NO_WORKERS = (
    "no worker to send requests to: list one under models[].workers in this file,"
    " or start an emulated one with `paceline demo` or `paceline engine --emulate`"
)


def problems(config: Config) -> Iterator[Problem]:
    """All that does not fit together."""
    yield from _workers(config)
    yield from _hand_overs(config)
    yield from _models(config)
    yield from _tiers(config)
    yield from _ways_down(config)
    yield from _tenants(config)
    if config.shutdown.notice_s > config.shutdown.grace_s:
        yield "shutdown.notice_s", "is longer than shutdown.grace_s, of which it is a part"
    if config.listen == config.admin and config.listen.port != 0:
        yield "admin", f"{config.admin} is taken by listen"


def _workers(config: Config) -> Iterator[Problem]:
    if not config.models:
        yield "models", NO_WORKERS
    for m, model in enumerate(config.models):
        if not model.workers:
            yield f"models[{m}].workers", NO_WORKERS
    yield from _twice(
        (f"models[{m}].workers[{w}].url", worker.url.place, "leads to the same engine as")
        for m, model in enumerate(config.models)
        for w, worker in enumerate(model.workers)
    )


def hand_over(worker: WorkerSettings) -> Iterator[Problem]:
    """Can this worker do what its role says?"""
    by, kind = worker.hands_over_by, worker.kind
    if by is None and worker.role != "both":
        if kind is None:
            known = ", ".join(way for ways in TRANSFERS.values() for way in ways)
            yield "transfer", f"role {worker.role} needs it, or `kind`: one of {known}"
        else:
            yield "role", f"{kind} has no way to hand a prompt over: leave role and transfer out"
    elif by == "sglang" and worker.role == "both":
        yield "role", "SGLang is started to prefill or to decode: say which of them"
    elif by is not None and kind is not None and by not in TRANSFERS.get(kind, ()):
        ways = ", ".join(TRANSFERS.get(kind, ())) or "none"
        yield "transfer", f"{kind} does not hand over by {by}; it knows {ways}"


def _hand_overs(config: Config) -> Iterator[Problem]:
    """Whoever prefills for others needs others that answer."""
    for m, model in enumerate(config.models):
        for w, worker in enumerate(model.workers):
            for setting, problem in hand_over(worker):
                yield f"models[{m}].workers[{w}].{setting}", problem
        prefilling = [w for w in model.workers if w.role == "prefill"]
        answering = [w for w in model.workers if w.role != "prefill"]
        if prefilling and not answering:
            yield (
                f"models[{m}].workers",
                "all of them prefill, and none answers: give one of them role decode, or both",
            )
            continue
        for w, worker in enumerate(model.workers):
            by = worker.hands_over_by
            if worker.role == "prefill" and by and by not in {a.hands_over_by for a in answering}:
                yield (
                    f"models[{m}].workers[{w}].transfer",
                    f"no other worker of {model.name} takes prompts over by {by}:"
                    f" give one that answers `transfer: {by}`",
                )


def _models(config: Config) -> Iterator[Problem]:
    names = []
    for m, model in enumerate(config.models):
        names.append((f"models[{m}].name", model.name, "is the same name as"))
        for a, alias in enumerate(model.aliases):
            names.append((f"models[{m}].aliases[{a}]", alias, "is the same name as"))
    yield from _twice(names)


def _tiers(config: Config) -> Iterator[Problem]:
    known = config.tiers
    named = [("default_tier", config.default_tier)]
    for t, tenant in enumerate(config.tenant_settings):
        if tenant.tier is not None:
            named.append((f"tenants[{t}].tier", tenant.tier))
    for place, tier in named:
        if tier not in known:
            yield place, f"unknown tier {tier!r}, known are {', '.join(known)}"


def _ways_down(config: Config) -> Iterator[Problem]:
    """Each step leads to a lower tier, or to a model and ends there: so there is no way round."""
    tiers, models = config.tiers, config.aliases
    for name, tier in tiers.items():
        at, to = f"tiers.{name}.degrade_to", tier.degrade_to
        if tier.overload != "degrade":
            if to:
                yield at, "acts with `overload: degrade` only: set that, or leave this out"
        elif not to:
            yield at, "`overload: degrade` needs it: name a lower tier, or a model"
        elif to in tiers and to in models:
            yield at, f"{to!r} is a tier and a model: name one of them otherwise"
        elif to in tiers and tiers[to].rank >= tier.rank:
            yield at, f"{to!r} is no lower tier: it must weigh less, or as much and promise less"
        elif to not in tiers and to not in models:
            known = ", ".join(dict.fromkeys((*tiers, *models)))
            yield at, f"unknown tier or model {to!r}, known are {known}"
        elif to in models and len(config.models) == 1:
            yield at, f"{to!r} is the only model: name a lower tier"


def _tenants(config: Config) -> Iterator[Problem]:
    keys = []
    for t, tenant in enumerate(config.tenant_settings):
        at = f"tenants[{t}]"
        if not tenant.digests():
            yield at, "no key to know the tenant by: set key, keys, key_sha256 or keys_sha256"
        if tenant.name == ANONYMOUS:
            yield f"{at}.name", f"{ANONYMOUS!r} stands for those who ask without a key"
        keys += [(at, digest, "has the same key as") for digest in tenant.digests()]
    yield from _twice(keys)
    yield from _twice(
        (f"tenants[{t}].name", tenant.name, "is the same name as")
        for t, tenant in enumerate(config.tenant_settings)
    )
    if not config.tenant_settings and not config.anonymous:
        yield "anonymous", "nobody could ask: list tenants, or leave this out"


def _twice(items: Iterable[tuple[str, Hashable, str]]) -> Iterator[Problem]:
    first: dict[Hashable, str] = {}
    for place, value, relation in items:
        if value in first:
            yield place, f"{relation} {first[value]}"
        first.setdefault(value, place)
