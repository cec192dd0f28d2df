"""What has a live gateway learned of its workers, and is it enough to simulate with?"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Annotated

import aiohttp
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paceline.domain.errors import PacelineError
from paceline.kernel.timing import Timing, WorkerTiming, from_json, to_json

PATH = "/paceline/v1/timing"
TIMEOUT_S = 10.0
SHOWN = ((1, 2048), (32, 2048), (128, 2048))
"""Loads of which step times are shown: decoding streams, and tokens of context of each."""
SEEN = ("steps\nseen", "ITL\nerror", "TTFT\nerror")
MEANING = "ms at n: a decode step of n streams, each with a context of 2k tokens."
WIDEST = 1000
"""Columns that a table may take: longer lines are better than names that can't be copied."""
ENOUGH_STEPS = 1000
"""Some fifty requests show so many steps; step times are then known within 10 %."""
STEPS_PER_REQUEST = 20
DISTURBED = 1.25
"""Slowdown, or its inverse, from which on a worker is not itself."""
DOUBTFUL = 0.25
"""Mean error of the ITL predictions from which on they are no ground to simulate on."""


class NoTiming(PacelineError):
    """The gateway cannot be asked; the message says why."""


def calibrate(
    admin: Annotated[
        str, typer.Option(help="The gateway's admin listener.")
    ] = "http://127.0.0.1:8081",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write it here, for `simulate --timing`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Export what a live gateway has learned of its workers' timing."""
    timing = asyncio.run(fetch(admin))
    if out is not None:
        try:
            out.write_bytes(to_json(timing))
        except OSError as error:
            raise NoTiming(f"{out}: {error.strerror or error}") from None
    if as_json:
        sys.stdout.buffer.write(to_json(timing))
        return
    lines = [MEANING, *doubts(timing), *([f"Written to {out}."] if out is not None else ())]
    console = Console(markup=False, highlight=False)
    for shown in tables(timing):
        wide = console.measure(shown, options=console.options.update(width=WIDEST)).maximum
        console.width = max(console.width, wide)
        console.print(shown, "")
    console.print(*lines, sep="\n", soft_wrap=True)


async def fetch(admin: str) -> Timing:
    """The timing that the gateway behind this address exports; `NoTiming` if none comes."""
    url = (admin if "://" in admin else f"http://{admin}").rstrip("/") + PATH
    limit = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(timeout=limit) as session, session.get(url) as response:
            status, body = response.status, await response.read()
    except TimeoutError:
        raise NoTiming(f"{url}: no answer within {TIMEOUT_S:.0f} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        why = "nobody answers" if isinstance(error, aiohttp.ClientConnectorError) else error
        raise NoTiming(
            f"{url}: {why}; is `paceline serve` running, and is this its admin listener?"
        ) from None
    if status != 200:
        raise NoTiming(f"{url}: HTTP {status}; is this the admin listener of a paceline gateway?")
    return from_json(body, url)


def tables(timing: Timing) -> Iterator[Table]:
    """One a model, so that a worker's name has room in its row."""
    for model in dict.fromkeys(worker.model for worker in timing.workers):
        yield _table(model, [worker for worker in timing.workers if worker.model == model])


def _table(model: str, workers: Sequence[WorkerTiming]) -> Table:
    """One worker a row."""
    shown = Table(
        title=Text(model),
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    shown.add_column("worker", no_wrap=True)
    for header in (*(f"ms at\n{streams}" for streams, _ in SHOWN), *SEEN):
        shown.add_column(header, justify="right", no_wrap=True)
    for worker in workers:
        shown.add_row(
            worker.id,
            *(f"{1e3 * worker.step.step_s(n, kv=n * each):.1f}" for n, each in SHOWN),
            f"{worker.step.samples:,}",
            *(
                f"{error:.0%}" if worker.predictions else "-"
                for error in (worker.itl_error, worker.ttft_error)
            ),
        )
    return shown


def doubts(timing: Timing) -> Iterator[str]:
    """Why a simulation with it might be wrong, one sentence each."""
    if not timing.workers:
        yield "The gateway has no workers."
    for worker in timing.workers:
        yield from (f"{worker.id}: {what}" for what in _doubts(worker))


def _doubts(worker: WorkerTiming) -> Iterator[str]:
    step = worker.step
    if step.samples < ENOUGH_STEPS:
        missing = ceil((ENOUGH_STEPS - step.samples) / STEPS_PER_REQUEST)
        requests = f"{missing} streamed request{'s' if missing > 1 else ''}"
        yield f"too few steps seen ({step.samples}); send about {requests} more"
    if not 1 / DISTURBED < step.slowdown < DISTURBED:
        yield f"takes {step.slowdown:.2f} times its usual time just now; calibrate when it is well"
    if step.samples >= ENOUGH_STEPS and worker.predictions and worker.itl_error > DOUBTFUL:
        yield f"its ITL was predicted {worker.itl_error:.0%} wrong of late"
