"""What does the gateway say now? Asked of the admin API, and only when somebody wants to know."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TypeVar

import aiohttp
import msgspec

PATIENCE_S = 5.0
"""With the gateway, for one answer."""
FORGET_S = 30.0
"""What nobody has asked for in so long is not kept."""

T = TypeVar("T")


class Missing(msgspec.Struct, frozen=True):
    """There is no such answer, and this is why, for people."""

    because: str


class _Known(msgspec.Struct):
    body: bytes
    told: object
    at: float
    """When it was asked for, on the monotonic clock."""


class Source:
    """Answers of one gateway, shared by all who look at it."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        """With the admin listener as its base."""
        self._known: dict[str, _Known] = {}
        self._asking: dict[str, asyncio.Lock] = {}

    async def get(self, path: str, kind: type[T], fresh_s: float = 0.9) -> T | Missing:
        """An answer no older than `fresh_s`; those who ask at once share one."""
        async with self._asking.setdefault(path, asyncio.Lock()):
            known = self._known.get(path)
            if known is None or monotonic() - known.at > fresh_s:
                known = self._known[path] = await self._ask(path, kind, known)
                self._forget()
        told = known.told
        return told if isinstance(told, kind | Missing) else Missing("another kind was asked for")

    async def _ask(self, path: str, kind: type[T], before: _Known | None) -> _Known:
        at = monotonic()
        try:
            async with self._session.get(
                "/paceline/v1/" + path, timeout=aiohttp.ClientTimeout(PATIENCE_S)
            ) as response:
                body = await response.read()
                if response.status == 404:
                    return _Known(b"", Missing("This gateway does not tell."), at)
                response.raise_for_status()
            if before is not None and before.body == body:
                return _Known(body, before.told, at)
            return _Known(body, msgspec.json.decode(body, type=kind), at)
        except (aiohttp.ClientError, TimeoutError) as error:
            because = f"The gateway does not answer: {error or type(error).__name__}."
        except msgspec.DecodeError as error:
            because = f"The answer was not understood: {error}."
        return _Known(b"", Missing(because), at)

    def _forget(self) -> None:
        old = monotonic() - FORGET_S
        for path in [path for path, known in self._known.items() if known.at < old]:
            del self._known[path], self._asking[path]
