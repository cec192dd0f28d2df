from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import answer, end, event, role, token

from paceline.workload.histogram import BUCKETS, bucket, middle_s, quantile_s
from paceline.workload.meter import Meter


def metered(*reads: tuple[float, bytes], **settings: bool) -> Meter:
    meter = Meter(**settings)
    for now, data in reads:
        meter.feed(data, now)
    return meter


def test_times_are_taken_from_reads() -> None:
    meter = metered(
        (1.0, role()),
        (2.0, token("a")),
        (2.1, token("b")),
        (2.5, token("c")),
        (2.6, token("d") + end(4)),
    )
    assert meter.first_at == 2.0
    assert meter.stall_s == pytest.approx(0.4)
    assert meter.itl_s == pytest.approx(0.2)
    assert sum(meter.gaps.values()) == 3
    assert (meter.prompt_tokens, meter.output_tokens, meter.whole) == (7, 4, True)


def test_tokens_that_come_together_share_the_gap_before_them() -> None:
    meter = metered((0.0, token("a")), (0.4, token("b") + token("c")), (0.5, end(3)))
    assert meter.gaps == {bucket(0.2): 2}
    assert meter.stall_s == pytest.approx(0.4)
    assert meter.itl_s == pytest.approx(0.2)


@pytest.mark.parametrize("key", ["content", "reasoning_content", "reasoning", "refusal"])
def test_any_kind_of_content_is_a_first_token(key: str) -> None:
    meter = metered((0.5, role()), (1.0, token("", **{key: "x"})))
    assert meter.first_at == 1.0


def test_a_tool_call_is_a_first_token_too() -> None:
    assert metered((1.0, token("", tool_calls=[{"index": 0}]))).first_at == 1.0


def test_comments_and_empty_deltas_are_no_tokens() -> None:
    meter = metered(
        (1.0, b": keep-alive\n\n"), (2.0, role()), (3.0, token("a")), (4.0, b": ka\n\n")
    )
    assert (meter.first_at, meter.chunk_tokens) == (3.0, 1)


def test_completions_are_read_like_chats() -> None:
    text = [event({"choices": [{"text": t, "finish_reason": None}]}) for t in ("a", "b")]
    meter = metered((1.0, text[0]), (2.0, text[1]))
    assert (meter.first_at, meter.chunk_tokens, meter.itl_s) == (1.0, 2, 1.0)


def test_text_that_looks_like_a_protocol_is_still_a_token() -> None:
    tricky = '"finish_reason":"stop" [DONE] {"error": {}} "choices":[]\r\n\n\ndata: x'
    meter = metered((1.0, token("a")), (2.0, token(tricky)), (3.0, token(tricky)))
    assert (meter.chunk_tokens, meter.whole, meter.error) == (3, False, "")


def test_an_error_within_the_stream_is_told() -> None:
    meter = metered((1.0, token("a")), (2.0, event({"error": {"message": "out of memory"}})))
    assert meter.error == "out of memory"


def test_several_tokens_a_chunk_are_counted_where_the_engine_tells() -> None:
    def chunk(so_far: int) -> bytes:
        choice = {"delta": {"content": "abc"}, "finish_reason": None}
        return event({"choices": [choice], "usage": {"completion_tokens": so_far}})

    meter = metered((1.0, chunk(3)), (2.0, chunk(7)), (2.5, end(7)), exact=True)
    assert (meter.first_tokens, meter.chunk_tokens) == (3, 7)
    assert meter.gaps == {bucket(0.25): 4}
    assert meter.itl_s == pytest.approx(0.25)


def test_untold_tokens_of_chunks_still_give_the_true_mean() -> None:
    chunks = [(float(i), token("abcd")) for i in range(5)]
    assert metered(*chunks, (5.0, end(20))).itl_s == pytest.approx(0.25)


def test_an_uncounted_end_of_text_token_does_not_shorten_the_mean() -> None:
    assert metered((0.0, token("a")), (1.0, token("b")), (1.0, end(3))).itl_s == 1.0


@given(st.lists(st.integers(0, 3000), max_size=12), st.booleans())
def test_it_does_not_matter_where_reads_are_cut(cuts: list[int], crlf: bool) -> None:
    stream = answer(12).replace(b"\n", b"\r\n") if crlf else answer(12)
    places = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
    meter = metered(*((0.0, stream[a:b]) for a, b in pairwise(places)), keep_text=True)
    assert (meter.chunk_tokens, meter.output_tokens, meter.whole) == (12, 12, True)
    assert "".join(meter.text) == "".join(f" t{i}" for i in range(12))


@given(st.floats(2e-5, 150.0))
def test_a_bucket_is_within_three_percent_of_its_gaps(seconds: float) -> None:
    assert middle_s(bucket(seconds)) == pytest.approx(seconds, rel=0.03)


@given(st.floats(0, 1e9))
def test_every_gap_has_a_bucket(seconds: float) -> None:
    assert 0 <= bucket(seconds) < BUCKETS


@given(st.lists(st.floats(1e-4, 10.0), min_size=1), st.floats(0.01, 1.0))
def test_quantiles_of_buckets_are_those_of_the_gaps(gaps: list[float], q: float) -> None:
    counts: dict[int, int] = {}
    for gap in gaps:
        counts[bucket(gap)] = counts.get(bucket(gap), 0) + 1
    rank = next(n for n in range(1, len(gaps) + 1) if n >= q * len(gaps))
    assert quantile_s(counts, q) == pytest.approx(sorted(gaps)[rank - 1], rel=0.03)


def test_without_gaps_there_is_no_quantile() -> None:
    assert quantile_s({}, 0.5) is None
