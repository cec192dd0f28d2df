"""Which promises are kept, and how fast is the room for broken ones used up?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paceline import words
from paceline.dashboard.parts import bar, empty, missing, section, table
from paceline.dashboard.said import Quantiles, Summary, Tiers
from paceline.dashboard.shape import Standing, Window, standings
from paceline.dashboard.source import Missing
from paceline.markup import Markup, join, tag

SAID = {"none": "no requests", "kept": "kept", "burning": "burning", "broken": "burning fast"}


def promises(tiers: Tiers | Missing, summaries: Mapping[str, Summary | Missing]) -> Markup:
    if isinstance(tiers, Missing):
        return section("promises", "Promises", missing(tiers, "tiers"))
    known = {name: seen for name, seen in summaries.items() if not isinstance(seen, Missing)}
    shown = standings(tiers.tiers, known)
    if not known:
        rows = [[_tier(standing)] for standing in shown]
        lacking = next(seen for seen in summaries.values() if isinstance(seen, Missing))
        return section(
            "promises",
            "Promises",
            table(["tier "], rows, "promises", "Promises by tier"),
            missing(lacking, "figures on what was kept"),
        )
    if not shown:
        return section("promises", "Promises", empty("No tiers.", "Set them under `tiers`."))
    note = "Share of requests whose promise was kept. Burn 1× spends just what may be broken. "
    note += "Times are over 1 min."
    return section("promises", "Promises", _table(shown, list(known)), note=note)


def _table(shown: Sequence[Standing], windows: Sequence[str]) -> Markup:
    rows = []
    for standing in shown:
        now, promise = standing.now, standing.tier.promise
        rows.append(
            [
                _tier(standing),
                *(_window(window) for window in standing.windows),
                _times(now.ttft_s, promise.ttft_s),
                _times(now.itl_s, promise.itl_s),
                words.count(now.requests_per_s) if now.requests else words.NONE,
            ]
        )
    heads = ["tier ", *(f"{name} " for name in windows)]
    heads += ["TTFT p50 · p99", "ITL p50 · p99", "requests/s"]
    return table(heads, rows, "promises", "Promises by tier")


def _tier(standing: Standing) -> Markup:
    name = tag("b", standing.tier.name, class_=f"tier {standing.worst}")
    share = tag("span", f" {standing.tier.attain * 100:.4g}%", class_="objective")
    return join([name, share, tag("small", standing.promise)])


def _window(window: Window) -> Markup:
    """Attainment large, burn beside it: a full bar is all that may be broken."""
    if window.verdict == "none":
        return tag("span", SAID["none"], class_="quiet")
    burn = "burn " + (f"{window.burn:.1f}×" if window.burn is not None else words.NONE)
    return tag(
        "span",
        tag("b", words.share(window.attainment)),
        tag("small", burn),
        bar(window.burn, window.verdict),
        title=f"{SAID[window.verdict]}, {window.requests:,} requests",
        class_=f"window {window.verdict}",
    )


def _times(seen: Quantiles | None, bound_s: float | None) -> Markup:
    """Median and tail; a tail beyond the promise is marked."""
    if seen is None:
        return tag("span", words.NONE, class_="quiet")
    late = bound_s is not None and seen.p99 > bound_s
    tail = tag("b", words.seconds(seen.p99), class_="late" if late else "")
    beyond = f"beyond {words.promised(bound_s)}" if late and bound_s else ""
    return join([words.seconds(seen.p50), " · ", tail, tag("small", beyond, class_="late")])
