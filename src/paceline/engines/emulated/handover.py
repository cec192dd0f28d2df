"""How does an emulated engine hand a prompt over to another? In the words of vLLM's NixlConnector.

The first holds the prompt's blocks and tells where they lie. The second fetches them, here by an
HTTP call that moves no data and takes its time. And as with the real ones: the first gives the
blocks up when the lease ends, and a second that comes later notices nothing and writes nonsense.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from paceline.enginemodel import Scheduler
from paceline.engines.emulated.settings import EngineSettings

FETCH_S = 5.0
NONSENSE = 500_000_000
"""Number of the first token of an answer that rests on others' blocks."""


class Place(msgspec.Struct, frozen=True):
    """Where a prompt lies, from `kv_transfer_params`; names are NixlConnector's."""

    remote_engine_id: str = ""
    remote_request_id: str = ""
    remote_host: str = ""
    remote_port: int = 0
    remote_num_tokens: int = 0
    do_remote_prefill: bool = False
    do_remote_decode: bool = False


def place_of(params: Mapping[str, Any] | None) -> Place:
    """What a body asks for; nothing, if it is not understood."""
    given = {name: value for name, value in (params or {}).items() if value is not None}
    return msgspec.convert(given, Place)


class Fetch(msgspec.Struct, frozen=True):
    """The body of `POST /emulate/fetch`."""

    engine_id: str
    request_id: str


Found = Literal["held", "others", "nothing"]


class Holder:
    """The first engine's part."""

    def __init__(
        self,
        scheduler: Scheduler,
        engine_id: str,
        s: EngineSettings,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.engine_id = engine_id
        """A new one after each start."""
        self.fetched = self.expired = 0
        self._scheduler = scheduler
        self._settings = s
        self._loop = loop
        self._leases: dict[str, asyncio.TimerHandle] = {}

    def hold(self, request_id: str, tokens: int, host: str, port: int) -> dict[str, Any]:
        """A prompt is prefilled: gives what the second has to be told."""
        lease = self._loop.call_later(self._settings.kv_lease_s, self._expire, request_id)
        self._leases[request_id] = lease
        blocks = -(-tokens // self._scheduler.profile.block_size)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(1, blocks + 1))],
            "remote_engine_id": self.engine_id,
            "remote_request_id": request_id,
            "remote_host": host,
            "remote_port": port,
            "tp_size": 1,
            "remote_num_tokens": tokens,
        }

    def fetch(self, asked: Fetch) -> Found:
        """Another engine has what it wants, and these blocks are free again."""
        if asked.engine_id != self.engine_id:
            return "nothing"
        lease = self._leases.pop(asked.request_id, None)
        if lease is None:
            return "others"
        lease.cancel()
        self.fetched += 1
        self._scheduler.release(asked.request_id)
        return "held"

    def stop(self) -> None:
        for lease in self._leases.values():
            lease.cancel()

    def _expire(self, request_id: str) -> None:
        del self._leases[request_id]
        self.expired += 1
        self._scheduler.release(request_id)


class Fetcher:
    """The second engine's part."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()

    def fetch(self, place: Place, then: Callable[[Found], None]) -> None:
        """Fetch a prompt, and go on with what was found. Whoever asked may be gone by then."""
        task = asyncio.create_task(self._fetch(place, then), name="fetch blocks")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _fetch(self, place: Place, then: Callable[[Found], None]) -> None:
        found = await _ask(place)
        rate = self._settings.kv_tokens_per_s
        if found != "nothing" and rate is not None:
            await asyncio.sleep(place.remote_num_tokens / (rate * self._settings.speed))
        then(found)


async def _ask(place: Place) -> Found:
    body = msgspec.json.encode(Fetch(place.remote_engine_id, place.remote_request_id))
    host = f"{place.remote_host}:{place.remote_port}"
    head = f"POST /emulate/fetch HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
    writer = None
    try:
        async with asyncio.timeout(FETCH_S):
            reader, writer = await asyncio.open_connection(place.remote_host, place.remote_port)
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.read()
        found: Found = msgspec.json.decode(answer[answer.index(b"\r\n\r\n") :], type=Found)
    except (OSError, ValueError):  # nobody there, or nobody that we know
        return "nothing"
    finally:
        if writer is not None:
            writer.close()
    return found
