"""How do SGLang's workers hand over? Both are asked at once, and meet in a numbered room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from paceline.domain.worker import Worker
from paceline.engines.probe import Probe
from paceline.engines.transfer.prompt import GENERATES, in_one_piece

ROOM = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
PORT = 8998
"""SGLang's `--disaggregation-bootstrap-port`, if nobody sets it."""


class Started(msgspec.Struct, frozen=True):
    """How the server was started, from `/server_info`."""

    disaggregation_bootstrap_port: int | None = None


class Bootstrap:
    """SGLang 0.5.23 with `--disaggregation-mode prefill` and `decode`.

    The first worker's token is the second's first one, so it must get the very same request. There
    is no lease: whoever waits in vain for the other gives up by itself, after minutes. A worker in
    either mode refuses a request that it does not share, with HTTP 400.
    """

    together = True

    def __init__(self, worker: Worker, api_key: str) -> None:
        host = urlsplit(worker.url).hostname or ""
        self._host = f"[{host}]" if ":" in host else host
        self._port = worker.bootstrap_port
        self._probe = Probe(worker.url, api_key)

    def none(self, path: str) -> Mapping[str, Any]:
        return dict.fromkeys(ROOM) if path in GENERATES else {}

    def prefill(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        return {**in_one_piece(body), **self._room(number)}

    def decode(self, path: str, number: int, answer: bytes) -> dict[str, Any] | None:
        return self._room(number)

    def _room(self, number: int) -> dict[str, Any]:
        return dict(zip(ROOM, (self._host, self._port or PORT, number), strict=True))

    def release(self, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """None: nothing is held between two calls."""
        return None

    async def learn(self, session: aiohttp.ClientSession) -> str:
        """Its port, unless the configuration has it."""
        if not self._port:
            told = (await self._probe.get(session, "/server_info")).read(Started)
            self._port = (told.disaggregation_bootstrap_port if told else None) or PORT
        return ""
