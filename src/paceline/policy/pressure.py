"""Will a worker's KV cache run out, and who should make room?

A stream grows by a token a step until it ends and gives all of it back, so what matters is the
worst moment to come, not what is held now. At the end of a stream those with more to come are still
there, each grown by as much as it had left: the need peaks at one of these moments (Past-Future
scheduling, Gong et al. 2025). Tokens throughout; time is counted in tokens of a stream.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

KV_FULL = 0.95
"""Share of the KV cache from which on a worker counts as full."""
DISTRUST = 0.95
"""What an engine that preempted although there should have been room is trusted with, of before."""
LEAST_TRUST = 0.7
REGAINED = 0.01
"""Trust that comes back with a report without preemptions."""
INTERRUPTION = 256.0
"""What a pause costs beside the tokens to prefill again, in such tokens: two requests, and a wait.
Without it many small streams would be paused for a large one."""
PLAIN = 32
"""Streams up to which plain Python is as fast as NumPy."""

Tokens = NDArray[np.float64]


class Stream(msgspec.Struct, frozen=True, gc=False):
    """One that may be paused."""

    id: str
    context: float
    """What it holds of the KV cache; to be prefilled again if it is paused."""
    left: float
    """Still to come."""


def peak_tokens(contexts: Sequence[float], left: Sequence[float], rounding: float = 0.0) -> float:
    """The most KV cache that streams will need together if none joins them.

    Max over i of the contexts of the i longest to stay, plus i times what the i-th has to come.
    `rounding` is what a stream's last block wastes: half a block on average.
    """
    if len(contexts) > PLAIN:
        return float(_moments(contexts, left, rounding)[2].max())
    held = peak = 0.0
    for i, (to_come, context) in enumerate(sorted(zip(left, contexts, strict=True))[::-1], 1):
        held += context
        peak = max(peak, held + i * (to_come + rounding))
    return peak


def _moments(
    contexts: Sequence[float], left: Sequence[float], rounding: float
) -> tuple[Tokens, Tokens, Tokens]:
    """When streams end; what those hold now that are there until then or longer; what they need."""
    ends, held = np.array(left, dtype=float), np.array(contexts, dtype=float)
    order = ends.argsort()
    ends = ends[order]
    held = held[order[::-1]].cumsum()[::-1]
    return ends, held, held + np.arange(len(ends), 0, -1) * (ends + rounding)


class Outlook:
    """What the streams of one worker will need: written down once, asked for many newcomers.

    It stays true while they decode, for what they hold more they have less to come; who ends early
    or late makes it wrong, so it is made anew from time to time.
    """

    __slots__ = ("_after", "_before", "_contexts", "_ends", "_held", "_left", "bound", "rounding")

    def __init__(
        self,
        contexts: Iterable[float] = (),
        left: Iterable[float] = (),
        block_size: int | None = None,
    ) -> None:
        self.rounding = 0.5 * (block_size or 0)
        self._contexts = list(contexts)
        self._left = list(left)
        self.bound = sum(self._contexts) + sum(self._left) + self.rounding * len(self._left)
        """No less than the peak: as if nobody ended before all are at their longest."""
        self._ends: list[float] | None = None
        """Moments at which streams end, in order; None until somebody asks."""
        self._held: list[float] = []
        """Contexts of those that are there at each moment, and nothing after the last."""
        self._after: list[float] = []
        """The most that is needed from a moment on."""
        self._before: list[float] = []
        """The most that is needed before it by one stream more, its context not counted."""

    def add(self, context: float, left: float) -> None:
        """A stream joins."""
        self._contexts.append(context)
        self._left.append(left)
        self.bound += context + left + self.rounding
        self._ends = None

    def add_unknown(self, streams: int, context: float, left: float) -> None:
        """Streams join of which only the sum of their contexts is known (other gateways').

        `left` is what streams have to come on average. They are taken to end one after the other,
        evenly over twice that time: if all ended at once, they would need far more.
        """
        if streams:
            apart = 2.0 * left / streams
            self._contexts += [context / streams] * streams
            self._left += [apart * (i + 0.5) for i in range(streams)]
            self.bound += context + streams * (left + self.rounding)
            self._ends = None

    def peak(self) -> float:
        """The most that the streams will need."""
        self._sorted()
        return self._after[0]

    def peak_with(self, context: float, left: float) -> float:
        """The most that they and a newcomer will need.

        It adds to every moment until its own end, itself a moment, and to none after that.
        """
        ends = self._sorted()
        place, rounding = bisect_left(ends, left), self.rounding
        at_end = self._held[place] + (len(ends) - place + 1) * (left + rounding)
        return max(context + max(self._before[place], at_end), self._after[place])

    def moments(self) -> tuple[Tokens, Tokens]:
        """When streams end, in order, and what is needed then."""
        ends, _, needed = _moments(self._contexts, self._left, self.rounding)
        return ends, needed

    def _sorted(self) -> list[float]:
        if self._ends is None:
            ends, held, needed = _moments(self._contexts, self._left, self.rounding)
            one_more = np.maximum.accumulate(needed + ends + self.rounding)
            self._before = [0.0, *one_more.tolist()]
            self._after = [*np.maximum.accumulate(needed[::-1])[::-1].tolist(), 0.0]
            self._held = [*held.tolist(), 0.0]
            self._ends = ends.tolist()
        return self._ends


def limit_tokens(capacity: float, trust: float = 1.0) -> float:
    """What the streams of a worker may need at most."""
    return KV_FULL * trust * capacity


def relief(outlook: Outlook, limit: float, candidates: Iterable[Stream]) -> list[str]:
    """Which of the streams to pause so that no more than `limit` will be needed.

    At the worst moment the one is taken that costs least, in tokens to prefill again, for each
    token that it relieves there, until the limit is kept or nobody can help any more. Whoever
    turns out not to matter, beside those taken later, goes on: the dearest first.
    """
    if outlook.bound <= limit:
        return []
    ends, needed = outlook.moments()
    streams = sorted(candidates, key=lambda stream: stream.id)  # argmin takes the first of equals
    context = np.array([stream.context for stream in streams])
    cost = context + INTERRUPTION
    left = np.array([stream.left for stream in streams])
    paused: list[int] = []
    while streams and needed.max() > limit:
        worst = int(needed.argmax())
        gain = np.where(left >= ends[worst], context + ends[worst] + outlook.rounding, 0.0)
        gain[paused] = 0.0
        useful = np.minimum(gain, needed[worst] - limit)
        price = np.divide(cost, useful, out=np.full(len(streams), np.inf), where=useful > 0.0)
        best = int(price.argmin())
        if useful[best] <= 0.0:
            break
        needed = needed - _needs(streams[best], ends, outlook.rounding)
        paused.append(best)
    reached = max(limit, float(needed.max()))
    for i in sorted(paused, key=lambda i: -streams[i].context):
        without = needed + _needs(streams[i], ends, outlook.rounding)
        if without.max() <= reached:
            needed = without
            paused.remove(i)
    return [streams[i].id for i in paused]


def _needs(stream: Stream, ends: Tokens, rounding: float) -> Tokens:
    """What one stream needs at each moment."""
    needs: Tokens = np.where(ends <= stream.left, stream.context + ends + rounding, 0.0)
    return needs


def trust_after(trust: float, preempted: bool) -> float:
    """How far the forecast is to be trusted after a report in which the engine had preempted."""
    return max(trust * DISTRUST, LEAST_TRUST) if preempted else min(trust + REGAINED, 1.0)
