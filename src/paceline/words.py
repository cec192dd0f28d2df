"""How is a number said, so that it can be read at a glance?"""

from __future__ import annotations

from collections.abc import Callable
from time import localtime, strftime

NONE = "–"
"""Nothing was measured."""


def seconds(value: float | None) -> str:
    """With about three digits, in the unit that suits."""
    if value is None:
        return NONE
    if value < 0.01:
        return f"{value * 1e3:.1f} ms"
    if value < 1.0:
        return f"{value * 1e3:.0f} ms"
    if value < 10.0:
        return f"{value:.2f} s"
    return f"{value:.0f} s" if value < 100 else span(value)


def promised(value: float) -> str:
    """A bound as somebody wrote it."""
    return f"{value * 1e3:g} ms" if value < 1.0 else f"{value:g} s"


def span(value: float) -> str:
    """How long ago, or for how long."""
    if value < 60:
        return f"{value:.0f} s"
    if value < 3600:
        return f"{value / 60:.0f} min"
    return f"{round(value / 3600, 1):g} h" if value < 36_000 else f"{value / 3600:.0f} h"


def share(value: float | None) -> str:
    """In percent; what is nearly all keeps the digit that matters."""
    if value is None:
        return NONE
    if value >= 1.0 or value <= 0.0:
        return f"{value:.0%}"
    return f"{min(value, 0.999):.1%}"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.0%}".replace("-", "−")


def times(value: float | None) -> str:
    """A factor."""
    if value is None:
        return NONE
    return f"{value:.2f}×" if value < 10 else f"{value:,.0f}×"


def count(value: float | None) -> str:
    if value is None:
        return NONE
    if value >= 10_000_000:
        return f"{value / 1e6:,.0f} M"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def money(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def counted(number: float, one: str, many: str = "") -> str:
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def evidence(name: str, value: float | str | None) -> tuple[str, str]:
    """A figure with its unit, as far as its name ends with one, and the name without it."""
    said: Callable[[float], str] = plain
    for unit, said_so in UNITS.items():
        if name.endswith(unit):
            name, said = name.removesuffix(unit), said_so
            break
    told = NONE if value is None else value if isinstance(value, str) else said(value)
    return " ".join(SHORT.get(word, word) for word in name.split("_")), told or NONE


def plain(value: float) -> str:
    """A number of whatever it is."""
    return count(value) if value == int(value) or value >= 10_000 else f"{value:.3g}"


def clock(unix: float) -> str:
    """The time of day, as it is here."""
    return strftime("%H:%M:%S", localtime(unix))


def plainly(name: str) -> str:
    """A name of the API in plain words."""
    return CAUSES.get(name, name.replace("_", " "))


CAUSES = {
    "gateway_queue": "queue at the gateway",
    "engine_queue": "queue in the engine",
    "own_prefill": "own prefill",
    "others_prefill": "others' prefill",
    "batch": "large batch",
    "preemption": "KV cache ran out",
    "transfer": "KV transfer",
    "slow_worker": "slow worker",
    "hang": "worker hangs",
    "lost_worker": "worker lost",
    "pause": "paused for others",
    "link": "link",
    "gateway": "gateway busy",
    "prefill_in_decode": "prefill in decode steps",
    "kv_pressure": "KV cache under pressure",
}
"""Causes of late tokens, and kinds of findings that say it better so."""

SHORT = {"gpu": "GPU", "kv": "KV", "sm": "SM", "xid": "XID"}
UNITS: dict[str, Callable[[float], str]] = {
    "_tokens_per_s": lambda value: f"{count(value)} tokens/s",
    "_per_s": lambda value: f"{count(value)}/s",
    "_mhz": lambda value: f"{value:,.0f} MHz",
    "_ms": lambda value: seconds(value / 1e3),
    "_share": percent,
    "_c": lambda value: f"{value:.0f} °C",
    "_w": lambda value: f"{value:,.0f} W",
    "_s": seconds,
}
"""How figures of evidence are said, by the end of their name; the longer ones first."""
