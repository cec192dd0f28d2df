"""Should a request be prefilled where it is answered, or by another worker, and by which?

Every worker that answers can be had in two ways: as it is, or with the prompt from the worker that
would prefill and hand it over soonest. Both are put to the routing policy as if they were workers,
so that one cost decides: what a prefill in place costs the residents against what a hand-over
takes. There is no threshold (docs/design/0010). Where prefix cache makes the prompt short it stays.

A worker that prefills for others gets no more than keeps it busy: if the best way leads through one
that has enough, the request waits, for as long as that costs less than the next best way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from paceline.policy.fleet import Choice, Fleet, Policy, lowest
from paceline.policy.headroom import Forecast, forecast, harm
from paceline.policy.links import TransferTime
from paceline.policy.route import LOOKED_AT, headroom
from paceline.policy.standing import Ask, Claim, Correction, Standing, Supply


class Sharing(Fleet, Protocol):
    """Workers of one model that may share a request."""

    @property
    def handed(self) -> Correction:
        """How TTFTs turn out, where one worker prefills and another answers."""
        ...

    def link(self, source: int, place: int) -> TransferTime | None:
        """The way from one place to another; None if one cannot take over from the other."""
        ...

    def prefill_limit(self, source: int) -> float:
        """Prompt tokens ahead of a worker below which it may prefill another for others."""
        ...

    def lease_s(self, source: int) -> float:
        """How long a worker is sure to keep what it has prefilled for others."""
        ...


Ways = Callable[[Sharing, Ask, Sequence[int], Sequence[int]], Choice]
"""As a policy; it is told the places that may answer, and those that may prefill for them."""

SAFE = 0.5
"""Share of the time that a prompt is surely kept within which it must be expected to be fetched."""
LOCAL_TOKENS = 3000.0
"""Uncached tokens of a prompt up to which it stays, in `by_length`: 1,000 in the source; this did
best of 0 to 4,000 on the scenarios."""
QUEUED = 12
"""Prompts on all prefill workers, those under way included, from which on it stays too: 2 that wait
in the source; this did best of 1 to 12."""


def ways_of(policy: Policy) -> tuple[Ways, Ways]:
    """How a policy chooses where prompts can be handed over: among workers that may answer by
    themselves, and where some answer only what others have prefilled."""
    if policy is headroom:
        return conditional, apart
    own: Ways | None = getattr(policy, "ways", None)
    return (own, own) if own else (partial(by_length, policy), partial(always, policy))


def by_length(
    policy: Policy, fleet: Sharing, ask: Ask, places: Sequence[int], sources: Sequence[int]
) -> Choice:
    """One policy for either worker. A prompt is handed over if more than so many of its tokens are
    not cached where it is answered, while fewer than so many prompts are on the prefill workers.

    Source: conditional disaggregation of NVIDIA Dynamo (`max_local_prefill_length`,
    `max_prefill_queue_size`),
    https://docs.nvidia.com/dynamo/archive/0.2.0/architecture/disagg_serving.html
    """
    here = policy(fleet, ask, places)
    long = ask.prompt_tokens - ask.cached.get(here.place, 0.0) > LOCAL_TOKENS
    queued = sum(fleet.load(i) - fleet.standing(i, ask.now).streams for i in sources)
    if not long or queued >= QUEUED:
        return here
    return always(policy, fleet, ask, places, sources)


def always(
    policy: Policy, fleet: Sharing, ask: Ask, places: Sequence[int], sources: Sequence[int]
) -> Choice:
    """One policy for the worker that prefills, and, when that is done, for the one that answers."""
    choice = policy(fleet, ask, sources)
    takers = [i for i in places if fleet.link(choice.place, i) is not None]
    if not takers:
        return policy(fleet, ask, places)
    place = lowest(takers, [fleet.load(i) for i in takers], ask.seed)
    return replace(choice, place=place, source=choice.place)


def conditional(fleet: Sharing, ask: Ask, places: Sequence[int], sources: Sequence[int]) -> Choice:
    """The way of least cost by `headroom`, in place or through another worker.

    A prefill makes each resident's answer later by all of its time, once. Routing counts a part of
    that, for among workers that all prefill it is much the same everywhere. Between the ways it is
    what decides; whether a way is open goes by routing's measure, for either kind by itself: that a
    prompt could be fetched somewhere does not make room to prefill it there.
    """
    through = _apart(fleet, ask, places, sources)
    if not through:
        return headroom(fleet, ask, places)
    here = _in_place(fleet, ask, places)
    waits = _put(fleet, ask, here).wait
    here = [_charged(way._replace(open=not waits), ask) for way in here]
    return _least(fleet, ask, here + _opened(fleet, ask, through))


def apart(fleet: Sharing, ask: Ask, places: Sequence[int], sources: Sequence[int]) -> Choice:
    """The way of least cost through another worker, if there is one."""
    ways = _apart(fleet, ask, places, sources)
    if not ways:
        return headroom(fleet, ask, places)
    return _least(fleet, ask, _opened(fleet, ask, ways))


def fetching(
    policy: Policy, fleet: Sharing, ask: Ask, places: Sequence[int], source: int
) -> Choice:
    """Which worker answers what another has prefilled already?"""
    if policy is not headroom:
        own = getattr(policy, "fetching", None)
        return own(fleet, ask, places, source) if own else policy(fleet, ask, places)
    ttft = Correction(spread=fleet.handed.spread)
    ways = []
    for i in _sample(ask, places):
        link = fleet.link(source, i)
        assert link is not None
        worker = fleet.standing(i, ask.now)
        supply = Supply(link.fetch_s(ask.prompt_tokens, ask.now))
        ways.append(_Way(i, source, ask.prompt_tokens - 1.0, worker.supplied(supply, ttft)))
    choice, _ = _chosen(fleet, ask, ways)
    return replace(choice, source=None)


class _Way(NamedTuple):
    """A worker that may answer, and where its prompt is prefilled."""

    place: int
    source: int | None
    cached: float
    standing: Standing
    open: bool = True
    """Whether a request may go this way now."""


class _Ways(msgspec.Struct):
    """Ways as a policy sees them: each is a worker at a place of its own."""

    fleet: Fleet
    ways: Sequence[_Way]

    @property
    def turn(self) -> int:
        return self.fleet.turn

    @property
    def ids(self) -> Sequence[str]:
        return [self.fleet.ids[way.place] for way in self.ways]

    def load(self, place: int) -> int:
        return self.fleet.load(self.ways[place].place)

    def remembered(self, place: int) -> int:
        return self.fleet.remembered(self.ways[place].place)

    def standing(self, place: int, now: float) -> Standing:
        return self.ways[place].standing


def _least(fleet: Sharing, ask: Ask, ways: Sequence[_Way]) -> Choice:
    """The way of least cost, the wait for those that are closed included."""
    choice, way = _chosen(fleet, ask, [_late(way, ask) for way in ways])
    return replace(choice, wait=not way.open)


def _chosen(fleet: Sharing, ask: Ask, ways: Sequence[_Way]) -> tuple[Choice, _Way]:
    """What `headroom` makes of these ways."""
    choice = _put(fleet, ask, ways)
    way = ways[choice.place]
    if way.source is None:
        return replace(choice, place=way.place), way
    assert choice.predicted is not None
    through = replace(
        choice,
        place=way.place,
        source=way.source,
        because=f"{choice.because}, prefill on {fleet.ids[way.source]}",
        predicted=replace(choice.predicted, cached_tokens=round(ask.cached.get(way.source, 0.0))),
    )
    return through, way


def _opened(fleet: Sharing, ask: Ask, through: Sequence[_Way]) -> list[_Way]:
    """Ways through another worker are open if that one and the link to it are, and if one of those
    that could take over so is open to the request."""
    at_hand = [way for way in through if way.open]
    waits = not at_hand or _put(fleet, ask, at_hand).wait
    return [way._replace(open=way.open and not waits) for way in through]


def _late(way: _Way, ask: Ask) -> _Way:
    """The same with what is to be waited for it. How long is not known: once more as long as the
    request has waited already is likely (Lindy's law). So a line that grows finds other ways."""
    if way.open or not ask.waited_s:
        return way
    worker = way.standing
    supply = worker.supply or Supply()
    supply = replace(supply, ttft_s=supply.ttft_s + ask.waited_s)
    return way._replace(standing=worker.supplied(supply, worker.ttft))


def _put(fleet: Sharing, ask: Ask, ways: Sequence[_Way]) -> Choice:
    """Put ways to `headroom`."""
    twice = len(ways) / len({way.place for way in ways})
    asked = replace(
        ask,
        cached={k: way.cached for k, way in enumerate(ways) if way.cached > 0.0},
        claims=[_times(claim, twice) for claim in ask.claims],
    )
    return headroom(_Ways(fleet, ways), asked, range(len(ways)))


def _times(claim: Claim, factor: float) -> Claim:
    """Workers are reserved for those of more weight by what each can take of a claim. One that
    stands here twice would count for two."""
    return Claim(
        claim.itl_s,
        factor * claim.prompt_rate,
        factor * claim.output_rate,
        factor * claim.read_rate,
    )


def _in_place(fleet: Sharing, ask: Ask, places: Sequence[int]) -> list[_Way]:
    """Each worker that may answer, with the whole request."""
    return [
        _Way(i, None, ask.cached.get(i, 0.0), fleet.standing(i, ask.now))
        for i in _sample(ask, places)
    ]


def _charged(way: _Way, ask: Ask) -> _Way:
    """The same with all that its prefill does to the residents."""
    worker = way.standing
    if not worker.everyone:
        return way
    seen = forecast(worker, ask, way.cached)
    rest = _stalled(worker, ask, seen, way.cached) - harm(worker, ask, seen)
    return way._replace(standing=worker.supplied(Supply(harm=max(rest, 0.0)), worker.ttft))


def _stalled(worker: Standing, ask: Ask, seen: Forecast, cached: float) -> float:
    """Harm to a worker's residents by the prompt."""
    own_s = worker.slowdown(ask.now) * worker.token_s * max(ask.prompt_tokens - cached, 1.0)
    after_s = seen.before_s + own_s / max(ask.output_tokens, 16.0)
    return harm(worker, ask, replace(seen, after_s=max(after_s, seen.after_s)))


def _apart(fleet: Sharing, ask: Ask, places: Sequence[int], sources: Sequence[int]) -> list[_Way]:
    """Each worker that may answer, with the one that would hand the prompt over soonest."""
    offers = [(source, _offer(fleet, ask, source)) for source in _sample(ask, sources)]
    tokens, ttft = ask.prompt_tokens, fleet.handed
    ways = []
    for i in _sample(ask, places):
        best, soonest_s = None, inf
        for source, offer in offers:
            link = fleet.link(source, i)
            if link is not None:
                whole_s = link.through_s(offer.ttft_s, tokens, ask.now)
                if whole_s < min(soonest_s, SAFE * fleet.lease_s(source)):
                    best, soonest_s = (source, offer, link), whole_s
        if best is not None:
            source, offer, link = best
            supply = replace(offer, ttft_s=ttft.factor * soonest_s)
            worker = fleet.standing(i, ask.now).supplied(supply, ttft)
            is_open = _is_open(fleet, ask, source) and link.is_open(offer.ttft_s, tokens, ask.now)
            ways.append(_Way(i, source, tokens - 1.0, worker, is_open))
    return ways


def _is_open(fleet: Sharing, ask: Ask, source: int) -> bool:
    """May a worker be sent a prompt to prefill for others?"""
    worker = fleet.standing(source, ask.now)
    fits = worker.kv_all + ask.prompt_tokens <= worker.kv_limit or not worker.kv_all
    return fits and worker.ahead < fleet.prefill_limit(source)


def _offer(fleet: Sharing, ask: Ask, source: int) -> Supply:
    """What a prefill on a worker takes, the transfer left out; by step times alone."""
    worker, cached = fleet.standing(source, ask.now), ask.cached.get(source, 0.0)
    seen = forecast(worker, ask, cached)
    hurt = 0.0
    if worker.everyone:  # it answers too
        hurt = _stalled(worker, ask, replace(seen, after_s=seen.before_s), cached)
    return Supply(seen.ttft_s / worker.ttft.factor, seen.work, seen.busy, seen.backlog_s, hurt)


def _sample(ask: Ask, places: Sequence[int], most: int = LOOKED_AT // 2) -> Sequence[int]:
    """Everybody, or an even sample from a seeded start, and who has most of the prompt."""
    count = len(places)
    if count <= most:
        return places
    sample = [places[(ask.seed + k * count // (most - 1)) % count] for k in range(most - 1)]
    holders = [i for i in sorted(ask.cached, key=lambda i: (-ask.cached[i], i)) if i in places]
    return sample + [i for i in holders[:1] if i not in sample]
