"""Does `paceline diagnose` name each trouble first, how soon, and nothing when all is well?

    python bench/diagnose.py [--trouble "slow worker"] [--healthy SECONDS] [--screens FOLDER]

A live gateway before four emulated Llama-70B, chat at about a third of what they can do. After a
calm start each trouble is injected into a fleet of its own, and the diagnosis is asked for twice a
second. The engines' own logs of their steps say what each late gap was in truth. Exit status 1 if
a trouble was not named first within 15 s, or anything was found while all was well. With
`--screens` each trouble is looked at on the dashboard, too (see `bench/screens.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, time
from typing import Any

import aiohttp
import uvloop
from rich.console import Console
from rich.table import Table

from paceline.demo.stage import url
from paceline.workload.generate import lognormal
from screens import glance
from troubles import RATE, TROUBLE_S, TROUBLES, Stage, Trouble

CALM_S, WITHIN_S = 30.0, 15.0


async def play(name: str, trouble: Trouble, folder: Path, screens: Path | None) -> dict[str, Any]:
    """One fleet, one trouble."""
    stage = Stage(folder, trouble.engine, trouble.policy, trouble.roles)
    alarms: list[str] = []
    named_s: float | None = None
    first: str | None = None
    finding: dict[str, Any] = {}
    with ExitStack() as running:
        await stage.start(running)
        stage.ask(RATE / 2, CALM_S + TROUBLE_S)
        stage.ask(RATE / 2, CALM_S + TROUBLE_S, key="acme", seed=9)
        await asyncio.sleep(CALM_S)
        calm = (await stage.diagnosis())["findings"]
        alarms += [f"{f['kind']}: {f['says']} {f['evidence']}" for f in calm]
        await trouble.inject(stage)
        begun = monotonic()
        looking = asyncio.create_task(_look(stage, name, screens)) if screens else None
        while monotonic() < begun + TROUBLE_S:
            await asyncio.sleep(0.5)
            findings = (await stage.diagnosis())["findings"]
            if findings and first is None:
                first = findings[0]["kind"]
            if findings and findings[0]["kind"] in trouble.kinds:
                named_s = named_s or monotonic() - begun
                finding = findings[0]
        seen = [f["kind"] for f in findings]
        if looking is not None:
            await looking
        truth = await against_truth(stage)
        await stage.stop()
    return {
        "trouble": name,
        "named_s": named_s,
        "first": first,
        "at_the_end": seen,
        "alarms_before": alarms,
        "truth": truth,
        "finding": finding,
    }


async def _look(stage: Stage, name: str, folder: Path) -> None:
    """While the trouble lasts, when it is to have been named."""
    await asyncio.sleep(WITHIN_S)
    await glance(url(stage.admin), folder / f"trouble-{name.replace(' ', '-')}.png")


async def healthy(seconds: float, folder: Path) -> dict[str, Any]:
    """Mixed load and no trouble: what is found all the same?"""
    stage = Stage(folder, {})
    alarms: list[tuple[float, str, str]] = []
    with ExitStack() as running:
        await stage.start(running)
        stage.ask(RATE, seconds)
        stage.ask(0.2, seconds, seed=7, prompts=lognormal(2000, 3400, most=3500))
        begun = monotonic()
        while monotonic() < begun + seconds:
            await asyncio.sleep(1.0)
            found = (await stage.diagnosis())["findings"]
            at_s = round(monotonic() - begun, 1)
            alarms += [(at_s, finding["kind"], finding["says"]) for finding in found]
        answer = await stage.diagnosis()
        await stage.stop()
    return {"healthy_s": seconds, "alarms": alarms, "last": answer}


# The truth.


async def against_truth(stage: Stage) -> dict[str, Any]:
    """Of the late gaps of whole steps, how many got the cause that the engine's log shows?"""
    offset = time() - monotonic()
    on_the_way = "link" if stage.link.delay_s else "gateway"
    stalls = await stage.get(stage.admin, "/paceline/v1/stalls?limit=256")
    right = wrong = 0
    mistakes: dict[str, int] = {}
    for place, port in enumerate(stage.engines):
        worker = url(stage.front if place == 0 else port).removeprefix("http://")
        late = [e for e in stalls["workers"].get(worker, ()) if e["what"] == "step"]
        with suppress(aiohttp.ClientError, OSError):
            steps = (await stage.get(port, "/emulate/steps"))["steps"]
            for event in late:
                truth = true_cause(steps, event["at"] - offset, event["seconds"], on_the_way)
                if truth == event["cause"] or not truth:
                    right += bool(truth)
                else:
                    wrong += 1
                    pair = f"{truth} taken for {event['cause']}"
                    mistakes[pair] = mistakes.get(pair, 0) + 1
    return {"right": right, "wrong": wrong, "mistakes": mistakes}


def true_cause(steps: list[dict[str, Any]], at: float, seconds: float, on_the_way: str) -> str:
    """What most of a gap went into beyond its decodes; empty: the log does not reach so far.

    `on_the_way`: what holds tokens up behind the engine, if anything does.
    """
    within = [s for s in steps if s["ended_at"] > at - seconds and s["began_at"] < at - 1e-3]
    if not within:
        return ""
    longest = max(within, key=lambda s: s["ended_at"] - s["began_at"])
    took_s = longest["ended_at"] - longest["began_at"]
    normal_s = longest["normal_s"] + longest["prefill_s"]
    held_up_s = seconds - took_s
    parts = {
        "others_prefill": longest["prefill_s"],
        "slow_worker": normal_s * (longest["slowdown"] - 1.0),
        "hang": longest["hung_s"],
        on_the_way: held_up_s,
    }
    return max(parts, key=lambda cause: parts[cause])


async def main(names: list[str], healthy_s: float, screens: Path | None) -> bool:
    results = []
    with TemporaryDirectory(prefix="paceline-bench-") as folder:
        for name in names:
            results.append(await play(name, TROUBLES[name], Path(folder), screens))
            print(
                json.dumps({k: v for k, v in results[-1].items() if k != "finding"}),
                file=sys.stderr,
            )
        calm = await healthy(healthy_s, Path(folder)) if healthy_s else None
    table = Table("trouble", "named after", "first finding", "at the end", "late gaps right",
                  title="Named first within 15 s?")  # fmt: skip
    good = True
    for result in results:
        named_s, truth = result["named_s"], result["truth"]
        good &= named_s is not None and named_s <= WITHIN_S and not result["alarms_before"]
        judged = truth["right"] + truth["wrong"]
        table.add_row(
            result["trouble"],
            f"{named_s:.1f} s" if named_s is not None else "never",
            str(result["first"]),
            ", ".join(result["at_the_end"]),
            f"{truth['right']} of {judged}" if judged else "-",
        )
    console = Console()
    console.print(table)
    if calm is not None:
        good &= not calm["alarms"]
        console.print(f"All well for {healthy_s:.0f} s: {len(calm['alarms'])} alarms")
    print(json.dumps({"bench": "diagnose", "results": results, "healthy": calm}))
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trouble", action="extend", nargs="+", choices=TROUBLES, metavar="NAME",
                        help=f"one or several; left out: {', '.join(TROUBLES)}")  # fmt: skip
    parser.add_argument("--healthy", type=float, default=0.0)
    parser.add_argument("--screens", type=Path, metavar="FOLDER")
    chosen = parser.parse_args()
    sys.exit(
        0 if uvloop.run(main(chosen.trouble or [*TROUBLES], chosen.healthy, chosen.screens)) else 1
    )
