"""How are the workers, all at a glance?"""

from __future__ import annotations

from paceline import words
from paceline.dashboard.parts import View, bar, chips, empty, missing, section, short_names
from paceline.dashboard.said import Fleet
from paceline.dashboard.shape import STATES, Tile, tally, tiles, workers_of
from paceline.dashboard.source import Missing
from paceline.markup import Markup, tag

LOUD = ("down", "avoided", "draining", "over", "full", "tight")
"""States that are named on the tile; with the others all is well."""


def fleet_map(fleet: Fleet | Missing, view: View) -> Markup:
    if isinstance(fleet, Missing):
        return section("fleet", "Fleet", missing(fleet, "fleet"))
    shown = tiles(workers_of(fleet, view.model), fleet.held)
    if not shown:
        return section("fleet", "Fleet", empty("No workers.", "Add one under `models`."))
    names = short_names([tile.id for tile in shown])
    counts = [
        tag("li", tag("b", str(number)), f" {STATES[state]}", class_=f"state {state}")
        for state, number in tally(shown)
    ]
    waiting = sum(n for model, n in fleet.held.items() if view.model in ("", model))
    if waiting:
        told = f" {'requests wait' if waiting > 1 else 'request waits'} at the gateway"
        counts.append(tag("li", tag("b", words.count(waiting)), told))
    models = []
    if len(fleet.models) > 1:
        choices = [("all models", view.link("fleet", model=""), not view.model)]
        choices += [(m, view.link("fleet", model=m), view.model == m) for m in fleet.models]
        models = [chips("Model", choices)]
    return section(
        "fleet",
        "Fleet",
        tag("div", tag("ul", *counts, class_="tally"), *models, class_="row"),
        tag("div", *(_tile(tile, names[tile.id], view) for tile in shown), class_="tiles"),
        note="Headroom: how much is left of the tightest promise (TTFT of whoever comes next, ITL "
        "of its streams) or of the KV cache. Choose a worker to see it closely.",
    )


def _tile(tile: Tile, name: str, view: View) -> Markup:
    chosen = view.worker == tile.id
    quiet = tile.state in ("down", "idle")
    figure = words.NONE if tile.state == "down" else words.percent(max(tile.headroom, -1.0))
    said = tile.state in LOUD and not (tile.slow and tile.state in ("over", "full", "tight"))
    state = STATES[tile.state].partition(" ")[0] if said else ""  # that it is slow says enough
    kv = "KV ?" if tile.kv is None else f"KV {words.percent(tile.kv)}"
    slow = tag("em", f"{tile.slow:.1f}×") if tile.slow else ""
    least = tag("span", tile.least, class_="of") if tile.least and not (quiet or slow) else ""
    return tag(
        "a",
        tag("span", tag("b", name), tag("small", tile.where), class_="name"),
        tag("span", tag("b", figure), least, tag("small", state), slow, class_="figure"),
        tag("span", *(_unseen(tile) or (_load(tile), tag("small", kv))), class_="load"),
        bar(tile.kv, "kv" + (" full" if (tile.kv or 0.0) >= 0.9 else "")),
        href=view.link("fleet" if chosen else "worker", worker="" if chosen else tile.id),
        class_=f"tile {tile.state}{' quiet' if quiet else ''}",
        aria_label=tile.says,
        title=tile.says,
        **({"aria_current": "true"} if chosen else {}),
    )


def _unseen(tile: Tile) -> tuple[Markup, ...]:
    """A slow worker gets little work that could show whether it still is."""
    if tile.unseen_s is None or not tile.slow or tile.streams or tile.arriving:
        return ()
    return (tag("small", f"not seen for {words.span(tile.unseen_s)}"),)


def _load(tile: Tile) -> Markup:
    arriving = f"+{tile.arriving}" if tile.arriving else ""
    return tag("span", f"{tile.streams}{arriving}", tag("small", " streams"))
