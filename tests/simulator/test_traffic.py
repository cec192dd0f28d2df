from __future__ import annotations

import tracemalloc
from collections import deque
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from paceline.simulator.scenario import Pattern, Requests, Scenario, SimTier, Workers
from paceline.simulator.traffic import GENERATORS, Fragile, arrivals
from paceline.workload.traces import Arrival

SAMPLES = Path(__file__).parents[2] / "examples" / "traces"
MOONCAKE = str(SAMPLES / "mooncake-sample.jsonl")
AZURE = str(SAMPLES / "azure-conv-sample.csv")

KINDS = sorted(GENERATORS)


def scenario(*requests: Requests, seconds: float = 100.0, load: float = 1.0) -> Scenario:
    return Scenario(
        about="A test.",
        seconds=seconds,
        workers=(Workers(profile="tiny", model="the-model"),),
        tiers={"first": SimTier(), "second": SimTier()},
        requests=requests,
        load=load,
    )


def played(*requests: Requests, seed: int = 1, **settings: Any) -> list[Arrival]:
    return list(arrivals(scenario(*requests, **settings), seed))


@st.composite
def streams(draw: st.DrawFn) -> Requests:
    from_s = draw(st.floats(0, 20))
    return Requests(
        kind=draw(st.sampled_from(KINDS)),
        rate=draw(st.floats(0.1, 10)),
        cv=draw(st.floats(0.3, 5)),
        from_s=from_s,
        until_s=draw(st.just(inf) | st.floats(from_s + 1, 60)),
        shared=draw(st.none() | st.integers(0, 2000)),
        pattern=Pattern(
            diurnal_period_s=draw(st.just(0.0) | st.floats(1, 100)),
            diurnal_swing=draw(st.floats(0, 1)),
            steps=tuple(sorted(draw(st.dictionaries(st.floats(0, 50), st.floats(0, 5))).items())),
        ),
    )


@given(st.lists(streams(), min_size=1, max_size=3), st.integers(0, 1000))
def test_requests_come_in_order_within_their_time_and_repeat_with_their_seed(
    requests: list[Requests], seed: int
) -> None:
    came = played(*requests, seed=seed, seconds=40.0)
    assert came == sorted(came, key=lambda a: a.at_s)
    assert came == played(*requests, seed=seed, seconds=40.0)
    assert all(0 <= a.at_s < 40.0 and a.prompt_tokens > 0 < a.output_tokens for a in came)


@given(st.tuples(streams(), streams()))
def test_another_stream_beside_it_changes_nothing_in_a_stream(
    both: tuple[Requests, Requests],
) -> None:
    ours, other = replace(both[0], tenant="ours"), replace(both[1], tenant="other")
    together = [a for a in played(ours, other, seconds=20.0) if a.tenant == "ours"]
    assert together == played(ours, seconds=20.0)


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_gives_other_requests_at_the_same_rate(kind: Any) -> None:
    stream = Requests(kind=kind, rate=20.0)
    one, other = (played(stream, seed=seed, seconds=500.0) for seed in (1, 2))
    assert one != other
    assert len(one) == pytest.approx(10_000, rel=0.1)
    assert len(other) == pytest.approx(10_000, rel=0.1)


def test_two_streams_that_are_alike_do_not_come_in_lockstep_or_share_prefixes() -> None:
    stream = Requests(rate=5.0, shared=600)
    one, other = (
        [
            a
            for a in played(replace(stream, tenant="a"), replace(stream, tenant="b"))
            if a.tenant == t
        ]
        for t in ("a", "b")
    )
    assert not {a.at_s for a in one} & {a.at_s for a in other}
    assert not {b for a in one for b in a.blocks} & {b for a in other for b in a.blocks}


def test_every_request_has_a_tier_a_tenant_and_a_model() -> None:
    [plain] = played(Requests(rate=1.0), seconds=100.0)[:1]
    assert (plain.tier, plain.tenant, plain.model) == ("first", "anonymous", "the-model")
    named = Requests(rate=1.0, tier="second", tenant="acme", model="other")
    [arrival] = played(named, seconds=100.0)[:1]
    assert (arrival.tier, arrival.tenant, arrival.model) == ("second", "acme", "other")


def test_a_stream_comes_only_between_its_start_and_its_end() -> None:
    came = played(Requests(kind="chat", rate=20.0, from_s=30.0, until_s=50.0))
    assert all(30 <= a.at_s < 50 for a in came)
    assert len(came) == pytest.approx(400, rel=0.3)


def test_a_batch_comes_in_one_go_at_its_start() -> None:
    came = played(Requests(kind="batch", rate=2.0, from_s=30.0, until_s=80.0))
    assert [a.at_s for a in came] == [30.0] * 100


def test_steps_count_from_the_start_of_the_scenario_also_for_a_stream_that_starts_later() -> None:
    pattern = Pattern(steps=((20.0, 4.0), (60.0, 1.0)))
    came = played(Requests(rate=50.0, from_s=40.0, pattern=pattern))
    assert sum(a.at_s < 60 for a in came) == pytest.approx(4_000, rel=0.1)
    assert sum(a.at_s >= 60 for a in came) == pytest.approx(2_000, rel=0.1)


def test_a_day_has_a_busy_half_and_a_quiet_half_and_the_rate_on_average() -> None:
    pattern = Pattern(diurnal_period_s=100.0, diurnal_swing=0.8)
    came = played(Requests(rate=200.0, pattern=pattern))
    assert len(came) == pytest.approx(20_000, rel=0.05)
    busy = sum(a.at_s < 50 for a in came)
    assert busy / len(came) == pytest.approx(0.5 + 0.8 / 3.1416, abs=0.02)


def test_load_multiplies_all_rates_also_those_of_traces() -> None:
    streams = (Requests(rate=20.0), Requests(kind="trace", file=AZURE))
    once, twice = (played(*streams, seconds=60.0, load=load) for load in (1.0, 2.0))
    whole = load_trace_of(AZURE)
    assert sum(a.at_s < 60 for a in whole) == len(once) - len(played(streams[0], seconds=60.0))
    plain = played(streams[0], seconds=60.0, load=2.0)
    assert sum(a.at_s < 120 for a in whole) == len(twice) - len(plain)


def load_trace_of(file: str) -> list[Arrival]:
    return played(Requests(kind="trace", file=file), seconds=1e6)


def test_a_trace_with_a_rate_comes_faster_or_slower_and_loses_no_request() -> None:
    came = played(Requests(kind="trace", file=AZURE, rate=20.0), seconds=1e6)
    assert len(came) == 800
    assert 799 / (came[-1].at_s - came[0].at_s) == pytest.approx(20.0)


def test_a_trace_starts_when_its_stream_does() -> None:
    came = played(Requests(kind="trace", file=AZURE, from_s=50.0))
    assert came[0].at_s == 50.0
    assert came[-1].at_s < 100.0


def test_prompts_of_a_trace_can_be_cut_with_their_prefixes() -> None:
    came = played(Requests(kind="trace", file=MOONCAKE, most_prompt=4096), seconds=1e6)
    assert max(a.prompt_tokens for a in came) == 4096
    assert max(len(a.blocks) for a in came) == 8


def test_a_trace_keeps_the_names_that_it_has_unless_the_scenario_names_others(
    tmp_path: Path,
) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(
        '{"at_s": 0, "prompt_tokens": 5, "output_tokens": 1, "tier": "second", "tenant": "acme"}\n'
    )
    [kept] = played(Requests(kind="trace", file=str(file)))
    [renamed] = played(Requests(kind="trace", file=str(file), tier="first", tenant="bolt"))
    assert (kept.tier, kept.tenant) == ("second", "acme")
    assert (renamed.tier, renamed.tenant) == ("first", "bolt")


@pytest.mark.parametrize("kind", ["independent", "chat", "agents", "batch"])
def test_the_first_million_requests_are_never_in_memory_together(kind: Any) -> None:
    endless = scenario(Requests(kind=kind, rate=100.0), seconds=1e6)
    stream = arrivals(endless, 1)
    tracemalloc.start()
    try:
        deque(islice(stream, 2_000), maxlen=0)
        early, _ = tracemalloc.get_traced_memory()
        deque(islice(stream, 20_000), maxlen=0)
        late, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert late < early + 1_000_000


def test_some_answers_cannot_go_on_elsewhere_and_nothing_else_changes() -> None:
    whole = played(Requests(rate=20.0))
    came = played(Requests(rate=20.0, resumable=0.5))
    assert [asdict(arrival) for arrival in came] == [asdict(arrival) for arrival in whole]
    fragile = sum(isinstance(arrival, Fragile) for arrival in came)
    assert fragile == pytest.approx(0.5 * len(came), rel=0.2)
