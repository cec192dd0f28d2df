"""Does an engine's answer reach the client the same, however its bytes come in?"""

from __future__ import annotations

import gc
import json
import sys
from itertools import count, pairwise
from typing import Any, cast
from unittest import mock

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.domain.facts import Step
from paceline.gateway import relay as relay_module
from paceline.gateway.flavors import FLAVORS, OTHER, usage
from paceline.gateway.relay import GAP_BOUNDS, MAX_HELD, Relay
from paceline.gateway.sieve import Sieve
from paceline.gateway.steps import StepWatch
from paceline.wire.http1 import LAST_CHUNK, ResponseHead, chunk, response_head

CHAT = "/v1/chat/completions"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


def event(body: Any, compact: bool = True) -> bytes:
    text = (
        body
        if isinstance(body, str)
        else json.dumps(body, separators=None if not compact else (",", ":"))
    )
    return b"data: %b\n\n" % text.encode()


def delta(compact: bool = True, **delta: Any) -> bytes:
    return event({"id": "c1", "choices": [{"index": 0, "delta": delta}]}, compact)


def chat(tokens: int, told: bool = True, compact: bool = True) -> list[bytes]:
    """A chat stream as vLLM sends it, event by event."""
    texts = [f't{i} "choices":[{{ data: \\n\n' for i in range(tokens)]
    answer = [delta(compact, role="assistant", content="")]
    answer += [delta(compact, content=text) for text in texts]
    if told:
        counts = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
        answer.append(event({"id": "c1", "choices": [], "usage": counts}, compact))
    return [*answer, event("[DONE]")]


class Connection:
    """The engine's side as far as a relay sees it."""

    def __init__(self) -> None:
        self.state = "open"

    def pause(self) -> None:
        self.state = "paused"

    def resume(self) -> None:
        self.state = "open"

    def close(self) -> None:
        self.state = "closed"


class Client:
    """The client's side: all that it was sent, and whether it keeps up."""

    def __init__(self) -> None:
        self.sent = b""
        self.keeps_up = True

    def send(self, data: bytes) -> bool:
        self.sent += data
        return self.keeps_up


class Bench:
    """A relay with nothing real around it. The clock ticks once for each read."""

    def __init__(
        self, path: str = CHAT, strip: bool = False, plain: bool = False, passes: bool = True
    ) -> None:
        self.client, self.connection = Client(), Connection()
        self.steps: list[Step] = []
        self.gaps = [0] * (len(GAP_BOUNDS) + 1)
        self.told: list[str] = []
        self.trouble = ""
        self.plain = plain
        self.passes = passes
        flavor = FLAVORS.get(path, OTHER)
        watch = StepWatch(self.steps.append)
        self.relay = Relay(
            self,
            cast(Any, self.client),
            cast(Any, self.connection),
            watch,
            self.gaps,
            Sieve(flavor, strip, plain),
            now=1.0,
        )
        self.ticks = count(2)

    def feed(self, *reads: bytes) -> Bench:
        for read in reads:
            with mock.patch.object(relay_module, "monotonic", return_value=float(next(self.ticks))):
                if not self.over:
                    self.relay.on_bytes(read)
        return self

    @property
    def over(self) -> bool:
        return "complete" in self.told or bool(self.trouble)

    # The owner's part.

    def on_head(self, head: ResponseHead, started: bytes) -> bool:
        self.told.append(f"head {head.status}")
        return self.passes

    def on_answer(self, now: float, token: bool) -> bytes:
        self.told.append("token" if token else "answer")
        head = self.relay.head
        assert head is not None
        length = [("content-length", str(head.length))] if head.length is not None else []
        framing = [("transfer-encoding", "chunked")] if head.length is None else length
        return response_head(head.status, [("connection", "close")] if self.plain else framing)

    def on_first_token(self, now: float) -> None:
        assert self.relay.tokens or self.relay.mode.__name__ == "_tokens"
        assert self.client.sent

    def on_complete(self, now: float) -> None:
        self.told.append("complete")
        self.relay.release()

    def on_trouble(self, because: str) -> None:
        self.trouble = because
        self.relay.abandon()

    def on_bug(self) -> None:
        raise AssertionError

    # What the client makes of it.

    def body(self) -> bytes:
        """The body as an independent parser reads it; the answer must be whole."""
        if self.plain:
            return self.client.sent.partition(b"\r\n\r\n")[2]
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
        parser.send(h11.EndOfMessage())
        parser.receive_data(self.client.sent)
        body = b""
        while not isinstance(found := parser.next_event(), h11.EndOfMessage):
            assert found is not h11.NEED_DATA
            body += bytes(found.data) if isinstance(found, h11.Data) else b""
        assert not parser.trailing_data[0]
        return body


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, *(place % (len(data) + 1) for place in places), len(data)})
    return [data[a:b] for a, b in pairwise(edges)]


PLACES = st.lists(st.integers(0, 10_000), max_size=25)


@settings(max_examples=300)
@given(
    st.integers(1, 6), PLACES, PLACES, st.booleans(), st.booleans(), st.booleans(), st.booleans()
)
def test_any_split_into_chunks_and_reads_gives_the_client_the_same_events(
    tokens: int,
    chunk_places: list[int],
    read_places: list[int],
    strip: bool,
    plain: bool,
    crlf: bool,
    compact: bool,
) -> None:
    events = chat(tokens, compact=compact)
    wanted = [e for e in events if not (strip and b'"usage"' in e)]
    if crlf:  # as sse-starlette ends them
        events = [e.replace(b"\n\n", b"\r\n\r\n") for e in events]
        wanted = [e.replace(b"\n\n", b"\r\n\r\n") for e in wanted]
    frames = b"".join(map(chunk, cut(b"".join(events), chunk_places)))
    bench = Bench(strip=strip, plain=plain).feed(*cut(SSE + frames + LAST_CHUNK, read_places))
    assert bench.told == ["token", "complete"]
    assert bench.body() == b"".join(wanted)
    assert bench.relay.tokens == tokens
    assert usage(bench.relay.tail).output_tokens == tokens
    assert usage(bench.relay.tail).prompt_tokens == 7
    assert bench.connection.state == "open"


@given(st.integers(1, 6), PLACES)
def test_bytes_pass_as_they_are_where_chunks_hold_whole_events(
    tokens: int, places: list[int]
) -> None:
    frames = b"".join(map(chunk, chat(tokens))) + LAST_CHUNK
    bench = Bench(strip=False).feed(*cut(SSE + frames, places))
    assert bench.client.sent.partition(b"\r\n\r\n")[2] == frames


def test_every_token_but_the_first_has_a_gap() -> None:
    bench = Bench().feed(SSE, *map(chunk, chat(5)), LAST_CHUNK)
    assert sum(bench.gaps) == 4
    assert len(bench.steps) == 5
    assert bench.relay.stall_s == 1.0
    assert bench.relay.token_at - bench.relay.first_at == 4.0


def test_several_tokens_in_one_chunk_share_its_gap() -> None:
    role, *events = chat(5)
    bench = Bench().feed(SSE + chunk(role), chunk(b"".join(events[:2])))
    bench.feed(chunk(b"".join(events[2:5])))
    assert (bench.relay.tokens, sum(bench.gaps)) == (5, 3)


def test_the_role_chunk_waits_for_the_first_token() -> None:
    role, first, *_ = chat(2)
    bench = Bench().feed(SSE, chunk(role))
    assert (bench.told, bench.client.sent) == ([], b"")
    bench.feed(chunk(first))
    assert bench.told == ["token"]
    assert bench.client.sent.endswith(chunk(role) + chunk(first))


@pytest.mark.parametrize(
    "first",
    [
        {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "f", "arguments": ""}}]},
        {"function_call": {"name": "f"}},
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"refusal": "no"},
        {"audio": {"id": "a", "data": "UklG"}},
    ],
)
def test_tool_calls_reasoning_and_sound_are_first_tokens_too(first: dict[str, Any]) -> None:
    bench = Bench().feed(SSE, chunk(delta(role="assistant", content=None, tool_calls=[])))
    assert bench.told == []
    bench.feed(chunk(delta(**first)))
    assert bench.told == ["token"]


@pytest.mark.parametrize(
    ("path", "setup", "first"),
    [
        (
            "/v1/responses",
            b'event: response.created\ndata: {"type":"response.created","usage":null}\n\n',
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta"}\n\n',
        ),
        (
            "/v1/messages",
            b'event: message_start\ndata: {"type":"message_start"}\n\n',
            b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n',
        ),
        (
            "/v1/completions",
            event({"choices": [{"text": ""}]}),
            event({"choices": [{"text": "a"}]}),
        ),
    ],
)
def test_each_endpoint_shows_its_first_token(path: str, setup: bytes, first: bytes) -> None:
    bench = Bench(path).feed(SSE, chunk(setup))
    assert bench.told == []
    bench.feed(chunk(first), chunk(first), LAST_CHUNK)
    assert bench.told == ["token", "complete"]
    assert bench.relay.tokens == 2


def test_a_stream_of_another_kind_passes_at_once() -> None:
    bench = Bench("/v1/audio/speech").feed(SSE, chunk(event({"type": "x"})))
    assert bench.told == ["token"]


def test_set_up_without_end_passes_at_last() -> None:
    bench = Bench().feed(SSE, *[chunk(delta(role="assistant", note="x" * 1000))] * 80)
    assert bench.told == ["token"]


def test_an_error_before_the_first_token_is_trouble() -> None:
    role, *_ = chat(0)
    bench = Bench().feed(SSE, chunk(role), chunk(event({"error": {"message": "broken"}})))
    assert bench.trouble.startswith('broken answer: error in the stream: data: {"error"')
    assert bench.client.sent == b""


@pytest.mark.parametrize(
    "error",
    [
        event({"error": {"message": "broken"}}),
        event({"object": "error", "message": "broken"}),
        b'event: error\ndata: {"type":"error","error":{}}\n\n',
    ],
)
def test_an_error_after_the_first_token_passes_and_is_marked(error: bytes) -> None:
    bench = Bench().feed(SSE, *map(chunk, chat(2, told=False)[:-1]))
    assert not bench.relay.failed
    bench.feed(chunk(error), chunk(event("[DONE]")), LAST_CHUNK)
    assert bench.relay.failed
    assert bench.body().endswith(error + event("[DONE]"))


def test_a_user_who_writes_of_errors_and_usage_changes_nothing() -> None:
    text = 'data: {"error": 1}\n\n "usage":{"completion_tokens":999} "choices":[]'
    bench = Bench(strip=True).feed(SSE, *map(chunk, [delta(content=text)] * 3), LAST_CHUNK)
    assert not bench.relay.failed
    assert bench.relay.tokens == 3
    assert usage(bench.relay.tail).output_tokens is None
    assert bench.body() == delta(content=text) * 3


def test_the_usage_is_found_in_the_last_token_s_event_too() -> None:
    last = {"choices": [{"delta": {"content": "b"}}], "usage": {"completion_tokens": 2}}
    bench = Bench(strip=True).feed(SSE, chunk(delta(content="a")), chunk(event(last)), LAST_CHUNK)
    assert usage(bench.relay.tail).output_tokens == 2
    assert b'"b"' in bench.body()


def test_comments_between_tokens_pass_and_are_no_tokens() -> None:
    bench = Bench().feed(SSE, chunk(b": ping\n\n"), chunk(delta(content="a")), chunk(b": ping\n\n"))
    assert bench.relay.tokens == 1
    assert bench.client.sent.endswith(chunk(b": ping\n\n"))


def test_a_stream_that_ends_early_is_trouble() -> None:
    bench = Bench().feed(SSE, *map(chunk, chat(2)[:2]))
    bench.relay.on_closed("gone", clean=True)
    assert bench.trouble == "gone"


@given(st.binary(max_size=400), PLACES, st.booleans())
def test_a_body_of_known_length_passes_whole(body: bytes, places: list[int], plain: bool) -> None:
    head = JSON + b"content-length: %d\r\n\r\n" % len(body)
    bench = Bench(plain=plain).feed(*cut(head + body, places))
    assert bench.told == ["answer", "complete"]
    assert bench.body() == body


def test_nothing_of_a_short_body_passes_before_its_end() -> None:
    bench = Bench().feed(JSON + b"content-length: 4\r\n\r\n", b"ab")
    assert (bench.told, bench.client.sent) == ([], b"")


def test_a_large_body_passes_as_it_comes() -> None:
    size, piece = MAX_HELD + 1000, b"x" * 65_536
    bench = Bench().feed(JSON + b"content-length: %d\r\n\r\n" % size, piece)
    assert bench.client.sent.endswith(piece)
    bench.feed(*[piece] * (size // len(piece)))
    assert "complete" in bench.told
    assert len(bench.body()) == size


def test_bytes_beyond_a_body_s_length_never_reach_the_client() -> None:
    bench = Bench().feed(JSON + b"content-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n")
    assert bench.body() == b"ok"
    assert bench.relay.head is not None
    assert not bench.relay.head.keep_alive


def test_bytes_beyond_the_last_chunk_never_reach_the_client() -> None:
    frames = b"".join(map(chunk, chat(2))) + LAST_CHUNK
    bench = Bench().feed(SSE + frames + b"HTTP/1.1 200 OK\r\n")
    assert bench.body() == b"".join(chat(2))
    assert bench.relay.head is not None
    assert not bench.relay.head.keep_alive


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=5), PLACES, st.booleans())
def test_a_chunked_body_that_is_no_stream_passes(
    bodies: list[bytes], places: list[int], plain: bool
) -> None:
    frames = b"".join(map(chunk, bodies)) + LAST_CHUNK
    head = JSON + b"transfer-encoding: chunked\r\n\r\n"
    bench = Bench(plain=plain).feed(*cut(head + frames, places))
    assert bench.told == ["answer", "complete"]
    assert bench.body() == b"".join(bodies)


def test_a_chunk_of_many_megabytes_is_put_together_once() -> None:
    body, head = bytes(8 << 20), JSON + b"transfer-encoding: chunked\r\n\r\n"
    bench = Bench().feed(*cut(head + chunk(body) + LAST_CHUNK, list(range(0, 9 << 20, 1460))))
    assert bench.body() == body


def test_a_part_that_would_be_too_large_is_refused_at_once() -> None:
    bench = Bench().feed(SSE, b"%x\r\n" % (MAX_HELD + 1))
    assert "too large" in bench.trouble


@given(st.binary(min_size=1, max_size=300), PLACES, st.booleans())
def test_a_body_until_close_ends_with_an_orderly_close(
    body: bytes, places: list[int], plain: bool
) -> None:
    bench = Bench(plain=plain).feed(JSON + b"\r\n", *cut(body, places))
    bench.relay.on_closed("closed", clean=True)
    assert bench.told == ["answer", "complete"]
    assert bench.body() == body


def test_a_body_until_close_that_is_reset_is_trouble() -> None:
    bench = Bench().feed(JSON + b"\r\n", b"half")
    bench.relay.on_closed("connection reset", clean=False)
    assert bench.trouble == "connection reset"


def test_an_answer_without_content_is_complete() -> None:
    bench = Bench().feed(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert bench.told == ["answer", "complete"]


@given(PLACES)
def test_interim_answers_are_passed_over(places: list[int]) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    bench = Bench().feed(*cut(interim * 2 + JSON + b"content-length: 2\r\n\r\nok", places))
    assert bench.body() == b"ok"


def test_a_refusal_passes_only_if_its_owner_says_so() -> None:
    answer = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\nno"
    assert b'{"error":{"message":"no",' in Bench(passes=True).feed(answer).body()
    refused = Bench(passes=False).feed(answer)
    assert (refused.told, refused.client.sent) == (["head 400"], b"")


def test_a_slow_client_holds_its_engine_back_and_not_its_engine_s_account() -> None:
    bench = Bench().feed(SSE, *map(chunk, chat(4)[:3]))
    bench.client.keeps_up = False
    bench.feed(chunk(chat(4)[3]))
    assert bench.connection.state == "paused"
    assert bench.relay.paused
    bench.client.keeps_up = True
    bench.relay.resume(bench.relay.last_at + 1000)
    assert bench.connection.state == "open"
    gap_s = bench.relay.token_at - bench.relay.first_at
    assert gap_s < 10
    assert bench.relay.stall_s < 10


def test_a_connection_that_ends_its_answer_while_paused_reads_on() -> None:
    bench = Bench().feed(SSE, *map(chunk, chat(2)[:2]))
    bench.client.keeps_up = False
    bench.feed(b"".join(map(chunk, chat(2)[2:])) + LAST_CHUNK)
    assert "complete" in bench.told
    assert bench.connection.state == "open"


def test_a_relay_that_is_over_leaves_no_cycle_behind() -> None:
    bench = Bench().feed(SSE, *map(chunk, chat(3)), LAST_CHUNK)
    assert bench.relay.mode.__name__ == "_ignore"  # a bound method would hold its relay
    assert not {id(bench.relay)} & {id(held) for held in gc.get_referents(bench.relay)}
    references = sys.getrefcount(bench.relay)
    assert references == 2  # the bench's, and the call's
