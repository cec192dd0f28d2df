"""`paceline replay`: does an endpoint keep its promises under this load?"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from math import inf
from pathlib import Path
from random import Random
from time import monotonic
from typing import Annotated, Literal, NoReturn

import aiohttp
import typer
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from paceline.domain.promise import Promise
from paceline.workload import report as reports
from paceline.workload import transform
from paceline.workload.drive import DriveSettings, OnProgress, Progress, drive, first_model
from paceline.workload.generate import GENERATORS
from paceline.workload.outcome import Outcome
from paceline.workload.traces import Arrival, load_trace

TierPromises = Callable[[Path], Mapping[str, Promise]]
"""Reads the tiers' promises from a configuration file; raises ValueError with a sentence."""


def replay_command(tier_promises: TierPromises) -> Callable[..., None]:
    """The command for the command line, which knows how to read a configuration file."""

    def replay(
        source: Annotated[
            str, typer.Argument(help=f"A trace file, or a workload: {', '.join(GENERATORS)}.")
        ],
        url: Annotated[str, typer.Option(help="Base address of an OpenAI endpoint.")],
        model: Annotated[str, typer.Option(help="Default: the endpoint's first.")] = "",
        key: Annotated[
            list[str] | None, typer.Option(help="API key; TENANT=KEY or TIER=KEY for several.")
        ] = None,
        promise: Annotated[
            list[str] | None,
            typer.Option(
                help="TTFT,ITL[,STALL] in seconds or with ms, as 0.5,40ms; TIER=... for several."
            ),
        ] = None,
        config: Annotated[
            Path | None, typer.Option(help="Take the tiers' promises from this paceline.yaml.")
        ] = None,
        tiers: Annotated[
            str, typer.Option(help="Deal requests to tiers, as premium=0.3,standard=0.7.")
        ] = "",
        rate: Annotated[
            float | None,
            typer.Option(min=0.001, help="Requests/s: drops or copies requests, in the same time."),
        ] = None,
        speed: Annotated[
            float, typer.Option(min=0.001, help="Time runs this much faster: squeezes bursts too.")
        ] = 1.0,
        cv: Annotated[
            float, typer.Option(min=0.01, help="Burstiness of generated arrivals; 1 is Poisson.")
        ] = 1.0,
        limit: Annotated[int | None, typer.Option(min=1, help="At most so many requests.")] = None,
        duration: Annotated[
            float | None, typer.Option(min=0.001, help="Seconds of arrivals; generated: 60.")
        ] = None,
        max_prompt: Annotated[int | None, typer.Option(min=1, help="Clip prompts, tokens.")] = None,
        max_output: Annotated[int | None, typer.Option(min=1, help="Clip answers, tokens.")] = None,
        seed: Annotated[int, typer.Option(help="Same seed, same replay.")] = 0,
        api: Annotated[
            Literal["chat", "completions"], typer.Option(help="Which endpoint to call.")
        ] = "chat",
        force_lengths: Annotated[
            bool, typer.Option("--force-lengths", help="Exactly the trace's lengths (vLLM).")
        ] = False,
        exact_tokens: Annotated[
            bool, typer.Option("--exact-tokens", help="Ask for token counts per chunk (vLLM).")
        ] = False,
        check_tokens: Annotated[
            bool, typer.Option("--check-tokens", help="Demand the emulated engine's unbroken text.")
        ] = False,
        chars_per_token: Annotated[
            float, typer.Option(min=0.1, help="Of the prompts' text.")
        ] = 4.0,
        timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")] = 600.0,
        drain: Annotated[
            float, typer.Option(min=0.0, help="Seconds to wait after the last arrival.")
        ] = 120.0,
        json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
        csv: Annotated[
            Path | None, typer.Option(help="Write one row a request to this file.")
        ] = None,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    ) -> None:
        """Drive an OpenAI endpoint with a trace or workload and report the promises kept.

        Open loop: requests come when the trace says, whether or not the endpoint keeps up.
        """
        try:
            table = csv.open("w", newline="", encoding="utf-8") if csv else nullcontext()
            promises = dict(tier_promises(config)) if config else {}
            promises |= dict(parse_promise(text) for text in promise or ())
            keys = dict(_named(text) for text in key or ())
            arrivals = plan(
                source,
                seed,
                rate=rate,
                speed=speed,
                cv=cv,
                limit=limit,
                duration_s=duration,
                max_prompt=max_prompt,
                max_output=max_output,
                tiers=parse_shares(tiers),
            )
        except (ValueError, OSError) as trouble:
            _give_up(str(trouble))
        settings = DriveSettings(
            url=url if "://" in url else f"http://{url}",
            model=model,
            key=keys.pop("", ""),
            keys=keys,
            api=api,
            force_lengths=force_lengths,
            exact_tokens=exact_tokens,
            check_tokens=check_tokens,
            chars_per_token=chars_per_token,
            salt=str(seed),
            timeout_s=timeout,
            drain_s=drain,
        )
        with table as rows:
            outcomes = run(arrivals, settings, promises, quiet=quiet)
            if rows:
                reports.write_csv(outcomes, rows)
        report = reports.summarize(outcomes, promises)
        if json:
            print(reports.as_json(report).decode())
        else:
            shown = (reports.as_table(report), *reports.remarks(report))
            Console(markup=False, highlight=False).print(*shown, sep="\n")

    return replay


def plan(
    source: str,
    seed: int,
    *,
    rate: float | None = None,
    speed: float = 1.0,
    cv: float = 1.0,
    limit: int | None = None,
    duration_s: float | None = None,
    max_prompt: int | None = None,
    max_output: int | None = None,
    tiers: Mapping[str, float] | None = None,
) -> list[Arrival]:
    """What will be sent and when; ValueError says in a sentence why nothing will."""
    rng = Random(seed)  # noqa: S311
    path = Path(source)
    if source in GENERATORS:
        per_s = rate / speed if rate else 1.0
        generated = GENERATORS[source](per_s, (duration_s or 60.0) * speed, rng, cv=cv)
        arrivals = transform.sped_up(generated, speed)
    elif path.is_file():
        arrivals = transform.sped_up(load_trace(path, rng), speed)
        if rate is not None and (now := transform.mean_rate(arrivals)):
            arrivals = transform.repopulated(arrivals, rate / now, rng)
    else:
        known = ", ".join(GENERATORS)
        raise ValueError(f"{source}: no such file; give a trace or one of the workloads {known}")
    arrivals = transform.limited(arrivals, limit, duration_s or inf)
    if not arrivals:
        raise ValueError("no request is left to send; raise --rate, --duration or --limit")
    arrivals = transform.clipped(arrivals, max_prompt, max_output)
    return transform.with_tiers(arrivals, tiers, rng) if tiers else arrivals


def run(
    arrivals: list[Arrival],
    settings: DriveSettings,
    promises: reports.Promises,
    *,
    quiet: bool = False,
) -> list[Outcome]:
    """The outcomes, also if Ctrl-C ends it early: then what was in flight counts as unfinished."""
    last = Progress(len(arrivals))
    with _bar(len(arrivals), hidden=quiet) as bar:
        show = _shown_on(bar, promises)

        def on_progress(progress: Progress) -> None:
            nonlocal last
            last = progress
            show(progress)

        gc.freeze()  # The trace stays; scanning it again and again would delay timestamps.
        try:
            return asyncio.run(_with_model(arrivals, settings, on_progress))
        except KeyboardInterrupt:
            return sorted(last.outcomes, key=lambda outcome: outcome.index)
        except _NoModel as trouble:
            reason = str(trouble)
    _give_up(reason)


class _NoModel(Exception):
    pass


async def _with_model(
    arrivals: list[Arrival], settings: DriveSettings, on_progress: OnProgress
) -> list[Outcome]:
    if not settings.model and not all(arrival.model for arrival in arrivals):
        try:
            settings = replace(settings, model=await first_model(settings))
        except (aiohttp.ClientError, OSError, ValueError, LookupError) as trouble:
            raise _NoModel(
                f"{settings.url} does not list its models ({trouble}); is it up? "
                "If so, name one with --model"
            ) from trouble
    return await drive(arrivals, settings, on_progress)


def _bar(total: int, *, hidden: bool) -> Bar:
    console = Console(stderr=True)
    return Bar(
        TextColumn("sent"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        disable=hidden or not console.is_terminal,
        auto_refresh=False,  # A drawing thread would take the interpreter from the timestamps.
    )


def _shown_on(bar: Bar, promises: reports.Promises) -> OnProgress:
    """Draws at most twice a second, and counts kept promises as they come in."""
    task = bar.add_task("", total=None, note="")
    kept = counted = 0
    next_at = 0.0

    def show(progress: Progress) -> None:
        nonlocal kept, counted, next_at
        if bar.disable or (monotonic() < next_at and progress.in_flight):
            return
        next_at = monotonic() + 0.5
        for outcome in progress.outcomes[counted:]:
            kept += not outcome.miss(reports.promise_for(outcome.tier, promises))
        counted = len(progress.outcomes)
        share = f"{kept / counted:.0%}" if counted else "-"
        note = f"in flight {progress.in_flight}, done {counted}, kept {share}"
        bar.update(task, total=progress.total, completed=progress.sent, note=note, refresh=True)

    return show


def parse_promise(text: str) -> tuple[str, Promise]:
    """`[TIER=]TTFT,ITL[,STALL]`; an empty field promises nothing."""
    tier, bounds = _named(text)
    fields = bounds.split(",")
    if len(fields) not in (2, 3):
        raise ValueError(f"--promise {text}: give TTFT,ITL or TTFT,ITL,STALL, as 0.5,40ms")
    try:
        return tier, Promise(*(_seconds(field) for field in fields))
    except ValueError:
        raise ValueError(f"--promise {text}: times are seconds, as 0.5, or 500ms") from None


def _seconds(text: str) -> float:
    text = text.strip()
    if not text:
        return inf
    value = float(text[:-2]) / 1e3 if text.endswith("ms") else float(text.removesuffix("s"))
    if not value > 0:
        raise ValueError
    return value


def parse_shares(text: str) -> dict[str, float]:
    """`premium=0.3,standard=0.7`; the shares are relative."""
    try:
        shares = {
            name: float(share)
            for name, _, share in (part.strip().partition("=") for part in text.split(",") if part)
        }
    except ValueError:
        shares = {"": 0.0}
    if text and not all(name and share > 0 for name, share in shares.items()):
        raise ValueError(f"--tiers {text}: give shares above 0, as premium=0.3,standard=0.7")
    return shares


def _named(text: str) -> tuple[str, str]:
    """`NAME=VALUE` or only a value. Keys may end in = (base64), so a name must precede more."""
    name, equals, value = text.partition("=")
    return (name, value) if equals and value.strip("=") else ("", text)


def _give_up(because: str) -> NoReturn:
    print(f"paceline replay: {because}", file=sys.stderr)
    raise typer.Exit(2)
