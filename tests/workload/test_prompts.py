from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paceline.workload.prompts import passage, prompt_text
from paceline.workload.traces import Arrival


def of(tokens: int, *blocks: int) -> Arrival:
    return Arrival(0.0, tokens, 1, blocks=blocks)


@given(st.integers(1, 400_000), st.lists(st.integers(0, 2**60), max_size=30))
def test_a_prompt_has_about_four_characters_a_token(tokens: int, blocks: list[int]) -> None:
    assert len(prompt_text(of(tokens, *blocks), 0)) == 4 * tokens


def test_shared_blocks_are_shared_text_and_the_rest_is_not() -> None:
    one, two = prompt_text(of(1200, 1, 2), 0), prompt_text(of(1200, 1, 2), 1)
    assert one[:4096] == two[:4096]
    assert one[4096:4100] != two[4096:4100]
    assert prompt_text(of(1024, 1, 2), 0)[:2048] == prompt_text(of(1024, 1, 3), 0)[:2048]
    assert prompt_text(of(1024, 1, 2), 0) != prompt_text(of(1024, 1, 3), 0)


def test_another_salt_finds_no_warm_cache() -> None:
    assert prompt_text(of(600, 1), 0, "a")[:8] != prompt_text(of(600, 1), 0, "b")[:8]


def test_a_literal_prompt_is_sent_as_it_is() -> None:
    assert prompt_text(Arrival(0.0, 5, 1, prompt="Why?"), 0) == "Why?"


@given(st.text(max_size=20), st.integers(0, 300_000), st.integers(0, 300_000))
def test_a_shorter_passage_begins_a_longer_one(name: str, a: int, b: int) -> None:
    short, long = sorted((a, b))
    assert passage(name, long).startswith(passage(name, short))
