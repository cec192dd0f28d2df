"""Are the tokens of a text those of its segments, and is a segment tokenised only once?"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from folders import CHATML, SAID, SPECIAL, byte_level, folder_of, of_words
from hypothesis import given
from hypothesis import strategies as st

from paceline.tokens.tokenizer import MOST_SEGMENTS, Tokenizer

PIECES = st.sampled_from([*SPECIAL, "<|greedy|>", "<think>", " ", "\n", "  \n ", "<|", *SAID])
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=12).map("".join)
KINDS = {"byte level": byte_level(), "of words": of_words()}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(folder_of(KINDS[kind], tmp_path_factory.mktemp("model")))


@given(text=TEXTS, with_special=st.booleans())
def test_a_text_in_segments_has_the_tokens_of_the_whole(
    tokenizer: Tokenizer, kind: str, text: str, with_special: bool
) -> None:
    whole = KINDS[kind].encode(text, add_special_tokens=with_special).ids
    assert list(tokenizer.ids(text, with_special)) == whole


def test_of_a_chat_that_goes_on_only_what_is_new_is_tokenised(tmp_path: Path) -> None:
    tokenizer = Tokenizer(folder_of(byte_level(), tmp_path))
    assert tokenizer.template is not None
    messages = [{"role": "system", "content": SAID[0] * 100}]
    for turn in range(5):
        messages.append({"role": "user", "content": f"{turn} {SAID[1]}"})
        before = tokenizer.encoded
        text = tokenizer.template.render(messages=messages, add_generation_prompt=True)
        tokenizer.ids(text)
        new = tokenizer.encoded - before
        assert new < 100 if turn else new > 3000
        messages.append({"role": "assistant", "content": "yes"})
    assert tokenizer.remembered > 4 * 3000


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first(tmp_path: Path) -> None:
    tokenizer = Tokenizer(folder_of(byte_level(), tmp_path), remembered=1000)
    for i in range(50):
        tokenizer.ids(f"<|start|>{i} {SAID[0]}")
    before = tokenizer.encoded
    tokenizer.ids(f"<|start|>49 {SAID[0]}")
    assert tokenizer.encoded == before
    tokenizer.ids(f"<|start|>0 {SAID[0]}")
    assert tokenizer.encoded > before


def test_a_text_of_nothing_but_special_tokens_is_cut_a_bounded_number_of_times(
    tmp_path: Path,
) -> None:
    tokenizer, text = Tokenizer(folder_of(byte_level(), tmp_path)), "<|end|>" * 3 * MOST_SEGMENTS
    assert len(set(tokenizer.ids(text))) == 1
    assert len(tokenizer.ids(text)) == 3 * MOST_SEGMENTS
    assert tokenizer.remembered > tokenizer.encoded


def test_several_threads_may_ask_at_once(tmp_path: Path) -> None:
    tokenizer = Tokenizer(folder_of(byte_level(), tmp_path), remembered=3000)
    texts = [f"<|start|>{i % 40} {SAID[0]}<|end|>" for i in range(400)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(tokenizer.ids, texts))
    assert found == [tokenizer.ids(text) for text in texts]


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_template_in_a_file_of_its_own_stands_above_the_settings(
    tmp_path: Path, name: str
) -> None:
    folder = folder_of(byte_level(), tmp_path, template="old")
    (folder / name).write_text("new" if name.endswith("jinja") else '{"chat_template": "new"}')
    template = Tokenizer(folder).template
    assert template is not None
    assert template.render(messages=[]) == "new"


def test_special_tokens_have_their_names_in_the_template(tmp_path: Path) -> None:
    folder = folder_of(byte_level(), tmp_path, "{{ bos_token }}{{ eos_token }}{{ pad_token }}")
    template = Tokenizer(folder).template
    assert template is not None
    assert template.render() == "<|begin|><|end|>"


def test_without_one_template_there_is_none(tmp_path: Path) -> None:
    assert Tokenizer(folder_of(byte_level(), tmp_path, template=None)).template is None
    several = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": CHATML}]
    folder = folder_of(byte_level(), tmp_path, template=None, chat_template=several)
    assert Tokenizer(folder).template is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "nonsense"),
        ("tokenizer_config.json", "nonsense"),
        ("chat_template.jinja", "{% for %}"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(
    tmp_path: Path, file: str, content: str | None
) -> None:
    folder = folder_of(byte_level(), tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        Tokenizer(folder)
