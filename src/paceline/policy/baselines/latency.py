"""Which worker is predicted to keep both promises, by one model for all of them?"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import msgspec
import numpy as np
from numpy.typing import NDArray

from paceline.domain.commands import Prediction
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    Fact,
    FirstTokenSeen,
    StreamBroke,
    StreamEnded,
    StreamStopped,
)
from paceline.policy.fleet import Choice, Fleet
from paceline.policy.standing import Ask

Array = NDArray[np.float64]

WEIGHTS = np.array([[0.8], [0.2]])
"""Of TTFT and ITL in a score."""
LEAST_HEADROOM = False
"""Among workers that keep both promises, prefer those that do by far (`most` of the source) or
those that barely do (`least`, its default, which packs). Both are offered there, the former does
better here: on four equal workers at 70 requests/s it kept 99.7 % of the promises, the latter 68 %.
"""
DRAW = False
"""Draw by score (weighted-random-picker, of the source's example) or take the highest
(max-score-picker). Highest does better here by 0 to 3 points."""
SLO_BUFFER = 1.0
"""Share of a promise that may be used."""
STICKY_ANYWHERE, STICKY_IN_TIER = 0.99, 0.80
"""Workers with so much of the prompt cached are looked at alone, before and after the split."""
STICKY_PENALTY_S = 5.0
"""Unless the best of them takes so much longer to the first token than the best of all."""
EXPLORE = 0.01
"""Chance of ignoring the cache, and of trying a worker that is predicted to break a promise."""

WINDOW = 1024
"""Newest outcomes that the model is fitted to."""
REFIT_EVERY = 32
"""Outcomes from one fit to the next, and before the first."""
RIDGE = 1.0
"""Pull of the coefficients to zero, in outcomes; features are standardised."""
FEATURES = 7
LEAST_S = 1e-4
"""No latency is predicted to be shorter."""


class GlobalLatency:
    """One with headroom to both promises, by a linear model of TTFT and of mean ITL that all
    workers share; else the one that breaks them least.

    Workers that have the prompt cached come first. Among those that keep both promises the one with
    most headroom is taken. If none does: an idle one, then one that breaks only the ITL, then only
    the TTFT, then both, by the smallest excess. 1 % of the choices explore. Until it has learned,
    it goes by free KV cache, queue and cached prefix.

    The source fits trees to labels; here a ridge regression is fitted to the newest outcomes, with
    the uncached and waiting tokens as features of their own, which a linear model cannot make up.

    Source: `latency-scorer` of the Gateway API Inference Extension and llm-d,
    https://llm-d.ai/docs/architecture/advanced/latency-predictor
    """

    def __init__(self) -> None:
        self._models: dict[Fleet, _Models] = {}
        self._asked: dict[str, _Asked] = {}
        """Requests that are not over."""

    def __call__(self, fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
        models = self._models.setdefault(fleet, _Models())
        rows = np.array([_features(fleet, ask, i) for i in places])
        promise = ask.promise
        predicted: Prediction | None = None
        if models.ready:
            ttft_s, itl_s = models.ttft.predict(rows), models.itl.predict(rows)
            slos = [SLO_BUFFER * s if s < inf else 0.0 for s in (promise.ttft_s, promise.itl_s)]
            idle = np.array([fleet.load(i) == 0 for i in places])
            headroom = np.array([slos[0] - ttft_s, slos[1] - itl_s])
            scores = _scores(headroom, ttft_s, rows[:, _CACHED], idle, ask.seed)
            k = _pick(scores, ask.seed)
            rooms = [1.0 - ttft_s[k] / promise.ttft_s] if 0 < promise.ttft_s < inf else []
            rooms += [1.0 - itl_s[k] / promise.itl_s] if 0 < promise.itl_s < inf else []
            predicted = Prediction(float(ttft_s[k]), float(itl_s[k]), float(min(rooms, default=1)))
            because = (
                f"score {scores[k]:.2f} of {scores.max():.2f}: "
                f"TTFT {ttft_s[k] * 1e3:.0f} ms, ITL {itl_s[k] * 1e3:.1f} ms"
            )
        else:
            scores = _composite(rows)
            k = _pick(scores, ask.seed)
            because = f"score {scores[k]:.2f} of {scores.max():.2f} for KV, queue and prefix"
        self._asked[ask.request_id] = _Asked(models, rows[k], ask.now)
        return Choice(places[k], because, predicted)

    def learn(self, fact: Fact, now: float) -> None:
        """Outcomes, with the state of the worker at the choice."""
        match fact:
            case FirstTokenSeen():
                asked = self._asked.get(fact.request_id)
                if asked is not None:
                    asked.models.ttft.add(asked.row, fact.at - asked.at)
            case StreamEnded():
                asked = self._asked.pop(fact.request_id, None)
                if asked is not None and fact.itl_s:
                    asked.models.itl.add(asked.row, fact.itl_s)
            case StreamBroke() | StreamStopped() | DispatchFailed() | ClientLeft():
                self._asked.pop(fact.request_id, None)


_KV, _CACHED, _WAITING = 0, 1, 2


def _features(fleet: Fleet, ask: Ask, place: int) -> list[float]:
    """A worker as the request would find it: KV use, share of the prompt cached, requests waiting
    and running, prompt tokens, those of them uncached, and uncached ones ahead."""
    worker = fleet.standing(place, ask.now)
    cached = ask.cached.get(place, 0.0)
    return [
        worker.kv_all / worker.kv_capacity,
        ask.blocks_held.get(place, 0) / max(ask.blocks, 1),
        float(worker.everyone - worker.streams),
        float(worker.streams),
        ask.prompt_tokens,
        ask.prompt_tokens - cached,
        worker.ahead,
    ]


def _scores(headroom: Array, ttft_s: Array, cached: Array, idle: Array, seed: int) -> Array:
    """What each worker is worth, above 0 to 1, and 0 if it is out of the question.

    `headroom`: seconds left to the promise, of TTFT and of ITL, a column each worker.
    """
    explore = [chance(seed, k) < EXPLORE for k in range(1, 4)]
    candidates = np.arange(len(ttft_s))
    candidates = _sticky(candidates, cached, ttft_s, STICKY_ANYWHERE, explore[0])
    keeps = (headroom[:, candidates] >= 0).all(axis=0)
    if keeps.any() and (keeps.all() or not explore[1]):
        chosen = candidates[keeps]
        chosen = _sticky(chosen, cached, ttft_s, STICKY_IN_TIER, explore[2])
        worth = _blend(headroom[:, chosen])
        worth = 1.0 - worth if LEAST_HEADROOM else worth
    else:
        chosen = candidates[~keeps]
        chosen = chosen[idle[chosen]] if idle[chosen].any() else chosen
        chosen = _sticky(chosen, cached, ttft_s, STICKY_IN_TIER, explore[2])
        severity = [2, 1] @ (headroom[:, chosen] < 0)
        chosen = chosen[severity == severity.min()]
        worth = 1.0 - _blend(np.maximum(-headroom[:, chosen], 0.0))
    scores = np.zeros(len(ttft_s))
    scores[chosen] = 0.02 + 0.98 * worth
    return scores


def _sticky(
    candidates: NDArray[np.intp], cached: Array, ttft_s: Array, share: float, explore: bool
) -> NDArray[np.intp]:
    """Those that have the prompt cached, unless there are none or they are far slower."""
    holders = candidates[cached[candidates] >= share]
    if explore or not len(holders):
        return candidates
    slower_s = ttft_s[holders].min() - ttft_s[candidates].min()
    return candidates if slower_s > STICKY_PENALTY_S else holders


def _blend(seconds: Array) -> Array:
    """Both rows scaled to 0 to 1 and weighed; one in which all are alike does not count."""
    low = seconds.min(axis=1, keepdims=True)
    span = seconds.max(axis=1, keepdims=True) - low
    weights = np.where(span > 1e-9, WEIGHTS, 0.0)
    scaled = (seconds - low) / np.maximum(span, 1e-9)
    blended: Array = (weights * scaled).sum(axis=0) / max(float(weights.sum()), 1e-9)
    return blended


def _composite(rows: Array) -> Array:
    """Scores without a prediction: free KV cache, shortness of the queue, prefix cached."""
    waiting = rows[:, _WAITING]
    span = waiting.max() - waiting.min()
    queue = (waiting.max() - waiting) / span if span else np.ones(len(rows))
    scores: Array = 0.01 + 0.99 * (1.0 - rows[:, _KV] + queue + rows[:, _CACHED]) / 3.0
    return np.maximum(scores, 0.01)


def _pick(scores: Array, seed: int) -> int:
    if not DRAW:
        best = np.flatnonzero(scores == scores.max())
        return int(best[seed % len(best)])
    upto = np.cumsum(scores)
    return int(np.searchsorted(upto, chance(seed, 0) * upto[-1], side="right"))


def chance(seed: int, nth: int) -> float:
    """The nth number, 0 to below 1, that a seed gives (SplitMix64, Steele et al. 2014)."""
    mask = 2**64 - 1
    z = (seed + (nth + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return float((z ^ (z >> 31)) >> 11) / 2.0**53


class _Ridge:
    """A linear model of the newest outcomes (ridge regression, Hoerl and Kennard 1970)."""

    def __init__(self) -> None:
        self._rows: Array = np.zeros((WINDOW, FEATURES))
        self._seconds: Array = np.zeros(WINDOW)
        self._count = 0
        self._slopes: Array = np.zeros(FEATURES)
        self._at_zero = 0.0

    @property
    def ready(self) -> bool:
        return self._count >= REFIT_EVERY

    def add(self, row: Array, seconds: float) -> None:
        """An outcome; every so often the model is fitted anew."""
        place = self._count % WINDOW
        self._rows[place], self._seconds[place] = row, seconds
        self._count += 1
        if self._count % REFIT_EVERY == 0:
            self._fit()

    def _fit(self) -> None:
        rows, seconds = self._rows[: self._count], self._seconds[: self._count]
        middle, scale = rows.mean(axis=0), rows.std(axis=0)
        scale[scale < 1e-9] = 1.0
        z = (rows - middle) / scale
        gram = z.T @ z + RIDGE * np.eye(len(scale))
        self._slopes = np.linalg.solve(gram, z.T @ (seconds - seconds.mean())) / scale
        self._at_zero = float(seconds.mean() - middle @ self._slopes)

    def predict(self, rows: Array) -> Array:
        """Seconds for each row."""
        return np.maximum(rows @ self._slopes + self._at_zero, LEAST_S)


class _Models:
    """What is learned of one fleet."""

    def __init__(self) -> None:
        self.ttft = _Ridge()
        self.itl = _Ridge()

    @property
    def ready(self) -> bool:
        return self.ttft.ready and self.itl.ready


class _Asked(msgspec.Struct, frozen=True):
    """A choice whose outcome is awaited."""

    models: _Models
    row: Array
    at: float
