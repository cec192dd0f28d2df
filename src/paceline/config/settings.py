"""What may be set? Every setting with its unit, its range and its default.

Ranges stand in the types, so that the reader can check them and name them in its complaints.
"""

from __future__ import annotations

from math import inf
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, field

from paceline.config.values import (
    Address,
    CollectorUrl,
    Digest,
    EngineUrl,
    ExporterUrl,
    Key,
    Secret,
)
from paceline.domain.gpu import Gpus
from paceline.domain.promise import Promise, Tenant, Tier
from paceline.domain.worker import Worker

Policy = Literal[
    "headroom",
    "random",
    "round-robin",
    "least-requests",
    "power-of-two",
    "priority",
    "least-kv",
    "prefix-affinity",
    "kv-cost",
    "kv-cost-output",
    "peak-ewma",
    "global-latency",
]
Kind = Literal["vllm", "sglang", "trtllm", "llamacpp", "openai"]
Role = Literal["both", "prefill", "decode"]
Transfer = Literal["nixl", "mooncake", "sglang", "trtllm"]
Overload = Literal["queue", "shed", "degrade"]

TRANSFERS: dict[str, tuple[Transfer, ...]] = {
    "vllm": ("nixl", "mooncake"),
    "sglang": ("sglang",),
    "trtllm": ("trtllm",),
}
"""Ways to hand over that kinds of engines have; the usual one first."""
POLICIES: tuple[str, ...] = get_args(Policy)
KINDS: tuple[str, ...] = get_args(Kind)
ROLES: tuple[str, ...] = get_args(Role)

LATER = ("database", "cluster", "planner")
"""Settings of versions to come. They are refused: a setting that does nothing is a lie."""

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Seconds = Annotated[float, Meta(gt=0, le=86_400 * 7, description="seconds as a number")]
Share = Annotated[float, Meta(gt=0, le=1, description="a share")]
Weight = Annotated[float, Meta(gt=0, le=1e6, description="a number")]
Money = Annotated[float, Meta(ge=0, le=1e6, description="an amount of money")]
Megabytes = Annotated[float, Meta(gt=0, le=4096, description="megabytes as a number")]
Kilobytes = Annotated[int, Meta(ge=1, le=1024, description="kilobytes as a whole number")]
Count = Annotated[int, Meta(ge=1, le=10**12, description="a whole number")]
Port = Annotated[int, Meta(ge=1, le=65535, description="a port")]
GpuIndex = Annotated[int, Meta(ge=0, le=1023, description="the number of a GPU")]


class GpuSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Who tells of the GPUs that a worker runs on."""

    url: ExporterUrl
    """A DCGM exporter's; http or https, with or without `/metrics` at the end."""
    indices: tuple[GpuIndex, ...] = ()
    """The worker's own, as the exporter numbers them (`gpu="0"`); left out: all that it has."""

    def told(self) -> Gpus:
        return Gpus(str(self.url), self.indices)


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One engine replica."""

    url: EngineUrl
    """Where it answers; http or https, with or without `/v1` at the end."""
    kind: Kind | None = None
    """Which dialect it speaks: vllm, sglang, trtllm, llamacpp or openai (any other); left out:
    detected."""
    role: Role = "both"
    """Which part of the work it does: both, prefill or decode."""
    node: str = ""
    """The machine that it runs on, for reports."""
    cost_per_hour: Money = 0.0
    """What it costs in any currency, 0 or more an hour."""
    served_model: str | None = None
    """The model's name at the engine, where it differs from the model's name here."""
    api_key: Secret | None = None
    """The key that the engine wants to see as `Authorization: Bearer`."""
    prefill_budget: Count | None = None
    """Tokens that one step of the engine may hold, 1 or more; left out: learned."""
    transfer: Transfer | None = None
    """How its KV cache is handed over to another worker: nixl or mooncake (vLLM), sglang or trtllm.
    With `role` prefill or decode it may follow from `kind`: nixl for vllm, its own for sglang and
    trtllm. With `role` both it must be said, and then the worker may serve as either."""
    lease_s: Seconds = 20.0
    """How long a prompt that was prefilled to be handed over is surely kept, seconds above 0: less
    than after what the engine gives it up (vLLM: 30 seconds). Fetched later, it would be garbage;
    so it is prefilled again."""
    bootstrap_port: Port | None = None
    """Where workers meet for a hand-over by mooncake or sglang. Left out: SGLang is asked for it,
    and vLLM has 8998."""
    gpus: GpuSettings | None = None
    """Who tells of the GPUs that it runs on, as evidence when it is slow; left out: nobody."""

    @property
    def hands_over_by(self) -> Transfer | None:
        """`transfer`, or what follows from the rest."""
        if self.transfer is not None or self.role == "both":
            return self.transfer
        return TRANSFERS.get(self.kind, (None,))[0] if self.kind is not None else None


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One model as clients name it, and who serves it."""

    name: Name
    """The name in requests and in `/v1/models`, at most 256 characters."""
    aliases: tuple[Name, ...] = ()
    """Other names for it in requests."""
    tokenizer: Name | None = None
    """Path of a folder with its tokenizer.json, tokenizer_config.json and chat template, so that
    prompts of text are matched exactly with what engines tell of their KV caches; left out: by a
    guess. Needs `paceline[tokens]`; read at the start."""
    workers: tuple[WorkerSettings, ...] = ()
    """The engines that serve it, at least one."""


class TierSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A promise on token timing, what it is worth, and what to do when it cannot be kept."""

    ttft_s: Seconds | None = None
    """Time to the first token, seconds above 0; left out: nothing is promised."""
    itl_s: Seconds | None = None
    """Mean gap between two tokens, seconds above 0; left out: nothing is promised."""
    stall_s: Seconds | None = None
    """The worst gap between two tokens, seconds above 0; left out: nothing is promised."""
    attain: Share = 0.95
    """Share of requests for which the promise shall be kept, above 0 to 1."""
    weight: Weight = 1.0
    """How much it counts against the others when not all can be served, above 0."""
    overload: Overload = "queue"
    """When the promise cannot be kept: queue (late is better than never), shed (answer 429) or
    degrade (serve by `degrade_to`)."""
    degrade_to: Name | None = None
    """With `overload: degrade`: the name of a lower tier, or of a model to answer instead."""
    preemptible: bool = False
    """Whether its streams may be paused for tiers that promise more."""
    deadline_s: Seconds | None = None
    """Time to the whole answer, seconds above 0; left out: none."""

    def tier(self, name: str) -> Tier:
        return Tier(
            name=name,
            promise=Promise(_or_inf(self.ttft_s), _or_inf(self.itl_s), _or_inf(self.stall_s)),
            attain=self.attain,
            weight=self.weight,
            overload=self.overload,
            preemptible=self.preemptible,
            deadline_s=_or_inf(self.deadline_s),
            degrade_to=self.degrade_to or "",
        )


class TenantSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Who may ask, by which keys, and how much."""

    name: Name
    """For reports and fairness, at most 256 characters."""
    key: Key | None = None
    """The key that the tenant sends; better taken from the environment with `${NAME}`."""
    keys: tuple[Key, ...] = ()
    """Several keys, as when one replaces another."""
    key_sha256: Digest | None = None
    """SHA-256 of the key in 64 hex digits, so that the file needs no secret."""
    keys_sha256: tuple[Digest, ...] = ()
    """Several of them, as when one key replaces another."""
    tier: str | None = None
    """The best tier that it may have; left out: `default_tier`."""
    max_streams: Count | None = None
    """Requests under way at once, 1 or more; left out: any number."""
    tokens_per_minute: Count | None = None
    """Prompt and output tokens a minute, 1 or more; left out: any number."""
    requests_per_minute: Count | None = None
    """Requests a minute, 1 or more; left out: any number."""

    def digests(self) -> tuple[bytes, ...]:
        """All its keys, hashed."""
        single = (digest for digest in (self.key, self.key_sha256) if digest is not None)
        return tuple(digest.sha256 for digest in (*single, *self.keys, *self.keys_sha256))


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker is chosen."""

    policy: Policy = "headroom"
    """headroom keeps promises; the others are there to compare with."""
    margin: Annotated[float, Meta(ge=0, lt=1, description="a share")] = 0.0
    """Share of a promise that headroom keeps free, 0 to below 1. Predictions are corrected by what
    they turned out to be, and reckon with their spread: this is for those who want more."""


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """Encryption towards clients."""

    cert: Name
    """Path of the certificate chain, PEM."""
    key: Name
    """Path of its private key, PEM."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one client may cost the gateway."""

    max_body_mb: Megabytes = 32.0
    """Size of a request's body, above 0 to 4,096 megabytes (2**20 bytes)."""
    max_head_kb: Kilobytes = 64
    """Size of a request's head, 1 to 1,024 kilobytes (2**10 bytes)."""
    max_connections: Annotated[int, Meta(ge=1, le=1_000_000, description="a whole number")] = 20_000
    """Client connections open at once, 1 to 1,000,000."""
    head_timeout_s: Seconds = 10.0
    """Patience with a client that sends its head slowly, seconds above 0."""
    body_timeout_s: Seconds = 60.0
    """Patience with a client that sends its body slowly, seconds above 0."""
    idle_timeout_s: Seconds = 75.0
    """Time that a connection may wait for its next request, seconds above 0."""
    write_timeout_s: Seconds = 60.0
    """Patience with a client that does not read its answer, seconds above 0."""


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Patience with a worker."""

    connect_s: Seconds = 5.0
    """Until the connection stands, seconds above 0."""
    first_token_s: Seconds = 600.0
    """From sending the request to its first token, seconds above 0."""
    stall_s: Seconds = 60.0
    """Between two chunks of a stream, seconds above 0."""


class Retries(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to a request whose worker failed before its first token."""

    attempts: Annotated[int, Meta(ge=1, le=10, description="a whole number")] = 3
    """How often a request is sent before it fails, the first time included, 1 to 10."""


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests wait at the gateway for room on a worker, and for how long."""

    max_waiting: Annotated[int, Meta(ge=0, le=1_000_000, description="a whole number")] = 10_000
    """Requests of one model and tier that may wait, 0 to 1,000,000; more are answered with 429."""
    max_wait_s: Seconds = 600.0
    """How long one may wait, seconds above 0; then it is answered with 429, whatever its tier."""


class Shutdown(msgspec.Struct, frozen=True, kw_only=True):
    """What happens between SIGTERM and the end."""

    notice_s: Annotated[float, Meta(ge=0, le=3600, description="seconds as a number")] = 1.0
    """How long new connections are taken while the gateway says that it is not ready, 0 to 3,600
    seconds: load balancers need to see the one before the other."""
    grace_s: Annotated[float, Meta(ge=0, le=86_400, description="seconds as a number")] = 25.0
    """How long requests may go on, 0 to 86,400 seconds, the notice included; then they end with an
    error. Kubernetes kills after 30 seconds, unless told otherwise."""


class Logging(msgspec.Struct, frozen=True, kw_only=True):
    """What is said on stderr."""

    level: Literal["debug", "info", "warning", "error", "off"] = "info"
    """The least urgent level that is said; each request is one line at info."""
    format: Literal["auto", "json", "pretty"] = "auto"
    """auto: pretty on a terminal, else one JSON object a line."""


class Observe(msgspec.Struct, frozen=True, kw_only=True):
    """What is told of all that goes on."""

    max_tenants: Annotated[int, Meta(ge=1, le=10_000, description="a whole number")] = 100
    """Tenants with metrics of their own, 1 to 10,000; further ones count together as `other`."""
    otlp: CollectorUrl | None = None
    """An OpenTelemetry collector's OTLP/HTTP receiver, as http://127.0.0.1:4318, for traces and
    metrics (`pip install 'paceline[otel]'`); left out: none."""
    sample: Annotated[float, Meta(ge=0, le=1, description="a share")] = 0.01
    """Share of the requests that are traced, 0 to 1; one whose client says whether it is traced
    (`traceparent`) is traced as the client says."""
    facts_mb: Megabytes = 64.0
    """About how large the file of `log_facts` may become, above 0 to 4,096 megabytes; then it
    becomes the first of the older files (`.1`, `.2`, ...), and a new one begins."""
    facts_files: Annotated[int, Meta(ge=2, le=10_000, description="a whole number")] = 8
    """How many files of `log_facts` are kept, the newest included, 2 to 10,000."""
    dashboard: bool = False
    """Whether a dashboard is shown on the admin listener, by a process of its own."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All that may be set. Equal values mean that a reload has nothing to do."""

    listen: Address = Address("127.0.0.1", 8080)
    """Where clients ask, host:port; port 0 takes a free one."""
    admin: Address = Address("127.0.0.1", 8081)
    """Where operators ask (metrics, admin API), host:port; port 0 takes a free one."""
    models: tuple[ModelSettings, ...] = ()
    """The models on offer, at least one."""
    tier_settings: dict[str, TierSettings] = field(default_factory=dict, name="tiers")
    """The promises on offer, by name; left out: one tier, `standard`, that promises nothing."""
    default_tier: str = "standard"
    """The tier of those for whom none is set."""
    tenant_settings: tuple[TenantSettings, ...] = field(default=(), name="tenants")
    """Who may ask by key."""
    anonymous_setting: bool | None = field(default=None, name="anonymous")
    """Whether one may ask without a key; left out: only while no tenants are listed."""
    routing: Routing = Routing()
    """How a worker is chosen."""
    tls: Tls | None = None
    """Encryption towards clients; left out: none."""
    limits: Limits = Limits()
    """What one client may cost the gateway."""
    timeouts: Timeouts = Timeouts()
    """Patience with a worker."""
    retries: Retries = Retries()
    """What happens to a request whose worker failed."""
    queue: Queue = Queue()
    """How many requests wait at the gateway, and for how long."""
    shutdown: Shutdown = Shutdown()
    """What happens between SIGTERM and the end."""
    logging: Logging = Logging()
    """What is said on stderr."""
    observe: Observe = Observe()
    """What is told of all that goes on."""
    log_facts: Name | None = None
    """Path of the log of all facts, from which every decision can be replayed; left out: none.
    `observe.facts_mb` and `observe.facts_files` bound it."""

    @property
    def tiers(self) -> dict[str, Tier]:
        settings = self.tier_settings or {self.default_tier: TierSettings()}
        return {name: tier.tier(name) for name, tier in settings.items()}

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """One value for each key: those of one tenant share its name, tier and quotas."""
        return tuple(
            Tenant(
                name=tenant.name,
                tier=tenant.tier or self.default_tier,
                key_sha256=digest,
                max_streams=tenant.max_streams,
                tokens_per_minute=tenant.tokens_per_minute,
                requests_per_minute=tenant.requests_per_minute,
            )
            for tenant in self.tenant_settings
            for digest in tenant.digests()
        )

    @property
    def anonymous(self) -> bool:
        if self.anonymous_setting is None:
            return not self.tenant_settings
        return self.anonymous_setting

    @property
    def aliases(self) -> dict[str, str]:
        """Every name by which a client may ask for a model, with the model's own name."""
        return {name: model.name for model in self.models for name in (model.name, *model.aliases)}

    @property
    def tokenizers(self) -> dict[str, str]:
        """Folders of tokenizers, by model."""
        return {model.name: model.tokenizer for model in self.models if model.tokenizer}

    def workers(self) -> tuple[Worker, ...]:
        """The engines as the kernel knows them. An empty `kind` is still to be detected."""
        return tuple(
            Worker(
                id=worker.url.name,
                model=model.name,
                url=str(worker.url),
                kind=worker.kind or "",
                role=worker.role,
                node=worker.node,
                cost_per_hour=worker.cost_per_hour,
                serves_as=worker.served_model or "",
                prefill_budget=worker.prefill_budget or 0,
                transfer=worker.hands_over_by or "",
                lease_s=worker.lease_s,
                bootstrap_port=worker.bootstrap_port or 0,
                gpus=worker.gpus.told() if worker.gpus is not None else None,
            )
            for model in self.models
            for worker in model.workers
        )

    def engine_keys(self) -> dict[str, Secret]:
        """The keys that engines want to see, by worker id."""
        return {
            worker.url.name: worker.api_key
            for model in self.models
            for worker in model.workers
            if worker.api_key is not None
        }


def _or_inf(seconds: float | None) -> float:
    return inf if seconds is None else seconds
