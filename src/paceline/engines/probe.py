"""What does an engine answer to a small question, if it answers at all?

The other side is not trusted to be well: every read ends after a time and a size, redirects are
not followed (they would carry the key elsewhere), and all trouble comes back as a value.
"""

from __future__ import annotations

import asyncio
import os
from typing import TypeVar

import aiohttp
import msgspec

TIMEOUT_S = 5.0
"""Longer than any healthy engine takes, also with a long prefill on the same core."""
MAX_BYTES = 4 * 1024 * 1024

T = TypeVar("T")


class Answer(msgspec.Struct, frozen=True):
    """What came back."""

    status: int
    """HTTP status; 0: nothing came back."""
    body: bytes = b""
    server: str = ""
    """The Server header."""
    because: str = ""
    """Why nothing came back, for people."""

    @property
    def ok(self) -> bool:
        return self.status == 200

    @property
    def trouble(self) -> str:
        """What to tell people if it is not ok."""
        if not self.status:
            return self.because
        if self.status in (401, 403):
            return f"refuses the key (HTTP {self.status})"
        return f"HTTP {self.status}"

    def read(self, kind: type[T]) -> T | None:
        """The body as JSON of this kind; None if it is something else."""
        if not self.ok:
            return None
        try:
            return msgspec.json.decode(self.body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None


class Probe:
    """Asks one engine."""

    def __init__(self, url: str, api_key: str) -> None:
        self._url = url.rstrip("/")
        self._headers = {"accept-encoding": "identity"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    async def get(self, session: aiohttp.ClientSession, path: str) -> Answer:
        """GET a path below the engine's URL."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._get(session, path)
        except TimeoutError:
            return Answer(0, because=f"no answer to {path} within {TIMEOUT_S:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Answer(0, because=_sentence(error))

    async def serves(self, session: aiohttp.ClientSession, name: str) -> tuple[Models | None, str]:
        """What is listed in `/v1/models`, and what is wrong with it: empty if `name` is served."""
        answer = await self.get(session, "/v1/models")
        listed = answer.read(Models)
        if listed is None:
            return None, "/v1/models is no list of models" if answer.ok else answer.trouble
        if name in listed.names:
            return listed, ""
        return listed, f"serves {', '.join(listed.names) or 'nothing'}, not {name}"

    async def _get(self, session: aiohttp.ClientSession, path: str) -> Answer:
        async with session.get(
            self._url + path, headers=self._headers, allow_redirects=False
        ) as response:
            body = bytearray()
            async for part in response.content.iter_any():
                body += part
                if len(body) > MAX_BYTES:
                    return Answer(0, because=f"more than {MAX_BYTES} bytes from {path}")
            server = response.headers.get("server", "")
            return Answer(response.status, bytes(body), server)


def _sentence(error: Exception) -> str:
    """aiohttp's own words for a refused connection are long, and lack "refused"."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__


class Model(msgspec.Struct, frozen=True):
    """An entry of `/v1/models`, with what some engines add to OpenAI's fields."""

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None


class Models(msgspec.Struct, frozen=True):
    """The answer of `/v1/models`."""

    data: list[Model]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model.id for model in self.data)

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and answer together, where the engine tells."""
        told = [model.max_model_len for model in self.data if model.max_model_len]
        return max(told) if told else None
