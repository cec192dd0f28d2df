from __future__ import annotations

from collections import Counter
from math import inf

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.kernel.line import Line
from paceline.kernel.waiting import QUANTUM, REMEMBERED, STARVATION, Waiting

NEVER = 1 << 40
"""A starvation bound that is never reached, where a test is about the order alone."""
WEIGHTS = {"premium": 8.0, "standard": 2.0, "free": 2.0, "batch": 1.0}


class Item(msgspec.Struct, frozen=True):
    """A request that waits."""

    request: Request
    arrived_at: float = 0.0
    deadline: float = inf
    needs_s: float = 0.0
    cost: float = 100.0


def item(
    name: str,
    tenant: str = "acme",
    tier: str = "standard",
    at: float = 0.0,
    by: float = inf,
    needs: float = 0.0,
    cost: float = 100.0,
) -> Item:
    request = Request(name, "m", tenant, tier, Promise(), weight=WEIGHTS[tier])
    return Item(request, at, by, needs, cost)


def names(items: list[Item]) -> list[str]:
    return [one.request.id for one in items]


def waiting(*items: Item, starvation: int = NEVER) -> Waiting[Item]:
    room: Waiting[Item] = Waiting(starvation=starvation)
    for one in items:
        room.add(one)
    return room


def take(room: Waiting[Item], now: float = 0.0) -> Item:
    """Send the first and charge its prompt."""
    first = room.heads(now)[0]
    room.taken(first)
    room.served(first, first.cost)
    return first


def drain(room: Waiting[Item], now: float = 0.0) -> list[str]:
    return [take(room, now).request.id for _ in range(len(room))]


# The order.


def test_a_tier_of_more_weight_goes_first_and_equal_ones_go_by_name() -> None:
    room = waiting(*(item(tier, tier=tier) for tier in WEIGHTS))
    assert names(room.heads(0.0)) == ["premium", "free", "standard", "batch"]


def test_a_tenant_s_requests_go_by_deadline_then_by_arrival() -> None:
    room = waiting(
        item("late", by=9.0),
        item("none"),
        item("second", by=5.0, at=0.2),
        item("first", by=5.0, at=0.1),
    )
    assert drain(room) == ["first", "second", "late", "none"]


def test_in_a_tier_what_can_still_be_helped_goes_before_what_is_lost() -> None:
    room = waiting(item("lost", by=1.0, needs=0.5, at=-1.0), item("hopeful", by=1.0, needs=0.2))
    assert names(room.heads(0.4)) == ["lost"]
    assert names(room.heads(0.6)) == ["hopeful", "lost"]


def test_what_is_lost_in_a_better_tier_does_not_wait_behind_all_of_the_lower_ones() -> None:
    room = waiting(
        item("late", tier="premium", by=1.0),
        item("hopeful", tier="batch", by=9.0),
        item("in time", tier="premium", by=9.0),
    )
    assert names(room.heads(2.0)) == ["in time", "late", "hopeful"]
    assert drain(room, now=2.0) == ["in time", "late", "hopeful"]


def test_the_lost_go_by_tier_then_by_arrival_and_no_longer_by_deadline() -> None:
    room = waiting(
        item("b", by=1.0, at=0.2),
        item("a", by=2.0, at=0.1),
        item("p", by=3.0, at=0.3, tier="premium"),
    )
    assert drain(room, now=5.0) == ["p", "a", "b"]


def test_each_loss_is_told_once() -> None:
    room = waiting(item("a", by=1.0), item("b", by=2.0), item("c"))
    assert room.newly_lost(0.9) == []
    room.heads(1.0)
    assert names(room.newly_lost(1.0)) == ["a"]
    assert room.newly_lost(1.9) == []
    assert names(room.newly_lost(9.0)) == ["b"]
    assert room.newly_lost(1e9) == []
    assert len(room) == 3


def test_who_left_is_not_told_as_lost() -> None:
    room = waiting(item("a", by=1.0))
    room.heads(2.0)
    room.discard("a")
    assert room.newly_lost(2.0) == []


def test_a_request_that_needs_forever_is_lost_only_if_it_has_a_promise() -> None:
    room = waiting(item("a", needs=inf), item("b", by=9.0, needs=inf))
    assert names(room.newly_lost(0.0)) == ["b"]


# Fair shares.


def test_within_a_quantum_the_earliest_deadline_goes_first_whoever_asks() -> None:
    much, little = item("much", "a", by=1.0), item("little", "b", by=9.0)
    room = waiting(much, little)
    room.served(much, QUANTUM - 1)
    assert names(room.heads(0.0)) == ["much"]


def test_a_quantum_apart_the_least_served_goes_first() -> None:
    much, little = item("much", "a", by=1.0), item("little", "b", by=9.0)
    room = waiting(much, little)
    room.served(much, QUANTUM)
    assert names(room.heads(0.0)) == ["little"]


def test_a_flood_does_not_delay_the_one_request_of_another_tenant() -> None:
    flood = [item(f"f{i:03}", "flood", cost=QUANTUM, by=10.0) for i in range(100)]
    room = waiting(*flood)
    for _ in range(10):
        take(room)
    room.add(item("one", "modest", by=20.0))
    room.served(flood[0], QUANTUM)
    assert take(room).request.id == "one"


def test_nobody_saves_up_by_staying_away() -> None:
    """After a long absence: level with the others, not ahead by all that they were given."""
    room = waiting(*(item(f"a{i:03}", "always", cost=QUANTUM, at=1.0) for i in range(200)))
    for _ in range(100):
        take(room)
    for i in range(50):
        room.add(item(f"b{i:03}", "back", cost=QUANTUM, at=2.0))
    given = Counter(take(room).request.tenant for _ in range(20))
    assert given == {"always": 10, "back": 10}


def test_who_leaves_for_a_moment_is_no_better_off_on_coming_back() -> None:
    room = waiting(
        *(item(f"a{i}", "a", cost=QUANTUM) for i in range(9)),
        *(item(f"b{i}", "b", cost=QUANTUM) for i in range(9)),
    )
    room.served(item("", "a"), 3 * QUANTUM)
    for i in range(9):
        room.discard(f"a{i}")
    room.add(item("again", "a"))
    assert [take(room).request.tenant for _ in range(4)] == ["b", "b", "b", "a"]


def test_where_nobody_waits_nobody_is_owed_anything() -> None:
    room = waiting(item("x", "busy"))
    room.served(item("", "busy"), 100 * QUANTUM)
    take(room)
    room.add(item("b", "busy", by=1.0))
    room.add(item("i", "idle", by=2.0))
    assert drain(room) == ["b", "i"]


def test_tiers_keep_separate_accounts() -> None:
    room = waiting(item("s", "a", by=1.0), item("t", "b", by=2.0))
    room.add(item("p", "a", tier="premium"))
    room.served(item("", "a", tier="premium"), 10 * QUANTUM)
    assert names(room.heads(0.0)) == ["p", "s"]


costs = st.lists(st.floats(1.0, 2 * QUANTUM), min_size=40, max_size=40)


@given(costs, costs, st.booleans())
def test_two_that_always_wait_are_never_further_apart_than_a_quantum_and_a_request(
    one: list[float], other: list[float], lost: bool
) -> None:
    by = {"one": 1.0 if lost else 2.0, "other": 1.0 if lost else 9.0}
    room = waiting()
    for tenant, prompts in (("one", one), ("other", other)):
        for i, cost in enumerate(prompts):
            room.add(item(f"{tenant}{i}", tenant, by=by[tenant], cost=cost))
    given: Counter[str] = Counter()
    left = Counter(one=len(one), other=len(other))
    while min(left.values()):
        first = take(room, now=1.5 if lost else 0.0)
        left[first.request.tenant] -= 1
        given[first.request.tenant] += first.cost  # type: ignore[assignment]
        assert abs(given["one"] - given["other"]) <= QUANTUM + max(one + other)


def test_the_oldest_s_turns_do_not_undo_fair_shares() -> None:
    room = waiting(starvation=STARVATION)
    for i in range(1000):
        room.add(item(f"f{i}", "flood", cost=1000.0, at=i / 1000))
        room.add(item(f"m{i}", "modest", cost=1000.0, at=1.0 + i / 1000))
    given: Counter[str] = Counter()
    for _ in range(1000):
        given[take(room).request.tenant] += 1000
        assert abs(given["flood"] - given["modest"]) <= QUANTUM + 2 * 1000


# Starvation.


def test_the_oldest_goes_at_every_sixteenth_turn_whatever_floods_in() -> None:
    room = waiting(item("lost", tier="batch", at=-2.0, by=-1.0), starvation=STARVATION)
    room.add(item("low", tier="batch", at=-1.0))
    sent = []
    for i in range(2 * STARVATION):
        room.add(item(f"p{i:02}", tier="premium", at=float(i)))
        sent.append(take(room, now=float(i)).request.id)
    assert sent[STARVATION - 1] == "lost"
    assert sent[2 * STARVATION - 1] == "low"


def test_the_oldest_keeps_its_turn_while_it_fits_nowhere_and_others_go_on() -> None:
    huge = item("huge", tier="batch", at=-1.0)
    room = waiting(huge, *(item(f"p{i:02}", tier="premium") for i in range(40)), starvation=4)
    for _ in range(20):
        room.taken(next(head for head in room.heads(0.0) if head is not huge))
    assert names(room.heads(0.0)) == ["huge", "p20"]
    room.taken(huge)
    assert names(room.heads(0.0)) == ["p20"]


# Coming and going.


def test_expired_ones_are_given_once_oldest_first() -> None:
    room = waiting(item("b", at=1.0), item("a", at=0.5), item("c", at=2.0))
    assert names(room.expired(6.0, max_wait_s=5.0)) == ["a", "b"]
    assert room.expired(6.0, max_wait_s=5.0) == []
    assert drain(room) == ["c"]


def test_discarding_what_does_not_wait_changes_nothing() -> None:
    room = waiting(item("a"))
    assert room.discard("b") is None
    assert room.discard("a") is not None
    assert room.discard("a") is None
    assert (len(room), room.oldest(), room.heads(0.0)) == (0, None, [])


def test_a_request_added_again_stands_where_it_now_belongs() -> None:
    room = waiting(item("a", tier="premium", by=1.0), item("b", by=5.0))
    room.newly_lost(2.0)
    room.add(item("a", tier="free", by=inf))
    assert len(room) == 2
    assert names(room.heads(2.0)) == ["a", "b"]
    assert names(room.heads(6.0)) == ["a", "b"]
    assert drain(room, now=6.0) == ["a", "b"]


def test_a_newcomer_has_the_live_work_of_its_tier_and_of_those_above_ahead() -> None:
    room = waiting(
        item("p", tier="premium", cost=1000),
        item("s", cost=200, by=9.0),
        item("lost", cost=30, by=1.0),
        item("b", tier="batch", cost=4),
    )
    room.heads(2.0)
    assert room.ahead_of(item("new")) == (2, 1200)
    assert room.ahead_of(item("new", tier="premium")) == (1, 1000)
    assert room.ahead_of(item("new", tier="batch")) == (3, 1204)
    room.discard("s")
    assert room.ahead_of(item("new")) == (1, 1000)


def test_who_waits_in_a_tier_is_counted_lost_or_not() -> None:
    room = waiting(item("1", "a"), item("2", "b", by=1.0), item("3", "a", tier="premium"))
    room.heads(2.0)
    asked = [item("", tier=tier).request for tier in WEIGHTS]
    assert [room.of_tier(request) for request in asked] == [1, 2, 0, 0]


# Against a model that sorts everything at every look.


class Sorted:
    """The same order, the slow way."""

    def __init__(self, starvation: int) -> None:
        self.items: dict[str, Item] = {}
        self.lost: set[str] = set()
        self.news: list[str] = []
        self.service: dict[tuple[str, str], float] = {}
        self.floor: dict[str, float] = {}
        self.passed_over = 0
        self.starvation = starvation

    def quanta(self, one: Item) -> float:
        return self.service[one.request.tier, one.request.tenant] // QUANTUM

    def place(self, one: Item) -> tuple[object, ...]:
        lost = one.request.id in self.lost
        deadline = 0.0 if lost else one.deadline
        tier = (-one.request.weight, one.request.tier)
        return (tier, lost, self.quanta(one), deadline, one.arrived_at, one.request.id)

    def raise_floor(self, tier: str) -> None:
        quanta = [
            self.quanta(one)
            for name, one in self.items.items()
            if name not in self.lost and one.request.tier == tier
        ]
        least = min(quanta, default=0.0) * QUANTUM
        self.floor[tier] = max(self.floor.get(tier, 0.0), least)

    def add(self, one: Item) -> None:
        self.discard(one.request.id)
        account = tier, _ = one.request.tier, one.request.tenant
        self.raise_floor(tier)
        if all((o.request.tier, o.request.tenant) != account for o in self.items.values()):
            self.service[account] = max(self.service.get(account, 0.0), self.floor[tier])
        self.items[one.request.id] = one

    def discard(self, name: str) -> None:
        if name not in self.items:
            return
        tier = self.items[name].request.tier
        self.raise_floor(tier)
        del self.items[name]
        self.lost.discard(name)
        self.news = [other for other in self.news if other != name]
        if all(one.request.tier != tier for one in self.items.values()):
            self.service = {key: value for key, value in self.service.items() if key[0] != tier}
            del self.floor[tier]

    def taken(self, one: Item) -> None:
        self.passed_over = 0 if one is self.oldest() else self.passed_over + 1
        self.discard(one.request.id)

    def served(self, one: Item, tokens: float) -> None:
        tier, tenant = one.request.tier, one.request.tenant
        if tier in self.floor:
            before = self.service.get((tier, tenant), self.floor[tier])
            self.service[tier, tenant] = before + tokens

    def age(self, now: float) -> None:
        gone = [
            (one.deadline - one.needs_s, name)
            for name, one in self.items.items()
            if name not in self.lost and now >= one.deadline - one.needs_s
        ]
        for _, name in sorted(gone):
            self.raise_floor(self.items[name].request.tier)
            self.lost.add(name)
            self.news.append(name)

    def oldest(self) -> Item | None:
        by_arrival = sorted(self.items.values(), key=lambda one: (one.arrived_at, one.request.id))
        return by_arrival[0] if by_arrival else None

    def heads(self, now: float) -> list[Item]:
        self.age(now)
        heads: dict[tuple[bool, str], Item] = {}
        for one in sorted(self.items.values(), key=self.place):
            heads.setdefault((one.request.id in self.lost, one.request.tier), one)
        best = list(heads.values())
        oldest = self.oldest()
        if oldest is not None and self.passed_over >= self.starvation - 1:
            best = [oldest, *(head for head in best if head is not oldest)]
        return best

    def newly_lost(self, now: float) -> list[str]:
        self.age(now)
        news, self.news = self.news, []
        return news


moments = st.integers(0, 40).map(lambda n: n / 4)
arrivals = st.builds(
    item,
    name=st.integers(0, 30).map(str),
    tenant=st.sampled_from("abc"),
    tier=st.sampled_from(list(WEIGHTS)),
    at=moments,
    by=st.one_of(st.just(inf), moments),
    needs=moments,
    cost=st.integers(1, 5000).map(float),
)
happenings = st.one_of(
    st.tuples(st.just("add"), arrivals),
    st.tuples(st.just("discard"), st.integers(0, 30).map(str)),
    st.tuples(st.just("take"), st.integers(0, 3)),
    st.tuples(st.just("serve"), arrivals),
    st.tuples(st.just("pass"), st.floats(0.0, 1.0)),
    st.tuples(st.just("lost"), st.none()),
    st.tuples(st.just("expire"), st.floats(0.0, 10.0)),
)


@settings(max_examples=300)
@given(st.lists(happenings, max_size=80))
def test_the_order_is_that_of_sorting_everything_at_every_look(
    story: list[tuple[str, object]],
) -> None:
    room, model, now = waiting(starvation=4), Sorted(starvation=4), 0.0
    for what, how in story:
        if isinstance(how, Item) and what == "add":
            room.add(how)
            model.add(how)
        elif isinstance(how, Item):
            room.served(how, how.cost)
            model.served(how, how.cost)
        elif isinstance(how, str):
            assert room.discard(how) is model.items.get(how)
            model.discard(how)
        elif isinstance(how, int):
            for head in room.heads(now)[how : how + 1]:
                for each in (room, model):
                    each.heads(now)
                    each.taken(head)
                    each.served(head, head.cost)
        elif what == "pass" and isinstance(how, float):
            now += how
        elif what == "lost":
            assert names(room.newly_lost(now)) == model.newly_lost(now)
        elif isinstance(how, float):
            for one in room.expired(now, how):
                assert model.oldest() is one
                assert one.arrived_at + how <= now
                model.discard(one.request.id)
        assert room.heads(now) == model.heads(now)
        assert room.oldest() is model.oldest()
        assert len(room) == len(model.items)
        of_tier = Counter(one.request.tier for one in model.items.values())
        assert all(room.of_tier(item("", tier=tier).request) == of_tier[tier] for tier in WEIGHTS)
        live = [one for name, one in model.items.items() if name not in model.lost]
        last = item("", tier="batch")
        assert room.ahead_of(last) == (len(live), sum(one.cost for one in live))


@given(
    st.lists(st.one_of(arrivals, st.none()), max_size=120),
    st.integers(1, STARVATION),
)
def test_of_so_many_taken_one_was_the_oldest_and_none_is_lost_or_doubled(
    story: list[Item | None], bound: int
) -> None:
    room = waiting(starvation=bound)
    added, sent, since = set(), [], 0
    for i, arrival in enumerate(story):
        if arrival is not None:
            one = item(
                f"r{i}",
                arrival.request.tenant,
                arrival.request.tier,
                arrival.arrived_at,
                arrival.deadline,
            )
            room.add(one)
            added.add(f"r{i}")
        elif len(room):
            oldest = room.oldest()
            first = take(room, now=float(i) / 10)
            sent.append(first.request.id)
            since = 0 if first is oldest else since + 1
            assert since < bound
    sent += drain(room, now=12.0)
    assert len(sent) == len(added)
    assert set(sent) == added


# Memory.


def test_memory_follows_those_who_wait_not_those_who_ever_did() -> None:
    room = waiting(*(item(f"stay{i}", tier="batch") for i in range(10)))
    for i in range(20_000):
        at = i / 100
        room.add(item(str(i), f"tenant-{i % 5000}", "premium", at=at, by=at + 1.0))
        if i >= 20:
            room.discard(str(i - 20)) if i % 3 else take(room, now=at)
        room.served(item("", f"other-{i}", "batch"), 1.0)
    lines = [room._by_arrival, room._by_loss]
    tenants = 0
    for tier in room._tiers:
        tenants += len(tier._service)
        for half in (tier.live, tier.lost):
            lines += [half._tenants, *half.lines.values()]
    assert len(room._news) <= len(room)
    assert all(len(line._heap) <= 2 * len(line) + 8 for line in lines)
    assert tenants <= 2 * (2 * REMEMBERED + len(room))


def test_the_most_served_are_remembered_longest() -> None:
    room = waiting(item("w", "waits", by=5.0))
    room.served(item("", "greedy"), 10 * QUANTUM)
    for i in range(5 * REMEMBERED):
        room.served(item("", f"passer-by-{i}"), 1.0)
    room.add(item("g", "greedy", by=1.0))
    assert names(room.heads(0.0)) == ["w"]


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.one_of(st.none(), st.integers(0, 5)))))
def test_a_line_gives_the_least_key_then_the_least_name(
    story: list[tuple[str, int | None]],
) -> None:
    line, model = Line(), dict[str, int]()
    for name, key in story:
        if key is None:
            line.remove(name)
            model.pop(name, None)
        else:
            line.put(name, key)
            model[name] = key
        assert line.first() == min(((key, name) for name, key in model.items()), default=None)
        assert len(line) == len(model)
