"""What does a router see of the workers of one model? Columns, one entry a worker."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from paceline.domain.promise import Promise
from paceline.policy.steptime import KNOTS, Array, StepModel

RELAX_S = 10.0
"""Half-life with which the slowdown of a worker that shows no steps is forgotten: only new work
can show whether it still lasts."""

_LOW = np.array(KNOTS[:-1], dtype=float)[:, None]
_WIDTH = np.append(np.diff(KNOTS[:-1]), np.inf)[:, None]


class Row(msgspec.Struct, frozen=True):
    """The state of one worker."""

    model: StepModel
    streams: int
    """Requests decoding."""
    arriving: int
    """Requests sent and not yet decoding."""
    kv: float
    """Context of the decoding streams, tokens."""
    kv_arriving: float
    """Context that the arriving ones will add."""
    ahead: float
    """Prompt tokens not yet prefilled."""
    prefill_rate: float
    """Prompt tokens a second, lately."""
    budget: float
    """Tokens that one step may hold."""
    overhead_s: float
    """What a first token takes beyond the steps: link, parsing, tokenising."""
    kv_capacity: float
    """Tokens; infinite if unknown."""
    last_step_at: float
    """When the last step was seen, or work was sent to the idle worker."""
    promised: Mapping[float, int]
    """How many of its requests have each ITL promise."""
    usable: bool


COLUMNS = ("streams", "arriving", "kv", "kv_arriving", "ahead", "prefill_rate", "budget",
           "overhead_s", "kv_capacity", "last_step_at", "usable",
           "spread", "p99", "gain", "base", "kv_s", "q_s")  # fmt: skip
"""Columns of the table: those of `Row`, then those of its step model."""


class FleetView:
    """The workers of one model side by side; a row is written when a worker's state has changed."""

    streams: Array
    arriving: Array
    kv: Array
    kv_arriving: Array
    ahead: Array
    prefill_rate: Array
    budget: Array
    overhead_s: Array
    kv_capacity: Array
    last_step_at: Array
    usable: Array
    spread: Array
    p99: Array
    gain: Array
    base: Array
    kv_s: Array
    q_s: Array

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.turn = 0
        """Dispatches so far: what round robin counts."""
        self.promised: dict[float, Array] = {}
        """How many requests each worker has of each ITL promise."""
        self._table: Array = np.zeros((len(COLUMNS) + len(KNOTS) - 1, 0))

    def add(self) -> int:
        """A place for one more worker."""
        self.ids.append("")
        self._table = np.pad(self._table, ((0, 0), (0, 1)))
        for column, name in zip(self._table, COLUMNS, strict=False):
            setattr(self, name, column)
        self._slopes = self._table[len(COLUMNS) :]
        self.promised = {itl_s: np.append(n, 0.0) for itl_s, n in self.promised.items()}
        return len(self.ids) - 1

    def write(self, i: int, row: Row) -> None:
        """Worker `i` is now like this."""
        model = row.model
        base, *slopes, kv_s, q_s = model.theta
        self._table[:, i] = (
            row.streams, row.arriving, row.kv, row.kv_arriving, row.ahead, row.prefill_rate,
            row.budget, row.overhead_s, row.kv_capacity, row.last_step_at, row.usable,
            model.spread, model.p99, model.slowdown, base, kv_s, q_s, *slopes,
        )  # fmt: skip
        for itl_s in row.promised:
            if itl_s not in self.promised:
                self.promised[itl_s] = np.zeros(len(self.ids))
        for itl_s in list(self.promised):
            counts = self.promised[itl_s]
            counts[i] = row.promised.get(itl_s, 0)
            if itl_s not in row.promised and not counts.any():
                del self.promised[itl_s]

    def base_s(self, tokens: Array, kv: Array, q: Array) -> Array:
        """Seconds of steps at normal speed, of shape (k, workers) like the arguments: tokens of
        the step, context of the streams, attention work of the prefill."""
        segments = np.minimum(np.maximum(tokens[:, None] - _LOW, 0.0), _WIDTH)
        segments *= self._slopes
        seconds: Array = segments.sum(axis=1)
        seconds += self.base
        seconds += self.kv_s * kv
        seconds += self.q_s * q
        return seconds

    def slowdown(self, now: float, usual_s: Array) -> Array:
        """Factor on step times just now, where a step would usually take `usual_s`.

        It is what was seen of late, relaxed while nothing is seen, and stretched by a gap that has
        been open for longer than a step should take.
        """
        silent_s = np.maximum(now - self.last_step_at, 0.0)
        busy = self.streams + self.arriving > 0
        relaxed = np.where(busy, self.gain, self.gain ** (0.5 ** (silent_s / RELAX_S)))
        late = silent_s / (usual_s * relaxed * self.p99 + self.overhead_s + 1e-4)
        slow: Array = relaxed * np.where(busy, np.maximum(late, 1.0), 1.0)
        return slow


class Ask(msgspec.Struct, frozen=True):
    """What a router needs to know of a request."""

    promise: Promise
    """What is left of it: the time waited so far is subtracted from the TTFT."""
    margin: float
    """Share of a promise to keep free."""
    weight: float
    prompt_tokens: float
    output_tokens: float
    """Expected."""
    cached: Mapping[int, float]
    """Prompt tokens believed to be cached, by the worker's place in the view."""
    blocks_held: Mapping[int, int]
    """Leading prefix blocks held, by place."""
    blocks: int
    """Prefix blocks in all."""
    seed: int
    now: float
