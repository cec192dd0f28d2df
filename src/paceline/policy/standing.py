"""What does a router need to know of a worker, and what of a request?"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate

import msgspec

from paceline.domain.promise import Promise
from paceline.policy.steptime import KNOTS, WIDTHS, StepModel

PROBE = 512.0
"""Prompt tokens by which the cost of a prefill token is measured."""
LEAST_ROOM = 64.0
"""Tokens of a step that prefill gets at least, however many streams decode."""
TTFT_SPREAD = 0.3
"""Least standard deviation of log(TTFT / predicted); steps alone spread less."""
ITL_SPREAD = 0.1
RELAX_S = 10.0
"""Half-life with which the slowdown of a worker that shows no steps is forgotten: only new work
can show whether it still lasts."""


class Curve:
    """Step seconds over the tokens of a step, at normal speed and without context."""

    __slots__ = ("_at_knots", "_slopes", "kv_s", "q_s")

    def __init__(self, theta: tuple[float, ...]) -> None:
        base, *self._slopes, self.kv_s, self.q_s = theta
        rises = map(float.__mul__, self._slopes, WIDTHS)
        self._at_knots = list(accumulate(rises, initial=base))[:-1]

    def at(self, tokens: float) -> float:
        """Seconds of a step of so many tokens."""
        i = min(bisect_right(KNOTS, tokens), len(self._slopes)) - 1
        return self._at_knots[i] + self._slopes[i] * (tokens - KNOTS[i])


class InFlight(msgspec.Struct, frozen=True, gc=False):
    """What is in flight on a worker, and what the engine can take."""

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


class Standing:
    """One worker as it stands: all that does not depend on who asks, computed once a change."""

    __slots__ = (
        "ahead",
        "before_s",
        "curve",
        "decode_s",
        "everyone",
        "full_s",
        "gain",
        "itl_spread",
        "joined_s",
        "kv",
        "kv_all",
        "kv_capacity",
        "kv_decode_s",
        "last_step_at",
        "made_at",
        "overhead_s",
        "prefill_rate",
        "promised",
        "room",
        "streams",
        "token_s",
        "ttft_spread",
        "usual_s",
    )

    def __init__(
        self,
        model: StepModel,
        curve: Curve,
        in_flight: InFlight,
        promised: Mapping[float, float],
        now: float = 0.0,
    ) -> None:
        self.made_at = now
        self.kv = in_flight.kv
        streams = in_flight.streams
        self.streams = streams
        self.everyone = everyone = streams + in_flight.arriving
        self.kv_all = in_flight.kv + in_flight.kv_arriving
        self.kv_capacity = in_flight.kv_capacity
        self.ahead = in_flight.ahead
        self.room = max(in_flight.budget - streams, LEAST_ROOM)
        self.prefill_rate = in_flight.prefill_rate
        self.overhead_s = in_flight.overhead_s
        self.last_step_at = in_flight.last_step_at
        self.promised = tuple(promised.items())
        """ITL promises of its requests, each with the weight of those that have it."""
        self.gain = model.slowdown
        self.itl_spread = max(model.spread, ITL_SPREAD)
        self.ttft_spread = max(model.spread, TTFT_SPREAD)
        self.curve = curve
        # Seconds of steps at normal speed.
        self.kv_decode_s = kv_s = curve.kv_s * in_flight.kv
        self.decode_s = curve.at(streams) + kv_s
        probe_s = curve.at(streams + PROBE) + kv_s + curve.q_s * (0.5 * PROBE * PROBE)
        self.token_s = (probe_s - self.decode_s) / PROBE
        self.full_s = curve.at(streams + self.room) + kv_s
        kv_all_s = curve.kv_s * self.kv_all
        self.before_s = curve.at(everyone) + kv_all_s
        """Everyone decoding, as it is."""
        self.joined_s = curve.at(everyone + 1) + kv_all_s
        """With one stream more, its context not counted."""
        usual = min(streams + in_flight.ahead, in_flight.budget)
        self.usual_s = (curve.at(usual) + kv_s) * model.p99
        """A step may take so long before its lateness is news."""

    def slowdown(self, now: float) -> float:
        """Factor on step times just now.

        What was seen of late, relaxed while the worker is idle, and stretched by a gap that has
        been open for longer than a step should take (the step is at least that long already).
        """
        silent_s = now - self.last_step_at
        if not self.everyone:
            return float(self.gain ** (0.5 ** (silent_s / RELAX_S)))
        late = silent_s / (self.gain * self.usual_s + self.overhead_s + 1e-4)
        return self.gain * late if late > 1.0 else self.gain


class Ask(msgspec.Struct, frozen=True):
    """What a router needs to know of a request."""

    request_id: str
    promise: Promise
    """What is left of it: the time waited so far is subtracted from the TTFT."""
    margin: float
    """Share of a promise to keep free."""
    weight: float
    prompt_tokens: float
    usual_tokens: float
    """Uncached prompt tokens of requests to this model, on average lately."""
    output_tokens: float
    """Expected."""
    cached: Mapping[int, float]
    """Prompt tokens believed to be cached, by the worker's place."""
    blocks_held: Mapping[int, int]
    """Leading prefix blocks held, by place."""
    blocks: int
    """Prefix blocks in all."""
    seed: int
    now: float
