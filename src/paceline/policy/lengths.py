"""How long will an answer be, and how many tokens has a prompt?

Answers are unlike each other but tenants are like themselves: quantiles of the output length are
kept for each model and tenant, leaning on the model's own while a tenant is new, and on a broad
guess while the model is. What a stream has already produced is the best news of all: only answers
at least as long still count.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from math import inf, log2

import numpy as np
from numpy.typing import NDArray

BINS_PER_OCTAVE = 4
LONGEST = 2**17
"""Tokens; what is longer counts as this."""
EDGES = 2.0 ** (np.arange(int(log2(LONGEST)) * BINS_PER_OCTAVE + 2) / BINS_PER_OCTAVE)
"""Bounds of the bins: bin i holds lengths in [EDGES[i], EDGES[i + 1])."""
BINS = len(EDGES) - 1

KEPT = 0.995
"""What is left of an old answer's weight with each new one: some 200 answers are remembered."""
PRIOR_ANSWERS = 8.0
"""Answers of its own after which a tenant counts as much as its model, a model as the guess."""
MOST_KEYS = 4096
"""Pairs of model and tenant remembered; the one unheard of for longest is forgotten first."""

EXPECTED = 0.6
"""Which quantile stands for the length of an answer: long ones cost more than short ones save."""
FRESH = 16
"""Requests for which an expected length is reused; answers for which a table of `left` is."""

CAUTIOUS = 0.75
"""Which quantile stands for what a single stream has still to come: KV cache that runs out costs
more than some that stays empty."""
LEAST_SHARE = 0.25
"""Of many together, each is taken for a quantile of its own, this one or more. From 0 on their
peak of KV would be right on average, so this is the margin."""
GOLDEN = 0.5 * (5.0**0.5 - 1.0)
MOST_TABLES = 1024
"""Tables for `left` that are kept."""

Histogram = NDArray[np.float64]

_EDGES: list[float] = EDGES.tolist()
LAST_EDGE = _EDGES[-1]


def own_share(serial: int) -> float:
    """Which quantile of the answers the so-manyth stream is taken for.

    If every stream were the long one of its kind, their KV together would be far overrated. So they
    are taken to be as unlike as answers are, as Past-Future scheduling does by drawing at random
    (Gong et al. 2025); multiples of the golden ratio spread more evenly, and without chance.
    """
    return LEAST_SHARE + (1.0 - LEAST_SHARE) * (serial * GOLDEN % 1.0)


def _guess() -> Histogram:
    """Before any data: log-normal around 256 tokens, two thirds of it within a factor of four."""
    middle = np.sqrt(EDGES[1:] * EDGES[:-1])
    weight = np.exp(-0.5 * (np.log2(middle / 256.0) / 2.0) ** 2)
    share: Histogram = weight / weight.sum()
    return share


class _Fading:
    """A histogram in which old answers fade: rather than all bins shrinking, the unit grows."""

    __slots__ = ("answers", "counts", "unit")

    def __init__(self) -> None:
        self.counts: Histogram = np.zeros(BINS)
        self.unit = 1.0
        self.answers = 0

    def add(self, place: int) -> None:
        self.answers += 1
        self.unit /= KEPT
        self.counts[place] += self.unit
        if self.unit > 1e100:
            self.counts /= self.unit
            self.unit = 1.0


class OutputLengths:
    """Learned distributions of output tokens."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], _Fading] = {}
        """By (model, tenant), least recently learned first; tenant "" is the whole model."""
        self._guess = _guess()
        self._expected: dict[tuple[str, str], tuple[int, float]] = {}
        """What was last said of each key, and how often it may be said again."""
        self._upto: dict[tuple[str, str], list[float]] = {}
        """Share of the answers up to each of `EDGES`, as it was some answers ago."""

    def expected(self, model: str, tenant: str, max_tokens: int | None = None) -> float:
        """`EXPECTED` quantile of a whole answer; computed anew for every so-manyth request."""
        times, length = self._expected.get((model, tenant), (0, 0.0))
        if not times:
            if len(self._expected) >= MOST_KEYS:
                self._expected.clear()
            times, length = FRESH, self.quantile(model, tenant, EXPECTED)
        self._expected[model, tenant] = (times - 1, length)
        return length if max_tokens is None else min(length, float(max_tokens))

    def learn(self, model: str, tenant: str, output_tokens: int) -> None:
        """An answer ended by itself or at its limit after so many tokens."""
        place = min(int(log2(max(output_tokens, 1)) * BINS_PER_OCTAVE + 1e-9), BINS - 1)
        for key in {(model, tenant): 0, (model, ""): 0}:
            seen = self._seen.pop(key, None)
            if seen is None:
                seen = _Fading()
                if len(self._seen) >= MOST_KEYS:
                    del self._seen[next(iter(self._seen))]
            seen.add(place)
            self._seen[key] = seen
            if seen.answers < FRESH or not seen.answers % FRESH:
                self._upto.pop(key, None)

    def left(
        self,
        model: str,
        tenant: str,
        produced: float,
        max_tokens: int | None = None,
        share: float = CAUTIOUS,
    ) -> float:
        """Tokens that `share` of the answers that got so far have still to come, at most.

        What `quantile` says, but cheap enough to be asked of every stream: plain Python on a table
        that serves for some answers.
        """
        if produced >= LAST_EDGE:
            tokens = 1.0
        else:
            upto = self._upto.get((model, tenant)) or self._cumulated(model, tenant)
            begin = produced if produced > 1.0 else 1.0
            i = bisect_right(_EDGES, begin)
            low, edge = upto[i - 1], _EDGES[i - 1]
            passed = low + (upto[i] - low) * (begin - edge) / (_EDGES[i] - edge)
            target = passed + share * (upto[-1] - passed)
            i = bisect_left(upto, target, i, BINS)
            low, edge = upto[i - 1], _EDGES[i - 1]
            tokens = edge + (_EDGES[i] - edge) * (target - low) / (upto[i] - low) - produced
        if max_tokens is not None:
            tokens = min(tokens, max_tokens - produced)
        return max(tokens, 0.0)

    def _cumulated(self, model: str, tenant: str) -> list[float]:
        """Made anew; a tenant of which nothing is known has its model's."""
        key = (model, tenant if (model, tenant) in self._seen else "")
        upto = self._upto.get(key)
        if upto is None:
            if len(self._upto) >= MOST_TABLES:
                self._upto.clear()
            upto = self._upto[key] = self._cumulative(*key).tolist()
        return upto

    def quantile(
        self,
        model: str,
        tenant: str,
        share: float,
        produced: int = 0,
        max_tokens: int | None = None,
    ) -> float:
        """Output tokens that `share` of the answers longer than `produced` do not exceed."""
        limit = inf if max_tokens is None else float(max_tokens)
        if produced >= min(limit, LAST_EDGE):
            return min(float(produced) + 1.0, limit)
        upto = self._cumulative(model, tenant)
        passed = np.interp(produced, EDGES, upto)
        target = passed + share * (upto[-1] - passed)
        return min(max(float(np.interp(target, upto, EDGES)), produced), limit)

    def _cumulative(self, model: str, tenant: str) -> Histogram:
        """Share of the answers up to each of `EDGES`."""
        return np.concatenate(([0.0], np.cumsum(self._distribution(model, tenant))))

    def _distribution(self, model: str, tenant: str) -> Histogram:
        """Counts of the tenant upon those of the model upon the guess."""
        shape = self._guess
        for key in ((model, ""), (model, tenant)):
            seen = self._seen.get(key)
            if seen is not None:
                blend = seen.counts / seen.unit + PRIOR_ANSWERS * shape
                shape = blend / blend.sum()
        return shape


class TokensPerByte:
    """Tokens in a byte of prompt JSON, for each model: its tokenizer and the users' language."""

    FIRST_GUESS = 0.25
    WEIGHT_BYTES = 4096.0
    """Weight of the guess."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}
        """Model → (tokens, bytes), fading."""

    def learn(self, model: str, prompt_bytes: int, prompt_tokens: int) -> None:
        """A prompt of so many bytes had so many tokens, says its engine."""
        tokens, size = self._seen.get(
            model, (self.FIRST_GUESS * self.WEIGHT_BYTES, self.WEIGHT_BYTES)
        )
        self._seen[model] = (KEPT * tokens + prompt_tokens, KEPT * size + prompt_bytes)

    def tokens(self, model: str, prompt_bytes: int) -> float:
        """Expected prompt tokens."""
        tokens, size = self._seen.get(model, (self.FIRST_GUESS, 1.0))
        return prompt_bytes * tokens / size
