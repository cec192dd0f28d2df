"""How are the GPUs under the workers, as their exporters tell?

Asked every few seconds beside everything else. Nothing is decided by it: it is evidence for people.
An exporter that is away takes its GPUs' figures with it, and is spoken of once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from time import monotonic

import aiohttp
import msgspec
import structlog

from paceline.domain.gpu import Gpu, Gpus
from paceline.domain.worker import Worker
from paceline.engines.dcgm import gpus_of
from paceline.engines.probe import Probe

EVERY_S = 5.0
"""Exporters collect anew every 30 s, unless told otherwise."""
TELLING_S = 60.0
"""So long a lowered clock is remembered: who is slow gets less work, and is not slowed by that."""
ALL = "all"

log = structlog.get_logger("paceline")


class GpuWatch:
    """The newest figures, by worker."""

    def __init__(self, workers: Callable[[], Iterable[Worker]]) -> None:
        self._workers = workers
        self._latest: dict[str, tuple[Gpu, ...]] = {}
        self._lowered: dict[str, tuple[float, tuple[Gpu, ...]]] = {}
        """When the clock of one of a worker's GPUs was last lowered, and how they all were."""
        self._best_mhz: dict[tuple[str, int], float] = {}
        self._away: set[tuple[str, str]] = set()
        """Exporters, and which of their GPUs, of which was said that they are."""

    def latest(self, worker_id: str) -> Sequence[Gpu]:
        """A worker's GPUs as last seen; none: nobody tells."""
        return self._latest.get(worker_id, ())

    def telling(self, worker_id: str) -> Sequence[Gpu]:
        """The same; if of late the clock of one of them was lowered, as they were then."""
        at, lowered = self._lowered.get(worker_id, (-inf, ()))
        return lowered if monotonic() - at < TELLING_S else self.latest(worker_id)

    async def run(self) -> None:
        """Ask again and again."""
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    await self.ask(session)
                except Exception:  # evidence is not worth a gateway
                    log.exception("a bug kept GPUs from being known")
                await asyncio.sleep(EVERY_S)

    async def ask(self, session: aiohttp.ClientSession) -> None:
        """Ask every exporter once, all at the same time."""
        owned = {worker.id: worker.gpus for worker in self._workers() if worker.gpus}
        urls = sorted({gpus.url for gpus in owned.values()})
        answers = await asyncio.gather(*(self._asked(session, url) for url in urls))
        pages = dict(zip(urls, answers, strict=True))
        seen = {worker_id: self._own(gpus, pages[gpus.url]) for worker_id, gpus in owned.items()}
        now, self._latest = monotonic(), seen
        for worker_id, own in seen.items():
            if any(gpu.lowered_by for gpu in own):
                self._lowered[worker_id] = now, own
        self._lowered = {name: was for name, was in self._lowered.items() if seen.get(name)}
        self._best_mhz = {key: mhz for key, mhz in self._best_mhz.items() if key[0] in pages}
        self._away = {away for away in self._away if away[0] in pages}

    def _own(self, gpus: Gpus, page: Mapping[int, Gpu]) -> tuple[Gpu, ...]:
        """A worker's GPUs, of all that are on a page."""
        for index in gpus.indices:
            if page and index not in page:
                self._say(gpus.url, f"GPU {index}", "it is not there")
        return tuple(page[index] for index in gpus.indices or page if index in page)

    async def _asked(self, session: aiohttp.ClientSession, url: str) -> dict[int, Gpu]:
        """An exporter's GPUs, each with its best clock; none if it is away."""
        answer = await Probe(url, "").get(session, "/metrics")
        gpus = gpus_of(answer.body) if answer.ok else {}
        if not gpus:
            self._say(url, ALL, "it tells of none" if answer.ok else answer.trouble)
        elif (url, ALL) in self._away:
            self._away.discard((url, ALL))
            log.info("GPUs are known again", exporter=url)
        return {index: self._with_best(url, gpu) for index, gpu in gpus.items()}

    def _with_best(self, url: str, gpu: Gpu) -> Gpu:
        if gpu.clock_mhz is None:
            return gpu
        key = url, gpu.index
        best_mhz = self._best_mhz[key] = max(self._best_mhz.get(key, 0.0), gpu.clock_mhz)
        return msgspec.structs.replace(gpu, best_clock_mhz=best_mhz)

    def _say(self, url: str, gpus: str, trouble: str) -> None:
        """What of an exporter is away, when that begins."""
        if (url, gpus) not in self._away:
            self._away.add((url, gpus))
            log.warning("GPUs are not known", exporter=url, gpus=gpus, because=trouble)
