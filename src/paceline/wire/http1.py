"""How do bytes become HTTP/1.1 messages, and back? Pure functions and one reader."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus

REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection")
) | frozenset(("te", "trailer", "transfer-encoding", "upgrade", "content-length"))
"""Headers that speak of one connection (RFC 9110, 7.6.1) or of framing, which is ours to write."""

Headers = Iterable[tuple[str, str]]


class WireError(Exception):
    """The peer does not speak HTTP/1.1 as it should."""


def response_head(status: int, headers: Headers) -> bytes:
    """A response head; the caller names the framing in `headers`."""
    lines = [b"HTTP/1.1 %d %b" % (status, REASONS.get(status, b"Unknown"))]
    lines += [f"{name}: {value}".encode("latin-1") for name, value in headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


class ResponseHead:
    """Status, headers and framing of an answer."""

    __slots__ = ("chunked", "headers", "keep_alive", "length", "status")

    def __init__(self, status: int, headers: list[tuple[str, str]], keep_alive: bool) -> None:
        self.status = status
        self.headers = headers
        self.keep_alive = keep_alive
        self.chunked = False
        self.length: int | None = None
        """Body bytes; None: chunked, or until the peer closes."""
        for name, value in headers:
            if name == "transfer-encoding":
                self.chunked = value.lower().endswith("chunked")
            elif name == "content-length":
                if not value.isdecimal() or self.length not in (None, int(value)):
                    raise WireError(f"content-length is {value!r}")
                self.length = int(value)
            elif name == "connection":
                self.keep_alive = "close" not in value.lower()
        if status in (204, 304):
            self.chunked, self.length = False, 0
        elif self.chunked:
            self.length = None
        elif self.length is None:
            self.keep_alive = False

    def get(self, name: str) -> str:
        """The first value of a header, or an empty text."""
        return next((value for key, value in self.headers if key == name), "")


def parse_response_head(data: bytes, limit: int = 65536) -> tuple[ResponseHead, int] | None:
    """The head at the start of `data` and where it ends; None while it is incomplete."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > limit:
            raise WireError("response head too large")
        return None
    first, *rest = data[:end].decode("latin-1").split("\r\n")
    version, _, tail = first.partition(" ")
    code = tail[:3]
    if not version.startswith("HTTP/1.") or not code.isdecimal():
        raise WireError(f"not an HTTP/1.1 status line: {first[:80]!r}")
    headers = []
    for line in rest:
        name, colon, value = line.partition(":")
        if not colon or "\n" in line or "\r" in line:
            raise WireError(f"malformed header line: {line[:80]!r}")
        headers.append((name.strip().lower(), value.strip()))
    return ResponseHead(int(code), headers, keep_alive=version != "HTTP/1.0"), end + 4


MAX_SIZE_LINE = 1024
SIZES = {b"%x" % size: size for size in range(1, 4096)}
"""Sizes of usual chunks by their text: looked up in two thirds of the time that reading takes."""
SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?", re.DOTALL)
EVENT_END = b"\n\n\r\n"
"""How a chunk ends that ends with a server-sent event."""


class Chunks:
    """Walks the frames of a chunked body without touching their contents."""

    __slots__ = ("done", "missing", "uneven")

    def __init__(self) -> None:
        self.done = False
        """The last chunk has been walked over."""
        self.missing = 0
        """Bytes that an unfinished chunk at the end lacks; 0 where its size is not known."""
        self.uneven = False
        """Some chunk did not end where an event did."""

    def walk(self, data: bytes) -> int:
        """The end of the last whole chunk in `data`, which begins at a chunk.

        Sizes are hexadecimal digits (RFC 9112, 7.1); extensions are skipped, and trailers belong
        to the last chunk.
        """
        pos, size = 0, len(data)
        while pos < size:
            eol = data.find(b"\r\n", pos)
            if eol < 0:
                if size - pos > MAX_SIZE_LINE:
                    raise WireError("chunk size line too long")
                self.missing = 0
                break
            length = SIZES.get(data[pos:eol]) or _size(data[pos:eol])
            if not length:
                return self._terminator(data, pos, eol)
            end = eol + 4 + length
            if end > size:
                self.missing = end - size
                break
            if data[end - 4 : end] != EVENT_END:
                self.uneven = True
                if data[end - 2 : end] != b"\r\n":
                    raise WireError("chunk does not end where its size says")
            pos = end
        return pos

    def _terminator(self, data: bytes, pos: int, eol: int) -> int:
        plain = data[eol + 2 : eol + 4] == b"\r\n"
        end = eol + 4 if plain else data.find(b"\r\n\r\n", eol) + 4
        if end < 4:
            self.missing = 0
            return pos
        self.done = True
        return end


def _size(line: bytes) -> int:
    found = SIZE.fullmatch(line)
    if found is None:
        raise WireError(f"broken chunk size: {line[:40]!r}")
    return int(found[1], 16)


def payloads(data: bytes) -> list[bytes]:
    """The contents of whole chunks, as `Chunks.walk` measured them off."""
    found, pos = [], 0
    while pos < len(data):
        eol = data.find(b"\r\n", pos)
        length = _size(data[pos:eol])
        if length == 0:
            break
        found.append(data[eol + 2 : eol + 2 + length])
        pos = eol + 4 + length
    return found


def chunk(payload: bytes) -> bytes:
    """One chunk that holds `payload`."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


LAST_CHUNK = b"0\r\n\r\n"
