"""What is wrong, who is hurt by it, and what can be done?"""

from __future__ import annotations

from paceline import words
from paceline.dashboard.parts import View, missing, section
from paceline.dashboard.said import Diagnosis, Finding
from paceline.dashboard.shape import evidence_of
from paceline.dashboard.source import Missing
from paceline.markup import Markup, tag

MOST = 5


def findings(answer: Diagnosis | Missing, view: View) -> Markup:
    if isinstance(answer, Missing):
        return section("findings", "Findings", missing(answer, "diagnosis"))
    notes = [tag("p", note, class_="note") for note in answer.notes]
    over = (
        f"{words.counted(answer.requests, 'request')} in {words.span(answer.window_s or 30)}, "
        f"{words.counted(answer.promises_lost, 'promise')} broken"
        + (f", {words.count(answer.overdue)} of them overdue" if answer.overdue else "")
    )
    if not answer.findings:
        calm = tag("p", tag("b", "Nothing found."), f" {over}.", class_="calm")
        return section("findings", "Findings", calm, *notes)
    cards = [_card(finding, answer.at, view) for finding in answer.findings[:MOST]]
    more = len(answer.findings) - len(cards)
    told = [tag("p", f"and {more} more, in paceline diagnose", class_="note")] if more > 0 else []
    shown = tag("ol", *cards, class_="findings")
    return section("findings", "Findings", shown, *told, *notes, note=over)


def _card(finding: Finding, at: float, view: View) -> Markup:
    since = f"for {words.span(max(at - finding.since, 0.0))}" if finding.since else ""
    facts = [
        tag("span", f"{name} ", tag("b", value), class_="fact")
        for name, value in evidence_of(finding)
    ]
    closer = Markup("")
    if finding.worker and finding.worker != view.worker:
        closer = tag("a", "look closer", href=view.link("worker", worker=finding.worker))
    return tag(
        "li",
        tag("div", tag("span", since, class_="since"), closer, class_="aside"),
        tag("p", tag("b", words.plainly(finding.kind), class_="kind"), finding.says),
        tag("p", tag("b", "Do: "), finding.remedy, class_="remedy") if finding.remedy else "",
        tag("div", _hurt(finding), *facts, class_="facts"),
        class_="finding" if finding.hurt.promises_lost else "finding mild",
    )


def _hurt(finding: Finding) -> Markup:
    """Promises first: they are what it is ranked by."""
    hurt = finding.hurt
    who = ", ".join(sorted(hurt.tiers, key=lambda tier: -hurt.tiers[tier]))
    lost = words.counted(hurt.promises_lost, "promise")
    return tag("span", tag("b", f"{lost} broken"), f" ({who})" if who else "", class_="hurt")
