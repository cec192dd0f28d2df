"""Does a client of OpenAI's API understand why an engine refuses, whichever engine it is?"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Act, Part, always, answer, scripted

from paceline.gateway.refused import in_openai_shape
from paceline.wire.http1 import LAST_CHUNK, ResponseHead, chunk
from stand import live_gateway, on_loop, post

OLD_VLLM = {
    "object": "error",
    "message": "too long",
    "type": "BadRequest",
    "param": None,
    "code": 7,
}


def shaped(body: bytes, status: int = 400, *headers: tuple[str, str]) -> dict[str, Any]:
    said = msgspec.json.decode(in_openai_shape(ResponseHead(status, list(headers), True), body))
    assert list(said) == ["error"]
    return dict(said["error"])


@pytest.mark.parametrize(
    ("body", "message", "kind", "code"),
    [
        (OLD_VLLM, "too long", "BadRequest", 7),
        ({"message": "no", "type": "x", "code": "why"}, "no", "x", "why"),
        ({"detail": "Not Found"}, "Not Found", "invalid_request_error", 400),
        ({"detail": [{"loc": ["a"]}]}, '[{"loc":["a"]}]', "invalid_request_error", 400),
        ({"error": "full", "error_type": "overloaded"}, "full", "overloaded", 400),
        ("told so", "told so", "invalid_request_error", 400),
        ({}, "{}", "invalid_request_error", 400),
    ],
)
def test_what_engines_say_is_kept_in_the_usual_shape(
    body: Any, message: str, kind: str, code: Any
) -> None:
    assert shaped(msgspec.json.encode(body)) == {
        "message": message,
        "type": kind,
        "param": None,
        "code": code,
    }


def test_plain_text_and_silence_have_a_message_too() -> None:
    assert shaped(b" File Not Found \n")["message"] == "File Not Found"
    assert shaped(b"", 404)["message"] == "Not Found"
    assert len(shaped(b"<p>" * 10_000)["message"]) == 2000


def test_what_is_in_the_shape_already_or_packed_stays_as_it_is() -> None:
    whole = b'{ "error": {"message": "no"} , "x": 1}'
    assert in_openai_shape(ResponseHead(400, [], True), whole) is whole
    packed = ResponseHead(400, [("content-encoding", "gzip")], True)
    assert in_openai_shape(packed, b"\x1f\x8b") == b"\x1f\x8b"


@given(st.binary(max_size=60), st.integers(400, 599))
def test_whatever_an_engine_answers_its_client_gets_an_error_object(
    body: bytes, status: int
) -> None:
    assert shaped(body, status)["message"]


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("framing", ["sized", "chunked", "in pieces"])
@on_loop
async def test_an_error_comes_whole_with_its_status_however_it_is_framed(
    version: str, framing: str
) -> None:
    body = msgspec.json.encode(OLD_VLLM)
    head = b"HTTP/1.1 422 Unprocessable\r\ncontent-type: text/plain\r\nx-why: because\r\n"
    answers: dict[str, list[Part]] = {
        "sized": [answer(body, 422)],
        "chunked": [head + b"transfer-encoding: chunked\r\n\r\n" + chunk(body) + LAST_CHUNK],
        "in pieces": [
            head + b"content-length: %d\r\n\r\n" % len(body) + body[:9],
            Act.PAUSE,
            body[9:],
        ],
    }
    async with (
        scripted(always(*answers[framing])) as (engine,),
        live_gateway(engine.url) as gateway,
    ):
        for _ in range(2):  # the connection to the engine is as good as before
            async with await gateway.client() as client:
                client.write(post({"messages": []}, version=version))
                reply = await client.reply()
            assert (reply.status, reply.error["message"]) == (422, "too long")
            assert reply.headers["content-type"] == "application/json"
            assert reply.whole
        assert engine.opened == 1
        await gateway.settled()
