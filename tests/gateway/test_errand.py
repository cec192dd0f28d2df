"""Is an answer that is Paceline's own read whole, however its bytes come in?"""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.gateway.errand import MAX_BYTES, Errand
from paceline.wire.http1 import LAST_CHUNK, chunk

BODY = b'{"kv_transfer_params": {"remote_block_ids": [[1, 2]]}}'
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
WAIT = b"HTTP/1.1 100 Continue\r\n\r\n"
SIZED = OK + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n" + chunk(BODY[:9]) + chunk(BODY[9:])
UNTIL_CLOSE = OK + b"\r\n" + BODY


class Ways:
    """The link, the connection and the sender of an errand."""

    connecting = None
    carried = 1

    def __init__(self) -> None:
        self.told: list[str] = []
        self.bodies: list[bytes] = []
        self.sent = 0
        self.errand = Errand(cast(Any, self), b"", cast(Any, self), 0.0)

    def connection(self, fresh: bool) -> Ways:
        return self

    def start(self, *_: object) -> None:
        self.sent += 1

    def keep(self, connection: Ways) -> None:
        self.told.append("kept")

    def close(self) -> None:
        self.told.append("closed")

    def on_told(self, errand: Errand, now: float) -> None:
        self.told.append(f"HTTP {errand.status}")
        self.bodies.append(errand.body)

    def on_untold(self, errand: Errand, because: str) -> None:
        self.told.append(because)

    def says(self, data: bytes, *cuts: int) -> None:
        ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
        for start, end in zip([0, *ends], ends, strict=False):
            if start < end:
                self.errand.on_bytes(data[start:end])


@given(
    answer=st.sampled_from([SIZED, CHUNKED + LAST_CHUNK, WAIT + SIZED]),
    cuts=st.lists(st.integers(0, 260), max_size=6),
)
def test_an_answer_is_whole_wherever_it_is_cut(answer: bytes, cuts: list[int]) -> None:
    ways = Ways()
    ways.says(answer, *cuts)
    assert (ways.told, ways.bodies) == (["kept", "HTTP 200"], [BODY])


@given(cuts=st.lists(st.integers(0, 160), max_size=6))
def test_an_answer_may_end_with_its_connection(cuts: list[int]) -> None:
    ways = Ways()
    ways.says(UNTIL_CLOSE, *cuts)
    assert ways.told == []
    ways.errand.on_closed("closed", clean=True)
    assert (ways.told, ways.bodies) == (["closed", "HTTP 200"], [BODY])


@pytest.mark.parametrize("answer", [SIZED[:-1], CHUNKED, OK, b""])
def test_half_an_answer_is_none(answer: bytes) -> None:
    ways = Ways()
    ways.says(answer)
    ways.errand.on_closed("it went away", clean=True)
    assert ways.told == ["closed", "it went away"]


def test_a_connection_that_said_too_much_carries_nothing_else() -> None:
    ways = Ways()
    ways.says(SIZED + b"HTTP/1.1")
    assert ways.told == ["closed", "HTTP 200"]


def test_a_connection_that_had_ended_unseen_is_replaced_by_a_fresh_one() -> None:
    ways = Ways()
    ways.carried = 2
    ways.errand.on_closed("closed", clean=True)
    assert (ways.sent, ways.told) == (2, [])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"what?\r\n\r\n", "broken answer"),
        (OK + b"content-length: %d\r\n\r\n" % (9 * MAX_BYTES) + bytes(MAX_BYTES + 1), "too large"),
    ],
)
def test_nonsense_and_floods_are_refused(answer: bytes, told: str) -> None:
    ways = Ways()
    ways.says(answer)
    assert told in ways.told[-1]


def test_nothing_is_heard_of_what_was_abandoned() -> None:
    ways = Ways()
    ways.errand.abandon()
    ways.says(SIZED)
    assert ways.told == ["closed"]
