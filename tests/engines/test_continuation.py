"""Do only such generations go on elsewhere that end the same?"""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.continuation import PENALTIES, STATEFUL
from paceline.engines.adapter import ADAPTERS, Adapter, make_adapter

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"role": "user", "content": "Hi"}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"stream": True, "messages": [ASK]},
    TEXT: {"stream": True, "prompt": "Once", "max_tokens": 9},
}


def adapter(kind: str) -> Adapter:
    return make_adapter(kind, "http://engine", "m", "")


@pytest.mark.parametrize("kind", ADAPTERS)
@given(prompt=st.text(), text=st.text(min_size=1))
def test_a_text_goes_on_where_it_ended(kind: str, prompt: str, text: str) -> None:
    body = BODIES[TEXT] | {"prompt": prompt, "seed": 1}
    assert adapter(kind).continuation(TEXT, body, text, None) == body | {"prompt": prompt + text}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_token_ids_go_on_as_token_ids(kind: str) -> None:
    body = BODIES[TEXT] | {"prompt": [1, 2]}
    assert adapter(kind).continuation(TEXT, body, "x", [3]) == body | {"prompt": [1, 2, 3]}
    assert adapter(kind).continuation(TEXT, body, "x", None) is None


@pytest.mark.parametrize("kind", ADAPTERS)
def test_only_a_single_prompt_goes_on(kind: str) -> None:
    go_on = adapter(kind).continuation
    some = {"max_tokens": 9}
    assert go_on(TEXT, {"prompt": ["a"], **some}, "b", None) == {"prompt": "ab", **some}
    assert go_on(TEXT, {"prompt": [[1]], **some}, "b", [2]) == {"prompt": [1, 2], **some}
    assert go_on(TEXT, {"prompt": ["a", "b"]}, "c", None) is None
    assert go_on(TEXT, {"prompt": [[1], [2]]}, "c", [3]) is None
    assert go_on(TEXT, {}, "c", [3]) is None


def test_a_text_of_no_stated_length_keeps_the_length_that_its_engine_gives_it() -> None:
    body = {"prompt": "Once"}
    for kind, limit in (
        ("vllm", 16),
        ("sglang", 16),
        ("openai", 16),
        ("llamacpp", None),
        ("trtllm", None),
    ):
        longer = adapter(kind).continuation(TEXT, body, " upon", None)
        assert longer is not None
        assert longer.get("max_tokens") == limit


def test_a_chat_with_thoughts_in_its_answer_cannot_go_on() -> None:
    for text in ("<think>Hm", "Hm</think>Yes"):
        assert adapter("vllm").continuation(CHAT, BODIES[CHAT], text, None) is None


def test_a_chat_at_vllm_goes_on_within_the_answer() -> None:
    assert adapter("vllm").continuation(CHAT, BODIES[CHAT], "Hel", None) == {
        "stream": True,
        "messages": [ASK, {"role": "assistant", "content": "Hel"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


def test_a_chat_that_began_as_a_continuation_stays_one_message() -> None:
    begun = {"role": "assistant", "content": "Hel"}
    body = BODIES[CHAT] | {"messages": [ASK, begun]}
    longer = [ASK, {"role": "assistant", "content": "Hello"}]
    at_vllm = adapter("vllm").continuation(CHAT, body | {"continue_final_message": True}, "lo", [])
    assert at_vllm is not None
    assert at_vllm["messages"] == longer
    assert adapter("llamacpp").continuation(CHAT, body, "lo", []) == body | {"messages": longer}


def test_a_chat_at_llamacpp_goes_on_in_streams_only() -> None:
    go_on = adapter("llamacpp").continuation
    longer = [ASK, {"role": "assistant", "content": "Hel"}]
    assert go_on(CHAT, BODIES[CHAT], "Hel", None) == {"stream": True, "messages": longer}
    assert go_on(CHAT, {"messages": [ASK]}, "Hel", None) is None


def test_a_chat_at_sglang_goes_on_after_the_mark_with_which_answers_begin() -> None:
    assert adapter("sglang").continuation(CHAT, BODIES[CHAT], "Hel", None) == {
        "stream": True,
        "messages": [ASK, {"role": "assistant", "content": "Hel"}],
        "continue_final_message": True,
    }


def test_a_chat_whose_last_message_sglang_took_for_a_users_cannot_go_on() -> None:
    """It would be an assistant's again, with an answer after it."""
    body = BODIES[CHAT] | {"messages": [ASK, {"role": "assistant", "content": "Hel"}]}
    go_on = adapter("sglang").continuation
    assert go_on(CHAT, body, "lo", None) is None
    longer = go_on(CHAT, body | {"continue_final_message": True}, "lo", None)
    assert longer is not None
    assert longer["messages"] == [ASK, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_penalty_for_what_an_answer_has_said_cannot_go_on_at_sglang(path: str) -> None:
    go_on = adapter("sglang").continuation
    assert go_on(path, BODIES[path] | {"repetition_penalty": 1.1}, "x", None) is None
    assert go_on(path, BODIES[path] | {"repetition_penalty": 1.0}, "x", None) is not None


@pytest.mark.parametrize("kind", ["openai", "trtllm"])
def test_a_chat_goes_on_nowhere_else(kind: str) -> None:
    assert adapter(kind).continuation(CHAT, BODIES[CHAT], "Hel", None) is None


def test_ids_of_tokens_are_asked_for_where_they_are_told_beside_the_text() -> None:
    for kind in ("vllm", "sglang"):
        assert adapter(kind).token_ids(TEXT) == {"return_token_ids": True}
        assert adapter(kind).token_ids(CHAT) == {}
    for kind in ("trtllm", "llamacpp", "openai"):
        assert adapter(kind).token_ids(TEXT) == {}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/embeddings"])
def test_other_endpoints_cannot_go_on(kind: str, path: str) -> None:
    assert adapter(kind).continuation(path, BODIES[CHAT], "x", None) is None


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "field",
    [
        {"n": 2},
        {"best_of": 3},
        {"logprobs": 0},
        {"top_logprobs": 5},
        *({name: 0.5} for name in PENALTIES),
        {"response_format": {"type": "json_object"}},
        *({name: [1]} for name in STATEFUL),
    ],
)
def test_what_keeps_state_beside_its_tokens_cannot_go_on(
    kind: str, path: str, field: dict[str, Any]
) -> None:
    assert adapter(kind).continuation(path, BODIES[path] | field, "x", [1]) is None


@pytest.mark.parametrize(
    "field",
    [
        {"n": 1},
        {"n": None},
        *({name: 0} for name in PENALTIES),
        {"logprobs": False},
        {"tools": []},
        {"echo": False},
        {"response_format": {"type": "text"}},
    ],
)
def test_fields_that_ask_for_nothing_do_not_hinder(field: dict[str, Any]) -> None:
    body = BODIES[TEXT] | field
    assert adapter("vllm").continuation(TEXT, body, "x", None) == body | {"prompt": "Oncex"}


@given(
    st.sampled_from([CHAT, TEXT]),
    st.dictionaries(
        st.sampled_from(["messages", "prompt", "n", "response_format", "stream"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["role", "content"]), inner)
            ),
            max_leaves=5,
        ),
    ),
)
def test_no_body_is_too_strange_to_be_judged(path: str, body: dict[str, Any]) -> None:
    for kind in ADAPTERS:
        adapter(kind).continuation(path, body, "x", [1])


def test_priority_is_sent_only_where_it_is_read() -> None:
    assert adapter("vllm").extras(CHAT, 2) == {"priority": 2}
    assert adapter("vllm").extras("/v1/messages", 2) == {}
    assert adapter("llamacpp").extras(CHAT, 2) == {}
    assert adapter("openai").extras(CHAT, 2) == {}
