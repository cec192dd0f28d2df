"""Are the pseudo tokens the same every time, and do continuations line up?"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.engines.emulated import EngineSettings, load_engines
from paceline.engines.emulated.asks import ChatAsk
from paceline.engines.emulated.tokens import (
    TEXT_IDS,
    BlockChain,
    answer_length,
    encode,
    next_number,
    partial_answer,
)


@given(st.text(max_size=200), st.integers(0, 50), st.integers(1, 50))
def test_a_partial_answer_continues_the_prompt_that_it_was_given_to(
    text: str, start: int, count: int
) -> None:
    prompt = encode(text + "?")
    answer = "".join(f" t{i}" for i in range(start, start + count))
    continued = encode(text + "?" + answer)
    assert continued[: len(prompt)] == prompt
    assert partial_answer(continued) == count
    assert next_number(continued) == start + count


def test_text_gives_a_token_for_every_four_bytes() -> None:
    assert len(encode("x" * 400)) == 100
    assert all(0 <= i < TEXT_IDS for i in encode("Grüße, 世界!"))


def test_a_chat_continuation_extends_the_rendered_prompt() -> None:
    question = {"role": "user", "content": "Why?"}
    answer = {"role": "assistant", "content": " t0 t1"}
    (first,) = ChatAsk(messages=[question]).prompts()
    (more,) = ChatAsk(
        messages=[question, answer], add_generation_prompt=False, continue_final_message=True
    ).prompts()
    (next_turn,) = ChatAsk(messages=[question, answer, question]).prompts()
    assert more == first + encode(" t0 t1")
    assert next_turn[: len(more)] == more


@given(st.lists(st.integers(0, 99), max_size=100), st.lists(st.integers(0, 99), max_size=100))
def test_chains_agree_exactly_as_far_as_the_text_does(a: list[int], b: list[int]) -> None:
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    common = min(len(a), len(b)) if common is None else common
    left, right = list(BlockChain(a, 4)), list(BlockChain(b, 4))
    assert left[: common // 4] == right[: common // 4]
    assert set(left[common // 4 :]).isdisjoint(right[common // 4 :])


def test_a_salt_separates_caches() -> None:
    assert list(BlockChain(range(4), 4, salt="a")) != list(BlockChain(range(4), 4, salt="b"))


@given(st.integers(0, 30), st.integers(0, 30), st.integers(-9, 9), st.integers(-9, 9))
def test_a_chain_looked_at_in_parts_is_the_same_as_all_at_once(
    prompt: int, answer: int, start: int, stop: int
) -> None:
    chain = BlockChain(range(prompt), 4, range(prompt, prompt + answer))
    whole = list(BlockChain(range(prompt + answer), 4))
    assert len(chain) == len(whole)
    assert chain[start:stop] == whole[start:stop]
    assert list(chain) == whole


def test_answer_lengths_have_the_mean_that_was_set() -> None:
    lengths = [answer_length([i], 100.0, seed=1) for i in range(4000)]
    assert sum(lengths) / len(lengths) == pytest.approx(100, rel=0.06)
    assert min(lengths) >= 1


def test_a_config_names_engines(tmp_path: Path) -> None:
    file = tmp_path / "engines.yaml"
    file.write_text("engines: [{profile: tiny, port: 9001, model: m}, {profile: a100-llama-8b}]")
    assert load_engines(file) == [
        EngineSettings(profile="tiny", port=9001, model="m"),
        EngineSettings(profile="a100-llama-8b"),
    ]


@pytest.mark.parametrize(
    ("text", "because"),
    [
        ("engines: [{profile: huge}]", "unknown profile 'huge'; there are h100-llama-8b"),
        ("engines: [{prot: 9}]", r"unknown field `prot` - at `\$.engines\[0\]`"),
        ("engines: [{port: many}]", r"Expected `int`, got `str` - at `\$.engines\[0\].port`"),
        ("engines: [{port: 9001}, {port: 9001}]", "port 9001 is used twice"),
        ("engines: []", "no engines"),
        ("engines: [", "line 1"),
        ("", "Expected `object`"),
    ],
)
def test_a_config_that_is_wrong_says_where(tmp_path: Path, text: str, because: str) -> None:
    file = tmp_path / "engines.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=because) as error:
        load_engines(file)
    assert str(file) in str(error.value)
