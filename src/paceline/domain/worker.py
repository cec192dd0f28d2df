"""What is known of one engine replica?"""

from __future__ import annotations

import msgspec

from paceline.domain.gpu import Gpus


class Worker(msgspec.Struct, frozen=True):
    """One engine replica behind one URL, as configured and detected."""

    id: str
    model: str
    """The model's public name in Paceline."""
    url: str
    kind: str = "openai"
    """vllm, sglang, trtllm, llamacpp, openai (anything that speaks the API)."""
    role: str = "both"
    """both, prefill or decode."""
    node: str = ""
    cost_per_hour: float = 0.0
    serves_as: str = ""
    """The model's name at the engine, where it differs from `model`."""
    prefill_budget: int = 0
    """Tokens that a step may hold (chunked prefill), if told; 0: learn it."""
    transfer: str = ""
    """How its KV cache is handed over: nixl, mooncake, sglang or trtllm; empty: it cannot be.
    Workers of one model with the same one can share a request."""
    lease_s: float = 20.0
    """How long a prompt that was prefilled to be handed over is sure to be kept."""
    bootstrap_port: int = 0
    """Where workers find each other to hand over (mooncake, sglang); 0: as the engine has it."""
    gpus: Gpus | None = None
    """What it runs on, if somebody tells of that."""

    @property
    def name_there(self) -> str:
        """The model's name at the engine."""
        return self.serves_as or self.model

    @property
    def prefills(self) -> bool:
        """May it prefill a prompt for another worker?"""
        return bool(self.transfer) and self.role != "decode"

    @property
    def pairs(self) -> bool:
        """Do both workers begin at once, so that nothing waits between them?"""
        return self.transfer == "sglang"

    @property
    def answers(self) -> bool:
        """May it write answers, whoever has prefilled the prompt?"""
        return self.role != "prefill"

    @property
    def alone(self) -> bool:
        """May it answer what no other worker has prefilled? SGLang's refuse that, once started to
        share requests."""
        return self.answers and self.transfer != "sglang"

    def takes_from(self, other: Worker) -> bool:
        """Can it go on with a prompt that another worker has prefilled?"""
        alike = bool(self.transfer) and self.transfer == other.transfer
        return alike and self.answers and other.prefills and self.id != other.id


class WorkerReport(msgspec.Struct, frozen=True):
    """What an engine says of itself, whatever its dialect. None: it does not say.

    All are gauges of the moment except the `_total` counters, which only grow.
    """

    healthy: bool
    because: str = ""
    """Why it is not healthy, for people."""
    running: int | None = None
    waiting: int | None = None
    kv_used: float | None = None
    """Share of the KV cache in use, 0 to 1."""
    kv_capacity_tokens: int | None = None
    block_size: int | None = None
    preemptions_total: float | None = None
    prefix_queries_total: float | None = None
    prefix_hits_total: float | None = None
    max_model_len: int | None = None
    prefill_budget: int | None = None
    """Tokens that a step may hold, where the engine tells."""
    took_s: float = 0.0
    """How long the engine took to tell, the way there and back included."""
    gaps_total: float | None = None
    """Gaps between tokens so far..."""
    gaps_s_total: float | None = None
    """...and their seconds together, as the engine measures them."""
