"""How is one worker, seen closely?"""

from __future__ import annotations

from paceline import words
from paceline.dashboard.parts import View, empty, missing, section
from paceline.dashboard.said import Accuracy, Fleet, History, Stalls, Tiers, Worker
from paceline.dashboard.sections.stalls import newest, timeline
from paceline.dashboard.sections.tokens import Times, heat_of
from paceline.dashboard.shape import BOUNDS, STATES, kv_of, slow_of, state_of, workers_of
from paceline.dashboard.source import Missing
from paceline.markup import Markup, tag


def worker(
    fleet: Fleet | Missing,
    history: History | Missing,
    late: Stalls | Missing,
    tiers: Tiers | Missing,
    view: View,
    times: Times,
) -> Markup:
    title = f"Worker {view.worker}"
    if isinstance(fleet, Missing):
        return section("worker", title, missing(fleet, "fleet"))
    found = next((w for w in workers_of(fleet) if w.id == view.worker), None)
    close = tag("a", "close", href=view.link("fleet", worker=""), class_="button")
    if found is None:
        return section("worker", title, empty("It is not in the fleet (any more)."), close)
    if isinstance(history, Missing):
        heat = missing(history, "history")
    else:
        heat = heat_of(history, tiers, found.id, times)
    if isinstance(late, Missing):
        lateness = missing(late, "record of late tokens")
    else:
        stalls = late.workers.get(found.id, [])
        lateness = timeline(stalls, times)
        if stalls:
            lateness = tag("div", lateness, newest(stalls))
    return section(
        "worker",
        title,
        close,
        _facts(found, fleet.held.get(found.model, 0)),
        tag("h3", "Inter-token latency of its streams"),
        heat,
        tag("h3", "Its late tokens by cause"),
        lateness,
    )


def _facts(of: Worker, waiting: int) -> Markup:
    state, report, timing = state_of(of, waiting), of.report, of.timing
    because = report.because if report is not None else "it has not reported yet"
    facts = [
        ("state", STATES[state] + (f": {because}" if because and state == "down" else "")),
        ("headroom", f"{words.percent(of.room.headroom)} {BOUNDS.get(of.room.least, '')}"),
        ("TTFT of who comes next", words.seconds(of.room.ttft_s)),
        ("streams", f"{of.in_flight.streams} + {of.in_flight.arriving} arriving"),
        ("prompt tokens ahead", words.count(of.in_flight.uncached_tokens_ahead)),
        ("context", f"{words.count(of.in_flight.context_tokens)} tokens"),
        ("KV cache", words.percent(kv_of(of))),
        ("step time", words.seconds(timing.step_s)),
        ("its steps take", _slow(of)),
        ("routing reckons with", f"{words.times(of.room.slowdown)} what is learned"),
        ("prefill", f"{words.count(round(timing.prefill_tokens_per_s))} tokens/s"),
        ("TTFT forecast", _error(of.predictions.get("ttft"))),
        ("ITL forecast", _error(of.predictions.get("itl"))),
        ("waiting in the engine", words.count(report.waiting if report else None)),
        ("serves", f"{of.model} as {of.role}" if of.role != "both" else of.model),
        ("engine", of.kind or "not known yet"),
        ("node", of.node or words.NONE),
        ("cost", f"{words.money(of.cost_per_hour)} an hour" if of.cost_per_hour else words.NONE),
    ]
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts]
    return tag("dl", *pairs, class_="facts")


def _slow(of: Worker) -> str:
    if of.slower is None:
        return "not known yet"
    times, than = slow_of(of) or (of.slower.than_itself, "they used to")
    ago = f", seen {words.span(of.slower.seen_ago_s)} ago" if of.slower.seen_ago_s >= 1.0 else ""
    return f"{times:.1f}× as long as {than}{ago}"


def _error(seen: Accuracy | None) -> str:
    """How far predictions are off, on average."""
    if seen is None or not seen.count:
        return "nothing to compare yet"
    return f"off by {seen.error:.0%} ({words.count(seen.count)})"
