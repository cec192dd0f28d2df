"""Is a chunked body walked the same however it is cut, and nonsense refused?"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.wire.http1 import (
    LAST_CHUNK,
    Chunks,
    WireError,
    chunk,
    parse_response_head,
    payloads,
    response_head,
)

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"
ENDINGS = (LAST_CHUNK, b"0;last\r\n\r\n", b"000\r\nchecksum: 1\r\nnote: x\r\n\r\n")


def walked(pieces: list[bytes]) -> tuple[bytes, bytes, bool]:
    """Payload, what was left over, and whether the end was seen, as a relay would walk it."""
    chunks, carry, found = Chunks(), b"", b""
    for piece in pieces:
        carry += piece
        if not chunks.done:
            end = chunks.walk(carry)
            found += b"".join(payloads(carry[:end]))
            carry = carry[end:]
    return found, carry, chunks.done


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=8),
    st.sampled_from(ENDINGS),
    st.lists(st.integers(0, 10_000), max_size=12),
    st.sampled_from((b"", b"HTTP/1.1 200")),
)
def test_any_split_into_reads_walks_the_same(
    bodies: list[bytes], ending: bytes, places: list[int], surplus: bytes
) -> None:
    data = b"".join(map(chunk, bodies)) + ending + surplus
    assert walked(cut(data, places)) == (b"".join(bodies), surplus, True)


@given(st.binary(min_size=1, max_size=5000))
def test_sizes_may_be_written_in_any_case_with_zeros_and_extensions(body: bytes) -> None:
    for size in (b"%X", b"000%x", b'%x;name="value"', b"%x ; a"):
        data = size % len(body) + b"\r\n" + body + b"\r\n" + LAST_CHUNK
        assert walked([data]) == (body, b"", True)


@pytest.mark.parametrize("size", [b"-1", b"+1", b"0x1", b"1_0", b"", b" 1", b"g", b"1" * 16, b";x"])
def test_a_size_that_is_no_hexadecimal_number_is_refused(size: bytes) -> None:
    with pytest.raises(WireError, match="broken chunk size"):
        Chunks().walk(size + b"\r\nx\r\n")


def test_a_chunk_longer_than_its_size_is_refused() -> None:
    with pytest.raises(WireError, match="does not end"):
        Chunks().walk(b"3\r\nfour\r\n")


def test_a_size_line_without_end_is_refused() -> None:
    with pytest.raises(WireError, match="too long"):
        Chunks().walk(b"1;" + b"x" * 2000)


def test_an_unfinished_chunk_says_how_much_it_lacks() -> None:
    chunks = Chunks()
    assert chunks.walk(b"2\r\nab\r\n" + b"64\r\nabc") == 7
    assert chunks.missing == 100 - 3 + 2
    assert chunks.walk(b"64") == 0
    assert chunks.missing == 0


def test_chunks_that_end_with_an_event_are_even() -> None:
    chunks = Chunks()
    chunks.walk(chunk(b"data: 1\n\n") + chunk(b"data: 2\n\ndata: 3\n\n"))
    assert not chunks.uneven
    chunks.walk(chunk(b"data: 4\n"))
    assert chunks.uneven


@given(st.lists(st.integers(0, 200), max_size=3))
def test_a_head_is_read_once_it_is_whole(places: list[int]) -> None:
    data = HEAD + b"content-length: 2\r\n\r\nok"
    for piece in (data[: place % (len(data) - 3)] for place in places):
        assert parse_response_head(piece) is None
    found = parse_response_head(data)
    assert found is not None
    head, end = found
    assert (head.status, head.length, head.keep_alive, data[end:]) == (200, 2, True, b"ok")


@pytest.mark.parametrize(
    ("lines", "chunked", "length", "keep_alive"),
    [
        (b"transfer-encoding: chunked\r\n", True, None, True),
        (b"Transfer-Encoding: gzip, Chunked\r\ncontent-length: 3\r\n", True, None, True),
        (b"content-length: 3\r\ncontent-length: 3\r\n", False, 3, True),
        (b"content-length: 3\r\nConnection: Close\r\n", False, 3, False),
        (b"", False, None, False),
    ],
)
def test_framing_follows_from_the_headers(
    lines: bytes, chunked: bool, length: int | None, keep_alive: bool
) -> None:
    found = parse_response_head(HEAD + lines + b"\r\n")
    assert found is not None
    head = found[0]
    assert (head.chunked, head.length, head.keep_alive) == (chunked, length, keep_alive)


def test_an_http_1_0_engine_keeps_alive_only_if_it_says_so() -> None:
    plain = parse_response_head(b"HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\n")
    kept = parse_response_head(
        b"HTTP/1.0 200 OK\r\ncontent-length: 1\r\nconnection: keep-alive\r\n\r\n"
    )
    assert plain is not None
    assert kept is not None
    assert (plain[0].keep_alive, kept[0].keep_alive) == (False, True)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\nset-cookie: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000,
    ],
)
def test_what_is_no_sound_head_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        parse_response_head(data)


def test_an_unknown_status_still_makes_a_head() -> None:
    assert response_head(299, [("a", "b")]) == b"HTTP/1.1 299 Unknown\r\na: b\r\n\r\n"
