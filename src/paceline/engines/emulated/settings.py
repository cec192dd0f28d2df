"""Which engine shall be emulated, and how?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml

from paceline.enginemodel import PROFILES, Profile

Positive = Annotated[int, msgspec.Meta(ge=1)]


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One emulated engine. What is None is as in the profile."""

    profile: str = "h100-llama-8b"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """0: any free one."""
    model: str = ""
    """The name that clients ask for; empty: the profile's."""
    max_num_seqs: Positive | None = None
    max_num_batched_tokens: Positive | None = None
    max_model_len: Positive | None = None
    kv_tokens: Positive | None = None
    noise_sigma: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """Deviation of the logarithm of step times."""
    priority_scheduling: bool = False
    seed: int = 0
    speed: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """How many times faster than the profile it runs."""
    mean_answer_tokens: Annotated[float, msgspec.Meta(gt=0)] = 150.0
    """Mean of the exponential from which the length of an answer is drawn."""
    keep_alive_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    """How long an idle connection is kept (vLLM's default)."""

    step_log: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Newest steps that `GET /emulate/steps` tells of: the truth about each token's time."""

    kv_events_endpoint: str = ""
    """Where it publishes what its KV cache holds, such as `tcp://*:5557`; empty: nowhere."""
    kv_events_replay_endpoint: str = ""
    """Where it repeats what was missed of that."""
    kv_events_topic: str = ""
    kv_events_buffer: Positive = 10_000
    """Batches of events that it can repeat."""

    hands_over: bool = True
    """It holds prompts for other engines, and fetches them from others, as with NixlConnector."""
    kv_lease_s: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    """How long a prompt is held (vLLM's default)."""
    kv_tokens_per_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """How fast it fetches a prompt from another engine; None: at once."""
    kv_load_failure_policy: Literal["fail", "recompute"] = "fail"
    """What becomes of a request whose prompt cannot be fetched: HTTP 500, or a prefill."""

    @property
    def model_name(self) -> str:
        return self.model or self.profile

    def resolved(self) -> Profile:
        """The profile with these settings in place. ValueError if it has no such name."""
        if self.profile not in PROFILES:
            raise ValueError(f"unknown profile {self.profile!r}; there are {', '.join(PROFILES)}")
        fields = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_tokens")
        changes = {name: getattr(self, name) for name in (*fields, "noise_sigma")}
        given = {name: value for name, value in changes.items() if value is not None}
        profile = PROFILES[self.profile]
        if "max_num_batched_tokens" in given:
            # A step must have room for a token of each stream; vLLM refuses to start otherwise.
            given.setdefault(
                "max_num_seqs", min(profile.max_num_seqs, given["max_num_batched_tokens"])
            )
        return msgspec.structs.replace(profile, **given)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    engines: list[EngineSettings]


def load_engines(path: Path | str) -> list[EngineSettings]:
    """The engines of a YAML file `engines: [{profile: …, port: …, model: …}, …]`.

    ValueError, with the place in the file, if it does not say what it should.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        engines = msgspec.convert(content, _File).engines
        for engine in engines:
            engine.resolved()
    except (yaml.YAMLError, ValueError) as error:  # msgspec's ValidationError is a ValueError
        raise ValueError(f"{path}: {error}") from error
    if not engines:
        raise ValueError(f"{path}: no engines in it")
    ports = [engine.port for engine in engines if engine.port]
    if twice := sorted({port for port in ports if ports.count(port) > 1}):
        raise ValueError(f"{path}: port {twice[0]} is used twice")
    return engines
