"""What does a gateway cost for each token and request, and what does it add to their time?

`make bench` compares Paceline with nginx, with a bare relay in Python, and with no gateway at all.
The candidates take turns and medians count, so that a busy moment of the machine hits them alike.
Prints a table and, last, one JSON line, which is kept in bench/results too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from stand import HERE, Candidate, Outcome, Scenario, build, measure

FULL = (
    Scenario(name="10k tok/s", streams=200),
    Scenario(name="20k tok/s", streams=400),
    Scenario(name="10k tok/s in steps", streams=200, workers=8, lockstep=True),
    Scenario(name="1k req/s, 1 worker", streams=32, requests=1000),
    Scenario(name="1k req/s, 8 workers", streams=32, requests=1000, workers=8),
    Scenario(name="1k req/s, 64 workers", streams=32, requests=1000, workers=64),
)
MANY_STREAMS = (
    Scenario(name="1,000 streams", streams=1000, rate=2, tokens=16, warm_s=8),
    Scenario(name="4,000 streams", streams=4000, rate=2, tokens=16, warm_s=8),
)
QUICK = (FULL[0], FULL[-1], MANY_STREAMS[0])


def nginx(scratch: Path, port: int, engines: range) -> list[str]:
    """One process, unbuffered, upstream connections kept: nginx at its best for streams."""
    servers = "\n".join(f"server 127.0.0.1:{engine};" for engine in engines)
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "\n".join(f"{path}_temp_path {scratch}/{path};" for path in paths)
    config = scratch / "nginx.conf"
    config.write_text(f"""
        daemon off; master_process off; pid {scratch}/nginx.pid; worker_rlimit_nofile 20000;
        error_log stderr crit;
        events {{ worker_connections 16384; multi_accept on; }}
        http {{
            access_log off; tcp_nodelay on; keepalive_requests 1000000;
            {temporary}
            upstream engines {{ {servers} keepalive 8192; keepalive_requests 1000000; }}
            server {{
                listen 127.0.0.1:{port} backlog=4096;
                location / {{
                    proxy_pass http://engines; proxy_http_version 1.1;
                    proxy_set_header Connection ""; proxy_buffering off;
                }}
            }}
        }}
    """)
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    return [program, "-p", str(scratch), "-c", str(config)]


def bare(relay: str, port: int, engines: range) -> list[str]:
    where = ["--port", str(port), "--engine-port", str(engines[0]), "--engines", str(len(engines))]
    return [sys.executable, str(HERE / "bare.py"), relay, *where]


def paceline(scratch: Path, port: int, engines: range) -> list[str]:
    """As an operator would run it, with promises to keep and without a line of log a request."""
    config = scratch / "paceline.yaml"
    kind = {"kind": "vllm", "prefill_budget": 1_000_000}  # prompts cost these engines nothing
    workers = [{"url": f"http://127.0.0.1:{engine}", **kind} for engine in engines]
    settings = {
        "listen": f"127.0.0.1:{port}",
        "admin": f"127.0.0.1:{port + 1}",
        "models": [{"name": "bench", "workers": workers}],
        "tiers": {"standard": {"ttft_s": 2.0, "itl_s": 0.08}},
        "logging": {"level": "warning"},
    }
    config.write_text(json.dumps(settings))  # JSON is YAML
    return [sys.executable, "-m", "paceline", "serve", "--config", str(config)]


CANDIDATES = {
    "direct": Candidate("direct", None),
    "nginx": Candidate("nginx", nginx),
    "bare": Candidate("bare", lambda _, port, engines: bare("protocol", port, engines)),
    "bare-epoll": Candidate("bare-epoll", lambda _, port, engines: bare("epoll", port, engines)),
    "paceline": Candidate("paceline", paceline),
}


def present(name: str) -> bool:
    """Whether a candidate can run here; says so if not."""
    missing = {
        "nginx": shutil.which("nginx") is None and not Path("/usr/sbin/nginx").exists(),
        "paceline": importlib.util.find_spec("paceline.cli") is None,
    }
    if missing.get(name):
        print(f"{name} is not here and is left out", file=sys.stderr)
    return not missing.get(name)


def rounds(
    scenarios: Sequence[Scenario], names: Sequence[str], times: int, seconds: float
) -> dict[tuple[str, str], list[Outcome]]:
    """Run A, B, C, A, B, C, ...; a candidate that does not start is named and left out."""
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    failed: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for turn in range(times):
            for scenario in scenarios:
                for name in names:
                    if name in failed or (name == "direct" and turn):
                        continue
                    try:
                        outcome = measure(CANDIDATES[name], scenario, seconds, Path(folder))
                    except (RuntimeError, ValueError) as problem:
                        print(f"{name}, {scenario.name}: {problem}", file=sys.stderr)
                        failed.add(name)
                        continue
                    outcomes.setdefault((scenario.name, name), []).append(outcome)
                    if outcome.errors:
                        log = (Path(folder) / f"{name}.log").read_text()
                        print(f"{name}, {scenario.name}: {log[-300:]}", file=sys.stderr)
    return outcomes


def median(outcomes: Sequence[Outcome]) -> Outcome:
    """Field by field; of what went wrong the sum."""
    fields = {
        field: statistics.median(getattr(outcome, field) for outcome in outcomes)
        for field in Outcome.__struct_fields__
    }
    errors, late = sum(o.errors for o in outcomes), sum(o.late for o in outcomes)
    return Outcome(**{**fields, "errors": errors, "late": late})


def table(results: dict[tuple[str, str], Outcome]) -> Table:
    columns = ("CPU µs", "× nginx", "per s", "TTFT p50", "p99", "delay p50", "p99", "gap p99")
    shown = Table(title="A gateway's cost for each token or request; what it adds, in µs")
    for column in ("load", "gateway"):
        shown.add_column(column)
    for column in (*columns, "RSS MB", "others", "late", "errors"):
        shown.add_column(column, justify="right")
    before = ""
    for (scenario, name), r in results.items():
        nginx_us = results[scenario, "nginx"].cpu_us if (scenario, "nginx") in results else 0.0
        if scenario != before:
            shown.add_section()
        times = (r.ttft_p50, r.ttft_p99, r.delay_p50, r.delay_p99, r.gap_p99)
        numbers = (r.per_s, *times, r.rss_mb)
        shown.add_row(
            scenario if scenario != before else "",
            name,
            f"{r.cpu_us:.1f}" if r.cpu_us else "",
            f"{r.cpu_us / nginx_us:.2f}" if nginx_us and r.cpu_us else "",
            *(f"{v:,.0f}" if v else "" for v in numbers),
            f"{r.others:.0%}",
            str(r.late),
            str(r.errors),
        )
        before = scenario
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="within a minute, less exact")
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), metavar="GATEWAY")
    parser.add_argument("--times", type=int, help="rounds; default 3, quick 1")
    args = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("the bench needs two cores: one for the gateway, one for the load")
    build()
    names = [n for n in args.only or CANDIDATES if (args.only or n != "bare-epoll") and present(n)]
    started = time.monotonic()
    if args.quick:
        outcomes = rounds(QUICK, names, args.times or 1, seconds=2.5)
    else:
        outcomes = rounds(FULL, names, args.times or 3, seconds=2.5)
        outcomes |= rounds(MANY_STREAMS, names, 1, seconds=3)
    results = {key: median(each) for key, each in outcomes.items()}
    Console(width=None if sys.stdout.isatty() else 160).print(table(results))
    line = json.dumps(
        {
            "bench": "gateway",
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "took_s": round(time.monotonic() - started),
            "results": [
                {"load": scenario, "gateway": name, **_rounded(outcome)}
                for (scenario, name), outcome in results.items()
            ],
        }
    )
    kept = HERE / "results" / f"gateway-{datetime.now(UTC):%Y%m%dT%H%M%S}.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(line + "\n")
    print(line)


def _rounded(outcome: Outcome) -> dict[str, float]:
    fields: dict[str, float] = msgspec.structs.asdict(outcome)
    return {field: round(value, 2) for field, value in fields.items()}


if __name__ == "__main__":
    main()
