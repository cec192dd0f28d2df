"""Is what is shown what the gateway said?"""

from __future__ import annotations

from math import isclose

import msgspec
import pytest
from fake_admin import FakeAdmin
from hypothesis import given
from hypothesis import strategies as st

from paceline import words
from paceline.dashboard import said
from paceline.dashboard.parts import short_names
from paceline.dashboard.shape import (
    by_cause,
    choice,
    choices,
    evidence_of,
    lanes,
    promise_of,
    standings,
    state_of,
    tally,
    tile,
    tiles,
    verdict,
    workers_of,
)

HEALTHY = said.Report(healthy=True)
BUSY = said.InFlight(streams=4)


def a_worker(name: str = "w1", headroom: float = 0.5, **other: object) -> said.Worker:
    worker = said.Worker(name, report=HEALTHY, in_flight=BUSY, room=said.Room(headroom=headroom))
    return msgspec.structs.replace(worker, **other)


@pytest.mark.parametrize(
    ("worker", "state"),
    [
        (a_worker(), "roomy"),
        (a_worker(headroom=0.1), "tight"),
        (a_worker(headroom=-0.1), "over"),
        (a_worker(in_flight=said.InFlight()), "idle"),
        (a_worker(draining=True), "draining"),
        (a_worker(ejected_for_s=2.0), "avoided"),
        (a_worker(report=said.Report(healthy=False)), "down"),
        (a_worker(report=None), "down"),
        (a_worker(draining=True, report=None), "down"),
    ],
)
def test_a_worker_is_in_one_state(worker: said.Worker, state: str) -> None:
    assert state_of(worker) == state


def test_a_tile_says_in_words_all_that_it_shows() -> None:
    down = said.Report(healthy=False, because="connection refused")
    says = tile(a_worker(report=down, node="a", role="decode")).says
    for part in ("w1: down", "connection refused", "node a", "role decode", "4 streams"):
        assert part in says


def test_workers_stand_where_people_look_for_them() -> None:
    names = [f"w{i}" for i in (10, 2, 1, 11)]
    assert [t.id for t in tiles(map(a_worker, names))] == ["w1", "w2", "w10", "w11"]


@given(st.lists(st.text(max_size=12), unique=True))
def test_any_names_can_be_ordered(names: list[str]) -> None:
    assert {tile.id for tile in tiles(map(a_worker, names))} == set(names)


def test_a_slow_worker_is_marked_even_while_it_is_idle() -> None:
    slow = said.Slower(3.0, 3.0, found=True)
    assert tile(a_worker(slower=slow)).slow == 3.0
    assert tile(a_worker(slower=slow, in_flight=said.InFlight())).slow
    assert not tile(a_worker(slower=slow, report=None)).slow
    assert not tile(a_worker(slower=said.Slower(3.0, 3.0))).slow


def test_a_slow_worker_that_gets_no_work_says_since_when_it_was_not_seen() -> None:
    seen = tile(a_worker(slower=said.Slower(8.0, 8.0, 24.0, found=True)))
    assert (seen.slow, seen.unseen_s) == (8.0, 24.0)
    assert "steps take 8.0 times as long as they used to" in seen.says
    assert "no step seen for 24 s" in seen.says
    assert tile(a_worker(slower=said.Slower(8.0, 8.0, 0.4, found=True))).unseen_s is None


def test_who_was_always_slower_than_its_like_is_called_so() -> None:
    assert (
        "1.6 times as long as at its like"
        in tile(a_worker(slower=said.Slower(1.0, 1.6, found=True))).says
    )


@pytest.mark.parametrize("headroom", [0.9, 0.36, 0.1])
def test_while_requests_wait_no_tile_is_green(headroom: float) -> None:
    assert tile(a_worker(headroom=headroom), waiting=329).state == "full"
    assert tile(a_worker(headroom=-0.1), waiting=329).state == "over"
    others = msgspec.structs.replace(a_worker(), model="other")
    assert [t.state for t in tiles([others], {"m": 3})] == ["roomy"]


def test_a_tile_says_what_its_headroom_is_of() -> None:
    room = said.Room(headroom=-0.4, least="ttft")
    assert "over its promises, headroom −40% of TTFT" in tile(a_worker(room=room)).says


def test_the_tally_counts_every_worker_once_and_worst_first() -> None:
    fleet = msgspec.convert(FakeAdmin(64).fleet({}), said.Fleet)
    counts = tally(tiles(workers_of(fleet)))
    assert sum(number for _, number in counts) == 64
    assert counts[0] == ("down", 1)
    assert workers_of(fleet, "another model") == []


@pytest.mark.parametrize(
    ("burn", "said_of_it"),
    [(None, "none"), (0.0, "kept"), (1.0, "kept"), (1.1, "burning"), (6.0, "broken")],
)
def test_burn_above_one_is_called_burning(burn: float | None, said_of_it: str) -> None:
    assert verdict(burn) == said_of_it


def test_tiers_stand_by_weight_and_show_every_window() -> None:
    fake = FakeAdmin()
    tiers = msgspec.convert(fake.tiers({}), said.Tiers).tiers
    minute = msgspec.convert(fake.summary({"window": "60"}), said.Summary)
    shown = standings(tiers, {"1 min": minute, "1 h": said.Summary()})
    assert [s.tier.name for s in shown] == ["premium", "standard", "batch"]
    premium = shown[0]
    assert [(w.name, w.verdict) for w in premium.windows] == [("1 min", "burning"), ("1 h", "none")]
    assert premium.worst == "burning"
    assert premium.now.requests > 0
    assert premium.promise == "TTFT ≤ 500 ms · ITL ≤ 40 ms · stall ≤ 500 ms"
    assert promise_of(tiers[2]) == "nothing promised"


def stall(at: float, late_s: float, **split: float) -> said.Stall:
    cause = max(split, key=lambda cause: split[cause], default="link")
    return said.Stall(at, late_s=late_s, cause=cause, split=split)


def test_the_worst_worker_comes_first_and_old_stalls_do_not_count() -> None:
    workers = {
        "a": [stall(5, 100.0, batch=100.0)],
        "b": [stall(50, 1.0, batch=0.4, hang=0.6)],
        "c": [stall(60, 2.0, link=2.0), stall(5, 9.0, link=9.0)],
    }
    shown = lanes(workers, since=10.0, most=5)
    assert [(lane.worker, lane.late_s, lane.cause) for lane in shown] == [
        ("c", 2.0, "link"),
        ("b", 1.0, "hang"),
    ]
    assert len(lanes(workers, since=0.0, most=2)) == 2


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["batch", "link", "hang"]), st.floats(0, 10), min_size=1
        ).map(lambda split: stall(0.0, sum(split.values()), **split))
    )
)
def test_no_late_second_is_lost_or_counted_twice(stalls: list[said.Stall]) -> None:
    lost = by_cause(stalls)
    assert isclose(sum(lost.values()), sum(stall.late_s for stall in stalls), abs_tol=1e-9)
    assert list(lost.values()) == sorted(lost.values(), reverse=True)


def a_decision(**command: object) -> said.Decision:
    told = {"at": 1.5, "command": {"request_id": "r", **command}}
    return msgspec.convert(told, said.Decision)


def test_a_decision_says_why_what_was_expected_and_what_instead() -> None:
    shown = choice(
        a_decision(
            type="Dispatch",
            worker_id="w1",
            because="least cost 0.021 of 8: TTFT 131 ms, ITL 19.8 ms",
            attempt=2,
            predicted={"ttft_s": 0.131, "itl_s": 0.0198, "headroom": -0.25, "cached_tokens": 512},
            runner_up={"worker_id": "w2", "costs_more": 0.034, "ttft_s": 0.2, "itl_s": 0.02},
        )
    )
    assert shown.kind == "sent"
    assert shown.because == "least cost 0.021 of 8 (attempt 2)"
    assert shown.expected == ("TTFT 131 ms · ITL 20 ms", "headroom −25%, 512 tokens cached")
    assert shown.instead == ("w2 costs 0.034 more", "TTFT 200 ms · ITL 20 ms")


def test_a_choice_without_alternative_says_so() -> None:
    assert choice(a_decision(type="Dispatch")).instead == ("no other was weighed", "")
    assert choice(a_decision(type="Hold")).instead == ("", "")


def test_decisions_can_be_narrowed_to_a_kind() -> None:
    log = [a_decision(type="Hold"), a_decision(type="Shed", retry_after_s=2.5, because="full")]
    (shed,) = choices(log, "turned away")
    assert shed.because == "full; retry after 2.50 s"
    assert len(choices(log)) == 2


def test_evidence_has_units() -> None:
    evidence: dict[str, float | str | None] = {
        "step_ms": 61.0,
        "waited_s": 2.5,
        "kv_share": 0.93,
        "failures": 12,
        "node": "a",
        "prompt_tokens_ahead": 159_756.34,
        "times_as_slow": 2.25,
        "clock_mhz": 1095.0,
        "temperature_c": 88.0,
        "power_w": 512.4,
        "last_step_ago_s": 20.4,
        "unknown": None,
    }
    finding = said.Finding("x", "y", evidence=evidence)
    assert evidence_of(finding) == [
        ("step", "61 ms"),
        ("waited", "2.50 s"),
        ("KV", "93%"),
        ("failures", "12"),
        ("node", "a"),
        ("prompt tokens ahead", "159,756"),
        ("times as slow", "2.25"),
        ("clock", "1,095 MHz"),
        ("temperature", "88 °C"),
        ("power", "512 W"),
        ("last step ago", "20 s"),
        ("unknown", "–"),
    ]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["127.0.0.1:9001", "127.0.0.1:9002"], ["9001", "9002"]),
        (["vllm-1.ns.svc:8000", "vllm-2.ns.svc:8000"], ["1", "2"]),
        (["w1", "w2"], ["w1", "w2"]),
        (["10.0.0.1:80", "10.0.1.2:80"], ["0.1", "1.2"]),
        (["a:1"], ["a:1"]),
        ([":", "::"], [":", "::"]),
    ],
)
def test_names_lose_what_all_have_in_common(names: list[str], short: list[str]) -> None:
    assert [short_names(names)[name] for name in names] == short


@given(st.lists(st.text("ab.:", min_size=1, max_size=8), unique=True))
def test_short_names_stay_different(names: list[str]) -> None:
    short = short_names(names)
    assert len(set(short.values())) == len(names)
    assert all(short.values())


@pytest.mark.parametrize(
    ("said_of", "text"),
    [
        (words.seconds(0.00042), "0.4 ms"),
        (words.seconds(0.021), "21 ms"),
        (words.seconds(1.234), "1.23 s"),
        (words.seconds(None), "–"),
        (words.seconds(130), "2 min"),
        (words.promised(0.5), "500 ms"),
        (words.promised(2.0), "2 s"),
        (words.span(3600), "1 h"),
        (words.span(5400), "1.5 h"),
        (words.share(0.99996), "99.9%"),
        (words.share(1.0), "100%"),
        (words.share(0.9432), "94.3%"),
        (words.percent(-0.3), "−30%"),
        (words.times(3.1), "3.10×"),
        (words.count(1920), "1,920"),
        (words.count(7.25), "7.2"),
        (words.money(0.1234), "0.123"),
        (words.plainly("others_prefill"), "others' prefill"),
        (words.plainly("a_new_cause"), "a new cause"),
    ],
)
def test_numbers_read_at_a_glance(said_of: str, text: str) -> None:
    assert said_of == text
