"""How do the parts make a gateway? The only place where they are wired together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import ssl
from collections.abc import Callable, Iterable, Mapping
from time import monotonic, time
from typing import TYPE_CHECKING, Any

import msgspec
import uvicorn

from paceline.config import Config
from paceline.config.running import changes, parse_worker, visible
from paceline.config.values import EngineUrl
from paceline.domain.errors import ConfigError, InvalidRequest, NotFound, Unavailable
from paceline.domain.promise import Tier
from paceline.domain.worker import Worker
from paceline.engines.engine import Engine
from paceline.gateway.auth import Directory
from paceline.gateway.exchange import Exchange
from paceline.gateway.link import Timeouts
from paceline.gateway.ordinary import ordinary_app
from paceline.gateway.outcome import outcome_of
from paceline.gateway.ports import Turn
from paceline.gateway.quota import Quotas
from paceline.gateway.server import Gateway
from paceline.host import Decision, LiveHost
from paceline.kernel import Kernel, Settings
from paceline.observe.admin import admin_app
from paceline.observe.events import event_routes
from paceline.observe.logs import configure
from paceline.observing import Observing
from paceline.wire.server import Limits, Server

if TYPE_CHECKING:
    from paceline.tokens import Prompts

LAST_WORDS_S = 2.0
"""How long clients may take to read that their request was ended."""

EXTRA = "pip install 'paceline[tokens]'"
ENDING = "the gateway is shutting down"

Fleet = dict[str, tuple[Worker, str]]
"""Workers by id, each with the key that its engine wants to see."""


async def serve(load: Callable[[], Config]) -> bool:
    """Run a gateway until SIGTERM or SIGINT, then let its requests finish. Did all of them?

    `load` reads the configuration: at the start, and whenever a reload is asked for.
    """
    return await _Application(load, load()).run()


class Reloaded(msgspec.Struct, frozen=True):
    """What became of a reload: settings by their names, workers by their ids."""

    changed: tuple[str, ...]
    needs_restart: tuple[str, ...]
    """They differ from what runs, and cannot change while it does."""
    workers_added: list[str]
    workers_changed: list[str]
    workers_draining: list[str]


class _Application:
    """One gateway process, and the orders that it takes."""

    def __init__(self, load: Callable[[], Config], config: Config) -> None:
        self.config = config
        self.log = configure(config.logging.level, config.logging.format)
        settings = Settings(
            policy=config.routing.policy,
            margin=config.routing.margin,
            attempts=config.retries.attempts,
            max_wait_s=config.queue.max_wait_s,
            max_waiting=config.queue.max_waiting,
        )
        kernel = Kernel(settings)
        timeouts = Timeouts(
            config.timeouts.connect_s, config.timeouts.first_token_s, config.timeouts.stall_s
        )
        self.host = LiveHost(kernel, timeouts, self._closed, time, on_turn=self._turned)
        self.quotas = Quotas(config.tenants)
        self.names = config.aliases
        """Changed in place by a reload: others look here too."""
        own = ordinary_app(self.names, time(), self.ready)
        self.prompts = _prompts(config, self.log)
        self.gateway = Gateway(
            self.host,
            _directory(config),
            self.names,
            own,
            quotas=self.quotas,
            prompts=self.prompts,
        )
        self.server = Server(self.gateway, _limits(config), monotonic)
        self.observing = Observing(config, self.host, self._tiers, self._refusals)
        if self.observing.otel is not None:
            self.gateway.trace = self.observing.otel.begin
        self._stop = asyncio.Event()
        views = [*event_routes(kernel, self, time, self._stop), *self.observing.routes]
        gpus, slower = self.observing.gpus.latest, self.observing.slower
        self.admin = admin_app(kernel, self.observing.metrics, self, monotonic, views, gpus, slower)
        self._load = load
        self._reloading = asyncio.Lock()
        self._notice_s, self._grace_s = config.shutdown.notice_s, config.shutdown.grace_s
        self._hurry: Callable[[], None] = lambda: None

    def _closed(self, exchange: Exchange) -> None:
        outcome = outcome_of(exchange)
        self.quotas.ended(outcome, monotonic())
        if self.prompts is not None:
            self.prompts.ended(outcome)
        self.observing.closed(exchange, outcome)

    def _turned(self, exchange: Exchange, turn: Turn, because: str) -> None:
        self.observing.turned(exchange, turn, because)

    def _tiers(self) -> Mapping[str, Tier]:
        return self.gateway.directory.tiers

    def _refusals(self) -> dict[str, int]:
        return {usage.tenant: usage.refused for usage in self.quotas.usage(monotonic())}

    # From start to end.

    async def run(self) -> bool:
        """Serve until told to stop. Did all requests end as they should?"""
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
                timeout_graceful_shutdown=1,
            )
        )
        async with asyncio.TaskGroup() as tasks:
            engines = [Engine.of(*told) for told in _fleet(config).values()]
            running = [
                tasks.create_task(self.host.run(engines), name="host"),
                tasks.create_task(self.server.sweep(), name="sweep"),
                *(
                    tasks.create_task(work, name=name)
                    for name, work in self.observing.tasks(admin.url).items()
                ),
            ]
            tasks.create_task(admin.serve(), name="admin")  # ends when it is told to
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._told_to_stop, number)
            loop.add_signal_handler(
                signal.SIGHUP, lambda: tasks.create_task(self._hung_up(), name="reload")
            )
            gc.collect()
            gc.freeze()  # what stands now stands for ever: spare the collector the walk
            self.log.info("listening", clients=f"{host}:{port}", admin=str(config.admin))
            await self._stop.wait()
            ended_well = await self._drain()
            admin.should_exit = True
            for task in running:
                task.cancel()
        if self.prompts is not None:
            self.prompts.close()
        await self.observing.close()
        return ended_well

    def _told_to_stop(self, number: int) -> None:
        """The first time: in good order. The second time: at once."""
        if self._stop.is_set():
            self._grace_s = 0.0
            self._hurry()
        if number == signal.SIGINT:
            self._notice_s = 0.0  # a person at a terminal, and no load balancer
        self._stop.set()

    async def _drain(self) -> bool:
        """Have clients turn elsewhere and requests finish; tell those that outlast the grace."""
        self.log.info("draining", requests=len(self.host.exchanges))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace_s) as patience:
                self._hurry = lambda: patience.reschedule(0.0)
                await asyncio.sleep(self._notice_s)
                await self.server.drain(self._grace_s + LAST_WORDS_S)  # the patience ends first
        self._hurry = lambda: None
        cut = self.host.end(Unavailable(ENDING, retry_after_s=1.0))
        if cut:
            self.log.warning("requests were ended before their time", requests=cut)
        await self.server.drain(LAST_WORDS_S)
        return not cut

    # What the admin API asks for.

    def ready(self) -> bool:
        """May clients be sent here?"""
        return not self._stop.is_set() and self.host.serves(set(self.names.values()))

    def decisions(self) -> Iterable[Decision]:
        return self.host.decisions

    def settings(self) -> dict[str, Any]:
        shown: dict[str, Any] = visible(self.config)
        return shown

    def tiers(self) -> list[dict[str, Any]]:
        return [msgspec.to_builtins(tier) for tier in self.config.tiers.values()]

    def tenants(self) -> list[dict[str, Any]]:
        used = {usage.tenant: usage for usage in self.quotas.usage(monotonic())}
        return [
            {
                "name": tenant.name,
                "tier": tenant.tier or self.config.default_tier,
                "keys": len(tenant.digests()),
                "max_streams": tenant.max_streams,
                "requests_per_minute": tenant.requests_per_minute,
                "tokens_per_minute": tenant.tokens_per_minute,
                "usage": msgspec.to_builtins(used[tenant.name]),
            }
            for tenant in self.config.tenant_settings
        ]

    def add(self, order: str) -> tuple[str, bool]:
        """Take on a worker, or change one; gives its id, and whether it is a new one."""
        worker, key = parse_worker(order)
        model = self.names.get(worker.model)
        if model is None:
            raise NotFound.model(worker.model)
        place = EngineUrl.parse(worker.url).place
        for known in self.host.engines.values():
            if known.worker.id != worker.id and EngineUrl.parse(known.worker.url).place == place:
                raise InvalidRequest(f"{worker.url} leads to {known.worker.id}", param="url")
        new = worker.id not in self.host.engines
        self.host.add(Engine.of(msgspec.structs.replace(worker, model=model), key))
        self.log.info("worker added", worker=worker.id, model=model, new=new)
        return worker.id, new

    def remove(self, worker_id: str, at_once: bool) -> None:
        """Let a worker go once what it has is done, or has moved."""
        if worker_id not in self.host.links:
            raise NotFound(f"there is no worker {worker_id!r}", code="worker_not_found")
        self.log.info("worker removed", worker=worker_id, at_once=at_once)
        self.host.remove(worker_id, at_once)

    async def _hung_up(self) -> None:
        """SIGHUP came."""
        try:
            await self.reload()
        except ConfigError:
            pass  # told by then
        except Exception:
            self.log.exception("a bug kept the configuration from being reloaded")

    async def reload(self) -> Reloaded:
        """Read the configuration anew, and run by it as far as that needs no restart.

        One that is wrong changes nothing. What the admin API has ordered of a worker stays, unless
        the configuration says something new of it.
        """
        async with self._reloading:
            try:  # in a thread: the streams must not wait for the parser
                wanted = await asyncio.to_thread(self._load)
            except ConfigError as error:
                self.log.error("configuration refused", problems=error.problems)
                raise
            before, found = self.config, changes(self.config, wanted)
            if wanted.tokenizers != before.tokenizers:
                self.log.warning("tokenizers are read at the start: restart to change them")
            self.config = config = found.config
            self.gateway.directory = _directory(config)
            self.quotas.reload(config.tenants)
            self.names.clear()
            self.names.update(config.aliases)
            added, changed, leaving = self._refit(_fleet(before), _fleet(config))
            done = Reloaded(found.changed, found.needs_restart, added, changed, leaving)
            self.log.info("configuration reloaded", **msgspec.structs.asdict(done))
            return done

    def _refit(self, old: Fleet, new: Fleet) -> tuple[list[str], list[str], list[str]]:
        """Make the fleet what the configuration says; gives who joins, changes and leaves."""
        serving, models = self.host.engines, set(self.names.values())
        leaving = [
            worker_id
            for worker_id, engine in serving.items()
            if worker_id not in new and (worker_id in old or engine.worker.model not in models)
        ]
        differing = [worker_id for worker_id in new if new[worker_id] != old.get(worker_id)]
        added = [worker_id for worker_id in differing if worker_id not in serving]
        changed = [worker_id for worker_id in differing if worker_id in serving]
        for worker_id in leaving:
            self.host.remove(worker_id)
        for worker_id in differing:
            self.host.add(Engine.of(*new[worker_id]))
        return added, changed, leaving


class _AdminServer(uvicorn.Server):
    """uvicorn without its own signal handling: the application decides when to stop."""

    async def url(self) -> str:
        """Where it answers on this machine, once it does."""
        while not self.started:  # noqa: ASYNC110 (uvicorn tells no other way)
            await asyncio.sleep(0.02)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
        return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


def _directory(config: Config) -> Directory:
    return Directory(config.tiers, config.tenants, config.default_tier, config.anonymous)


def _prompts(config: Config, log: Any) -> Prompts | None:
    """Whoever tokenises prompts, where a model has a tokenizer."""
    if not config.tokenizers:
        return None
    try:
        from paceline.tokens import Prompts, load  # and what few need: jinja2 and tokenizers
    except ImportError as error:
        log.warning("no tokenizers: prompts go by the guess", because=str(error), needs=EXTRA)
        return None
    return Prompts(load(config.tokenizers))


def _fleet(config: Config) -> Fleet:
    keys = config.engine_keys()
    return {
        worker.id: (worker, keys[worker.id].reveal() if worker.id in keys else "")
        for worker in config.workers()
    }


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
