"""Do the rules that we compare with do what their sources say?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    FirstTokenSeen,
    RequestArrived,
    Step,
    StepsSeen,
    StreamEnded,
    WorkerRemoved,
)
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.policy.baselines import (
    GlobalLatency,
    KvCost,
    KvCostOutput,
    PeakEwma,
    latency,
    least_kv,
    least_requests,
    power_of_two,
    prefix_affinity,
)
from paceline.policy.fleet import Choice, Policy
from paceline.policy.route import POLICIES
from paceline.policy.standing import Ask, Curve, InFlight, Standing
from paceline.policy.steptime import StepTimeEstimator

SEEDS = range(0, 2**32, 2**32 // 97)
MODEL = StepTimeEstimator().model()
CURVE = Curve(MODEL.theta)


class Workers:
    """A fleet whose state is said, not lived."""

    def __init__(
        self,
        loads: Sequence[int],
        *,
        waiting: Sequence[int] = (),
        kv: Sequence[float] = (),
        kv_capacity: Sequence[float] = (),
        ahead: Sequence[float] = (),
        remembered: Sequence[int] = (),
    ) -> None:
        self.turn = 0
        self.ids = [f"w{i}" for i in range(len(loads))]
        self.loads = list(loads)
        self.waiting = list(waiting) or [0] * len(loads)
        self.kv = list(kv) or [0.0] * len(loads)
        self.kv_capacity = list(kv_capacity) or [100_000.0] * len(loads)
        self.ahead = list(ahead) or [0.0] * len(loads)
        self.blocks = list(remembered) or [0] * len(loads)

    def load(self, place: int) -> int:
        return self.loads[place]

    def remembered(self, place: int) -> int:
        return self.blocks[place]

    def standing(self, place: int, now: float) -> Standing:
        in_flight = InFlight(
            streams=self.loads[place] - self.waiting[place],
            arriving=self.waiting[place],
            kv=self.kv[place],
            kv_arriving=0.0,
            ahead=self.ahead[place],
            prefill_rate=0.0,
            budget=2048.0,
            overhead_s=0.0,
            kv_capacity=self.kv_capacity[place],
            last_step_at=now,
        )
        return Standing(MODEL, CURVE, in_flight, {})

    @property
    def places(self) -> range:
        return range(len(self.loads))


def ask(
    request_id: str = "r",
    *,
    promise: Promise = Promise(),  # noqa: B008 (frozen)
    prompt: float = 640.0,
    output: float = 100.0,
    held: Mapping[int, int] | None = None,
    blocks: int = 10,
    seed: int = 0,
    now: float = 0.0,
) -> Ask:
    held = held or {}
    return Ask(
        request_id=request_id,
        promise=promise,
        margin=0.1,
        weight=1.0,
        prompt_tokens=prompt,
        usual_tokens=1000.0,
        output_tokens=output,
        output_left=output,
        cached={i: prompt * depth / blocks for i, depth in held.items()},
        blocks_held=held,
        blocks=blocks,
        seed=seed,
        now=now,
    )


def taken(policy: Policy, fleet: Workers, **asked: object) -> Counter[int]:
    """Which places are taken how often, over many seeds."""
    seeded = (ask(f"r{seed}", seed=seed, **asked) for seed in SEEDS)  # type: ignore[arg-type]
    return Counter(policy(fleet, each, fleet.places).place for each in seeded)


# All of them.


@given(
    name=st.sampled_from([name for name in POLICIES if name != "headroom"]),
    loads=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_every_rule_takes_a_place_that_may_be_taken_and_says_why(
    name: str, loads: list[int], seed: int, data: st.DataObject
) -> None:
    named = POLICIES[name]
    policy: Policy = named() if isinstance(named, type) else named
    fleet = Workers(loads)
    places = data.draw(st.lists(st.sampled_from(fleet.places), min_size=1, unique=True))
    held = {places[0]: 4, len(loads) - 1: 2}
    choice = policy(fleet, ask(seed=seed, held=held), places)
    assert choice.place in places
    assert choice.because


@pytest.mark.parametrize("name", POLICIES)
def test_every_rule_says_where_it_is_from(name: str) -> None:
    assert name == "headroom" or "Source: " in (POLICIES[name].__doc__ or "")


@pytest.mark.parametrize(
    "name", ["random", "least-requests", "power-of-two", "least-kv", "prefix-affinity", "peak-ewma"]
)
def test_among_equal_workers_all_are_taken_alike(name: str) -> None:
    named = POLICIES[name]
    policy: Policy = named() if isinstance(named, type) else named
    counts = taken(policy, Workers([1, 1, 1, 1]))
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) <= 3 * min(counts.values())


# Without memory.


def test_round_robin_takes_each_in_turn() -> None:
    fleet = Workers([9, 0, 5])
    turns = []
    for fleet.turn in range(6):
        turns.append(POLICIES["round-robin"](fleet, ask(), fleet.places))  # type: ignore[call-arg]
    assert [choice.place for choice in turns if isinstance(choice, Choice)] == [0, 1, 2, 0, 1, 2]


def test_the_worker_with_fewest_requests_is_taken() -> None:
    assert set(taken(least_requests, Workers([3, 1, 2, 1]))) == {1, 3}


def test_the_busiest_of_three_is_never_the_better_of_two() -> None:
    assert set(taken(power_of_two, Workers([1, 9, 2]))) == {0, 2}


def test_kv_use_is_a_share_of_the_workers_own_cache() -> None:
    fleet = Workers([1, 1], kv=[3_000, 2_000], kv_capacity=[100_000, 20_000])
    assert least_kv(fleet, ask(), fleet.places).place == 0


def test_kv_use_is_compared_in_tokens_where_a_cache_is_of_unknown_size() -> None:
    fleet = Workers([1, 1], kv=[3_000, 2_000], kv_capacity=[100_000, inf])
    assert least_kv(fleet, ask(), fleet.places).place == 1


def test_the_longest_cached_prefix_decides_in_a_balanced_fleet() -> None:
    fleet = Workers([8, 0, 0])
    assert prefix_affinity(fleet, ask(held={0: 8, 1: 4}), fleet.places).place == 0


def test_a_short_cached_prefix_does_not_decide_but_the_room_in_the_caches() -> None:
    fleet = Workers([0, 0, 0], remembered=[50, 40, 20])
    assert prefix_affinity(fleet, ask(held={0: 3}), fleet.places).place == 2
    assert prefix_affinity(fleet, ask(held={0: 4}), fleet.places).place == 0


@pytest.mark.parametrize(
    ("loads", "balanced"), [([8, 0], True), ([9, 0], False), ([195, 130], True)]
)
def test_an_unbalanced_fleet_is_one_with_both_a_large_gap_and_a_large_ratio(
    loads: list[int], balanced: bool
) -> None:
    fleet = Workers(loads)
    place = prefix_affinity(fleet, ask(held={0: 10}), fleet.places).place
    assert place == (0 if balanced else 1)


# KV cost.


def arrived(policy: KvCost, request_id: str, blocks: tuple[int, ...] = (), tail: int = 0) -> None:
    """Its prompt is in so many blocks of 64 tokens, and a tail of so many."""
    size = len(blocks) * 256 + tail * 4
    request = Request(request_id, "m", "t", "", Promise(), prompt_bytes=size, blocks=blocks)
    policy.learn(RequestArrived(request), 0.0)


def test_prefill_and_decode_blocks_count_alike() -> None:
    fleet = Workers([0, 0], ahead=[0, 100])
    policy = KvCost()
    policy(fleet, ask("first", prompt=90), [0])
    assert policy(fleet, ask("second"), fleet.places).place == 0
    policy(fleet, ask("third", prompt=20), [0])
    assert policy(fleet, ask("fourth"), fleet.places).place == 1


def test_cached_tokens_need_no_prefill() -> None:
    fleet = Workers([0, 0, 0])
    assert KvCost()(fleet, ask(held={1: 2}), fleet.places).place == 1


def test_a_block_that_active_prompts_share_counts_once() -> None:
    fleet = Workers([0, 0])
    policy = KvCost()
    common = tuple(range(10))
    for name in ("a", "b"):
        arrived(policy, name, common)
        policy(fleet, ask(name), [0])
    policy(fleet, ask("other", prompt=700), [1])
    assert policy(fleet, ask("new"), fleet.places).place == 0
    arrived(policy, "c", (*common, 10))
    because = policy(fleet, ask("c", prompt=704, blocks=11), [0]).because
    assert because == "least blocks: 44 to prefill, 84 to decode"


@pytest.mark.parametrize(
    "fact", [StreamEnded("a", 5), ClientLeft("a"), DispatchFailed("a", "w0", "")]
)
def test_the_blocks_of_a_request_that_is_gone_are_free(
    fact: StreamEnded | ClientLeft | DispatchFailed,
) -> None:
    fleet = Workers([0, 0])
    policy = KvCost()
    policy(fleet, ask("a"), [0])
    assert policy(fleet, ask("b"), fleet.places).place == 1
    policy.learn(fact, 1.0)
    assert policy(fleet, ask("c"), fleet.places).place == 0


def test_a_request_that_is_asked_for_again_has_its_blocks_where_it_was_put_last() -> None:
    fleet = Workers([0, 0])
    policy = KvCost()
    policy(fleet, ask("a"), [0])
    policy(fleet, ask("a"), [1])
    assert policy(fleet, ask("b"), fleet.places).place == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=30))
def test_blocks_in_use_are_those_of_the_prompts_in_flight(moves: list[tuple[int, int]]) -> None:
    fleet = Workers([0])
    policy = KvCost()
    here: dict[str, tuple[int, ...]] = {}
    for who, length in moves:
        name = f"r{who}"
        if here.pop(name, None) is not None:
            policy.learn(StreamEnded(name, 1), 0.0)
            continue
        chain = tuple(who % 2 * 100 + i for i in range(length))
        arrived(policy, name, chain, tail=10)
        policy(fleet, ask(name, prompt=64.0 * length + 10), [0])
        here[name] = chain
    distinct = {block for chain in here.values() for block in chain}
    arrived(policy, "probe")
    because = policy(fleet, ask("probe", prompt=6.0), [0]).because
    blocks = (len(distinct) * 64 + len(here) * 10 + 6) / 16
    assert because.endswith(f" {blocks:.0f} to decode")


def decode_blocks(policy: KvCost, fleet: Workers) -> str:
    said = policy(fleet, ask("probe", prompt=16), [0]).because.rsplit(", ", 1)[1]
    policy.learn(ClientLeft("probe"), 0.0)
    return said


def test_what_a_stream_holds_alone_counts_by_what_is_still_to_come() -> None:
    fleet = Workers([0])
    policy = KvCostOutput()
    policy(fleet, ask("a", prompt=1600, output=320), [0])
    assert decode_blocks(policy, fleet) == "101 to decode"
    policy.learn(FirstTokenSeen("a", 1.0), 1.0)
    policy.learn(StepsSeen("w0", [Step(2.0, 0.1, 1, 1, 160)]), 2.0)
    assert decode_blocks(policy, fleet) == "56 to decode"  # (1600 + 160) / 2, and the probe
    policy.learn(StepsSeen("w0", [Step(3.0, 0.1, 1, 1, 160)]), 3.0)
    assert decode_blocks(policy, fleet) == "1 to decode"
    policy.learn(StreamEnded("a", 320), 4.0)
    assert decode_blocks(policy, fleet) == "1 to decode"


def test_what_streams_share_counts_whole_however_far_they_are() -> None:
    fleet = Workers([0])
    policy = KvCostOutput()
    for name in ("a", "b"):
        arrived(policy, name, tuple(range(10)))
        policy(fleet, ask(name, prompt=640, output=160), [0])
        policy.learn(FirstTokenSeen(name, 1.0), 1.0)
    policy.learn(StepsSeen("w0", [Step(2.0, 0.1, 2, 2, 160)]), 2.0)
    assert decode_blocks(policy, fleet) == "41 to decode"


def test_without_output_tracking_an_answer_does_not_count() -> None:
    fleet = Workers([0])
    policy = KvCost()
    policy(fleet, ask("a", prompt=1600), [0])
    policy.learn(FirstTokenSeen("a", 1.0), 1.0)
    policy.learn(StepsSeen("w0", [Step(2.0, 0.1, 1, 1, 160)]), 2.0)
    assert decode_blocks(policy, fleet) == "101 to decode"


# Peak EWMA.


def answered(policy: PeakEwma, fleet: Workers, place: int, seconds: float, now: float) -> None:
    policy(fleet, ask("x", now=now), [place])
    policy.learn(FirstTokenSeen("x", now + seconds), now + seconds)


def test_the_worker_that_answers_faster_is_taken_until_it_has_more_to_do() -> None:
    fleet = Workers([0, 0])
    policy = PeakEwma()
    answered(policy, fleet, 0, 0.1, 0.0)
    answered(policy, fleet, 1, 0.4, 0.0)
    assert policy(fleet, ask(now=1.0), fleet.places).place == 0
    fleet.loads = [4, 0]
    assert policy(fleet, ask(now=1.0), fleet.places).place == 1


def test_a_peak_counts_at_once_and_is_forgotten_slowly() -> None:
    fleet = Workers([0, 0])
    policy = PeakEwma()
    answered(policy, fleet, 0, 0.1, 0.0)
    answered(policy, fleet, 1, 0.2, 0.0)
    answered(policy, fleet, 0, 1.0, 1.0)
    assert policy(fleet, ask(now=2.0), fleet.places).place == 1
    for second in range(3, 40):
        answered(policy, fleet, 0, 0.1, float(second))
        answered(policy, fleet, 1, 0.2, float(second))
    assert policy(fleet, ask(now=41.0), fleet.places).place == 0


def test_a_worker_that_has_never_answered_gets_one_request() -> None:
    fleet = Workers([0, 3])
    policy = PeakEwma()
    answered(policy, fleet, 1, 5.0, 0.0)
    assert policy(fleet, ask(now=5.0), fleet.places).place == 0
    fleet.loads = [1, 3]
    assert policy(fleet, ask(now=5.0), fleet.places).place == 1


def test_a_wait_that_ends_in_failure_is_a_latency_too() -> None:
    fleet = Workers([0, 0])
    policy = PeakEwma()
    answered(policy, fleet, 1, 1.0, 0.0)
    policy(fleet, ask("a", now=0.0), [0])
    policy.learn(DispatchFailed("a", "w0", "timed out", timed_out=True), 30.0)
    assert policy(fleet, ask(now=30.0), fleet.places).place == 1


def test_a_worker_that_was_removed_starts_anew() -> None:
    fleet = Workers([0, 0])
    policy = PeakEwma()
    answered(policy, fleet, 0, 9.0, 0.0)
    answered(policy, fleet, 1, 1.0, 0.0)
    policy.learn(WorkerRemoved("w0"), 9.0)
    assert policy(fleet, ask(now=9.0), fleet.places).place == 0


# Global latency.

PROMISED = Promise(ttft_s=1.0, itl_s=0.05)


def true_ttft_s(prompt: float, ahead: float) -> float:
    return 0.02 + 1e-4 * (prompt + ahead)


def true_itl_s(streams: int) -> float:
    return 0.01 + 0.001 * streams


def taught(outcomes: int = 400) -> tuple[GlobalLatency, Workers]:
    """One that has seen a fleet in which latency is linear in what there is."""
    policy = GlobalLatency()
    fleet = Workers([0, 0, 0])
    for n in range(outcomes):
        fleet.loads = [n % 50, n % 37, n % 23]
        fleet.ahead = [float(n % 11 * 300), float(n % 7 * 500), float(n % 5 * 900)]
        prompt = 200.0 + n % 13 * 150
        i = policy(fleet, ask("x", prompt=prompt, seed=n * 7919), fleet.places).place
        policy.learn(FirstTokenSeen("x", true_ttft_s(prompt, fleet.ahead[i])), 1.0)
        policy.learn(StreamEnded("x", 9, itl_s=true_itl_s(fleet.loads[i])), 2.0)
    return policy, fleet


def test_latency_is_predicted_once_it_has_been_learned() -> None:
    policy, fleet = taught()
    fleet.loads, fleet.ahead = [20, 30, 10], [1000.0, 0.0, 3000.0]
    for place in fleet.places:
        predicted = policy(fleet, ask(prompt=1000.0, promise=PROMISED), [place]).predicted
        assert predicted is not None
        assert predicted.ttft_s == pytest.approx(true_ttft_s(1000, fleet.ahead[place]), rel=0.1)
        assert predicted.itl_s == pytest.approx(true_itl_s(fleet.loads[place]), rel=0.1)


def test_nothing_is_predicted_before_there_are_outcomes() -> None:
    fleet = Workers([0, 0])
    assert GlobalLatency()(fleet, ask(promise=PROMISED), fleet.places).predicted is None


def test_fleets_of_different_models_are_learned_apart() -> None:
    policy, _ = taught()
    other = Workers([0, 0])
    assert policy(other, ask(promise=PROMISED), other.places).predicted is None


def test_workers_that_would_break_a_promise_are_hardly_ever_taken() -> None:
    policy, fleet = taught()
    fleet.loads, fleet.ahead = [60, 10, 10], [0.0, 20_000.0, 0.0]  # ITL broken; TTFT broken; fine
    counts = taken(policy, fleet, promise=PROMISED, prompt=500.0)
    assert counts[2] >= 0.95 * len(SEEDS)


def test_an_idle_worker_is_taken_first_if_all_break_a_promise() -> None:
    policy, fleet = taught()
    fleet.loads, fleet.ahead = [1, 1, 0], [0.0, 0.0, 5000.0]
    counts = taken(policy, fleet, promise=Promise(ttft_s=0.01, itl_s=0.001), prompt=500.0)
    assert set(counts) == {2}


def test_breaking_only_the_itl_is_the_least_evil() -> None:
    policy, fleet = taught()
    fleet.loads, fleet.ahead = [60, 10, 60], [0.0, 20_000.0, 20_000.0]
    counts = taken(policy, fleet, promise=PROMISED, prompt=500.0)
    assert counts[0] == len(SEEDS)


def test_a_worker_that_has_the_prompt_cached_comes_first() -> None:
    policy, fleet = taught()
    fleet.loads, fleet.ahead = [10, 10, 10], [0.0, 0.0, 0.0]
    counts = taken(policy, fleet, promise=PROMISED, prompt=500.0, held={1: 9})
    assert counts[1] >= 0.95 * len(SEEDS)


def test_among_workers_that_keep_the_promise_the_one_with_most_headroom_is_taken() -> None:
    policy, fleet = taught()
    fleet.loads, fleet.ahead = [35, 20, 5], [6000.0, 3000.0, 0.0]
    assert set(taken(policy, fleet, promise=PROMISED, prompt=500.0)) == {2}


def test_where_the_fleet_shall_be_packed_one_that_barely_keeps_the_promise_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, fleet = taught()
    monkeypatch.setattr(latency, "LEAST_HEADROOM", True)
    monkeypatch.setattr(latency, "DRAW", True)
    fleet.loads, fleet.ahead = [35, 20, 5], [6000.0, 3000.0, 0.0]
    counts = taken(policy, fleet, promise=PROMISED, prompt=500.0)
    assert counts[0] > counts[1] > counts[2]


@given(st.integers(0, 2**64 - 1), st.integers(0, 8))
def test_chance_lies_between_0_and_1(seed: int, nth: int) -> None:
    assert 0.0 <= latency.chance(seed, nth) < 1.0
