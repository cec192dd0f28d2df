"""Who listens to what one engine tells of its KV cache?

A task for each of its caches, from when it is ready until it tells elsewhere, or its worker leaves.
"""

from __future__ import annotations

import asyncio

import aiohttp
import structlog

from paceline.domain.kvevents import BlocksChanged, BlocksUnknown
from paceline.engines.kvevents.sources import Source, sources
from paceline.engines.kvevents.stream import KvEventStream, Told

log = structlog.get_logger("paceline")


class Ears:
    """All that listens to one engine."""

    def __init__(self, worker_id: str, tell: Told, owner: asyncio.TaskGroup) -> None:
        """`owner`: of the tasks that listen."""
        self._worker_id = worker_id
        self._tell = tell
        self._owner = owner
        self._tasks: dict[Source, asyncio.Task[None]] = {}

    async def turn(self, session: aiohttp.ClientSession, url: str, api_key: str) -> None:
        """Listen where the engine tells now, and nowhere else."""
        wanted = await sources(session, url, api_key)
        for source in [source for source in self._tasks if source not in wanted]:
            self._tasks.pop(source).cancel()
        for source in wanted:
            if source not in self._tasks or self._tasks[source].done():
                name = f"KV events of {self._worker_id}, rank {source.rank}"
                self._tasks[source] = self._owner.create_task(self._listen(source), name=name)

    async def _listen(self, source: Source) -> None:
        log.info("listening to KV events", worker=self._worker_id, at=source.endpoint)
        try:
            await KvEventStream(self._worker_id, source, self._heard).run()
        except Exception:  # its worker is worth more than what its cache holds
            log.exception("KV events cannot be heard", worker=self._worker_id, at=source.endpoint)
        finally:
            self._heard(BlocksUnknown(self._worker_id, "nobody listens any more", source.rank))

    def _heard(self, fact: BlocksChanged | BlocksUnknown) -> None:
        """Tell it on. What was not understood must neither end the listening nor leave a view that
        is half true."""
        try:
            self._tell(fact)
        except Exception:
            log.exception("KV events were not understood", worker=self._worker_id)
            if isinstance(fact, BlocksChanged):
                self._heard(BlocksUnknown(fact.worker_id, "a bug", fact.rank))
