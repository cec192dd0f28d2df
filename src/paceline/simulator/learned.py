"""How does an engine behave in time, as far as a live gateway has learned it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import gcd, log

from paceline.enginemodel import PROFILES, Chance, Load, Profile
from paceline.kernel.timing import Timing, WorkerTiming
from paceline.policy.standing import Curve
from paceline.policy.steptime import DISTURBED
from paceline.simulator.flight import NAME_TOKENS
from paceline.simulator.scenario import Workers

USUAL_SEQS = 256
"""Streams at once, which no gateway is told: vLLM's default on most GPUs."""
USUAL_BLOCK = 16
"""Tokens of a block, where the engine does not say: vLLM's default."""
AMPLE_KV = 2**26
"""Tokens of KV cache where the engine does not say: never full."""


class LearnedProfile(Profile, frozen=True, kw_only=True):
    """A profile whose steps take what a worker's were seen to take, not what five figures say."""

    weights_s: float = 0.0
    token_s: float = 0.0
    stream_s: float = 0.0
    context_s: float = 0.0
    attention_s: float = 0.0
    hiccup_share: float = 0.0
    """How far steps spread is learned, but not how often one takes many times as long."""
    curve: Curve
    slowdown: float
    """How many times slower than `curve` it lastingly is."""

    def step_seconds(self, load: Load, rng: Chance | None = None) -> float:
        """Seconds that a step takes; spread as the worker's are, if `rng` is given."""
        curve = self.curve
        seconds = self.slowdown * (
            curve.at(load.streams + load.prefill)
            + curve.kv_s * load.context
            + curve.q_s * load.attention
        )
        return seconds * self.noise(rng)[0] if rng else seconds


def learned_profile(worker: WorkerTiming, max_num_seqs: int = USUAL_SEQS) -> LearnedProfile:
    """An engine that takes as long for its steps as this worker."""
    # Of blocks, a simulation must be able to make those by which it names prefixes.
    block = gcd(worker.block_size or USUAL_BLOCK, NAME_TOKENS)
    return LearnedProfile(
        name=worker.id,
        curve=Curve(worker.step.theta),
        slowdown=_lasting(worker.step.slowdown),
        noise_sigma=worker.step.spread,
        overhead_s=worker.overhead_s,
        kv_tokens=max(worker.kv_capacity_tokens or AMPLE_KV, block),
        max_num_seqs=min(max_num_seqs, worker.prefill_budget),
        max_num_batched_tokens=worker.prefill_budget,
        block_size=block,
    )


def _lasting(slowdown: float) -> float:
    """A worker far from its usual pace was disturbed when its timing was taken: that passes."""
    return slowdown if abs(log(slowdown)) <= DISTURBED else 1.0


def live_fleet(timing: Timing) -> tuple[Workers, ...]:
    """The fleet that a gateway has now, to play a scenario with in place of its own."""
    return tuple(
        Workers(
            profile=worker.id,
            name=worker.id,
            model=worker.model,
            node=worker.node,
            cost_per_hour=worker.cost_per_hour or 1.0,
        )
        for worker in timing.workers
    )


def profiles_of(timing: Timing) -> Callable[[Workers], Profile]:
    """The profiles of a scenario that names live workers beside those that Paceline knows."""
    return partial(_named, {worker.id: learned_profile(worker) for worker in timing.workers})


def _named(learned: Mapping[str, Profile], workers: Workers) -> Profile:
    return learned.get(workers.profile) or PROFILES[workers.profile]
