"""Who looks on while a gateway serves? Each part is told what happens; none decides anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from random import uniform
from time import monotonic, time
from typing import TYPE_CHECKING, Any

import structlog
from starlette.routing import Route

from paceline.config import Config
from paceline.domain.errors import ConfigError
from paceline.domain.outcome import Outcome
from paceline.domain.promise import Tier
from paceline.engines.gpus import GpuWatch
from paceline.gateway.exchange import Exchange
from paceline.gateway.ports import Turn
from paceline.gateway.relay import GAP_BOUNDS
from paceline.host import LiveHost, Observer
from paceline.kernel import Kernel
from paceline.kernel.log import known_workers, opening
from paceline.observe.cluster import Cluster
from paceline.observe.dashboard import Dashboard
from paceline.observe.diagnosis import Diagnosis
from paceline.observe.ended import Counter, Ended, Listener, Over
from paceline.observe.factlog import FactLog
from paceline.observe.findings import diagnosis_routes
from paceline.observe.gpu_metrics import GpuMetrics
from paceline.observe.lag import watch_lag
from paceline.observe.late_metrics import LateMetrics
from paceline.observe.logs import request_lines
from paceline.observe.metrics import Metrics
from paceline.observe.pace_metrics import PaceMetrics
from paceline.observe.stalls import Stalls
from paceline.observe.views import cluster_routes

if TYPE_CHECKING:
    from paceline.observe.otel import OpenTelemetry

LOOK_S = (1.5, 2.5)
"""Between two looks at who uses the workers, and at what has happened: by chance, so that no rhythm
of the load is taken for the whole."""

log = structlog.get_logger("paceline")


class Observing:
    """Metrics, causes, findings, the last hour, traces, the log of facts, the dashboard."""

    def __init__(
        self,
        config: Config,
        host: LiveHost,
        tiers: Callable[[], Mapping[str, Tier]],
        refusals: Callable[[], Mapping[str, int]],
    ) -> None:
        """`refusals`: requests over a quota so far, by tenant."""
        kernel = host.kernel

        def attain(tier: str) -> float:
            """Share of its promises that a tier is to keep; of one that is gone, what is usual."""
            return tiers().get(tier, Tier(tier)).attain

        self.metrics = Metrics(
            kernel,
            host.gap_counts,
            GAP_BOUNDS,
            refusals,
            lambda: {name: tier.attain for name, tier in tiers().items()},
            config.observe.max_tenants,
        )
        self.otel = _otel(config)
        self._stalls = Stalls(kernel)
        self._facts = _fact_log(config, kernel)
        self._cluster = Cluster(kernel, host.gap_counts, attain, monotonic(), host.asked)
        self.metrics.also(LateMetrics(self._stalls.losses))
        self.gpus = GpuWatch(lambda: [state.worker for state in kernel.workers.values()])
        self.metrics.also(GpuMetrics(kernel, self.gpus.latest))
        clocks = monotonic, time
        self._diagnosis = Diagnosis(kernel, self._stalls, clocks, refusals, self.gpus.telling)
        self.slower = self._diagnosis.slower
        self.metrics.also(PaceMetrics(kernel, self.slower))
        self._dashboard = Dashboard(config.observe.dashboard)
        observers: list[Observer] = [self._stalls.saw]
        if self._facts is not None:
            observers.append(self._facts.write)
        if self.otel is not None:
            observers.append(self.otel.saw)
        host.observers = observers
        listeners: list[Listener] = [_say, self._cluster.batches.over]
        counters: list[Counter] = [self.metrics.count, self._cluster.count]
        if self.otel is not None:
            listeners.append(self.otel.over)
            counters.append(self.otel.count)
        self._ended = Ended(listeners, counters)
        if self.otel is not None:
            self.otel.before_reading = self._ended.count
        self.metrics.before_reading = self._catch_up
        self.routes: list[Route] = [
            *diagnosis_routes(self._diagnosis),
            *cluster_routes(self._cluster, kernel, GAP_BOUNDS, time),
            *self._dashboard.routes(),
        ]

    def closed(self, exchange: Exchange, outcome: Outcome) -> None:
        """A request is over."""
        self._ended.add(exchange, outcome)

    def _catch_up(self) -> None:
        """Somebody wants to know."""
        self._ended.count()
        self._stalls.catch_up(monotonic())

    def turned(self, exchange: Exchange, turn: Turn, because: str) -> None:
        """A request is turned away, or off its worker and not over."""
        asked = exchange.asked
        if self.otel is not None:
            self.otel.turned(asked.id, turn, because)
        alike = because.replace(exchange.worker_id, "the worker")  # so that they count together
        match turn:
            case "shed":
                self.metrics.shed(asked)
            case "moved":
                self.metrics.moved(asked, alike)
            case "paused":
                self.metrics.paused(asked, alike)

    def tasks(self, admin_url: Callable[[], Coroutine[Any, Any, str]]) -> dict[str, Any]:
        """What is to run as long as the gateway does, by name."""
        running: dict[str, Coroutine[Any, Any, None]] = {
            "look": self._look(),
            "lag": watch_lag(self._stalls.lag),
            "gpus": self.gpus.run(),
            "dashboard": self._dashboard.run(admin_url),
        }
        if self._facts is not None:
            running["facts"] = self._facts.run()
        if self.otel is not None:
            running["otel"] = self.otel.run()
        return running

    async def close(self) -> None:
        """Say what has not been said yet."""
        self._ended.count()
        if self._facts is not None:
            self._facts.close()
        if self.otel is not None:
            await asyncio.to_thread(self.otel.close)

    async def _look(self) -> None:
        """Count what has happened, again and again."""
        while True:
            await asyncio.sleep(uniform(*LOOK_S))  # noqa: S311 (no secret)
            try:
                self._ended.count()
                await self._diagnosis.refreshed()  # so that it is known since when a trouble lasts
                await self._cluster.look_aside(monotonic())
            except Exception:  # what is counted is not worth a stream
                log.exception("a bug kept the last seconds from being counted")


def _say(over: Over) -> None:
    """What became of requests."""
    unix_at_0 = time() - monotonic()
    request_lines((unix_at_0 + life.done_at, outcome) for life, outcome in over)


def _fact_log(config: Config, kernel: Kernel) -> FactLog | None:
    """The log of facts, if one is wanted."""
    if config.log_facts is None:
        return None

    def head(continued: bool) -> bytes:
        now = monotonic()
        first = opening(kernel.settings, continued, unix_at_0=time() - now)
        return b"".join([first, *known_workers(kernel, now)])

    observe = config.observe
    return FactLog(Path(config.log_facts), observe.facts_mb * 2**20, observe.facts_files, head)


def _otel(config: Config) -> OpenTelemetry | None:
    """The way to an OpenTelemetry collector, if one is set."""
    if config.observe.otlp is None:
        return None
    try:
        from paceline.observe.otel import OpenTelemetry
    except ImportError:
        raise ConfigError(["observe.otlp: needs `pip install 'paceline[otel]'`"]) from None
    return OpenTelemetry(str(config.observe.otlp), config.observe.sample)
