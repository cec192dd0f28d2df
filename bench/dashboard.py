"""What does it cost a gateway that somebody looks at its dashboard?

    python bench/dashboard.py [--workers 64] [--streams 2000] [--rate 4] [--seconds 10] [--rounds 3]

One gateway under one load, by turns unwatched and watched. Who watches asks for the whole page each
second, as the page's script does. The gateway has one core, engines and client the other; the
dashboard has whatever is left of either. Linux only, as CPU time is read from /proc.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import yaml
from rich.console import Console
from rich.table import Table

import stand

EVERY_S = 1.0


class Watcher:
    """Somebody who has the page open."""

    def __init__(self, url: str) -> None:
        self._request = urllib.request.Request(url, headers={"accept-encoding": "gzip"})
        self.took_s: list[float] = []
        self.packed = self.whole = 0
        """Bytes of the last page."""

    def look(self) -> None:
        began = time.monotonic()
        with urllib.request.urlopen(self._request, timeout=10) as answer:
            body = answer.read()
        self.took_s.append(time.monotonic() - began)
        self.packed, self.whole = len(body), len(gzip.decompress(body))

    @contextmanager
    def watching(self, wanted: bool):  # type: ignore[no-untyped-def]
        over = threading.Event()

        def follow() -> None:
            while not over.wait(EVERY_S):
                self.look()

        thread = threading.Thread(target=follow)
        if wanted:
            thread.start()
        try:
            yield
        finally:
            over.set()
            if wanted:
                thread.join()


def own_cpu_s(pid: int) -> float:
    """Of a process without its children."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=4.0, help="tokens a second of each stream")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    stand.build()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        rows = run(given, Path(scratch), stack)
    show(given, rows)


def run(given: argparse.Namespace, scratch: Path, stack: ExitStack) -> list[dict[str, float]]:
    listen, admin, *ports = stand.free_ports(given.workers + 2)
    log = scratch / "log"
    scenario = stand.Scenario(
        name="watched", streams=given.streams, workers=given.workers, rate=given.rate, lockstep=True
    )
    config = {
        "listen": f"127.0.0.1:{listen}",
        "admin": f"127.0.0.1:{admin}",
        "models": [{"name": "bench", "workers": [{"url": f"http://127.0.0.1:{p}"} for p in ports]}],
        "observe": {"dashboard": True},
        "logging": {"level": "off"},
    }
    (scratch / "config.yaml").write_text(yaml.safe_dump(config))
    engine = stack.enter_context(stand.running(stand._engine(scenario, ports[0]), 1, log))
    stand.wait_until_ready(ports[0], engine, log)
    serve = [sys.executable, "-m", "paceline", "serve", "--config", str(scratch / "config.yaml")]
    gateway = stack.enter_context(stand.running(serve, 0, log))
    stand.wait_until_ready(listen, gateway, log)
    watcher = Watcher(f"http://127.0.0.1:{admin}/dashboard/")
    watcher.look()
    (child,) = stand.family(gateway.pid)[1:]
    subprocess.run(["taskset", "-cp", "0,1", str(child)], check=True, capture_output=True)
    return [
        measure(given, listen, watcher, watched, gateway.pid, child, log)
        for _ in range(given.rounds)
        for watched in (False, True)
    ]


def measure(
    given: argparse.Namespace,
    port: int,
    watcher: Watcher,
    watched: bool,
    gateway: int,
    child: int,
    log: Path,
) -> dict[str, float]:
    command = [str(stand.BUILD / "client"), "--port", str(port), "--streams", str(given.streams)]
    command += ["--tokens", str(round(given.rate * 60)), "--warm", "4"]
    command += ["--seconds", str(given.seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    watcher.took_s.clear()
    with stand.running(command, 1, log, **pipes) as load, watcher.watching(watched):
        assert load.stdout is not None
        load.stdout.readline()
        before = own_cpu_s(gateway), own_cpu_s(child)
        seen = json.loads(load.stdout.readline())
        spent = own_cpu_s(gateway) - before[0], own_cpu_s(child) - before[1]
    return {
        "watched": watched,
        "gateway_ms_per_s": spent[0] / given.seconds * 1e3,
        "dashboard_ms_per_s": spent[1] / given.seconds * 1e3,
        "tokens_per_s": seen["tokens"] / given.seconds,
        "delay_p50_us": seen["delay_us"]["p50"],
        "delay_p99_us": seen["delay_us"]["p99"],
        "gap_p99_us": seen["gap_us"]["p99"],
        "errors": seen["errors"],
        "page_ms": median(watcher.took_s) * 1e3 if watcher.took_s else 0.0,
        "page_kb": watcher.packed / 1e3,
        "page_kb_unpacked": watcher.whole / 1e3,
        "gateway_mb": stand.rss_mb(gateway),
        "dashboard_mb": stand.rss_mb(child),
    }


def show(given: argparse.Namespace, rows: list[dict[str, float]]) -> None:
    about = f"{given.workers} workers, {given.streams:,} streams; median of {given.rounds}"
    table = Table(title=f"Nobody looks, somebody looks ({about})")
    for head in ("", "unwatched", "watched"):
        table.add_column(head, justify="right" if head else "left")
    result = {}
    for key in list(rows[0])[1:]:
        off, on = (median(r[key] for r in rows if r["watched"] is w) for w in (False, True))
        table.add_row(key, f"{off:,.1f}", f"{on:,.1f}")
        result[key] = {"unwatched": round(off, 2), "watched": round(on, 2)}
    Console().print(table)
    print(json.dumps({"bench": "dashboard", **vars(given), **result}))


if __name__ == "__main__":
    main()
