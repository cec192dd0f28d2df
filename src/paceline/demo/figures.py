"""What was seen? A table, a few sentences, and JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median

import msgspec
from rich.table import Table

from paceline.demo.scenario import PROMISES, SLOW_WORKER, SLOWDOWN, SMALL_MODEL, Scenario
from paceline.workload.outcome import Outcome
from paceline.workload.report import OVERALL, Report, Summary, remarks, summarize


class Chat(msgspec.Struct, frozen=True):
    """A question to the real small model, and what became of it."""

    question: str
    answer: str
    ttft_s: float | None
    itl_s: float
    error: str = ""


class Act(msgspec.Struct, frozen=True):
    """The trace under one policy."""

    policy: str
    report: Report
    while_slow: Report
    """Only the requests that came while one worker was slow."""
    slow_worker: str
    slow_worker_share: float
    """Of the requests that came while it was slow."""
    chats: list[Chat]

    @property
    def troubles(self) -> list[str]:
        """Why requests did not end well."""
        return [*self.report.errors, *(chat.error for chat in self.chats if chat.error)]


def act_of(
    policy: str,
    outcomes: Sequence[Outcome],
    play: Scenario,
    slow_worker: str,
    chats: list[Chat],
) -> Act:
    then = [o for o in outcomes if play.slow_from_s <= o.at_s < play.slow_until_s]
    while_slow = summarize(then, PROMISES)
    share = while_slow.tiers[OVERALL].workers.get(slow_worker, 0.0)
    report = summarize(outcomes, PROMISES)
    return Act(policy, report, while_slow, slow_worker, share, chats)


def as_json(play: Scenario, acts: Sequence[Act]) -> bytes:
    """For programs; times in seconds."""
    body = {
        "ok": not any(act.troubles for act in acts),
        "seed": play.seed,
        "seconds": play.seconds,
        "promises": PROMISES,
        "acts": {act.policy: act for act in acts},
    }
    return msgspec.json.format(msgspec.json.encode(body), indent=2)


def as_table(acts: Sequence[Act]) -> Table:
    """For people: one column a policy."""
    table = Table(title="The same requests, the same engines; times in ms", title_justify="left")
    table.add_column("", no_wrap=True)
    for act in acts:
        table.add_column(act.policy, justify="right")
    for name, cell in _rows():
        table.add_row(name, *(cell(act) for act in acts))
    return table


def _rows() -> Iterator[tuple[str, Callable[[Act], str]]]:
    yield "requests", lambda act: str(_all(act).requests)
    for tier, promise in PROMISES.items():
        bounds = f"TTFT {promise.ttft_s * 1e3:g}, ITL {promise.itl_s * 1e3:g}"
        yield f"{tier} promises kept ({bounds})", partial(_kept, "report", tier)
        yield "  of those sent while a worker was slow", partial(_kept, "while_slow", tier)
    yield "TTFT p50", lambda act: _ms(_all(act).ttft_s.p50)
    yield "TTFT p99", lambda act: _ms(_all(act).ttft_s.p99)
    yield "ITL p50", lambda act: _ms(_all(act).itl_s.p50)
    yield "ITL p99", lambda act: _ms(_all(act).itl_s.p99)
    yield "sent to the slow worker while it was slow", lambda act: f"{act.slow_worker_share:.0%}"


def sentences(play: Scenario, acts: Sequence[Act]) -> list[str]:
    """What the table means, and what to know before believing it."""
    shares = _listed(acts, lambda act: f"{act.slow_worker_share:.0%}")
    then = _listed(acts, lambda act: f"{act.while_slow.tiers[OVERALL].attainment:.0%}")
    whole = _listed(acts, lambda act: f"{_all(act).attainment:.0%}")
    said = [
        f"From {play.slow_from_s:.0f} s to {play.slow_until_s:.0f} s worker {SLOW_WORKER} took "
        f"{SLOWDOWN:g} times as long. The share of the requests that it was sent: {shares}.",
        f"Promises kept for the requests of those seconds: {then}; for all requests: {whole}.",
        "Nobody told the gateway how fast a worker is, nor which one was slow: "
        "headroom reads it from the token streams.",
    ]
    chats = [chat for act in acts for chat in act.chats if not chat.error]
    if chats:
        said.append(_of_the_small_model(chats))
    for act in acts:
        failed = [f"{SMALL_MODEL}: {chat.error}" for chat in act.chats if chat.error]
        said += [f"{act.policy}: {line}" for line in (*remarks(act.report), *failed)]
    return said


def _of_the_small_model(chats: list[Chat]) -> str:
    ttft_s = median(chat.ttft_s or 0.0 for chat in chats)
    itl_s = median(chat.itl_s for chat in chats)
    question, answer = (text.partition(". ")[0] for text in (chats[0].question, chats[0].answer))
    return (
        f"{SMALL_MODEL}, a real model on this CPU, answered {len(chats)} questions through the "
        f"same gateways (TTFT {_ms(ttft_s)} ms, ITL {_ms(itl_s)} ms). “{question}” “{answer}”"
    )


def _listed(acts: Sequence[Act], figure: Callable[[Act], str]) -> str:
    return ", ".join(f"{figure(act)} under {act.policy}" for act in acts)


def _all(act: Act) -> Summary:
    return act.report.tiers[OVERALL]


def _kept(part: str, tier: str, act: Act) -> str:
    report: Report = getattr(act, part)
    summary = report.tiers.get(tier)
    return f"{summary.attainment:.1%}" if summary else "-"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f}"
