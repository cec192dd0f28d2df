"""How long will a worker's next step take?

One step is one forward pass of the engine's continuous batch. Its time is modelled as

    seconds = slowdown · (base + Σ slope_i·segment_i(streams + prefill) + kv_s·kv + q_s·q)

with every coefficient ≥ 0, so that more work never takes less time. The token term is piecewise
linear because mixture-of-experts models are concave in the batch (each token wakes new experts)
where dense ones are flat and then linear (bound by memory, then by compute); `kv` is what attention
reads for the decoding streams and `q` what it computes for the prompts.

Two things are learned at two speeds, and must not be mistaken for each other:

- The coefficients say what a load costs. They are refitted by nonnegative least squares on a
  buffer stratified by load: nearly all steps are decode-only, so whatever forgets by age alone
  (recursive least squares, EWMA) forgets what a prefill costs.
- The gain says how fast the worker is just now. It moves within a few steps.

A residual at a load that the buffer knows speaks of the worker: it moves the gain. At a load seen
fewer than `KNOWN` times it speaks of the model: the gain holds still and the sample is learned.
While the gain is small (`DISTURBED`), samples are kept as they are, so that the coefficients learn
what the gain made up for. While it is large, the worker is disturbed, and samples are kept divided
by it. What lasts is no disturbance: the slow average of the gain moves into the common scale of
coefficients and samples, which changes no prediction, and the gain means "just now" again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import exp, inf, log
from operator import mul
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bin = tuple[int, int]

KNOTS = (0, 8, 32, 128, 256, 512, 1024, 2048)
"""Tokens of a step between which its time is linear; beyond the last the last slope goes on."""
WIDTHS = tuple(float(high - low) for low, high in pairwise(KNOTS))
"""Of each linear piece; the last one has no end."""
FILLED = tuple((1.0, *WIDTHS[:i]) for i in range(len(WIDTHS)))
EMPTY = tuple((0.0,) * (len(WIDTHS) - 1 - i) for i in range(len(WIDTHS)))
"""The features before and after the piece in which a step's tokens lie."""

ROOFLINE = (8e-3, *[1e-5] * 3, *[1.5e-5] * 4, 4e-8, 8e-10)
"""Coefficients to start from: an 8B model on a data-centre GPU. Only their proportions matter
once the first step is seen."""

BIN_SAMPLES = 24
KNOWN = 4
"""Samples of a load's bin from which on a residual there is blamed on the worker, not the model.
Until then each sample that is `NEWS` is fitted at once."""
NEWS = 0.05
"""Log residual from which on a load that is not known yet is not as it was foreseen."""
MAX_BINS = 64
FULL_BIN_STRIDE = 8
"""A full bin takes every so-manyth sample, so that it spans more than one moment."""
REFIT_EVERY = 64
"""Samples between refits once the first ones (after 1, 2, 4, … samples) are done..."""
REFIT_SHARE = 16
"""...and later the sixteenth part of all so far: what is well known is not news every minute."""
PRIOR_SAMPLES = 0.2
"""Weight of the prior, in samples at `TYPICAL` features."""
TYPICAL = np.array([1.0, 8, 24, 96, 128, 256, 512, 1024, 50_000, 1_000_000])

REFERENCE = np.array(
    [1.0, *np.clip(544.0 - np.array(KNOTS[:-1]), 0, np.diff(KNOTS)), 32_000.0, 131_072.0]
)
"""Features of a typical step with prefill (32 streams of 1,000 tokens, a prompt of 512)."""

QUANTILES, NORMAL = (0.5, 0.9, 0.99), (0.0, 1.28, 2.33)
"""The quantiles that are tracked, and where those of a normal distribution lie, in sigmas."""
SETTLED = 1e-3
"""A fit that moves by less is done."""
LEAST_S = 1e-6
"""No step is free."""
CLIP = 0.25
"""A log residual moves the gain as if it were no larger, lest a hiccup look like a slowdown..."""
SURPRISES = 3
"""...unless so many in a row point the same way: then the gain follows at once."""
DISTURBED = 0.15
"""Log gain above which the worker, not the model, is taken to be off."""
PERSISTENT_S = 20.0
"""Half-life in busy seconds after which a gain is no longer called temporary."""


class Load(msgspec.Struct, frozen=True, gc=False):
    """One step's work."""

    streams: float
    """Streams decoding, one token each."""
    prefill: float = 0.0
    """Prompt tokens prefilled."""
    kv: float = 0.0
    """Tokens of context of the decoding streams."""
    q: float = 0.0
    """Attention work of the prefill: Σ p·(context + p/2), token pairs."""


def dot(theta: Sequence[float], row: Sequence[float]) -> float:
    total: float = sum(map(mul, theta, row))
    return total


def features(streams: float, prefill: float, kv: float, q: float) -> list[float]:
    """What the coefficients multiply: [1, tokens in each segment, kv, q]."""
    tokens = streams + prefill
    i = bisect_right(KNOTS, tokens, 1, len(WIDTHS)) - 1
    return [*FILLED[i], tokens - KNOTS[i], *EMPTY[i], kv, q]


class StepModel(msgspec.Struct, frozen=True):
    """What was learned of one worker, as it stood at one moment."""

    theta: tuple[float, ...] = ROOFLINE
    """Seconds per feature: base, one slope a segment, kv, q."""
    slowdown: float = 1.0
    """Observed over expected step time just now."""
    spread: float = 0.1
    """Robust standard deviation of log(observed / expected)."""
    p50: float = 1.0
    p90: float = 1.15
    p99: float = 1.5
    """Quantiles of observed / expected."""
    samples: int = 0

    def expected_s(self, load: Load) -> float:
        """Median expectation of one step's seconds."""
        return self.step_s(load.streams, load.prefill, load.kv, load.q)

    def step_s(
        self, streams: float, prefill: float = 0.0, kv: float = 0.0, q: float = 0.0
    ) -> float:
        """`expected_s` of a load given by its parts."""
        return self.slowdown * dot(self.theta, features(streams, prefill, kv, q))


def pool_prior(models: Iterable[StepModel]) -> tuple[float, ...]:
    """What a new worker may expect to be like, from the workers of its kind.

    Coefficients trade off against each other, so whole shapes are averaged, weighted by samples;
    the scale is the median worker's, so that one slow machine does not speak for the others.
    """
    known = [(m.theta, m.samples) for m in models if m.samples > 0]
    if not known:
        return ROOFLINE
    theta = np.array([t for t, _ in known])
    scale = theta @ REFERENCE
    weights = np.minimum([n for _, n in known], 1000) / scale
    shape = weights @ theta
    return tuple((shape * (np.median(scale) / (shape @ REFERENCE))).tolist())


class StepTimeEstimator:
    """Learns one worker's step times from what it is seen to do.

    `observe` takes some 10 µs a step, and every so often refits, which takes less than 1 ms.
    """

    def __init__(self, prior: Sequence[float] = ROOFLINE) -> None:
        self._prior: Array = np.array(prior, dtype=float)
        self._theta = [float(c) for c in prior]
        self._scale = 1.0
        """Seconds of the worker per second of `_theta` and of the buffer."""
        self._shown: tuple[float, ...] | None = None
        """Scaled coefficients, until scale or coefficients change."""
        self._gain = 0.0
        self._slow_gain = 0.0
        self._streak = 0.0
        """Residuals in a row beyond the usual, counted with their sign."""
        self._buffer = _Buffer()
        self._samples = 0
        self._refit_at = 1
        self._spread = 0.1
        self._tail = list(NORMAL)
        """Running `QUANTILES` of log(observed / expected), in units of the spread."""

    @property
    def slowdown(self) -> float:
        """Observed over expected step time just now; 1 is the worker's normal speed."""
        return exp(self._gain)

    @property
    def p99(self) -> float:
        """Quantile of observed / expected."""
        return exp(self._tail[2] * self._spread)

    @property
    def scale(self) -> float:
        """What of the slowdowns so far has lasted: twice as high if steps of loads that were known
        take twice as long for good. What is learned of other loads does not change it."""
        return self._scale

    @property
    def coefficients(self) -> tuple[float, ...]:
        """As in `model()`; the same object until they change."""
        if self._shown is None:
            self._shown = tuple(c * self._scale for c in self._theta)
        return self._shown

    @property
    def samples(self) -> int:
        return self._samples

    def expected_s(self, load: Load) -> float:
        """Median expectation of one step's seconds."""
        row = features(load.streams, load.prefill, load.kv, load.q)
        return self._scale * exp(self._gain) * dot(self._theta, row)

    def model(self) -> StepModel:
        """A snapshot to decide with."""
        return StepModel(
            theta=self.coefficients,
            slowdown=exp(self._gain),
            spread=self._spread,
            p50=exp(self._tail[0] * self._spread),
            p90=exp(self._tail[1] * self._spread),
            p99=self.p99,
            samples=self._samples,
        )

    def observe(self, load: Load, seconds: float, steps: float = 1.0) -> None:
        """So many steps of this load took so long together."""
        row = features(load.streams, load.prefill, load.kv, load.q)
        self._learn(row, load.streams + load.prefill, seconds / steps, steps)

    def observe_window(self, steps: Sequence[tuple[Load, float]], seconds: float) -> None:
        """So many steps of these loads took so long together."""
        count = sum(times for _, times in steps)
        if count <= 0:
            return
        row = [0.0] * len(TYPICAL)
        for load, times in steps:
            share = times / count
            for i, x in enumerate(features(load.streams, load.prefill, load.kv, load.q)):
                row[i] += share * x
        self._learn(row, sum(row[1:-2]), seconds / count, count)

    def _learn(self, row: list[float], tokens: float, seconds: float, steps: float) -> None:
        """Of `steps` steps of mean features `row` each took `seconds` on average."""
        if not LEAST_S <= seconds < inf:
            return
        modelled_s = self._scale * dot(self._theta, row)
        residual = log(seconds / modelled_s)
        key = bin_of(tokens, kv=row[-2])
        known = self._buffer.seen(key) >= KNOWN
        if known:
            if steps == 1:
                self._widen(residual - self._gain)
            self._follow(residual, modelled_s * steps, steps)
        disturbance = self._gain if abs(self._gain) > DISTURBED else 0.0
        self._buffer.keep(key, row, seconds / (self._scale * exp(disturbance)))
        self._samples += 1
        news = not known and abs(residual - self._gain) > NEWS
        if news or self._samples >= self._refit_at:
            self._refit(row)

    def _follow(self, residual: float, busy_s: float, steps: float) -> None:
        """Move the gain towards `log(observed / modelled)`, seen over so many steps and seconds."""
        error = residual - self._gain
        if abs(error) > DISTURBED and abs(error) > 3.0 * self._spread:
            told = steps if error > 0 else -steps
            self._streak = self._streak + told if self._streak * told > 0 else told
        else:
            self._streak = 0.0
        if abs(self._streak) >= SURPRISES:
            self._gain += (1.0 - 0.5**steps) * error
        else:
            rate = min(max(1.0 - 0.5**busy_s, 0.05), 0.3)
            self._gain += rate * min(max(error, -CLIP), CLIP)
        self._slow_gain += (1.0 - 0.5 ** (busy_s / PERSISTENT_S)) * (self._gain - self._slow_gain)
        if abs(self._slow_gain) > DISTURBED:
            self._scale *= exp(self._slow_gain)
            self._shown = None
            self._gain -= self._slow_gain
            self._slow_gain = 0.0

    def _widen(self, error: float) -> None:
        """Track spread and quantiles of log(observed / expected), predicted before it was learned.

        A quantile p moves up by p or down by 1 − p and rests where the two balance; a normal
        variable's mean absolute error is 0.8 sigma.
        """
        spread, tail = self._spread, self._tail
        for i, p in enumerate(QUANTILES):
            tail[i] += 0.05 * (p if error > tail[i] * spread else p - 1.0)
        capped = min(abs(error), 3.0 * spread + 0.02)
        self._spread = spread + 0.02 * (1.25 * capped - spread)

    def _refit(self, row: list[float]) -> None:
        """Fit the coefficients anew; keep what the gain says only where the fit doesn't say it."""
        before = dot(self._theta, row)
        self._theta = fit(self._buffer.rows, self._buffer.seconds, self._prior).tolist()
        self._shown = None
        rest = self._gain + log(before / dot(self._theta, row))
        if abs(rest) < abs(self._gain):
            self._gain = rest
        patience = max(REFIT_EVERY, self._samples // REFIT_SHARE)
        self._refit_at = self._samples + min(self._samples, patience)

    def to_dict(self) -> dict[str, Any]:
        """The learned model as plain values, for export."""
        built: dict[str, Any] = msgspec.to_builtins(self.model())
        return built

    @classmethod
    def from_dict(cls, exported: dict[str, Any]) -> Self:
        """An estimator that starts from an exported model, and trusts it as a prior."""
        model = msgspec.convert(exported, StepModel)
        estimator = cls(model.theta)
        estimator._spread = model.spread
        estimator._tail = [
            log(p) / max(model.spread, 1e-6) for p in (model.p50, model.p90, model.p99)
        ]
        return estimator


def bin_of(tokens: float, kv: float) -> Bin:
    """Loads that are alike: the same segment of tokens, context within a factor of two."""
    return bisect_right(KNOTS, tokens), int(kv).bit_length()


class _Buffer:
    """Samples kept by load, so that the common ones never push out the rare ones."""

    def __init__(self) -> None:
        self._slots: dict[Bin, int] = {}
        """Load bin → its place in the arrays; least recently used first."""
        self._visits: list[int] = []
        self.rows: Array = np.zeros((0, BIN_SAMPLES, len(TYPICAL)))
        self.seconds: Array = np.zeros((0, BIN_SAMPLES))

    def seen(self, key: Bin) -> int:
        """Samples so far at loads of this bin."""
        slot = self._slots.get(key)
        return 0 if slot is None else self._visits[slot]

    def keep(self, key: Bin, row: list[float], seconds: float) -> None:
        slot = self._slots.pop(key, None)
        if slot is None:
            slot = self._new_slot()
        self._slots[key] = slot
        visit = self._visits[slot]
        self._visits[slot] += 1
        if visit >= BIN_SAMPLES:
            visit, skip = divmod(visit, FULL_BIN_STRIDE)
            if skip:
                return
        self.rows[slot, visit % BIN_SAMPLES] = row
        self.seconds[slot, visit % BIN_SAMPLES] = seconds

    def _new_slot(self) -> int:
        if len(self._slots) < MAX_BINS:
            self._visits.append(0)
            if len(self._visits) > len(self.seconds):
                self.rows = np.pad(self.rows, ((0, 8), (0, 0), (0, 0)))
                self.seconds = np.pad(self.seconds, ((0, 8), (0, 0)))
            return len(self._visits) - 1
        slot = self._slots.pop(next(iter(self._slots)))
        self._visits[slot] = 0
        self.seconds[slot] = 0.0
        return slot


def fit(rows: Array, seconds: Array, prior: Array) -> Array:
    """Coefficients ≥ 0 with the least relative error.

    Samples come in bins: rows (bin, sample, feature), seconds (bin, sample), 0 for no sample. The
    prior gives the proportions, the samples their scale. A sample far from what its own bin says is
    weighted down and the fit done again (iteratively reweighted, as in Huber 1964), so that a
    hiccup has no say but a rare load keeps its own. The prior's pull is relative too, so that a
    prefill thirty times dearer than thought is believed soon.
    """
    used = seconds > 0
    counts = used.sum(axis=1)
    bins, middle = np.arange(len(used)), np.maximum(counts - 1, 0) // 2
    relative = (rows / np.where(used, seconds, inf)[..., None]).reshape(-1, len(prior))
    unseen = np.where(used, 0.0, inf)
    scaled_prior = prior / median((relative @ prior)[used.ravel()])
    weights = used.astype(float)
    theta = scaled_prior
    for _ in range(4):
        typical = np.maximum(theta, scaled_prior)
        penalty = PRIOR_SAMPLES * (TYPICAL / (typical[0] + typical * TYPICAL)) ** 2
        weights = weights.ravel()
        gram = (relative * weights[:, None]).T @ relative
        gram.flat[:: len(prior) + 1] += penalty
        before = theta
        theta = nonnegative(gram, weights @ relative + penalty * scaled_prior, theta)
        theta[0] = max(theta[0], LEAST_S)
        if np.abs(theta - before) @ TYPICAL < SETTLED * (theta @ TYPICAL):
            break
        ratio = (relative @ theta).reshape(used.shape)
        of_bin = np.sort(ratio + unseen, axis=1)[bins, middle]
        miss = np.abs(ratio / of_bin[:, None] - 1.0)
        usual = max(3.0 * 1.48 * median(miss[used]), 0.05)
        weights = used * np.minimum(1.0, usual / np.maximum(miss, usual)) ** 2
    return theta


def median(values: Array) -> float:
    """The middle one, or the mean of the two. For short arrays ten times as fast as NumPy's own."""
    values.sort()
    half = len(values) // 2
    return float(values[half] + values[~half]) / 2.0


def nonnegative(gram: Array, target: Array, start: Array) -> Array:
    """x ≥ 0 minimising xᵀ·gram·x/2 − target·x: the active set of Lawson and Hanson (1974).

    `start` ≥ 0 tells which are likely to be positive and saves most of the way.
    """
    unit = 1.0 / np.sqrt(gram.diagonal())
    gram, target, x = gram * unit[:, None] * unit, target * unit, start / unit
    free = x > 0
    for _ in range(5 * len(target)):
        aim = np.zeros_like(x)
        aim[free] = np.linalg.solve(gram[free][:, free], target[free])
        blocked = free & (aim <= 0)
        if blocked.any():
            part = (x[blocked] / (x[blocked] - aim[blocked])).min()
            x += part * (aim - x)
            free &= x > 1e-12 * x.max()
            continue
        x = aim
        pull = np.where(free, 0.0, target - gram @ x)
        best = int(pull.argmax())
        if pull[best] <= 1e-10:
            break
        free[best] = True
    return x * unit
