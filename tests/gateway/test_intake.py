"""Is a body read for what it says, and changed in nothing but what must change?"""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain.errors import InvalidRequest
from paceline.domain.request import BLOCK_BYTES
from paceline.gateway.intake import (
    IMAGE_BYTES,
    MAX_BLOCKS,
    max_tokens,
    multipart_model,
    prefix_blocks,
    prompt_size,
    prompt_text,
    read,
    with_fields,
)
from paceline.gateway.resume import resumable

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from(("model", "stream", "x", "y}", '"model"')), VALUES)


@given(
    OBJECTS, OBJECTS.filter(bool), st.sampled_from((None, 2)), st.sampled_from(("", " ", "\n\t"))
)
def test_fields_are_set_and_all_else_stays(
    body: dict[str, Any], fields: dict[str, Any], indent: int | None, space: str
) -> None:
    text = space + json.dumps(body, indent=indent) + space
    assert json.loads(with_fields(text.encode(), fields)) == body | fields


@pytest.mark.parametrize("body", [b"{}", b"{ }", b" {\n}\n"])
def test_fields_fit_into_an_empty_body(body: bytes) -> None:
    assert json.loads(with_fields(body, {"a": {"b": 1}})) == {"a": {"b": 1}}


def test_numbers_stay_as_the_client_wrote_them() -> None:
    body = b'{"model": "a", "temperature": 1.0, "seed": 123456789012345678901234, "top_p": 1e-1}'
    sent = with_fields(body, {"model": "b"})
    for number in (b"1.0", b"123456789012345678901234", b"1e-1"):
        assert number in sent


def test_a_field_in_disguise_does_not_win() -> None:
    body = b'{"pr\\u0069ority": -9, "messages": []}'
    assert json.loads(with_fields(body, {"priority": 3}))["priority"] == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [(b"", msgspec.UNSET), (b',"stream_options":null', None), (b',"stream_options":{}', {})],
)
def test_absent_and_null_options_are_told_apart(options: bytes, told: object) -> None:
    assert read(b'{"stream":true' + options + b"}").stream_options == told


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"1", b'{"stream":1}', b'{"model":[]}', b"\xff"]
)
def test_what_is_no_json_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a valid JSON request"):
        read(body)


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        (b"{}", None),
        (b'{"max_tokens":5}', 5),
        (b'{"max_tokens":5.0}', 5),
        (b'{"max_tokens":5,"max_completion_tokens":7}', 7),
        (b'{"max_output_tokens":9}', 9),
        (b'{"max_tokens":null}', None),
        (b'{"max_tokens":-3}', None),
        (b'{"max_tokens":0}', None),
    ],
)
def test_the_limit_of_the_answer_has_several_names(body: bytes, limit: int | None) -> None:
    assert max_tokens(read(body)) == limit


def test_the_prompt_is_read_in_the_order_in_which_templates_render_it() -> None:
    body = read(b'{"messages":[1],"model":"m","system":"s","tools":[2],"instructions":"i"}')
    assert prompt_text(body) == b'[2]"s""i"[1]'


@pytest.mark.parametrize(
    ("text", "size"),
    [(b'"four"', (6, None)), (b"[1,22,333]", (10, 3)), (b'["a","b"]', (9, None)), (b"", (0, None))],
)
def test_token_ids_are_counted_exactly(text: bytes, size: tuple[int, int | None]) -> None:
    assert prompt_size(text) == size


@pytest.mark.parametrize("length", [4, 400_000])
def test_an_image_counts_for_what_it_costs_not_for_its_bytes(length: int) -> None:
    image = b'{"url":"data:image/png;base64,%b"}' % (b"A" * length)
    bare = len(image) - length - len(b";base64,")
    assert prompt_size(image * 2) == (2 * (bare + IMAGE_BYTES), None)


def test_an_image_that_never_ends_is_counted_once() -> None:
    size, _ = prompt_size(b'"data:image/png;base64,AAAA')
    assert 0 < size < 2 * IMAGE_BYTES


@given(st.binary(max_size=3000), st.binary(max_size=600), st.binary(max_size=600))
def test_equal_blocks_mean_an_equal_prefix(common: bytes, one: bytes, other: bytes) -> None:
    a, b = prefix_blocks(common + one), prefix_blocks(common + other)
    shared = len(common) // BLOCK_BYTES
    assert a[:shared] == b[:shared]
    assert len(a) == len(common + one) // BLOCK_BYTES
    for block, (x, y) in enumerate(zip(a, b, strict=False), start=1):
        same = (common + one)[: block * BLOCK_BYTES] == (common + other)[: block * BLOCK_BYTES]
        assert (x == y) == same


def test_the_prefix_of_a_huge_prompt_is_bounded() -> None:
    assert len(prefix_blocks(bytes(10 * MAX_BLOCKS * BLOCK_BYTES))) == MAX_BLOCKS


PART = b'--b\r\ncontent-disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (PART % (b"model", b"", b"whisper"), "whisper"),
        (
            PART % (b"file", b'; filename="a"', b"\x00" * 500_000) + PART % (b"model", b"", b"w"),
            "w",
        ),
        (PART % (b"model", b"\r\ncontent-type: text/plain", b"w"), "w"),
        (PART % (b"file", b"", b"x"), None),
        (PART % (b"model", b"", b"x" * 300), None),
        (b"", None),
    ],
)
def test_a_form_names_its_model(body: bytes, model: str | None) -> None:
    assert multipart_model(body + b"--b--\r\n") == model


@pytest.mark.parametrize("opening", ['{"tools":', "[", '{"a":'], ids=["tools", "list", "object"])
def test_a_body_that_is_nested_too_deeply_is_not_continued_and_does_no_harm(opening: str) -> None:
    assert not resumable("/v1/chat/completions", "POST", opening.encode() * 100_000)
