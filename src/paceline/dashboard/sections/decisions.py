"""Why did each request go where it went, and where else could it have gone?"""

from __future__ import annotations

from paceline import words
from paceline.dashboard.parts import View, chips, empty, missing, section, table
from paceline.dashboard.said import Decisions
from paceline.dashboard.shape import KINDS, Choice, choices
from paceline.dashboard.source import Missing
from paceline.markup import Markup, join, tag

MOST = 20
"""Lines that are shown."""


def decisions(answer: Decisions | Missing, view: View) -> Markup:
    if isinstance(answer, Missing):
        return section("decisions", "Decisions", missing(answer, "decisions"))
    everything = choices(answer.decisions)
    kinds = dict.fromkeys(KINDS.values(), 0)
    for each in everything:
        kinds[each.kind] = kinds.get(each.kind, 0) + 1
    offered = [("all", view.link("decisions", show=""), not view.show)]
    offered += [
        (f"{kind} {number}", view.link("decisions", show=kind), view.show == kind)
        for kind, number in kinds.items()
        if number or kind == view.show
    ]
    shown = choices(answer.decisions, view.show)[:MOST]
    if not everything:
        lines = empty("No decisions yet.", "They come with the first request.")
    elif not shown:
        lines = empty(f"None of the newest {len(everything)} is “{view.show}”.")
    else:
        heads = ["time ", "decision ", "worker ", "why ", "expected there ", "instead of "]
        lines = table(heads, [_line(c, view) for c in shown], "log", "Decisions, newest first")
    note = f"The newest {min(len(shown), MOST)} of {len(everything)} looked at."
    return section("decisions", "Decisions", chips("Kind", offered), lines, note=note)


def _line(choice: Choice, view: View) -> list[str]:
    when = f"{words.clock(choice.at)}.{int(choice.at % 1 * 1000):03d}"
    look = choice.kind.replace(" ", "-")
    worker = (
        tag("a", choice.worker, href=view.link("worker", worker=choice.worker))
        if choice.worker and choice.kind in ("sent", "prefill")
        else choice.worker
    )
    return [
        join([when, tag("small", choice.request[:18], title=choice.request)]),
        tag("span", choice.kind, class_=f"did {look}"),
        worker,
        choice.because,
        _two_lines(*choice.expected),
        _two_lines(*choice.instead),
    ]


def _two_lines(first: str, second: str) -> Markup:
    return join([first, tag("small", second) if second else ""])
