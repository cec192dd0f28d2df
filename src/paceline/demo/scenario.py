"""What is played, and what is promised?

Four engines at half the speed of an A100 with an 8B model give about 38 tokens a second to each
stream: a pace that two CPU cores can carry for four of them, with the gateway and the clients.
The promises leave room for that pace and for other people's prompts, not for a threefold slowdown.
"""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec

from paceline.domain.promise import Promise
from paceline.engines.emulated import EngineSettings
from paceline.workload.generate import independent, lognormal
from paceline.workload.traces import Arrival
from paceline.workload.transform import with_tiers

POLICIES = ("round-robin", "headroom")
MODEL = "emulated-8b"
SMALL_MODEL = "smollm2-135m"
WORKERS = 4
SLOW_WORKER = 3
"""Counted from 1, as it is shown."""
SLOWDOWN = 3.0

PROMISES = {"premium": Promise(ttft_s=0.5, itl_s=0.04), "standard": Promise(ttft_s=1.5, itl_s=0.06)}
WEIGHTS = {"premium": 4.0, "standard": 1.0}
SHARES = {"premium": 0.3, "standard": 0.7}

RATE_PER_S = 20.0
PROMPTS = lognormal(200, 1_500)
ANSWERS = lognormal(80, 200, most=200)

QUESTIONS = (
    "Why is the sky blue?",
    "What do cyclists do in a paceline?",
    "Why do people dislike waiting?",
    "What is the capital of France?",
)


class Scenario(msgspec.Struct, frozen=True):
    """One act, played once for each policy."""

    seconds: float
    """How long requests keep coming; in the middle third of it one worker is slow."""
    seed: int

    @property
    def slow_from_s(self) -> float:
        return self.seconds / 3

    @property
    def slow_until_s(self) -> float:
        return self.seconds * 2 / 3

    def trace(self) -> list[Arrival]:
        """The requests: the same for every policy."""
        rng = Random(self.seed)  # noqa: S311
        plain = list(independent(RATE_PER_S, self.seconds, rng, prompts=PROMPTS, answers=ANSWERS))
        return with_tiers(plain, SHARES, rng)

    def engines(self, ports: list[int]) -> dict[str, Any]:
        """The configuration of the emulated engines."""
        engines = [
            EngineSettings(
                profile="a100-llama-8b", speed=0.5, port=port, model=MODEL, seed=self.seed + i
            )
            for i, port in enumerate(ports)
        ]
        return {"engines": [msgspec.structs.asdict(engine) for engine in engines]}


def gateway(
    policy: str, listen: str, admin: str, engines: list[str], small: str, dashboard: bool = False
) -> dict[str, Any]:
    """The gateway's configuration; addresses are URLs, and `small` is empty without that model."""
    workers = [{"url": url, "kind": "vllm"} for url in engines]
    models = [{"name": MODEL, "workers": workers}]
    if small:
        models.append({"name": SMALL_MODEL, "workers": [{"url": small, "kind": "llamacpp"}]})
    return {
        "listen": listen.removeprefix("http://"),
        "admin": admin.removeprefix("http://"),
        "models": models,
        "tiers": {
            name: {"ttft_s": promise.ttft_s, "itl_s": promise.itl_s, "weight": WEIGHTS[name]}
            for name, promise in PROMISES.items()
        },
        "default_tier": "premium",  # Without a key one may ask for less than this, not for more.
        "routing": {"policy": policy},
        "observe": {"dashboard": dashboard},
        "logging": {"level": "warning"},
    }
