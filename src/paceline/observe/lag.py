"""How late does the event loop come to what is due?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

EVERY_S = 0.02
LEAST_LAG_S = 0.005
"""What timers are late by on a quiet machine is less."""


async def watch_lag(told: Callable[[float, float], None]) -> None:
    """Tell, for ever, when a short sleep ends late: when that was, and by how much."""
    while True:
        due = monotonic() + EVERY_S
        await asyncio.sleep(EVERY_S)
        now = monotonic()
        if now - due > LEAST_LAG_S:
            told(now, now - due)
