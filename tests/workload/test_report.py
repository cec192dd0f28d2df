from __future__ import annotations

import csv
import io
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from paceline.domain.promise import Promise
from paceline.workload.histogram import bucket
from paceline.workload.outcome import Outcome
from paceline.workload.report import as_json, as_table, remarks, summarize, write_csv

PROMISE = Promise(ttft_s=0.5, itl_s=0.04, stall_s=1.0)


def outcome(**changes: Any) -> Outcome:
    good: dict[str, Any] = {
        "index": 0,
        "at_s": 0.0,
        "behind_s": 0.0,
        "ended_s": 10.0,
        "status": 200,
        "output_tokens": 100,
        "ttft_s": 0.1,
        "itl_s": 0.02,
        "stall_s": 0.1,
        "gaps": {bucket(0.02): 99},
    }
    return Outcome(**good | changes)


@pytest.mark.parametrize(
    ("changes", "miss"),
    [
        ({}, ""),
        ({"error": "HTTP 500"}, "failed"),
        ({"ttft_s": None}, "failed"),
        ({"ttft_s": 0.6, "itl_s": 0.1}, "ttft"),
        ({"itl_s": 0.05}, "itl"),
        ({"stall_s": 2.0}, "stall"),
    ],
)
def test_a_miss_is_named_by_what_broke_first(changes: dict[str, Any], miss: str) -> None:
    assert outcome(**changes).miss(PROMISE) == miss


def test_refused_and_failed_requests_count_as_misses() -> None:
    refused = outcome(error="HTTP 429: busy", status=429, ttft_s=None, output_tokens=0, gaps={})
    failed = outcome(error="oom", output_tokens=10)
    total = summarize([outcome(), outcome(ttft_s=0.7), refused, failed], {"": PROMISE}).tiers["all"]
    assert (total.requests, total.ok, total.refused, total.failed, total.kept) == (4, 2, 1, 1, 1)
    assert total.attainment == 0.25
    assert total.missed == {"failed": 2, "ttft": 1}


def test_goodput_counts_only_what_kept_its_promise() -> None:
    late = outcome(at_s=2.0, ended_s=22.0, itl_s=1.0)
    total = summarize([outcome(at_s=2.0), late], {"": PROMISE}).tiers["all"]
    assert total.goodput_requests_per_s == pytest.approx(1 / 20)
    assert total.goodput_tokens_per_s == pytest.approx(100 / 20)
    assert total.tokens_per_s == pytest.approx(200 / 20)


def test_each_tier_is_held_to_its_own_promise() -> None:
    outcomes = [outcome(tier="premium", ttft_s=0.3), outcome(tier="standard", ttft_s=0.3)]
    report = summarize(outcomes, {"premium": Promise(ttft_s=0.2), "": Promise(ttft_s=1.0)})
    assert list(report.tiers) == ["premium", "standard", "all"]
    assert [s.attainment for s in report.tiers.values()] == [0.0, 1.0, 0.5]
    assert report.tiers["all"].promise is None


def test_quantiles_are_by_nearest_rank() -> None:
    outcomes = [outcome(ttft_s=i / 100) for i in range(1, 101)]
    ttft = summarize(outcomes, {}).tiers["all"].ttft_s
    assert (ttft.p50, ttft.p90, ttft.p99) == (0.5, 0.9, 0.99)
    assert ttft.mean == pytest.approx(0.505)


def test_shares_of_workers_are_of_the_requests_they_answered() -> None:
    outcomes = [outcome(worker=w) for w in ("a", "a", "b", "a", "")]
    assert summarize(outcomes, {}).tiers["all"].workers == {"a": 0.75, "b": 0.25}


def test_an_overall_gap_is_weighted_by_tokens() -> None:
    outcomes = [outcome(), outcome(gaps={bucket(0.5): 1})]
    gaps = summarize(outcomes, {}).tiers["all"].gap_s
    assert gaps.p50 == pytest.approx(0.02, rel=0.03)
    assert gaps.p99 == pytest.approx(0.02, rel=0.03)


def test_json_has_no_infinities_and_csv_has_every_request() -> None:
    outcomes = [outcome(), outcome(index=1, error="a, b", ttft_s=None)]
    report = msgspec.json.decode(as_json(summarize(outcomes, {"": Promise(ttft_s=0.5)})))
    assert report["tiers"]["all"]["promise"] == {"ttft_s": 0.5}
    file = io.StringIO()
    write_csv(outcomes, file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [row["error"] for row in rows] == ["", "a, b"]
    assert rows[0]["ttft_s"] == "0.1"


def test_the_reader_is_warned_of_errors_and_of_a_late_driver() -> None:
    lines = remarks(summarize([outcome(behind_s=2.0, error="oom")] * 3, {}))
    assert lines[0] == "3 x oom"
    assert "too busy" in lines[1]
    assert remarks(summarize([outcome()], {})) == []


OUTCOMES = st.builds(
    outcome,
    tier=st.sampled_from(["", "a", "b"]),
    error=st.sampled_from(["", "", "x"]),
    status=st.sampled_from([0, 200, 429]),
    ttft_s=st.none() | st.floats(0, 2),
    itl_s=st.floats(0, 0.1),
    gaps=st.dictionaries(st.integers(0, 383), st.integers(1, 9), max_size=3),
)


@given(st.lists(OUTCOMES, max_size=20))
def test_every_request_is_counted_once_and_any_report_can_be_drawn(outcomes: list[Outcome]) -> None:
    report = summarize(outcomes, {"": PROMISE})
    total = report.tiers["all"]
    assert total.requests == len(outcomes) == total.kept + sum(total.missed.values())
    tiers = [summary for name, summary in report.tiers.items() if name != "all"]
    assert not tiers or sum(summary.requests for summary in tiers) == total.requests
    as_json(report)
    Console(file=io.StringIO()).print(as_table(report))


def test_brackets_in_an_error_do_not_break_the_print() -> None:
    report = summarize([outcome(error="HTTP 500: [/red] [DONE]", tier="[/x]")], {})
    file = io.StringIO()
    console = Console(file=file, markup=False, width=200)
    console.print(as_table(report), *remarks(report), sep="\n")
    assert "[/red] [DONE]" in file.getvalue()
    assert "[/x]" in file.getvalue()
