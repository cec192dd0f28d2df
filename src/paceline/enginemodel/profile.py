"""How long does a step take on this GPU with this model, and how much context fits?"""

from __future__ import annotations

from math import exp, hypot, inf, log, log1p, sqrt
from statistics import NormalDist
from typing import Protocol

import msgspec

from paceline.enginemodel.tables import StepTable

HICCUP = (2.0, 4.0)
"""How many times as long as usual a step takes that hiccups, evenly spread."""


class Chance(Protocol):
    """What noise needs of a random generator; `random.Random` has it."""

    def random(self) -> float: ...


class Load(msgspec.Struct, frozen=True, gc=False):
    """The work in one step of a continuous batch."""

    streams: int = 0
    """Streams that decode one token each."""
    prefill: int = 0
    """Prompt tokens that are computed."""
    context: int = 0
    """Tokens of context that the decoding streams attend to."""
    attention: float = 0.0
    """`sum of p * (before + p / 2)` over the chunks of p tokens: pairs that prefill attends to."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Timing and capacity of one engine replica, with the limits that its engine defaults to.

    The time of a step is read off `table`; without one it is by a formula of five figures. A step
    must read the weights (memory-bound) and multiply them with each token (compute-bound). The two
    overlap, less so where they are alike: of dense models, their root sum of squares follows the
    figures better than sum or maximum. Reading KV cache and attention come on top:

        seconds = hypot(weights_s, token_s (n + p)) + stream_s n + context_s kv + attention_s q

    Neither is the form that a gateway's learner uses.
    """

    name: str
    weights_s: float
    token_s: float
    stream_s: float
    """Sampling and bookkeeping of one stream."""
    context_s: float
    """Reading the KV cache of one token."""
    attention_s: float
    """One pair of prompt tokens attending to one another."""
    table: StepTable | None = None
    """`msgspec.structs.replace(profile, table=None)` goes by the formula."""
    kv_tokens: int
    """Tokens of context that the KV cache holds."""
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int = 131_072
    block_size: int = 16
    kv_token_bytes: int = 128 * 1024
    """KV cache of one token: 2 x layers x KV heads x head size x 2 bytes (BF16)."""
    overhead_s: float = 0.0
    """From a request until a step can hold it, the way there and back included: what an engine's
    server takes, where it was measured. Not part of any step."""
    noise_sigma: float = 0.03
    """Deviation of the logarithm of step times."""
    hiccup_share: float = 1 / 2000
    """Share of steps that take `HICCUP` times as long: a garbage collection, a late thread."""

    def step_seconds(self, load: Load, rng: Chance | None = None) -> float:
        """Seconds that a step takes, with multiplicative noise if `rng` is given."""
        if self.table:
            seconds = self.table.step_seconds(
                load.streams, load.prefill, load.context, load.attention
            )
        else:
            seconds = (
                hypot(self.weights_s, self.token_s * (load.streams + load.prefill))
                + self.stream_s * load.streams
                + self.context_s * load.context
                + self.attention_s * load.attention
            )
        return seconds * self.noise(rng)[0] if rng else seconds

    def noise(self, rng: Chance, steps: int = 1) -> tuple[float, float]:
        """How many times as long as by `step_seconds` so many alike steps take: mean and worst.

        Takes a few microseconds for thousands of them. Of one step, both are the same.
        """
        mean, worst = lognormal_mean_and_worst(self.noise_sigma, steps, rng)
        usual, least, span = mean, HICCUP[0], HICCUP[1] - HICCUP[0]
        hiccup = _gap(self.hiccup_share, rng)
        while hiccup <= steps:
            factor = least + span * rng.random()
            mean += (factor - 1.0) * usual / steps
            worst = max(worst, factor * usual)
            hiccup += _gap(self.hiccup_share, rng)
        return mean, worst


def lognormal_mean_and_worst(sigma: float, count: int, rng: Chance) -> tuple[float, float]:
    """Mean and maximum of so many independent lognormals of median 1, without drawing each.

    The maximum of k lies at the quantile u^(1/k), u uniform. The others lie below it, z sigmas out:
    by the moments of the truncated lognormal, E[x^m] = exp(m² s²/2) F(z - m s) / F(z) with s for
    sigma and F the normal distribution. Their mean is drawn as if it were normal.
    """
    if sigma == 0.0:
        return 1.0, 1.0
    below = max(rng.random(), TINY) ** (1.0 / count)
    z = _deviate(below)
    worst = exp(sigma * z)
    if count == 1:
        return worst, worst
    mean = exp(sigma**2 / 2) * NORMAL.cdf(z - sigma) / below
    square = exp(2 * sigma**2) * NORMAL.cdf(z - 2 * sigma) / below
    deviation = sqrt(max(square - mean**2, 0.0) / (count - 1))
    others = min(mean + deviation * _deviate(rng.random()), worst)
    return (worst + (count - 1) * others) / count, worst


NORMAL = NormalDist()
TINY = 1e-15


def _deviate(quantile: float) -> float:
    """How many sigmas out this quantile of the normal distribution is; 0 and 1 are finite too."""
    return NORMAL.inv_cdf(min(max(quantile, TINY), 1.0 - TINY))


def _gap(share: float, rng: Chance) -> float:
    """Steps until the next one of those that have this share, itself included: geometric."""
    return 1 + int(log(1.0 - rng.random()) / log1p(-share)) if share else inf


def kv_capacity_tokens(
    gpus: int, weights_bytes: float, layers: int, kv_heads: int, head_dim: int = 128
) -> int:
    """Tokens that fit beside the weights on 80 GiB GPUs, in BF16.

    As vLLM counts: 92 % of the memory (its default), less the weights, less 2 GB a GPU for
    activations and CUDA graphs, over the keys and values of all layers.
    """
    bytes_per_token = 2 * layers * kv_heads * head_dim * 2
    room = gpus * (0.92 * 80 * 2**30 - 2e9) - weights_bytes
    return int(room / bytes_per_token) // 1024 * 1024


LLAMA_8B_KV = kv_capacity_tokens(1, 2 * 8.03e9, layers=32, kv_heads=8)
LLAMA_70B_TP4_KV = kv_capacity_tokens(4, 2 * 70.6e9, layers=80, kv_heads=8)
QWEN3_30B_KV = kv_capacity_tokens(1, 2 * 30.5e9, layers=48, kv_heads=4)

# The formula's five figures are the relative least squares fit to FIGURES_MS below: at most 7 % off
# for dense models. The tables, which come from the same source, are at most 7 % off as well.
# Batch limits are vLLM's defaults for its API server on these GPUs.
_ALL = (
    Profile(
        name="h100-llama-8b",
        table=StepTable.of("h100-llama-8b"),
        weights_s=6.24e-3,
        token_s=1.99e-5,
        stream_s=9.77e-6,
        context_s=3.92e-8,
        attention_s=1.11e-9,
        kv_tokens=LLAMA_8B_KV,
        max_num_seqs=1024,
        max_num_batched_tokens=8192,
    ),
    Profile(
        name="h100-llama-70b-tp4",
        table=StepTable.of("h100-llama-70b-tp4"),
        weights_s=15.4e-3,
        token_s=6.28e-5,
        stream_s=1.38e-5,
        context_s=2.32e-8,
        attention_s=1.78e-9,
        kv_tokens=LLAMA_70B_TP4_KV,
        kv_token_bytes=320 * 1024,
        max_num_seqs=1024,
        max_num_batched_tokens=8192,
    ),
    Profile(
        name="a100-llama-8b",
        table=StepTable.of("a100-llama-8b"),
        weights_s=12.3e-3,
        token_s=6.22e-5,
        stream_s=1.27e-5,
        context_s=7.38e-8,
        attention_s=1.24e-9,
        kv_tokens=LLAMA_8B_KV,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
    ),
    Profile(  # a mixture of experts, of which the formula is up to 57 % off
        name="h100-qwen3-30b-a3b",
        table=StepTable.of("h100-qwen3-30b-a3b"),
        weights_s=5.24e-3,
        token_s=2.19e-5,
        stream_s=0.0,
        context_s=8.23e-8,
        attention_s=0.0,
        kv_tokens=QWEN3_30B_KV,
        kv_token_bytes=96 * 1024,
        max_num_seqs=1024,
        max_num_batched_tokens=8192,
        max_model_len=40_960,
    ),
    Profile(  # of no real machine: quick and cramped, for tests
        name="tiny",
        weights_s=2e-3,
        token_s=1e-5,
        stream_s=1e-5,
        context_s=1e-8,
        attention_s=1e-10,
        kv_tokens=16_384,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        max_model_len=4096,
        noise_sigma=0.0,
        hiccup_share=0.0,
    ),
)
PROFILES = {profile.name: profile for profile in _ALL}

PREFILL_TOKENS = (512, 2048, 8192)
DECODE_STREAMS = (1, 32, 128, 256)
DECODE_CONTEXT = 2048

FIGURES_MS = {
    "h100-llama-8b": ((12, 44, 200), (6.2, 9.6, 18, 31)),
    "h100-llama-70b-tp4": ((37, 130, 577), (15, 18, 26, 37)),
    "a100-llama-8b": ((36, 125, 557), (12, 19, 34, 63)),
    "h100-qwen3-30b-a3b": ((29, 46, 153), (4.7, 22, 32, 42)),
}
"""Milliseconds of a prefill of `PREFILL_TOKENS`, and of a decode step of `DECODE_STREAMS` streams
at `DECODE_CONTEXT` tokens each: vLLM, BF16, by the kernel measurements in aiconfigurator-core
(PyPI, Apache-2.0)."""
