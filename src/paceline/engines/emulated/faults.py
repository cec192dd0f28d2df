"""Which troubles can be ordered? Bodies of `POST /emulate/…`, and what they do to an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from paceline.engines.emulated.asks import error_body
from paceline.engines.emulated.formats import DONE, event
from paceline.wire.http1 import LAST_CHUNK, chunk
from paceline.wire.server import ServerConnection

Seconds = Annotated[float, msgspec.Meta(ge=0)]
FaultKind = Literal[
    "error500",
    "close_mid_header",
    "no_answer",
    "broken_chunk",
    "cut_chunk",
    "garbled_chunk",
    "error_event",
    "close_mid_stream",
    "reset_mid_stream",
]


class Slowdown(msgspec.Struct, forbid_unknown_fields=True):
    """Steps take `factor` times as long."""

    factor: Annotated[float, msgspec.Meta(gt=0)]
    seconds: Seconds | None = None
    """None: until reset."""


class Hang(msgspec.Struct, forbid_unknown_fields=True):
    """No step ends, while the server goes on answering."""

    seconds: Seconds


class Crash(msgspec.Struct, forbid_unknown_fields=True):
    """All connections and the listener are gone, and with them requests, cache and counters."""

    restart_after_s: Seconds | None = None
    """None: for good."""


class Refuse(msgspec.Struct, forbid_unknown_fields=True):
    """New connections are reset, orders included, while those that stand go on."""

    seconds: Seconds


class Cut(msgspec.Struct, forbid_unknown_fields=True):
    """The connections of all answers under way are reset, and nothing else happens."""


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """The next `count` generations go wrong in this way."""

    kind: FaultKind
    count: Annotated[int, msgspec.Meta(ge=1)] = 1
    after_tokens: Annotated[int, msgspec.Meta(ge=1)] = 3
    """For what goes wrong within a stream: how many tokens come before. A shorter one is spared."""


Spoil = Callable[[ServerConnection, bytes], bool]
"""What comes in place of a token's frame; True: the stream goes on after it."""


def broken_chunk(connection: ServerConnection, frame: bytes) -> bool:
    """What a client's parser must refuse: a chunk whose size is no number."""
    connection.send(b"no size\r\n")
    connection.close()
    return False


def cut_chunk(connection: ServerConnection, frame: bytes) -> bool:
    connection.send(frame[: len(frame) // 2])
    connection.close()
    return False


def garbled_chunk(connection: ServerConnection, frame: bytes) -> bool:
    """A sound frame whose content is no JSON: a careless reader loses a token and goes on."""
    connection.send(frame.replace(b'"', b"#"))
    return True


def error_event(connection: ServerConnection, frame: bytes) -> bool:
    """How vLLM ends a stream whose generation failed."""
    error = msgspec.json.decode(error_body(500, "EngineCore encountered an issue."))
    connection.send(chunk(event(error) + DONE) + LAST_CHUNK)
    connection.finish()
    return False


def close_mid_stream(connection: ServerConnection, frame: bytes) -> bool:
    connection.close()
    return False


def reset_mid_stream(connection: ServerConnection, frame: bytes) -> bool:
    connection.abort()
    return False


SPOILS: dict[FaultKind, Spoil] = {
    "broken_chunk": broken_chunk,
    "cut_chunk": cut_chunk,
    "garbled_chunk": garbled_chunk,
    "error_event": error_event,
    "close_mid_stream": close_mid_stream,
    "reset_mid_stream": reset_mid_stream,
}
"""The faults that happen within a stream."""


def fail_at_once(connection: ServerConnection, kind: FaultKind) -> None:
    """A fault before the first token, or of an answer that is no stream."""
    if kind == "error500":
        connection.answer(500, error_body(500, "EngineCore encountered an issue."))
    elif kind != "no_answer":  # for which the client waits for ever
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/eve")
        connection.close()
