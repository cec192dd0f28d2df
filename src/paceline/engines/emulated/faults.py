"""Which troubles can be ordered? Bodies of `POST /emulate/…`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from paceline.wire.server import ServerConnection

Seconds = Annotated[float, msgspec.Meta(ge=0)]
FaultKind = Literal["error500", "close_mid_header", "broken_chunk", "close_mid_stream", "no_answer"]


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


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """The next `count` generations go wrong in this way."""

    kind: FaultKind
    count: Annotated[int, msgspec.Meta(ge=1)] = 1


def close_mid_header(connection: ServerConnection) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/eve")
    connection.close()


def break_chunk(connection: ServerConnection) -> None:
    """What a client's parser must refuse: a chunk whose size is no number."""
    connection.send(b"no size\r\n")
    connection.close()


def close_mid_stream(connection: ServerConnection) -> None:
    connection.close()
