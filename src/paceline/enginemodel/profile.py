"""How long does a step take on this GPU with this model, and how much context fits?"""

from __future__ import annotations

from math import hypot
from typing import Protocol

import msgspec


class Chance(Protocol):
    """What noise needs of a random generator; `random.Random` has it."""

    def lognormvariate(self, mu: float, sigma: float, /) -> float: ...


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

    A step must read the weights (memory-bound) and multiply them with each token (compute-bound).
    The two overlap, less so where they are alike: their root sum of squares follows the figures
    better than sum or maximum (and is a form that no learner of ours uses). Reading KV cache and
    attention come on top:

        seconds = hypot(weights_s, token_s (n + p)) + stream_s n + context_s kv + attention_s q
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
    kv_tokens: int
    """Tokens of context that the KV cache holds."""
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int = 131_072
    block_size: int = 16
    noise_sigma: float = 0.03
    """Deviation of the logarithm of step times."""

    def step_seconds(self, load: Load, rng: Chance | None = None) -> float:
        """Seconds that a step takes, with multiplicative lognormal noise if `rng` is given."""
        seconds = (
            hypot(self.weights_s, self.token_s * (load.streams + load.prefill))
            + self.stream_s * load.streams
            + self.context_s * load.context
            + self.attention_s * load.attention
        )
        return seconds * rng.lognormvariate(0.0, self.noise_sigma) if rng else seconds


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

# The five coefficients are the relative least squares fit to FIGURES_MS below, at most 7 % off.
# Batch limits are vLLM's defaults for its API server on these GPUs.
_ALL = (
    Profile(
        name="h100-llama-8b",
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
        weights_s=15.4e-3,
        token_s=6.28e-5,
        stream_s=1.38e-5,
        context_s=2.32e-8,
        attention_s=1.78e-9,
        kv_tokens=LLAMA_70B_TP4_KV,
        max_num_seqs=1024,
        max_num_batched_tokens=8192,
    ),
    Profile(
        name="a100-llama-8b",
        weights_s=12.3e-3,
        token_s=6.22e-5,
        stream_s=1.27e-5,
        context_s=7.38e-8,
        attention_s=1.24e-9,
        kv_tokens=LLAMA_8B_KV,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
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
}
"""Milliseconds of a prefill of `PREFILL_TOKENS`, and of a decode step of `DECODE_STREAMS` streams
at `DECODE_CONTEXT` tokens each: vLLM, BF16, by the kernel measurements in aiconfigurator-core
(PyPI, Apache-2.0)."""
