"""How are causes of late tokens told apart? By a name, a colour and a hatch each."""

from __future__ import annotations

from paceline import words
from paceline.markup import Markup, join, tag

WAYS = {
    "gateway_queue": "",
    "engine_queue": "M0 6L6 0",
    "own_prefill": "M3 0V6",
    "others_prefill": "M0 0L6 6",
    "batch": "M0 3H6",
    "preemption": "M0 6L6 0M0 0L6 6",
    "transfer": "M0 1.5H6M0 4.5H6",
    "slow_worker": "",
    "hang": "M1.5 0V6M4.5 0V6",
    "lost_worker": "M0 3H6M3 0V6",
    "pause": "M0 5H6",
    "link": "M0 0L6 6",
    "gateway": "M5 0V6",
}
"""Hatches of causes: what colour does not tell, they do."""


def hatches() -> Markup:
    """For all pictures of the page; how a cause is coloured stands in page.css."""
    fills = [
        tag(
            "pattern",
            tag("rect", width=6, height=6, class_=f"ink {cause}"),
            tag("path", d=way, class_="hatch"),
            id=f"fill-{cause}",
            patternUnits="userSpaceOnUse",
            width=6,
            height=6,
        )
        for cause, way in WAYS.items()
    ]
    inner = tag("defs", *fills)
    return tag("svg", inner, width=0, height=0, class_="unseen", aria_hidden="true")


def look(cause: str) -> dict[str, str]:
    """The attributes of what is drawn in a cause's colour and hatch."""
    return {"fill": f"url(#fill-{cause})"} if cause in WAYS else {"class_": "other"}


def swatch(cause: str) -> Markup:
    """A small square of it."""
    square = tag("rect", width=11, height=11, rx=2, **look(cause))
    return tag("svg", square, width=11, height=11, class_="swatch", aria_hidden="true")


def named(cause: str) -> Markup:
    """Swatch and words."""
    return join([swatch(cause), " ", words.plainly(cause)])
