"""Does a client see one unbroken answer, whatever becomes of the workers that write it?"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from line import CHAT, SSE, TEXT, Connection, Line, stream
from msgspec.structs import replace

from paceline.domain.commands import Degrade, Fail, Shed
from paceline.domain.facts import DispatchFailed, StreamBroke, StreamEnded, StreamStopped
from paceline.gateway.link import Timeouts
from paceline.gateway.resume import KEPT_BYTES, Produced, resumable
from paceline.gateway.seam import without_ids
from paceline.wire.http1 import LAST_CHUNK, chunk

TOKENS = 5
USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}


def answered(connection: Connection, tokens: int = TOKENS) -> bytes:
    """What the engine at this connection says: each has its own name and clock."""
    name = f"{id(connection):x}"
    return stream(connection.request, tokens, name, created=id(connection) % 9999)


def check(line: Line, tokens: int = TOKENS, usage: bool = False) -> None:
    """The client has each token once, in a stream that looks like one engine's."""
    *events, done = line.events
    assert done == b"[DONE]"
    assert line.client.over == "finished"
    assert line.text == "".join(f" t{i}" for i in range(tokens))
    for name in ("id", "created", "model", "object"):
        assert len({event[name] for event in events}) == 1, name
    assert {choice["index"] for choice in line.choices} == {0}
    roles = [c for c in line.choices if "role" in c.get("delta", {})]
    assert len(roles) == (1 if "chat" in events[0]["object"] else 0)
    reasons = [c["finish_reason"] for c in line.choices if c["finish_reason"]]
    assert len(reasons) == 1
    counted = [event["usage"] for event in events if not event["choices"]]
    assert len(counted) == usage
    if usage:
        assert counted[0]["completion_tokens"] == tokens
        assert counted[0]["total_tokens"] == counted[0]["prompt_tokens"] + tokens
    (ended,) = line.of(StreamEnded)
    assert ended.output_tokens == tokens
    assert line.outcome is not None
    assert (line.outcome.error, line.outcome.output_tokens) == ("", tokens)


def prompt_tokens(path: str) -> int:
    line = Line(path, **USAGE)
    line.send().say(answered(line.connection))
    found: int = line.events[-2]["usage"]["prompt_tokens"]
    return found


def broken_after(offset: int, path: str, version: str = "1.1", **fields: Any) -> Line:
    """The first worker's connection ends after so many bytes; another goes on."""
    line = Line(path, version, **fields)
    connection = line.send()
    said = answered(connection)
    line.retry_always()
    connection.say(said[:offset]).die()
    if offset < len(said):
        line.connection.say(answered(line.connection))
    return line


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_may_break_after_any_of_its_bytes(path: str) -> None:
    whole = Line(path, **USAGE)
    size = len(answered(whole.send()))
    prompt = prompt_tokens(path)
    for offset in range(size + 1):
        line = Line(path, **USAGE)
        connection = line.send()
        line.retry_always()
        connection.say(answered(connection)[:offset]).die()
        if not line.outcome:
            line.connection.say(answered(line.connection))
        (ended,) = line.of(StreamEnded)
        counted = any(isinstance(e, dict) and not e["choices"] for e in line.events)
        check(line, usage=counted)
        if counted:
            assert line.events[-2]["usage"]["prompt_tokens"] == prompt
            assert ended.prompt_tokens in (prompt, None)
        else:  # all but the usage had come: to ask for it again would cost a whole answer
            assert path == CHAT
            assert offset > size - 600


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([CHAT, TEXT]),
    st.sampled_from(["1.1", "1.0"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 3000), min_size=1, max_size=4),
    st.integers(1, 400),
)
def test_it_may_break_many_times_and_come_in_any_pieces(
    path: str,
    version: str,
    usage: bool,
    running: bool,
    ids: bool,
    offsets: list[int],
    piece: int,
) -> None:
    fields: dict[str, Any] = {"return_token_ids": True} if ids else {}
    if usage:
        fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": running}
    line = Line(path, version, kinds=("vllm", "vllm"), **fields)
    connection = line.send()
    line.retry_always()
    for offset in [*offsets, 1 << 20]:
        if line.outcome is not None:
            break
        connection = line.connection
        said = answered(connection, 12)[:offset]
        connection.say(*(said[i : i + piece] for i in range(0, len(said), piece)))
        connection.die()
    events = [event for event in line.events if isinstance(event, dict)]
    check(line, 12, usage=any(not event["choices"] for event in events))
    shown = [c["token_ids"] for c in line.choices if c.get("token_ids")]
    assert bool(shown) == ids
    if ids:
        assert len([t for some in shown for t in some]) == 12
    if usage and running:
        counts = [e["usage"]["completion_tokens"] for e in events]
        assert counts == sorted(counts)
        assert len({e["usage"]["prompt_tokens"] for e in events}) == 1


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "trouble",
    [
        chunk(b'data: {"error":{"message":"oom"}}\n\n') + chunk(b"data: [DONE]\n\n") + LAST_CHUNK,
        chunk(b"data: {#id#: #x#}\n\n"),
        b"no size\r\n",
        LAST_CHUNK,
    ],
    ids=["error event", "no JSON", "no chunk", "early end"],
)
def test_what_is_no_answer_never_reaches_the_client_and_another_goes_on(
    path: str, trouble: bytes
) -> None:
    line = Line(path)
    connection = line.send()
    line.retry_always()
    whole = answered(connection)
    second = whole.index(b" t2")
    connection.say(whole[: whole.rindex(b"data:", 0, second) - 4])
    connection.say(trouble)
    assert line.told[-1] == "StreamBroke"
    line.connection.say(answered(line.connection))
    check(line)


def test_a_silent_stream_goes_on_elsewhere() -> None:
    line = Line()
    line.send().say(answered(line.connection)[:900])
    line.retry_always()
    line.exchange.expire(Timeouts(stall_s=0.0), now=1e9)
    line.connection.say(answered(line.connection))
    check(line)


def test_a_move_keeps_each_token() -> None:
    line = Line(kinds=("vllm", "vllm"))
    first = line.send()
    first.say(answered(first)[:900])
    line.stop(move=True)
    assert not first.open
    (stopped,) = line.of(StreamStopped)
    assert (stopped.worker_id, stopped.produced) == ("w0", 3)
    line.send()
    assert line.connection.body["model"] == "m1"
    line.connection.say(answered(line.connection))
    check(line)
    assert line.told == ["FirstTokenSeen", "StreamStopped", "FirstTokenSeen", "StreamEnded"]


def test_a_pause_before_the_first_token_starts_anew() -> None:
    line = Line()
    first = line.send()
    first.say(SSE)
    line.stop()
    assert line.of(StreamStopped)[0].produced == 0
    assert line.send().request == first.request
    line.connection.say(answered(line.connection))
    check(line)


def test_a_pause_that_comes_with_a_token_is_in_time() -> None:
    line = Line()
    line.send()
    line.on_fact = lambda fact: line.stop() if type(fact).__name__ == "FirstTokenSeen" else None
    line.connection.say(answered(line.connection)[:900])
    assert line.told == ["FirstTokenSeen", "StreamStopped"]
    line.on_fact = lambda fact: None
    line.send().say(answered(line.connection))
    check(line)


def test_a_paused_stream_waits_without_a_worker_for_as_long_as_it_takes() -> None:
    line = Line()
    line.send().say(answered(line.connection)[:900])
    line.stop()
    line.exchange.expire(Timeouts(stall_s=0.0, first_token_s=0.0), now=1e9)
    line.stop()
    line.exchange.on_writable()
    assert line.told == ["FirstTokenSeen", "StreamStopped"]


def test_a_client_that_does_not_read_loses_nothing_by_a_move() -> None:
    line = Line()
    line.send()
    line.client.keeps_up = False
    line.connection.say(answered(line.connection)[:900])
    line.stop()
    line.send().say(answered(line.connection))
    line.client.keeps_up = True
    line.exchange.on_writable()
    check(line)


def test_a_paused_client_may_leave() -> None:
    line = Line()
    line.send().say(answered(line.connection)[:900])
    line.stop()
    line.exchange.on_client_left()
    assert line.told[-1] == "ClientLeft"
    assert line.outcome is not None


@pytest.mark.parametrize(
    "command", [Fail("r", "w0: gone"), Shed("r", "no room", 1.0)], ids=["fail", "shed"]
)
def test_a_begun_stream_that_finds_no_worker_ends_with_an_error(command: Fail | Shed) -> None:
    line = Line()
    line.send().say(answered(line.connection)[:900])
    line.connection.die()
    assert line.of(StreamBroke)[0].resumable
    if isinstance(command, Fail):
        line.exchange.fail(command)
    else:
        line.exchange.shed(command)
    assert line.events[-1]["error"]["code"] == "upstream_failed"
    assert line.outcome is not None
    assert line.outcome.error


def with_delta(**delta: Any) -> bytes:
    event = {"id": "x", "created": 1, "model": "m", "object": "chat.completion.chunk"}
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return chunk(b"data: %b\n\n" % json.dumps({**event, "choices": [choice]}).encode())


DEAD_ENDS: dict[str, tuple[dict[str, Any], bytes]] = {
    "n": ({"n": 2}, with_delta(content="a")),
    "logprobs": ({"logprobs": True}, with_delta(content="a")),
    "tools": ({"tools": [{}]}, with_delta(content="a")),
    "grammar": ({"response_format": {"type": "json_object"}}, with_delta(content="{")),
    "tool call": ({}, with_delta(tool_calls=[{"index": 0, "function": {"name": "f"}}])),
    "thoughts": ({}, with_delta(reasoning_content="hm")),
    "older thoughts": ({}, with_delta(content="a") + with_delta(reasoning="hm")),
    "refusal": ({}, with_delta(refusal="no")),
    "no text": ({}, chunk(b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n')),
}


@pytest.mark.parametrize(("fields", "said"), DEAD_ENDS.values(), ids=DEAD_ENDS.keys())
def test_what_cannot_go_on_is_left_in_peace_and_ends_with_an_error(
    fields: dict[str, Any], said: bytes
) -> None:
    line = Line(**fields)
    connection = line.send().say(SSE + with_delta(role="assistant", content="") + said)
    line.stop(move=True)
    assert connection.open
    assert not line.of(StreamStopped)
    connection.die()
    (broke,) = line.of(StreamBroke)
    assert not broke.resumable
    assert line.events[-1]["error"]["message"].startswith("the stream broke: ")
    assert line.client.over == "finished"


def test_a_worker_that_cannot_go_on_is_not_asked_and_not_blamed() -> None:
    line = Line(kinds=("vllm", "openai", "vllm"))
    line.send().say(answered(line.connection)[:900])
    line.retry_always()
    line.connection.die()
    (failed,) = line.of(DispatchFailed)
    assert (failed.worker_id, failed.blame) == ("w1", False)
    line.connection.say(answered(line.connection))
    check(line)


def test_a_worker_that_refuses_to_go_on_keeps_its_words_to_us() -> None:
    line = Line()
    line.send().say(answered(line.connection)[:900])
    line.retry_always()
    line.connection.die()
    refusal = b'{"error":{"message":"its template does not allow that"}}'
    line.connection.say(b"HTTP/1.1 400 X\r\ncontent-length: %d\r\n\r\n%b" % (len(refusal), refusal))
    (failed,) = line.of(DispatchFailed)
    assert not failed.blame
    assert "template" in failed.because
    line.connection.say(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
    assert len(line.of(DispatchFailed)) == 2
    line.connection.say(answered(line.connection))
    check(line)


def test_limits_shrink_by_what_the_client_has() -> None:
    line = Line(max_tokens=8, min_tokens=2)
    line.send().say(answered(line.connection, 99)[:900])
    line.retry_always()
    line.connection.die()
    (broke,) = line.of(StreamBroke)
    body = line.connection.body
    assert (body["max_tokens"], body["min_tokens"]) == (8 - broke.produced, 0)
    line.connection.say(answered(line.connection, 99))
    check(line, 8)


def test_an_answer_at_its_limit_ends_there_though_its_worker_did_not_say_so() -> None:
    line = Line(TEXT, max_tokens=3, **USAGE)
    connection = line.send()
    said = stream(connection.request.replace(b'"max_tokens":3', b'"max_tokens":9'), 9)
    connection.say(said[: said.index(b" t3")])
    line.retry_always()
    connection.die()
    check(line, 3, usage=True)
    assert line.choices[-1]["finish_reason"] == "length"
    assert len(line.links[0].connections) == 1


def test_a_text_goes_on_by_token_ids_of_which_the_client_sees_nothing() -> None:
    line = Line(TEXT)
    connection = line.send()
    assert connection.body["return_token_ids"] is True
    said = answered(connection)
    line.retry_always()
    connection.say(said[: said.index(b" t3")]).die()
    prompt = line.connection.body["prompt"]
    assert all(type(token) is int for token in prompt)
    assert len(prompt) == prompt_tokens(TEXT) + 3
    line.connection.say(answered(line.connection))
    check(line)
    assert not any(choice.get("prompt_token_ids") for choice in line.choices)
    assert not any(choice.get("token_ids") for choice in line.choices)


@pytest.mark.parametrize(
    "anew", [["\n", "\n  b"], ["\n\n", "  b"], ["\n\n  b"], ["\n", "\n", "  b"]]
)
def test_white_space_that_templates_trim_is_written_again_and_shown_once(anew: list[str]) -> None:
    line = Line()
    line.retry_always()
    said = SSE + with_delta(role="assistant", content="") + with_delta(content="a")
    line.send().say(said + with_delta(content="\n\n")).die()
    assert line.connection.body["messages"][-1] == {"role": "assistant", "content": "a"}
    line.connection.say(SSE + with_delta(content="\n\n")).die()
    assert line.connection.body["messages"][-1]["content"] == "a"
    rest = b"".join(with_delta(content=text) for text in anew)
    line.connection.say(SSE + rest + chunk(b"data: [DONE]\n\n") + LAST_CHUNK)
    assert line.text == "a\n\n  b"


@pytest.mark.parametrize("blanks", [["\n\n"], ["\n", " "]])
def test_white_space_written_again_counts_once_to_the_client_and_in_the_log(
    blanks: list[str],
) -> None:
    line = Line(**USAGE)
    line.retry_always()
    blank = b"".join(with_delta(content=text) for text in blanks)
    opening = SSE + with_delta(role="assistant", content="")
    line.send().say(opening + with_delta(content="a") + blank).die()
    line.connection.say(opening + blank).die()
    counts = {"prompt_tokens": 11, "completion_tokens": len(blanks) + 1}  # "a" was in its prompt
    counts["total_tokens"] = 11 + counts["completion_tokens"]
    usage = b"data: %b\n\n" % json.dumps({"choices": [], "usage": counts}).encode()
    end = chunk(usage) + chunk(b"data: [DONE]\n\n") + LAST_CHUNK
    line.connection.say(opening + blank + with_delta(content="b") + end)
    shown = line.events[-2]["usage"]
    assert (shown["prompt_tokens"], shown["completion_tokens"]) == (10, len(blanks) + 2)
    (ended,) = line.of(StreamEnded)
    assert (ended.prompt_tokens, ended.output_tokens) == (10, len(blanks) + 2)
    assert line.outcome is not None
    assert (line.outcome.prompt_tokens, line.outcome.output_tokens) == (10, len(blanks) + 2)


def test_stop_strings_go_on_by_text_since_ids_would_be_ahead_of_it() -> None:
    line = Line(TEXT, stop=["\n"])
    connection = line.send()
    assert "return_token_ids" not in connection.body
    line.retry_always()
    connection.say(answered(connection)[:900]).die()
    assert line.connection.body["prompt"].startswith("Count! t0")
    line.connection.say(answered(line.connection))
    check(line)


def test_ids_are_of_no_use_to_another_kind_of_engine() -> None:
    line = Line(TEXT, kinds=("vllm", "llamacpp", "vllm"))
    line.retry_always()
    for cut in (b" t2", b" t4"):
        connection = line.connection if line.attempts else line.send()
        said = answered(connection)
        connection.say(said[: said.index(cut)]).die()
        if cut == b" t2":
            assert line.connection.body["prompt"] == "Count! t0 t1"
    line.connection.say(answered(line.connection))
    check(line)


def test_the_gap_at_the_seam_counts_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 1000))
    monkeypatch.setattr("paceline.gateway.relay.monotonic", lambda: float(next(clock)))
    line = Line()

    def each_token(connection: Connection) -> list[bytes]:
        said = answered(connection)
        frames, at = [], said.index(b"\r\n\r\n") + 4
        while at < len(said):
            size = int(said[at : said.index(b"\r\n", at)], 16)
            end = said.index(b"\r\n", at) + 2 + size + 2
            frames.append(said[at:end])
            at = end
        return frames

    connection = line.send()
    frames = each_token(connection)
    connection.say(SSE + frames[0] + frames[1], frames[2], frames[3])  # a token a second
    for _ in range(10):
        next(clock)
    line.stop(now=112.0)
    connection = line.send()
    rest = each_token(connection)
    connection.say(SSE + rest[0] + rest[1], rest[2] + rest[3] + rest[4])
    check(line)
    (ended,) = line.of(StreamEnded)
    assert ended.stall_s == 11.0
    assert ended.itl_s == (1 + 1 + 11 + 1) / 4


def test_a_request_becomes_what_its_tier_falls_back_to_only_while_nothing_has_passed() -> None:
    line = Line()
    request = line.exchange.request
    lowest = replace(request, tier="lowest")
    line.exchange.request = replace(request, instead=replace(request, tier="low", instead=lowest))
    line.exchange.degrade(Degrade("r", "low", "m", "told so"))
    assert line.send().body["priority"] == 3
    line.connection.say(answered(line.connection))
    assert b"x-paceline-tier: low\r\n" in line.client.got
    line.exchange.degrade(Degrade("r", "lowest", "m", "told so"))
    assert line.exchange.request.tier == "low"
    assert line.outcome is not None
    assert line.outcome.request.tier == "standard"
    assert line.outcome.degraded_to is not None
    assert line.outcome.degraded_to.tier == "low"


def test_each_step_down_has_its_own_priority_at_the_engine() -> None:
    line = Line()
    request = line.exchange.request
    lowest = replace(request, tier="lowest")
    line.exchange.request = replace(request, instead=replace(request, tier="low", instead=lowest))
    for tier in ("low", "lowest"):
        line.exchange.degrade(Degrade("r", tier, "m", "told so"))
    assert line.send().body["priority"] == 4


def test_a_request_counts_how_often_it_was_moved_and_paused() -> None:
    line = Line()
    line.send().say(answered(line.connection, 20)[:900])
    line.stop(move=True)
    line.send().say(answered(line.connection, 20)[:900])
    line.stop()
    line.send().say(answered(line.connection, 20)[:900])
    line.connection.die()
    line.send().say(answered(line.connection, 20))
    assert [turn for turn, _ in line.turns] == ["moved", "paused", "moved"]
    assert line.outcome is not None
    assert (line.outcome.moved, line.outcome.paused) == (2, 1)


def test_what_cannot_be_stopped_is_no_move() -> None:
    line = Line(logprobs=True)
    line.send().say(answered(line.connection)[:900])
    line.stop(move=True)
    assert not line.turns


def test_a_plain_answer_starts_anew() -> None:
    line = Line(stream=False)
    connection = line.send().say(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
    line.stop()
    assert line.of(StreamStopped)[0].produced == 0
    assert not connection.open
    line.send().say(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    assert line.body == b"ok"


# What is kept.


def test_what_is_kept_of_a_long_stream_is_its_text_and_little_more() -> None:
    produced, sizes = Produced(), []
    event = chunk(b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"word "}}]}' + b"\n\n")
    for _ in range(20_000):
        produced.add(bytes(bytearray(event)))
        kept = sum(map(sys.getsizeof, produced._pieces)) + sys.getsizeof(produced._pieces)
        texts = sum(map(sys.getsizeof, produced._texts)) + sys.getsizeof(produced._texts)
        sizes.append(kept + texts)
    text = 5 * 20_000
    assert max(sizes) < 1.1 * text + 1.25 * KEPT_BYTES
    assert produced.can_go_on


@given(st.lists(st.integers(0, 1 << 31), max_size=5), st.lists(st.booleans(), max_size=5))
def test_ids_are_cut_out_without_a_trace_and_without_a_byte_more(
    ids: list[int], several: list[bool]
) -> None:
    text = 'token_ids":[1]'
    said: list[Any] = [{"text": text, "token_ids": ids if x else None} for x in several]
    frames = b"".join(chunk(json.dumps(x, separators=(",", ":")).encode()) for x in said)
    cut = without_ids(frames)
    assert len(cut) == len(frames)
    for seen in [json.loads(part) for part in cut.split(b"\r\n") if part.startswith(b"{")]:
        assert seen["text"] == text
        assert not seen["token_ids"]


JUDGED: list[tuple[dict[str, Any], bool]] = [
    ({"stream": True, "messages": []}, True),
    ({"stream": False, "messages": []}, False),
    ({"messages": []}, False),
    ({"stream": True, "n": 2}, False),
    ({"stream": True, "logprobs": 5}, False),
    ({"stream": True, "presence_penalty": 0.5}, False),
    ({"stream": True, "prompt": ["one"]}, True),
    ({"stream": True, "prompt": ["one", "two"]}, False),
    ({"stream": True, "prompt": [1, 2, 3]}, True),
    ({"stream": True, "prompt": [[1], [2]]}, False),
    ({"stream": "yes"}, False),
]


@pytest.mark.parametrize(("body", "can"), JUDGED)
def test_only_streams_of_one_run_of_tokens_can_go_on(body: dict[str, Any], can: bool) -> None:
    data = json.dumps(body).encode()
    assert resumable(CHAT, "POST", data) is can
    assert not resumable("/v1/messages", "POST", data)
    assert not resumable(CHAT, "GET", data)
    assert not resumable(CHAT, "POST", data[:-1])
