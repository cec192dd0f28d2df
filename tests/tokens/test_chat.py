"""Is a chat rendered as engines render it, and left alone where that cannot be known?"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from msgspec.json import encode

from paceline.tokens.chat import CHAT, COMPLETION, MOST_MESSAGES, Text, Unreadable, text_of
from paceline.tokens.template import ChatTemplate

USER = {"role": "user", "content": "hi"}
SHOWN = ChatTemplate("{{ messages | tojson }}{{ tools | tojson }}", {})
PARTS = ChatTemplate("{% for m in messages %}{% for p in m['content'] %}{{ p.text }}|{% endfor %}"
                     "{% endfor %}", {})  # fmt: skip


def chat(template: ChatTemplate = SHOWN, **body: Any) -> Text:
    return text_of(CHAT, encode(body), template)


def test_templates_see_texts_as_strings_or_as_parts_as_they_like() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, "b"]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    assert '"content": "a\\nb"' in chat(messages=messages).text
    assert '"content": ""' in chat(messages=messages).text
    assert chat(PARTS, messages=[*messages, USER]).text == "a||b|hi|"


def test_arguments_of_calls_are_objects_to_templates() -> None:
    for arguments, shown in (('{"a": 1}', '{"a": 1}'), ("", "{}"), ("[1]", "{}"), ("?", "{}")):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        assert f'"arguments": {shown}' in chat(messages=[USER, said]).text


def test_tools_are_shown_with_the_fields_that_the_engine_shows() -> None:
    tools = [{"function": {"parameters": {}, "name": "f", "x": 1}, "type": "function", "y": 2}]
    expected = '[{"type": "function", "function": {"name": "f", "description": null, '
    assert chat(messages=[USER], tools=tools).text.endswith(expected + '"parameters": {}}}]')


def test_a_template_can_be_told_more_by_the_client_but_not_other_messages() -> None:
    template = ChatTemplate("{{ messages | length }}{{ mood }}{{ enable_thinking }}", {})
    told = {"mood": "calm", "messages": []}
    asked = chat(template, messages=[USER], chat_template_kwargs=told, reasoning_effort="none")
    assert asked.text == "1calmFalse"


def test_special_tokens_are_added_to_completions_and_not_to_chats_unless_asked_otherwise() -> None:
    body = encode({"prompt": ["said"], "cache_salt": "s"})
    assert text_of(COMPLETION, body, None) == Text("said", True, "s")
    bare = encode({"prompt": "said", "add_special_tokens": False})
    assert text_of(COMPLETION, bare, None) == Text("said", False)
    assert not chat(messages=[USER]).with_special
    assert chat(messages=[USER], add_special_tokens=True).with_special


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [USER], "chat_template": "{{ 1 }}"},
        {"messages": [USER], "truncate_prompt_tokens": 5},
        {"messages": [USER], "continue_final_message": True, "add_generation_prompt": False},
        {"messages": [USER], "tools": [], "tool_choice": "none", "documents": 1, "cache_salt": 1},
        {"messages": [USER], "tools": [{"function": {"name": "f"}}], "tool_choice": "none"},
        {"messages": [{"role": "developer", "content": "be kind"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [{"role": "system", "content": "x-anthropic-billing-header: 1\nhi"}]},
        {"messages": [{"content": "nobody"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": "text"},
        {"messages": [USER] * (MOST_MESSAGES + 1)},
    ],
)
def test_what_the_engine_alone_can_read_is_not_guessed_at(body: dict[str, Any]) -> None:
    with pytest.raises(Unreadable):
        text_of(CHAT, encode(body), SHOWN)


@pytest.mark.parametrize("prompt", [["a", "b"], [], [1, 2], 5, None])
def test_of_completions_one_text_can_be_read(prompt: Any) -> None:
    with pytest.raises(Unreadable):
        text_of(COMPLETION, encode({"prompt": prompt}), None)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
        "{% for i in range(1000000) %}{% endfor %}",
    ],
)
def test_what_a_template_must_not_do_makes_the_chat_unreadable(source: str) -> None:
    with pytest.raises(Unreadable):
        chat(ChatTemplate(source, {}), messages=[USER])


def test_marks_for_training_and_todays_date_do_no_harm() -> None:
    source = "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ strftime_now('%Y') }}"
    assert chat(ChatTemplate(source, {}), messages=[USER]).text.startswith("hi20")


def test_what_is_no_template_is_told_when_it_is_read() -> None:
    with pytest.raises(TemplateError):
        ChatTemplate("{% if %}", {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)
FIELDS = ["messages", "prompt", "tools", "tool_choice", "chat_template_kwargs", "documents"]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from([CHAT, COMPLETION]))
def test_whatever_a_body_says_it_is_read_or_unreadable(body: dict[str, Any], path: str) -> None:
    with suppress(Unreadable):
        assert isinstance(text_of(path, encode(body), SHOWN), Text)
