"""How long does a step take, by what its kernels were measured to take?

A step's time is that of its dense part (GEMMs, experts, all-reduce: by tokens) and of attention: of
the decoding streams over their contexts, and of the prompts over what comes before. Each is read
off a table of measurements, linear between its knots and rising in every argument.

A gateway's learner is of a simpler form: a third of the knots over tokens, and one slope each for
context and pairs. Fitted to these tables at its best, it is still 1 to 4 % off (median of steps as
they occur) and 5 to 9 % at the 95th percentile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from paceline.enginemodel import figures


class Curve(msgspec.Struct, frozen=True, gc=False):
    """A piecewise linear function from 0 on; the last slope goes on beyond the last knot."""

    knots: tuple[int, ...]
    values: tuple[float, ...]
    slopes: tuple[float, ...]

    @classmethod
    def through(cls, knots: Sequence[int], values: Sequence[float]) -> Curve:
        """The curve through these points. The first knot is 0."""
        points = zip(knots, values, strict=True)
        slopes = [(v1 - v0) / (k1 - k0) for (k0, v0), (k1, v1) in pairwise(points)]
        return cls(tuple(knots), tuple(values), (*slopes, slopes[-1]))

    def at(self, x: float) -> float:
        i = bisect_right(self.knots, x) - 1
        return self.values[i] + self.slopes[i] * (x - self.knots[i])


class Surface(msgspec.Struct, frozen=True, gc=False):
    """A function of two arguments: a curve over the second for each knot of the first.

    Beyond the last knot of the first argument it grows in proportion to it: then it still rises
    in both.
    """

    knots: tuple[int, ...]
    rows: tuple[Curve, ...]

    def at(self, x: float, y: float) -> float:
        knots = self.knots
        i = bisect_right(knots, x)
        if i == len(knots):
            return self.rows[-1].at(y) * (x / knots[-1])
        low = self.rows[i - 1].at(y)
        share = (x - knots[i - 1]) / (knots[i] - knots[i - 1])
        return low + share * (self.rows[i].at(y) - low)


class StepTable(msgspec.Struct, frozen=True, gc=False):
    """The measured times of one model on one kind of GPU, in seconds."""

    dense: Curve
    """Over the tokens of the step, and with the logits of one."""
    decode: Surface
    """Over streams and their context: attention, and the logits of the other streams."""
    prefill: Surface
    """Over prompt tokens and the pairs that attend to one another."""

    @classmethod
    def of(cls, name: str) -> StepTable:
        """The table that is bundled under this name."""
        return cls(
            Curve.through(figures.TOKENS, _seconds(figures.DENSE_MS[name])),
            _surface(figures.STREAMS, figures.CONTEXT, figures.DECODE_MS[name]),
            _surface(figures.PREFILL, figures.PAIRS, figures.PREFILL_MS[name]),
        )

    def step_seconds(self, streams: int, prefill: int, context: int, attention: float) -> float:
        """Seconds of a step of so many decoding streams and prompt tokens.

        `context` counts the tokens of the streams, `attention` the pairs as `Load` has them.
        """
        seconds = self.dense.at(streams + prefill)
        if streams:
            seconds += self.decode.at(streams, context)
        if prefill:
            seconds += self.prefill.at(prefill, attention)
        return seconds


def _seconds(ms: Sequence[float]) -> list[float]:
    return [1e-3 * value for value in ms]


def _surface(
    knots: tuple[int, ...], across: tuple[int, ...], rows_ms: Sequence[Sequence[float]]
) -> Surface:
    return Surface(knots, tuple(Curve.through(across, _seconds(row)) for row in rows_ms))
