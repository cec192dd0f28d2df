"""How is it all put together into one page?"""

from __future__ import annotations

import asyncio
from urllib.parse import quote

import msgspec

from paceline import words
from paceline.dashboard import said
from paceline.dashboard.causes import hatches
from paceline.dashboard.parts import View
from paceline.dashboard.sections.accounts import any_batches, batches, cost, tenants
from paceline.dashboard.sections.decisions import decisions
from paceline.dashboard.sections.findings import findings
from paceline.dashboard.sections.fleetmap import fleet_map
from paceline.dashboard.sections.promises import promises
from paceline.dashboard.sections.stalls import stalls
from paceline.dashboard.sections.tokens import times_of, tokens
from paceline.dashboard.sections.worker import worker
from paceline.dashboard.shape import workers_of
from paceline.dashboard.source import Missing, Source
from paceline.markup import Markup, tag

WINDOWS = {"10 s": 10, "1 min": 60, "10 min": 600, "1 h": 3600}
DECISIONS = 100
LATE, FAR, FAR_OF = 15, 150, 6
"""Late events of each worker that are asked for; and of how many workers that have more, how many.
One that is in trouble has hundreds, and a large fleet in trouble would have the gateway tell them
all."""

PARTS = ("findings", "promises", "fleet", "tokens", "stalls", "decisions", "tenants", "cost")


class Seen(msgspec.Struct, frozen=True):
    """All that one page shows."""

    fleet: said.Fleet | Missing
    tiers: said.Tiers | Missing
    diagnosis: said.Diagnosis | Missing
    summaries: dict[str, said.Summary | Missing]
    history: said.History | Missing
    late: said.Stalls | Missing
    decisions: said.Decisions | Missing
    tenants: said.Tenants | Missing
    by_tenant: said.Summary | Missing
    cost: said.Cost | Missing
    batches: said.Batches | Missing
    its_history: said.History | Missing
    """Of the worker that is looked at."""
    its_late: said.Stalls | Missing


NOBODY = Missing("No worker is looked at.")


async def look(source: Source, view: View) -> Seen:
    """Ask for all of it at once; what changes slowly is asked for seldom."""
    get = source.get
    one, history = f"worker={quote(view.worker, safe='')}", f"history?window={view.seconds}&by="
    async with asyncio.TaskGroup() as asks:
        summaries = {
            name: asks.create_task(
                get(f"summary?window={span}&by=tier", said.Summary, max(0.9, span / 60))
            )
            for name, span in WINDOWS.items()
        }
        fleet = asks.create_task(get("fleet", said.Fleet))
        tiers = asks.create_task(get("tiers", said.Tiers, 5.0))
        diagnosis = asks.create_task(get("diagnosis", said.Diagnosis, 3.0))
        whole = asks.create_task(get(history, said.History, view.seconds / 120))
        stalled = asks.create_task(_late(source))
        chosen = asks.create_task(get(f"decisions?limit={DECISIONS}", said.Decisions))
        who = asks.create_task(get("tenants", said.Tenants, 2.0))
        by_tenant = asks.create_task(get("summary?window=600&by=tenant", said.Summary, 5.0))
        spent = asks.create_task(get("cost?window=3600&by=tier", said.Cost, 10.0))
        parts = asks.create_task(get("cost?by=batch", said.Batches, 2.0))
        if view.worker:
            own = asks.create_task(get(f"{history}&{one}", said.History, view.seconds / 120))
            own_late = asks.create_task(get(f"stalls?limit={FAR}&{one}", said.Stalls, 3.0))
    return Seen(
        fleet.result(),
        tiers.result(),
        diagnosis.result(),
        {name: asked.result() for name, asked in summaries.items()},
        whole.result(),
        stalled.result(),
        chosen.result(),
        who.result(),
        by_tenant.result(),
        spent.result(),
        parts.result(),
        own.result() if view.worker else NOBODY,
        own_late.result() if view.worker else NOBODY,
    )


async def _late(source: Source) -> said.Stalls | Missing:
    """The newest late events of all, and more of the workers that have many."""
    answer = await source.get(f"stalls?limit={LATE}", said.Stalls, 3.0)
    if isinstance(answer, Missing):
        return answer
    many = [name for name, found in answer.workers.items() if len(found) >= LATE]
    many.sort(key=lambda name: -sum(stall.late_s for stall in answer.workers[name]))
    asked = [f"stalls?limit={FAR}&worker={quote(name, safe='')}" for name in many[:FAR_OF]]
    workers = dict(answer.workers)
    for told in await asyncio.gather(*(source.get(path, said.Stalls, 3.0) for path in asked)):
        if not isinstance(told, Missing):
            workers.update(told.workers)
    return msgspec.structs.replace(answer, workers=workers)


def page(seen: Seen, view: View, at: float) -> str:
    """The whole document. `at` is the time of the day, Unix."""
    times = times_of(seen.history, view.seconds, at)
    closely = []
    if view.worker:
        closely = [worker(seen.fleet, seen.its_history, seen.its_late, seen.tiers, view, times)]
    body = tag(
        "body",
        tag("a", "Skip to findings", href="#findings", class_="skip"),
        _header(seen, at),
        tag(
            "main",
            _figures(seen),
            findings(seen.diagnosis, view),
            promises(seen.tiers, seen.summaries),
            fleet_map(seen.fleet, view),
            *closely,
            tokens(seen.history, seen.tiers, view, times),
            stalls(seen.late, view, times),
            decisions(seen.decisions, view),
            tenants(seen.tenants, seen.by_tenant),
            batches(seen.batches),
            cost(seen.cost),
        ),
        hatches(),
        tag("script", src="page.js"),
    )
    title = tag("title", _title(seen))
    return f"<!doctype html>\n{tag('html', tag('head', HEAD, title), body, lang='en')}\n"


def _title(seen: Seen) -> str:
    """What a tab says while another one is looked at."""
    if isinstance(seen.diagnosis, Missing) or not seen.diagnosis.findings:
        return "Paceline"
    return f"({len(seen.diagnosis.findings)}) Paceline"


def _header(seen: Seen, at: float) -> Markup:
    parts = [*PARTS[:-1], *(["batches"] if any_batches(seen.batches) else []), *PARTS[-1:]]
    links = [tag("a", part, href=f"#{part}") for part in parts]
    return tag(
        "header",
        tag("b", MARK, "Paceline", class_="brand"),
        tag("nav", *links, aria_label="Sections"),
        tag("span", words.clock(at), class_="live", id="live", role="status"),
        tag("button", "freeze", id="freeze", type="button", aria_pressed="false"),
        tag("button", "theme", id="theme", type="button", title="light, dark, as the system"),
    )


def _figures(seen: Seen) -> Markup:
    """The few numbers that are looked at first."""
    shown: list[tuple[str, str, str]] = []
    minute = seen.summaries["1 min"]
    if not isinstance(minute, Missing):
        total = minute.total
        shown += [
            ("promises kept", words.share(total.attainment), ""),
            ("TTFT p99", words.seconds(total.ttft_s.p99 if total.ttft_s else None), ""),
            ("ITL p99", words.seconds(total.itl_s.p99 if total.itl_s else None), ""),
            ("requests/s", words.count(total.requests_per_s), ""),
            ("tokens/s", words.count(total.output_tokens_per_s), ""),
        ]
    if not isinstance(seen.fleet, Missing):
        workers = workers_of(seen.fleet)
        usable, everyone = sum(worker.usable for worker in workers), len(workers)
        waiting = sum(seen.fleet.held.values())
        streams = sum(worker.in_flight.streams for worker in workers)
        arriving = sum(worker.in_flight.arriving for worker in workers)
        shown += [
            ("streams", words.count(streams), ""),
            ("before first token", words.count(arriving), ""),
            ("waiting here", words.count(waiting), "bad" if waiting else ""),
            ("workers usable", f"{usable} of {everyone}", "" if usable == everyone else "bad"),
        ]
    items = [
        tag("div", tag("dt", name), tag("dd", value, class_=look)) for name, value, look in shown
    ]
    return tag("dl", *items, class_="figures", aria_label="Now")


MARK = Markup(
    '<svg viewBox="0 0 24 24" width="20" height="20" aria-hidden="true">'
    '<path d="M2 17h6M4 12h9M6 7h16" stroke="currentColor" stroke-width="3.2" '
    'stroke-linecap="round"/></svg>'
)

HEAD = Markup(
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark"><link rel="stylesheet" href="page.css">'
    '<link rel="icon" href="icon.svg">'
    '<noscript><meta http-equiv="refresh" content="5"></noscript>'
)
