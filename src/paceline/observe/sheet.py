"""What is left of requests that are over? A row of numbers each, for all who count.

Whatever a request has in common with many others (model, tier, tenant, worker, how it ended) is a
`Who`, which has a number. So a request costs as much as writing down a row, whoever counts it, and
counting is done for many at a time, in columns.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import NamedTuple

import numpy as np

from paceline.domain.outcome import Outcome
from paceline.observe.sketch import Floats, Ints

MOST_ROWS = 256
"""In one sheet: to count them keeps tokens waiting for a third of a millisecond."""
MOST_WHOS = 8192
"""Then they are numbered anew."""
_ROW = Struct("16d")
LEFT, LEFT_STATUS = "the client left", 499


class Who(NamedTuple):
    """What requests have in common that are counted together."""

    path: str
    model: str
    tier: str
    """Model and tier are what was asked for, whatever it was served as."""
    tenant: str
    worker: str
    status: int
    broken: bool
    """There was an error."""
    prefilled_at: str
    degraded_to: tuple[str, str] | None
    """Model and tier."""


class Sheet:
    """Some requests that are over, in columns."""

    def __init__(self, whos: list[Who], rows: Floats) -> None:
        self.whos = whos
        """All that are known, by their number; there may be more of them later."""
        self.who: Ints = rows[:, 0].astype(np.intp)
        """Of each row."""
        (
            self.status,
            broken,
            left,
            streaming,
            self.rare,
            self.retries,
            self.queued_s,
            self.ttft_s,
            self.itl_s,
            self.stall_s,
            self.seconds,
            self.kept,
            self.prompt_tokens,
            self.cached_tokens,
            self.output_tokens,
        ) = np.ascontiguousarray(rows.T[1:])
        """`rare`: there is more to say than most columns do."""
        self.left = (left > 0.0) | (self.status == LEFT_STATUS)
        """Those whose client did not wait for the end."""
        self.sound = (self.status < 400) & (broken == 0.0)
        """Those that ended well..."""
        self.streams = self.sound & (streaming > 0.0)
        """...whose first token could be seen..."""
        self.gaps = self.streams & (self.itl_s > 0.0)
        """...and a second one."""


class Sheets:
    """Where requests are written down."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[object, ...], int] = {}
        self._whos: list[Who] = []
        self._rows: list[bytes] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, outcome: Outcome) -> None:
        """A request is over."""
        request, error, given = outcome.request, outcome.error, outcome.degraded_to
        retries = outcome.attempts - 1 if outcome.attempts else 0
        key = (
            outcome.path,
            request.model,
            request.tier,
            request.tenant,
            outcome.worker,
            outcome.status,
            error != "",
            outcome.prefilled_at,
            None if given is None else (given.model, given.tier),
        )
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._whos)
            self._whos.append(Who(*key))
        self._rows.append(
            _ROW.pack(
                number,
                outcome.status,
                error != "",
                error == LEFT,
                request.streaming,
                given is not None or retries > 0 or outcome.prefilled_at != "",
                retries,
                outcome.queued_s,
                outcome.ttft_s,
                outcome.itl_s,
                outcome.stall_s,
                outcome.seconds,
                outcome.kept,
                outcome.prompt_tokens or 0,
                outcome.cached_tokens or 0,
                outcome.output_tokens,
            )
        )

    def take(self) -> Sheet:
        """What was written down since the last time."""
        rows = np.frombuffer(b"".join(self._rows)).reshape(len(self._rows), -1)
        self._rows.clear()
        sheet = Sheet(self._whos, rows)
        if len(self._whos) > MOST_WHOS:
            self._numbers, self._whos = {}, []
        return sheet


class Places:
    """Under what does somebody count each `Who`? Asked once of each that there is."""

    def __init__(self, place: Callable[[Who], int]) -> None:
        self._place = place
        self._whos: list[Who] = []
        self._places: Ints = np.empty(0, np.intp)
        """By number; below 0: not asked yet."""

    def of(self, sheet: Sheet) -> Ints:
        """Of each row."""
        if sheet.whos is not self._whos:
            self._whos = sheet.whos
            self.forget()
        more = len(sheet.whos) - len(self._places)
        if more > 0:
            self._places = np.pad(self._places, (0, more), constant_values=-1)
        places = self._places[sheet.who]
        if places.min() < 0:
            for number in np.unique(sheet.who[places < 0]).tolist():
                self._places[number] = self._place(sheet.whos[number])
            places = self._places[sheet.who]
        return places

    def forget(self) -> None:
        """They have other places from now on."""
        self._places = np.empty(0, np.intp)


def sheet_of(*outcomes: Outcome) -> Sheet:
    """Of these requests."""
    sheets = Sheets()
    for outcome in outcomes:
        sheets.add(outcome)
    return sheets.take()
