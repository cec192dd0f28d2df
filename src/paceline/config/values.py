"""Which texts in the file are more than text? Addresses, engine URLs, keys.

Each type reads itself with `parse` and refuses with a `ValueError` whose message ends the sentence
"expected …".
"""

from __future__ import annotations

import hashlib
from typing import ClassVar, Self
from urllib.parse import SplitResult, urlsplit

import msgspec

DEFAULT_PORTS = {"http": 80, "https": 443}


class Address(msgspec.Struct, frozen=True):
    """Where to listen."""

    host: str
    port: int
    """0: any free one."""

    @classmethod
    def parse(cls, text: str) -> Self:
        expected = "host:port such as 127.0.0.1:8080 or [::1]:8080"
        host, colon, port = text.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        bracketed = host == f"[{bare}]"
        if not colon or not bare or (":" in bare) != bracketed or set(bare) & set("[]/@ "):
            raise ValueError(expected)
        return cls(bare, _port(port, expected, least=0))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class EngineUrl(msgspec.Struct, frozen=True):
    """Where an engine answers, in one spelling whatever way it was written."""

    scheme: str
    host: str
    port: int
    path: str = ""
    """In front of the API's own paths, such as `/engine-1` before `/v1/models`."""

    expected: ClassVar[str] = "the URL of an engine such as http://127.0.0.1:8000"

    @classmethod
    def parse(cls, text: str) -> Self:
        expected = cls.expected
        if not _fits_in_a_header(text):
            raise ValueError(expected)
        try:
            url = urlsplit(text)
        except ValueError:
            raise ValueError(expected) from None
        if url.username or url.password:
            raise ValueError("a URL without a user or password; put the engine's key into api_key")
        if url.scheme not in DEFAULT_PORTS or not url.hostname or url.query or url.fragment:
            raise ValueError(expected)
        return cls(url.scheme, url.hostname, _url_port(url, expected), _url_path(url))

    @property
    def name(self) -> str:
        """Short and readable: a worker's id."""
        return f"{Address(self.host, self.port)}{self.path}"

    @property
    def place(self) -> tuple[str, int, str]:
        """Equal for two URLs that lead to the same engine, as far as spelling tells."""
        return ("127.0.0.1" if self.host == "localhost" else self.host, self.port, self.path)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.name}"


class CollectorUrl(EngineUrl, frozen=True):
    """Where an OpenTelemetry collector takes OTLP over HTTP."""

    expected = "the URL of a collector such as http://127.0.0.1:4318"


class ExporterUrl(EngineUrl, frozen=True):
    """Where a DCGM exporter tells of GPUs, with or without `/metrics` at the end."""

    expected = "the URL of a DCGM exporter such as http://127.0.0.1:9400"

    @classmethod
    def parse(cls, text: str) -> Self:
        url = super().parse(text)
        return msgspec.structs.replace(url, path=url.path.removesuffix("/metrics"))


class Secret:
    """A text that is told only when asked for: never by `repr`, a log line or an encoder."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(_key(text))

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


class Digest(msgspec.Struct, frozen=True):
    """SHA-256 of a tenant's key: it recognises the key and does not give it away."""

    sha256: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        expected = "64 hex digits (printf %s KEY | sha256sum)"
        if len(text) != 64:
            raise ValueError(expected)
        try:
            return cls(bytes.fromhex(text))
        except ValueError:
            raise ValueError(expected) from None


class Key(Digest, frozen=True):
    """A tenant's key as written, forgotten as soon as it is read."""

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(hashlib.sha256(_key(text).encode()).digest())


def _fits_in_a_header(text: str) -> bool:
    """Printable ASCII without spaces: nothing in it can end a line or a field."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def _key(text: str) -> str:
    if not _fits_in_a_header(text):
        raise ValueError("a key of printable ASCII characters without spaces")
    return text


def _port(text: str, expected: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text) <= 65535):
        raise ValueError(f"{expected}, with a port from {least} to 65535")
    return int(text)


def _url_port(url: SplitResult, expected: str) -> int:
    try:
        port = url.port
    except ValueError:
        port = 0
    return _port(str(DEFAULT_PORTS[url.scheme] if port is None else port), expected, least=1)


def _url_path(url: SplitResult) -> str:
    """Without the slash at the end and without `/v1`, which clients of OpenAI's API like to add."""
    return url.path.rstrip("/").removesuffix("/v1").rstrip("/")
