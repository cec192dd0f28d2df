"""How is one gateway measured? Engine and client on one core, the gateway alone on another.

CPU time and memory are read from /proc, so only Linux will do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
READY_WITHIN_S = 10.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of load."""

    name: str
    streams: int
    rate: float = 50.0
    """Tokens a second of each stream."""
    tokens: int = 128
    """Tokens of each stream."""
    workers: int = 1
    lockstep: bool = False
    """Whether the streams of a worker get their tokens together, as in an engine's steps."""
    requests: float = 0.0
    """Short requests a second over the streams' connections, in place of streaming; 0: stream."""
    warm_s: float = 1.0
    """In it all connections are opened."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one run showed. Times that were added, in microseconds."""

    cpu_us: float
    """Gateway CPU time for each token, or for each request in scenarios of requests."""
    per_s: float
    """Tokens or requests a second that came through."""
    rss_mb: float
    """The most memory that the gateway had resident, 2**20 bytes."""
    errors: int
    """Requests that failed and tokens out of order."""
    late: int
    """Requests that found all connections waiting for an answer, and were not sent."""
    others: float
    """Share of the gateway's core that other work took; above a tenth, trust CPU time only."""
    ttft_p50: float
    ttft_p99: float
    """First tokens, or whole answers in scenarios of requests."""
    delay_p50: float
    delay_p99: float
    """From the engine's send to the client's receipt, first tokens left out."""
    gap_p99: float
    """By how much gaps between two tokens grew."""


class Candidate(msgspec.Struct, frozen=True):
    """A gateway, by the command that runs it in front of engines on a range of ports."""

    name: str
    command: Callable[[Path, int, range], list[str]] | None
    """Gets a scratch folder, the port to listen on and the engines' ports; None: no gateway."""


def build() -> None:
    """Compile engine and client where their sources are newer."""
    BUILD.mkdir(exist_ok=True)
    for name in ("engine", "client"):
        source, binary = HERE / "load" / f"{name}.c", BUILD / name
        newest = max(f.stat().st_mtime for f in (source, HERE / "load" / "net.h"))
        if not binary.exists() or binary.stat().st_mtime < newest:
            compiler = shutil.which("cc") or sys.exit("the bench needs a C compiler")
            flags = ["-O2", "-Wall", "-Wextra", "-o", str(binary)]
            subprocess.run([compiler, *flags, str(source), "-lm"], check=True)


def free_ports(n: int) -> range:
    """N ports in a row, below those that the kernel hands out for connections."""
    for first in range(20_000, 32_000, n):
        ports = range(first, first + n)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in ports:
                probe = held.enter_context(socket.socket())
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
            return ports
    raise RuntimeError(f"no {n} free ports in a row")


@contextlib.contextmanager
def running(
    command: list[str], core: int, log: Path, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A process pinned to a core, gone at the end."""
    with log.open("a") as said:
        process: subprocess.Popen[str] = subprocess.Popen(
            command,
            stderr=said,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            **options,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(port: int, process: subprocess.Popen[str], log: Path) -> None:
    """Return when a request comes through."""
    body = json.dumps({"model": "bench", "max_tokens": 1, "messages": []}).encode()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    until = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            headers = {"content-type": "application/json"}
            urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=2).close()
            return
        time.sleep(0.05)
    raise RuntimeError(f"not ready: {' '.join(map(str, process.args))}\n{log.read_text()[-300:]}")  # type: ignore[arg-type]


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(p for child in children for p in family(int(child)))]


def cpu_s(pid: int) -> float:
    """Time that its threads have run so far. schedstat counts nanoseconds, stat only ticks."""
    threads = [
        thread for member in family(pid) for thread in Path(f"/proc/{member}/task").iterdir()
    ]
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def rss_mb(pid: int) -> float:
    """The most that was resident at once."""
    kb = 0
    for member in family(pid):
        status = Path(f"/proc/{member}/status").read_text()
        kb += int(status.partition("VmHWM:")[2].split()[0])
    return kb / 1024


def busy_s(core: int) -> float:
    """Time for which a core has been busy, whoever with."""
    line = Path("/proc/stat").read_text().partition(f"cpu{core} ")[2].partition("\n")[0]
    user, nice, system, _idle, _wait, *rest = (int(ticks) for ticks in line.split()[:8])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def measure(candidate: Candidate, scenario: Scenario, seconds: float, scratch: Path) -> Outcome:
    """Start everything afresh, warm up, and look at the gateway before and after."""
    gateway_core, load_core = sorted(os.sched_getaffinity(0))[:2]
    gateway_port, *_ = ports = free_ports(2 + scenario.workers)
    engine_ports = ports[2:]
    log = scratch / f"{candidate.name}.log"
    client = [
        *(str(BUILD / "client"), "--streams", str(scenario.streams)),
        *("--tokens", str(scenario.tokens), "--requests", str(scenario.requests)),
        *("--warm", str(scenario.warm_s), "--seconds", str(seconds)),
    ]
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(running(_engine(scenario, engine_ports[0]), load_core, log))
        wait_until_ready(engine_ports[0], engine, log)
        gateway, port = engine, engine_ports[0]
        if candidate.command is not None:
            command = candidate.command(scratch, gateway_port, engine_ports)
            gateway = stack.enter_context(
                running(command, gateway_core, log, stdout=subprocess.DEVNULL)
            )
            port = gateway_port
            wait_until_ready(port, gateway, log)
        load = stack.enter_context(
            running(
                [*client, "--port", str(port)],
                load_core,
                log,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        assert load.stdout is not None
        load.stdout.readline()
        cpu_before_s, busy_before_s = cpu_s(gateway.pid), busy_s(gateway_core)
        seen = json.loads(load.stdout.readline())
        spent_s, rss = cpu_s(gateway.pid) - cpu_before_s, rss_mb(gateway.pid)
        if candidate.command is None:
            spent_s = rss = 0.0
        others_s = max(busy_s(gateway_core) - busy_before_s - spent_s, 0.0)
        return _outcome(seen, scenario, seconds, spent_s, others_s, rss)


def _engine(scenario: Scenario, port: int) -> list[str]:
    command = [
        *(str(BUILD / "engine"), "--port", str(port), "--workers", str(scenario.workers)),
        *("--rate", str(scenario.rate)),
    ]
    return [*command, "--lockstep"] if scenario.lockstep else command


def _outcome(
    seen: dict[str, Any],
    scenario: Scenario,
    seconds: float,
    spent_s: float,
    others_s: float,
    rss: float,
) -> Outcome:
    work = seen["requests"] if scenario.requests else seen["tokens"]
    first = seen["answer_us"] if scenario.requests else seen["ttft_us"]
    return Outcome(
        cpu_us=spent_s / max(work, 1) * 1e6,
        per_s=work / seconds,
        rss_mb=rss,
        errors=seen["errors"] + seen["disorder"],
        late=seen["late"],
        others=others_s / seconds,
        ttft_p50=first["p50"],
        ttft_p99=first["p99"],
        delay_p50=seen["delay_us"]["p50"],
        delay_p99=seen["delay_us"]["p99"],
        gap_p99=seen["gap_us"]["p99"],
    )
