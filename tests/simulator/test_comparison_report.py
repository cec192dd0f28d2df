"""Does a report tell what there is to tell, and is it well-formed?"""

from __future__ import annotations

import io
from collections.abc import Sequence
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from played import SCENARIO, played
from rich.console import Console

from paceline.markup import join, tag
from paceline.simulator import report
from paceline.simulator.charts import (
    DASHES,
    MARKERS,
    Band,
    Line,
    Point,
    Rule,
    chart,
    linear_axis,
    log_axis,
    nines_axis,
)
from paceline.simulator.compare import Comparison, compare
from paceline.simulator.html import page

SKILLS = {"headroom": 0.9, "least-requests": 0.4, "round-robin": 0.0}


def comparison(policies: Sequence[str] = tuple(SKILLS), seeds: int = 3, **at: str) -> Comparison:
    names = [(name, seed) for name in policies for seed in range(seeds)]
    return compare([played(n, s, SKILLS.get(n, 0.5)) for n, s in names], at)


def printed(*comparisons: Comparison, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(*report.for_terminal(comparisons), sep="\n")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def parsed(text: str) -> ElementTree.Element:
    """The page as XML, which is stricter than browsers; only the void elements are mended."""
    body = text.removeprefix("<!doctype html>\n")
    for part in body.split("<meta ")[1:]:
        body = body.replace(f"<meta {part.split('>')[0]}>", "")
    return ElementTree.fromstring(body)


# The terminal.


def test_the_headline_says_who_is_best_and_by_how_much() -> None:
    said = report.headline(comparison())
    assert said.startswith("headroom keeps ")
    assert "points more than least-requests" in said
    assert said.endswith("over 3 seeds.")


def test_one_seed_is_said_to_prove_nothing() -> None:
    assert "one seed can't tell" in report.headline(comparison(seeds=1))
    assert report.headline(comparison(["headroom"], 1)).endswith("over 1 seed.")


def test_a_tie_is_called_one() -> None:
    tied = compare(
        [msgspec.structs.replace(r, policy=p) for p in "ab" for r in comparison(["a"]).results]
    )
    assert "tied with b" in report.headline(tied)


def two_that_chance_may_have_parted() -> Comparison:
    """98 and 61 % over two seeds: the interval of the difference contains 0."""
    shares = {"headroom": (0.99, 0.97), "least-requests": (0.40, 0.82)}
    return compare(
        [
            msgspec.structs.replace(played(name, seed, 1.0), attainment=kept)
            for name, both in shares.items()
            for seed, kept in enumerate(both)
        ],
        {"load": "1"},
    )


def test_what_chance_may_have_made_is_called_not_told_apart_everywhere() -> None:
    unsure = two_that_chance_may_have_parted()
    assert "not told apart from least-requests: more seeds" in report.headline(unsure)
    assert "tied" not in report.headline(unsure)
    assert "not told apart" in printed(unsure, width=80)
    assert report.starred(unsure, "least-requests").endswith(" ?")
    assert "In 2 not all are told apart" in report.sweep_headline([unsure, unsure])
    text = page(SCENARIO, [unsure])
    assert "<small>not told apart</small>" in text
    assert "tied with best" not in text


def test_the_oracle_is_named_beside_the_best() -> None:
    said = report.headline(comparison(["headroom", "least-requests", "oracle"]))
    assert said.startswith("headroom keeps")
    assert "The oracle, which need not learn or guess, keeps" in said


def test_the_tables_name_every_policy_tier_and_cause() -> None:
    text = printed(comparison())
    for word in (*SKILLS, "premium", "standard", "ttft", "TTFT", "KV use", "weighted", "worse"):
        assert word in text


@pytest.mark.parametrize("width", [50, 80, 120])
def test_nothing_is_cut_however_narrow_the_terminal(width: int) -> None:
    text = printed(comparison(["headroom", "prefix-affinity", "least-requests"], 2), width=width)
    assert "…" not in text
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


def test_what_is_kept_and_the_difference_stand_in_one_line_on_80_columns() -> None:
    shown = comparison(["headroom", "prefix-affinity", "kv-cost-output"], 2)
    _, _, table = printed(shown, width=80).partition("verdict")
    lines = table.splitlines()
    for name, standing in shown.policies.items():
        line = next(line for line in lines if line.startswith(name))
        assert report.share(standing.attainment) in line
        assert report.gained(standing) in line
        assert line.rstrip().endswith(report.judged(standing))


def test_a_single_policy_is_not_said_to_be_the_best_of_all() -> None:
    alone = [comparison(["headroom"], load=load) for load in ("1", "2")]
    assert report.sweep_headline(alone) == ""
    assert "best" not in printed(*alone)
    text = page(SCENARIO, alone)
    assert "is best" not in text
    assert "<small>" not in text
    assert "* the best" not in text


def test_a_sweep_is_one_table_more() -> None:
    swept = [comparison(load="0.5"), comparison(load="[1.0]")]
    text = printed(*swept)
    assert "one-throttled, load 0.5" in text
    assert "headroom is best, or tied with the best, in 2 of 2 settings." in text
    assert "[1.0]" in text
    assert "*" in text


def test_many_policies_of_a_sweep_stand_in_rows() -> None:
    names = [f"policy-{i}" for i in range(8)]
    table = report.sweep_table([comparison(names, 2, load=load) for load in ("1", "2")])
    assert [column.header for column in table.columns] == ["load", "1", "2"]
    assert table.row_count == 8


def test_json_holds_all_comparisons_and_no_infinity() -> None:
    text = report.as_json([comparison(load="1"), comparison(load="2")])
    assert [c.at for c in msgspec.json.decode(text, type=list[Comparison])] == [
        {"load": "1"},
        {"load": "2"},
    ]
    assert b"Infinity" not in text


@pytest.mark.parametrize(
    ("part", "text"), [(0.1234, "12.3"), (0.001, "0.1"), (0.00012, "0.01"), (1.0, "100.0")]
)
def test_a_small_share_is_not_shown_as_none(part: float, text: str) -> None:
    assert report.percent(part) == text


# The page.


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    for text in (page(SCENARIO, [comparison()]), page(SCENARIO, [comparison(seeds=1)])):
        root = parsed(text)
        assert root.get("lang") == "en"
        for element in root.iter():
            assert not {"src", "href"} & set(element.keys())
            assert element.tag not in {"script", "link", "img"}
        assert "http" not in text


def test_every_chart_has_words_for_who_cannot_see_it() -> None:
    root = parsed(page(SCENARIO, [comparison()]))
    pictures = list(root.iter("svg"))
    assert pictures
    for picture in pictures:
        assert picture.get("aria-label") or picture.get("aria-hidden") == "true"
    for table in root.iter("table"):
        assert all(cell.get("scope") for cell in table.iter("th"))


def test_the_page_shows_faults_promises_and_late_workers() -> None:
    text = page(SCENARIO, [comparison()])
    for words in (
        "w3 3x slower",
        "w1 link 50x slower",
        "all crash",
        "late0 added",
        "promised: 500 ms",
        "TTFT, premium",
    ):
        assert words in text


def test_words_of_the_scenario_are_no_markup() -> None:
    assert "One of &lt;four&gt; workers is throttled &amp; comes back." in page(
        SCENARIO, [comparison()]
    )


@pytest.mark.parametrize("values", [("1", "4", "2"), ("random", "chat"), ("1", "inf"), ("3",)])
def test_a_sweep_has_charts_over_its_values(values: tuple[str, ...]) -> None:
    swept = [comparison(seeds=2, load=value) for value in values for _ in range(2)][::2]
    text = page(SCENARIO, swept if len(swept) > 1 else swept * 2)
    assert "goodput, requests/s over load" in text
    parsed(text)


def test_nothing_answered_is_drawn_too() -> None:
    nothing = compare([played("a", 0, 1.0)])
    empty = msgspec.structs.replace(
        nothing.results[0],
        tiers={},
        workers={},
        series=msgspec.structs.replace(
            nothing.results[0].series, arrivals=(0,) * 60, attainment=(None,) * 60
        ),
    )
    parsed(page(SCENARIO, [compare([empty])]))


def test_no_table_has_more_columns_than_a_page_is_wide() -> None:
    moved = [
        msgspec.structs.replace(r, total=msgspec.structs.replace(r.total, moved=7))
        for r in comparison().results
    ]
    for table in parsed(page(SCENARIO, [compare(moved)])).iter("table"):
        assert len(next(table.iter("tr"))) <= 8


# Charts.


def test_no_two_policies_look_alike() -> None:
    looks = {(i % 8, DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)]) for i in range(120)}
    assert len(looks) == 120


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", tag("b", "1 < 2"), title='"') == '<p title="&quot;"><b>1 &lt; 2</b></p>'
    assert join(["<", tag("b")]) == "&lt;<b></b>"


@given(
    st.floats(-1e6, 1e6).flatmap(
        lambda low: st.tuples(st.just(low), st.floats(low + 1e-3 + abs(low) * 1e-3, low + 2e6))
    )
)
def test_ticks_are_few_and_within(bounds: tuple[float, float]) -> None:
    low, high = bounds
    ticks = [value for value, _ in linear_axis("", low, high).ticks]
    slack = (high - low) * 1e-6
    assert 2 <= len(ticks) <= 6
    assert all(low - slack <= tick <= high + slack for tick in ticks)


@given(st.floats(1e-4, 10.0), st.floats(1.4, 1e5))
def test_logarithmic_ticks_are_few_and_within(low: float, ratio: float) -> None:
    ticks = [value for value, _ in log_axis("", low, low * ratio, str).ticks]
    assert len(ticks) <= 8
    assert all(low <= tick <= low * ratio for tick in ticks)


def test_the_nines_are_equally_far_apart() -> None:
    places = [nines_axis("", 0.999).place(share) for share in (0.0, 0.9, 0.99, 0.999)]
    assert places == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_line_is_broken_where_nothing_is_known() -> None:
    ys = (1.0, 2.0, None, 3.0, 4.0)
    line = Line("a", 0, [Point(float(x), y) for x, y in enumerate(ys)])
    axes = linear_axis("x", 0, 4), linear_axis("y", 0, 4)
    bands, rules = [Band(1, 1, "now"), Band(2, 3, "then")], [Rule(2.0, "bound"), Rule(9.0, "far")]
    drawn = ElementTree.fromstring(chart("A line", *axes, [line], bands, rules))
    group = next(g for g in drawn.iter("g") if g.get("class") == "line c0")
    assert len(list(group.iter("path"))) == 2
    words = [text.text for text in drawn.iter("text")]
    assert {"now", "then", "bound"} <= set(words)
    assert "far" not in words, "beyond the axis"


def test_what_gateways_did_is_told_where_they_did_anything() -> None:
    quiet, moved = (
        compare([msgspec.structs.replace(r, total=msgspec.structs.replace(r.total, moved=n))])
        for r in [played("headroom", 1, 0.9)]
        for n in (0, 7)
    )
    assert report.measures_of(quiet) == {}
    table = report.figures_table(moved, report.measures_of(moved))
    assert [column.header for column in table.columns][-1] == "moved,\ntimes"
    assert list(table.columns[-1].cells) == ["7"]
