"""What does it take to talk to one engine?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp
import msgspec

from paceline.domain.worker import Worker
from paceline.engines.adapter import Adapter, make_adapter
from paceline.engines.transfer import Transfer, make_transfer

REFUSED_S = 5.0
"""How long a worker may take to refuse what it is to refuse."""


class Engine(msgspec.Struct, frozen=True):
    """A worker with what it takes to talk to it."""

    worker: Worker
    adapter: Adapter
    api_key: str
    """What it wants to see as a bearer token; empty: nothing."""
    transfer: Transfer | None = None
    """How it hands prompts over to others, if it does."""

    @classmethod
    def of(cls, worker: Worker, api_key: str) -> Engine:
        """With the adapter of the worker's kind; a plain one until the kind is detected."""
        adapter = adapter_of(worker, api_key)
        return cls(worker, adapter, api_key, make_transfer(worker, api_key))

    def identified(self, kind: str, serves_as: str) -> Engine:
        """With the kind and the model's name that it has shown, where it was told none."""
        worker = self.worker
        shown = msgspec.structs.replace(
            worker, kind=worker.kind or kind, serves_as=worker.serves_as or serves_as
        )
        return self if shown == worker else Engine.of(shown, self.api_key)

    def __repr__(self) -> str:
        return f"Engine({self.worker.id})"


def adapter_of(worker: Worker, api_key: str) -> Adapter:
    """The adapter of a worker's kind; a plain one until the kind is detected."""
    name = worker.serves_as or worker.model
    return make_adapter(worker.kind or "openai", worker.url, name, api_key)


async def refused(
    session: aiohttp.ClientSession, engines: Iterable[Engine], body: Mapping[str, Any]
) -> None:
    """Ask one of these engines for a completion that it will refuse, and by that has another one
    free what it holds. If none of them answers, the other's own time limit remains."""
    for engine in engines:
        url = f"{engine.worker.url.rstrip('/')}/v1/completions"
        headers = {"authorization": f"Bearer {engine.api_key}"} if engine.api_key else {}
        try:
            async with (
                asyncio.timeout(REFUSED_S),
                session.post(url, json=body, headers=headers) as answer,
            ):
                await answer.read()
                return
        except (aiohttp.ClientError, OSError):  # OSError: also the timeout
            continue
