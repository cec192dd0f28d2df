"""How do the parts make a gateway? The only place where they are wired together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import ssl
from time import monotonic, time
from typing import BinaryIO

import uvicorn

from paceline.config import Config
from paceline.gateway.auth import Directory
from paceline.gateway.exchange import Exchange, Timeouts
from paceline.gateway.ordinary import ordinary_app
from paceline.gateway.relay import GAP_BOUNDS
from paceline.gateway.server import Gateway
from paceline.host import Engine, LiveHost, adapter_of
from paceline.kernel import Kernel, Settings
from paceline.observe.admin import admin_app
from paceline.observe.logs import configure, request_line
from paceline.observe.metrics import Metrics
from paceline.wire.server import Limits, Server

GRACE_S = 30.0
"""How long requests may go on after SIGTERM."""


async def serve(config: Config) -> None:
    """Run a gateway until SIGTERM or SIGINT, then let its requests finish."""
    if config.log_facts is None:
        await _Application(config, None).run()
        return
    with open(config.log_facts, "wb") as fact_log:  # noqa: ASYNC230 (at the start, once)
        await _Application(config, fact_log).run()


class _Application:
    """One gateway process."""

    def __init__(self, config: Config, fact_log: BinaryIO | None) -> None:
        self.config = config
        self.log = configure(config.logging.level, config.logging.format)
        settings = Settings(
            policy=config.routing.policy,
            margin=config.routing.margin,
            attempts=config.retries.attempts,
        )
        kernel = Kernel(settings)
        timeouts = Timeouts(
            config.timeouts.connect_s, config.timeouts.first_token_s, config.timeouts.stall_s
        )
        self.host = LiveHost(kernel, timeouts, self._closed, time, fact_log)
        self.metrics = Metrics(kernel, self.host.gap_counts, GAP_BOUNDS)
        directory = Directory(config.tiers, config.tenants, config.default_tier, config.anonymous)
        names = config.aliases
        own = ordinary_app(names, time(), lambda: self.host.ready)
        self.gateway = Gateway(self.host, directory, names, own)
        self.server = Server(self.gateway, _limits(config), monotonic)
        self.admin = admin_app(
            kernel, self.metrics, lambda: self.host.decisions, monotonic, lambda: self.host.ready
        )

    def _closed(self, exchange: Exchange) -> None:
        outcome = exchange.outcome()
        self.metrics.closed(outcome)
        request_line(self.log, outcome)

    async def run(self) -> None:
        """Serve until told to stop."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        config = self.config
        host, port = await self.server.listen(config.listen.host, config.listen.port, _tls(config))
        admin = _AdminServer(
            uvicorn.Config(
                self.admin,
                host=config.admin.host,
                port=config.admin.port,
                log_config=None,
                access_log=False,
                lifespan="off",
                loop="none",
            )
        )
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self.host.run(self._engines()), name="host"),
                tasks.create_task(self.server.sweep(), name="sweep"),
                tasks.create_task(admin.serve(), name="admin"),
            ]
            gc.collect()
            gc.freeze()  # what stands now stands for ever: spare the collector the walk
            if any(t.max_streams or t.tokens_per_minute for t in config.tenants):
                self.log.warning("quotas of tenants are read but not enforced by this version")
            self.log.info("listening", clients=f"{host}:{port}", admin=str(config.admin))
            await stop.wait()
            self.log.info("draining", requests=len(self.host.exchanges))
            await self.server.drain(GRACE_S)
            admin.should_exit = True
            for task in running[:2]:
                task.cancel()

    def _engines(self) -> list[Engine]:
        keys = self.config.engine_keys()
        engines = []
        for worker in self.config.workers():
            secret = keys.get(worker.id)
            key = secret.reveal() if secret is not None else ""
            engines.append(Engine(worker, adapter_of(worker, key), key))
        return engines


class _AdminServer(uvicorn.Server):
    """uvicorn without its own signal handling: the application decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


def _limits(config: Config) -> Limits:
    limits = config.limits
    return Limits(
        max_head_bytes=limits.max_head_kb * 1024,
        max_body_bytes=int(limits.max_body_mb * 1024 * 1024),
        max_connections=limits.max_connections,
        head_timeout_s=limits.head_timeout_s,
        body_timeout_s=limits.body_timeout_s,
        idle_timeout_s=limits.idle_timeout_s,
        write_timeout_s=limits.write_timeout_s,
    )


def _tls(config: Config) -> ssl.SSLContext | None:
    if config.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(config.tls.cert, config.tls.key)
    return context
