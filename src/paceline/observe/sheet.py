"""What is left of requests that are over? A row of numbers each, for all who count.

Whatever a request has in common with others (model, tier, tenant, worker, how it ended) is one
`Who`; the rest is a row of a table. So a request costs as much as writing down a row, whoever
counts it, and counting is done for many at a time, in columns.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np

from paceline.domain.outcome import Outcome
from paceline.observe.sketch import Floats, Ints

MOST_ROWS = 256
"""In one sheet: to count them keeps tokens waiting for a third of a millisecond."""
LEFT = "the client left"
COLUMNS = 11


class Who(NamedTuple):
    """What requests have in common that are counted together."""

    path: str
    model: str
    tier: str
    """Model and tier are what was asked for, whatever it was served as."""
    tenant: str
    worker: str
    status: int
    error: str
    """Empty: none. LEFT, or that there was another one."""
    streaming: bool
    prefilled_at: str
    degraded_to: tuple[str, str] | None
    """Model and tier."""


class Sheet:
    """Some requests that are over, in columns."""

    def __init__(self, whos: list[Who], rows: Floats) -> None:
        self.whos = whos
        self.who: Ints = rows[:, 0].astype(np.intp)
        """Of each row: its place in `whos`."""
        (
            self.queued_s,
            self.ttft_s,
            self.itl_s,
            self.stall_s,
            self.seconds,
            self.kept,
            self.prompt_tokens,
            self.cached_tokens,
            self.output_tokens,
            self.retries,
        ) = rows.T[1:]

        sound = np.array([who.status < 400 and not who.error for who in whos])
        streaming = np.array([who.streaming for who in whos])
        self.sound = sound[self.who]
        """Those that ended well..."""
        self.streams = (sound & streaming)[self.who]
        """...whose first token could be seen..."""
        self.gaps = self.streams & (self.itl_s > 0.0)
        """...and a second one."""

    @property
    def requests(self) -> list[int]:
        """Of each of `whos`."""
        counts: list[int] = np.bincount(self.who).tolist()
        return counts


class Sheets:
    """Where requests are written down."""

    def __init__(self) -> None:
        self._whos: dict[tuple[object, ...], int] = {}
        self._rows = array("d")
        self.count = 0

    def add(self, outcome: Outcome) -> None:
        """A request is over."""
        request, error, given = outcome.request, outcome.error, outcome.degraded_to
        key = (
            outcome.path,
            request.model,
            request.tier,
            request.tenant,
            outcome.worker,
            outcome.status,
            error if not error or error == LEFT else "another",
            request.streaming,
            outcome.prefilled_at,
            None if given is None else (given.model, given.tier),
        )
        whos = self._whos
        self._rows.extend(
            (
                whos.setdefault(key, len(whos)),
                outcome.queued_s,
                outcome.ttft_s,
                outcome.itl_s,
                outcome.stall_s,
                outcome.seconds,
                outcome.kept,
                outcome.prompt_tokens or 0,
                outcome.cached_tokens or 0,
                outcome.output_tokens,
                outcome.attempts - 1 if outcome.attempts else 0,
            )
        )
        self.count += 1

    def take(self) -> Sheet:
        """What was written down since the last time."""
        rows = np.frombuffer(self._rows).reshape(-1, COLUMNS)
        sheet = Sheet([Who(*key) for key in self._whos], rows)  # type: ignore[arg-type]
        self._whos, self._rows, self.count = {}, array("d"), 0
        return sheet


def sheet_of(*outcomes: Outcome) -> Sheet:
    """Of these requests."""
    sheets = Sheets()
    for outcome in outcomes:
        sheets.add(outcome)
    return sheets.take()
