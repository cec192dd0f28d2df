"""What does a router need to know of a worker, and what of a request?"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import inf

import msgspec

from paceline.domain.promise import Promise
from paceline.policy.pressure import Outlook
from paceline.policy.steptime import KNOTS, WIDTHS, StepModel, StepTimeEstimator

PROBE = 512.0
"""Prompt tokens by which the cost of a prefill token is measured, unless told otherwise."""
LEAST_ROOM = 64.0
"""Tokens of a step that prefill gets at least, however many streams decode."""
USUAL_STREAMS = 64.0
"""Up to so many the cost of a further stream is measured."""
RELAX_S = 10.0
"""Half-life with which the slowdown of a worker that shows no steps is forgotten: only new work
can show whether it still lasts."""
CAUTION = 0.3
"""Predictions so much above the usual, as a power of the ratio, are taken to be worse."""


INNER_KNOTS = tuple(map(float, KNOTS[1:-1]))
"""Where one linear piece of the step time ends and the next begins."""


class Curve:
    """Step seconds over the tokens of a step, at normal speed and without context."""

    __slots__ = ("_pieces", "kv_s", "least_s", "q_s", "stream_s")

    def __init__(self, theta: tuple[float, ...]) -> None:
        base, *slopes, self.kv_s, self.q_s = theta
        at_knots = accumulate(map(float.__mul__, slopes, WIDTHS), initial=base)
        self._pieces = list(zip(KNOTS, at_knots, slopes, strict=False))
        self.least_s = self.at(1.0)
        """Of a lone stream's step."""
        self.stream_s = (self.at(USUAL_STREAMS) - self.least_s) / (USUAL_STREAMS - 1.0)
        """What a further stream adds, on average."""

    def at(self, tokens: float) -> float:
        """Seconds of a step of so many tokens."""
        knot, at_knot_s, slope = self._pieces[bisect_right(INNER_KNOTS, tokens)]
        return at_knot_s + slope * (tokens - knot)


class Correction(msgspec.Struct, frozen=True, gc=False):
    """How outcomes of late differ from what step times alone predict."""

    factor: float = 1.0
    """They are so many times as long."""
    spread: float = 0.2
    """Standard deviation of log(outcome / corrected prediction)."""
    usual_s: float = inf
    """What was predicted, corrected, on (geometric) average."""

    def cautious(self, predicted_s: float) -> float:
        """A prediction as admission takes it: the further above the usual, the worse.

        How far predictions are off was learned at the load of late. When a calm fleet is flooded,
        what comes is up to 1.4 times as slow as was to be expected from the calm.
        """
        if predicted_s <= self.usual_s:
            return predicted_s
        return float(predicted_s * (predicted_s / self.usual_s) ** CAUTION)


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
    through_rate: float = 0.0
    """Prompt tokens a second that prompts came through with, each with those before it."""
    delay_s: float = 0.0
    """What a lone prompt takes beyond being prefilled, waiting for the step under way included."""


class Supply(msgspec.Struct, frozen=True, gc=False):
    """What a request takes besides its worker's own part, as the fields of a forecast say it."""

    ttft_s: float = 0.0
    """Its prefill, the wait for it, and the transfer."""
    work: float = 0.0
    busy: float = 0.0
    backlog_s: float = 0.0
    harm: float = 0.0


class Standing:
    """One worker as it stands: all that does not depend on who asks, computed once a change."""

    __slots__ = (
        "ahead",
        "before_s",
        "curve",
        "due_s",
        "everyone",
        "full_s",
        "gain",
        "itl",
        "joined_s",
        "kv",
        "kv_all",
        "kv_capacity",
        "kv_decode_s",
        "kv_limit",
        "last_step_at",
        "made_at",
        "outlook",
        "overhead_s",
        "pipe",
        "prefill_rate",
        "prefill_share",
        "promised",
        "room",
        "streams",
        "supply",
        "to_read",
        "token_s",
        "ttft",
        "under_way_s",
        "usual_s",
    )

    def __init__(
        self,
        timing: StepModel | StepTimeEstimator,
        curve: Curve,
        in_flight: InFlight,
        promised: Mapping[tuple[float, float], int],
        ttft: Correction = Correction(),  # noqa: B008 (frozen)
        itl: Correction = Correction(),  # noqa: B008 (frozen)
        now: float = 0.0,
        outlook: Outlook | None = None,
        kv_limit: float = inf,
        probe: float = PROBE,
    ) -> None:
        self.made_at = now
        self.kv = in_flight.kv
        streams = in_flight.streams
        self.streams = streams
        self.everyone = everyone = streams + in_flight.arriving
        self.kv_all = in_flight.kv + in_flight.kv_arriving
        self.to_read = self.kv_all - 0.5 * in_flight.kv
        """Context of its streams, of those decoding half: it has been read so often already."""
        self.kv_capacity = in_flight.kv_capacity
        self.outlook = outlook
        """What the streams will need of the KV cache; None while it is far from full."""
        self.kv_limit = kv_limit
        """What they may need."""
        self.ahead = in_flight.ahead
        self.room = max(in_flight.budget - streams, LEAST_ROOM)
        self.prefill_rate = in_flight.prefill_rate
        self.overhead_s = in_flight.overhead_s
        self.last_step_at = in_flight.last_step_at
        self.promised = [
            (itl_s, weight, n) for (itl_s, weight), n in promised.items() if itl_s < inf
        ]
        """ITL promises of its requests, with the weight and number of those that have each."""
        self.gain = timing.slowdown
        self.ttft, self.itl = ttft, itl
        """What predictions are corrected by."""
        self.curve = curve
        # Seconds of steps at normal speed.
        self.kv_decode_s = kv_s = curve.kv_s * in_flight.kv
        decode_s = curve.at(streams) + kv_s
        probe_s = curve.at(streams + probe) + kv_s + curve.q_s * (0.5 * probe * probe)
        self.under_way_s = 0.5 * decode_s if everyone else 0.0
        """What is left of the step under way, on average."""
        self.token_s = (probe_s - decode_s) / probe
        self.prefill_share = in_flight.prefill_rate * self.token_s
        """Of its time, at normal speed."""
        self.full_s = curve.at(streams + self.room) + kv_s
        far_s = max(in_flight.delay_s - self.gain * self.full_s, 0.0)
        self.pipe = in_flight.through_rate * far_s
        """Prompt tokens on their way there and back, if that takes longer than a full step."""
        kv_all_s = curve.kv_s * self.kv_all
        self.before_s = curve.at(everyone) + kv_all_s
        """Everyone decoding, as it is."""
        self.joined_s = curve.at(everyone + 1) + kv_all_s
        """With one stream more, its context not counted."""
        usual = min(streams + in_flight.ahead, in_flight.budget)
        self.usual_s = (curve.at(usual) + kv_s) * timing.p99
        """A step may take so long before its lateness is news."""
        self.due_s = self.gain * self.usual_s + self.overhead_s + 1e-4
        """The same with the slowdown and on the way here, when a gap begins to count."""
        self.supply: Supply | None = None
        """What comes on top, where another worker may prefill the prompt."""

    def supplied(self, supply: Supply, ttft: Correction) -> Standing:
        """The same worker with that on top, and with TTFTs that turn out so."""
        other = Standing.__new__(Standing)
        for name in Standing.__slots__:
            setattr(other, name, getattr(self, name))
        other.supply, other.ttft = supply, ttft
        return other

    def slowdown(self, now: float) -> float:
        """Factor on step times just now.

        What was seen of late, relaxed while the worker is idle, and stretched by a gap that has
        been open for longer than a step should take (the step is at least that long already).
        """
        silent_s = now - self.last_step_at  # below 0 while it is to come
        if not self.everyone:
            return float(self.gain ** (0.5 ** (max(silent_s, 0.0) / RELAX_S)))
        late = silent_s / self.due_s
        return self.gain * late if late > 1.0 else self.gain


class Claim(msgspec.Struct, frozen=True, gc=False):
    """What the requests of one promise and weight take of a fleet, in tokens a second."""

    itl_s: float
    """Their promise."""
    prompt_rate: float
    """To prefill."""
    output_rate: float
    """To decode."""
    read_rate: float
    """Of context, to be read for those."""


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
    output_left: float
    """By a quantile of its own (`lengths.own_share`): what the KV cache is reckoned with."""
    cached: Mapping[int, float]
    """Prompt tokens believed to be cached, by the worker's place."""
    blocks_held: Mapping[int, int]
    """Leading prefix blocks held, by place."""
    blocks: int
    """Prefix blocks in all."""
    seed: int
    now: float
    overdue: bool = False
    """It has waited longest of all, and its turn has come whatever it is worth."""
    claims: Sequence[Claim] = ()
    """Of those with more weight."""
    waited_s: float = 0.0
    """Since it came."""
