from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from paceline.workload.traces import Arrival, TraceError, load_trace, read_trace

SAMPLES = Path(__file__).parents[2] / "examples" / "traces"


def read(*lines: str, seed: int = 0) -> list[Arrival]:
    return read_trace(lines, Random(seed), "t")


def mooncake(ms: int, hash_ids: str = "[1, 2]") -> str:
    return f'{{"timestamp": {ms}, "input_length": 600, "output_length": 5, "hash_ids": {hash_ids}}}'


@pytest.mark.parametrize(
    "name", ["mooncake-sample.jsonl", "azure-conv-sample.csv", "azure-code-sample.csv"]
)
def test_the_sample_traces_are_read_whole_and_in_order(name: str) -> None:
    arrivals = load_trace(SAMPLES / name, Random(0))
    assert len(arrivals) == 800
    times = [arrival.at_s for arrival in arrivals]
    assert times == sorted(times)
    assert times[0] >= 0


def test_azure_times_count_from_the_first_request() -> None:
    first, second = read(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n",
        "2023-11-16 18:17:03.9799600,4808,10\r\n",
        "2023-11-16 18:17:04.0319600,3180,8\r\n",
    )
    assert (first.at_s, first.prompt_tokens, first.output_tokens) == (0.0, 4808, 10)
    assert second.at_s == pytest.approx(0.052)


def test_mooncake_batches_are_spread_over_their_three_seconds() -> None:
    arrivals = read(*[mooncake(0)] * 50, *[mooncake(2999)] * 50)
    assert len({arrival.at_s for arrival in arrivals}) == 100
    assert all(0 <= arrival.at_s < 3 for arrival in arrivals[:50])
    assert all(3 <= arrival.at_s < 6 for arrival in arrivals[50:])
    assert arrivals[0].blocks == (1, 2)


def test_exact_mooncake_times_are_left_alone() -> None:
    assert [arrival.at_s for arrival in read(mooncake(0), mooncake(1250))] == [0.0, 1.25]


def test_the_same_seed_spreads_batches_the_same_way() -> None:
    lines = [mooncake(0)] * 20
    assert read(*lines, seed=1) == read(*lines, seed=1) != read(*lines, seed=2)


def test_requests_with_one_prefix_share_its_blocks() -> None:
    line = (
        '{"at_s": 0, "prompt_tokens": 900, "output_tokens": 5,'
        ' "prefix": "%s", "prefix_tokens": 600}'
    )
    one, same, other = read(line % "docs", line % "docs", line % "code")
    assert len(one.blocks) == 2
    assert one.shared_tokens == 600
    assert one.blocks == same.blocks
    assert not set(one.blocks) & set(other.blocks)


def test_own_lines_may_carry_text_tier_tenant_and_batch() -> None:
    said, chat = read(
        '{"at_s": 0, "prompt": "Why is the sky blue?", "output_tokens": 5, "tier": "premium"}',
        "",
        '{"at_s": 1, "messages": [{"role": "user", "content": "Hello!"}], "output_tokens": 5,'
        ' "tenant": "acme", "batch": "night"}',
    )
    assert (said.prompt, said.prompt_tokens, said.tier) == ("Why is the sky blue?", 5, "premium")
    assert (chat.messages[0]["content"], chat.tenant, chat.batch) == ("Hello!", "acme", "night")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "empty"),
        (["hello"], "t:1: no known form"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens"], "no request after the header"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03,x,1"], "t:2: "),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03,1"], "t:2: "),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "now,1,1"], "t:2: .*isoformat"),
        ([mooncake(0), '{"timestamp": 1}'], "t:2: .*input_length"),
        ([mooncake(0), "{"], "t:2: "),
        ([mooncake(0), mooncake(-5)], "t:2: .*before the start"),
        (['{"at_s": 0, "prompt_tokens": 9}'], "t:1: .*output_tokens"),
        (['{"at_s": 0, "output_tokens": 9}'], "t:1: .*prompt_tokens, prompt or messages"),
        (['{"at_s": 0, "prompt_tokens": 0, "output_tokens": 9}'], "at least one"),
        (['{"at_s": 0, "prompt_tokens": 9, "output_tokens": 9, "teir": "x"}'], "t:1: .*teir"),
        (['{"at_s": 0, "prompt_tokens": 9, "output_tokens": 9, "prefix": "x"}'], "go together"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(lines: list[str], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        read(*lines)


def test_a_missing_or_binary_file_is_a_trace_error(tmp_path: Path) -> None:
    binary = tmp_path / "b"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none", binary):
        with pytest.raises(TraceError, match="cannot be read"):
            load_trace(path, Random(0))
