"""What is wrong with a running fleet? Asks its gateway, for people and for scripts."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Annotated, Any

import aiohttp
import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from paceline import words
from paceline.domain.errors import PacelineError

PATH = "/paceline/v1/diagnosis"
TIMEOUT_S = 10.0
WATCH_S = 2.0


class NoDiagnosis(PacelineError):
    """The gateway cannot be asked; the message says why."""


class _Hurt(msgspec.Struct):
    promises_lost: int
    streams: int
    tiers: dict[str, int]
    tenants: dict[str, int]


class _Finding(msgspec.Struct):
    kind: str
    since: float
    says: str
    remedy: str
    evidence: dict[str, Any]
    hurt: _Hurt


class _Answer(msgspec.Struct):
    at: float
    window_s: float
    requests: int
    promises_lost: int
    findings: list[_Finding]
    overdue: int = 0
    notes: list[str] = []


def diagnose(
    url: Annotated[
        str, typer.Option(help="The gateway's admin listener.")
    ] = "http://127.0.0.1:8081",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, until interrupted.")] = False,
) -> None:
    """Say what is wrong with a running fleet: exit 0 nothing, 1 something, 2 it cannot be asked."""
    if watch:
        _watch(url)
        return
    body = asyncio.run(fetch(url))
    answer = _read(body, url)
    if as_json:
        sys.stdout.buffer.write(body + b"\n")
    else:
        Console(markup=False, highlight=False).print(shown(answer))
    if answer.findings:
        raise typer.Exit(1)


def _watch(url: str) -> None:
    with Live(console=Console(markup=False, highlight=False), auto_refresh=False) as live:
        while True:
            live.update(shown(_read(asyncio.run(fetch(url)), url)), refresh=True)
            time.sleep(WATCH_S)


async def fetch(url: str) -> bytes:
    """What the gateway behind this address finds; `NoDiagnosis` if nothing comes."""
    address = (url if "://" in url else f"http://{url}").rstrip("/") + PATH
    limit = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=limit) as session,
            session.get(address) as response,
        ):
            status, body = response.status, await response.read()
    except TimeoutError:
        raise NoDiagnosis(f"{address}: no answer within {TIMEOUT_S:.0f} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        why = "nobody answers" if isinstance(error, aiohttp.ClientConnectorError) else error
        raise NoDiagnosis(
            f"{address}: {why}; is `paceline serve` running, and is this its admin listener?"
        ) from None
    if status != 200:
        raise NoDiagnosis(f"{address}: HTTP {status}; is this a gateway's admin listener?")
    return body


def _read(body: bytes, url: str) -> _Answer:
    try:
        return msgspec.json.decode(body, type=_Answer)
    except msgspec.DecodeError as error:
        raise NoDiagnosis(f"{url}: {error}; is this a gateway's admin listener?") from None


def shown(answer: _Answer) -> RenderableType:
    """The findings, worst first; without any, a sentence."""
    lost = f"{answer.promises_lost:,} of {answer.requests:,} promises lost"
    overdue = f", {answer.overdue:,} of them overdue" if answer.overdue else ""
    last = "\n".join([f"{lost} in the last {answer.window_s:.0f} s{overdue}.", *answer.notes])
    if not answer.findings:
        return Text(f"Nothing found. {last}")
    table = Table(show_lines=True)
    for header in ("trouble", "for", "lost", "what is known, and what to do"):
        table.add_column(header, justify="right" if header in ("for", "lost") else "left")
    for finding in answer.findings:
        hurt = finding.hurt
        lines = [
            finding.says,
            ", ".join(" ".join(words.evidence(*item)) for item in finding.evidence.items()),
            *([f"Hurt: {_counts(hurt.tiers)}; {_counts(hurt.tenants)}."] if hurt.tiers else ()),
            f"→ {finding.remedy}",
        ]
        table.add_row(
            finding.kind,
            words.span(max(answer.at - finding.since, 0.0)),
            f"{hurt.promises_lost:,}",
            "\n".join(line for line in lines if line),
        )
    return Group(table, Text(last))


def _counts(counts: dict[str, int]) -> str:
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {count:,}" for name, count in ranked[:5])
    return named + (f" and {len(ranked) - 5} others" if len(ranked) > 5 else "")
