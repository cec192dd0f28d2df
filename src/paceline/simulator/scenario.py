"""Which fleet, which requests, which promises, which troubles? A scenario, read from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from paceline.domain.promise import Promise

Seconds = Annotated[float, Meta(ge=0, description="seconds as a number")]
Share = Annotated[float, Meta(ge=0, le=1, description="a share")]
Positive = Annotated[float, Meta(gt=0, description="a number")]
Factor = Annotated[float, Meta(ge=0, description="a number")]
Mean = Annotated[float, Meta(ge=1, description="a number")]
Count = Annotated[int, Meta(ge=1, description="a whole number")]
Tokens = Annotated[int, Meta(ge=0, description="a whole number")]
Room = Annotated[int, Meta(ge=1024, description="a whole number")]


class Workers(msgspec.Struct, frozen=True, kw_only=True):
    """Some engine replicas that are alike. They are called `name` with a number: w0, w1, ..."""

    profile: str
    """One of the engine profiles, such as h100-llama-8b."""
    count: Count = 1
    """How many of them."""
    name: str = "w"
    """What they are called, before their number."""
    model: str = "m"
    """The model's name, as requests have it."""
    node: str = ""
    """The machine that they run on: engines of one machine hand over fast. Empty: each has one."""
    role: Literal["both", "prefill", "decode"] = "both"
    """What they may do: prefill prompts for others, answer (decode), or both."""
    transfer: Literal["", "nixl", "mooncake", "trtllm"] = ""
    """How KV cache is handed over; empty: not at all if both, else nixl."""
    lease_s: Positive = 20.0
    """How long the gateway takes a prompt prefilled for others to be kept. Engines keep it 30 s."""
    cost_per_hour: Positive = 1.0
    """Of one replica, in any currency."""
    speed: Positive = 1.0
    """How many times as fast as its profile it works."""
    kv_tokens: Room | None = None
    """Tokens of context that its KV cache holds; none: as many as the profile says."""
    added_s: Seconds = 0.0
    """When it is started."""
    start_up_s: Seconds = 0.0
    """From its start until it is ready; also after a crash."""

    @property
    def hands_over(self) -> str:
        """`transfer`, with its default."""
        return self.transfer or ("nixl" if self.role != "both" else "")

    @property
    def names(self) -> tuple[str, ...]:
        """One for each replica."""
        return tuple(f"{self.name}{i}" for i in range(self.count))


class SimTier(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A promise, and what it is worth."""

    ttft_s: Positive = inf
    """Time to the first token."""
    itl_s: Positive = inf
    """Mean gap between two tokens of an answer."""
    stall_s: Positive = inf
    """The worst gap."""
    weight: Positive = 1.0
    """What keeping it is worth, against the other tiers."""
    overload: Literal["queue", "shed", "degrade"] = "queue"
    """When the promise cannot be kept: queue (late is better than never), shed (turn away) or
    degrade. Whatever becomes of a request, it is measured by what its own tier promises."""
    degrade_to: str = ""
    """The tier or the model that a request gets instead, if degraded."""
    preemptible: bool = False
    """Whether its answers may be paused for tiers of more weight."""
    deadline_s: Positive = inf
    """Time to the whole answer."""

    @property
    def promise(self) -> Promise:
        return Promise(self.ttft_s, self.itl_s, self.stall_s)

    @property
    def rank(self) -> tuple[float, float, float, float]:
        """The greater, the sooner it is served: by weight, then by how much is promised."""
        return self.weight, -self.ttft_s, -self.itl_s, -self.stall_s


class Pattern(msgspec.Struct, frozen=True, kw_only=True):
    """How a rate changes over time. Without any: it does not."""

    diurnal_period_s: Seconds = 0.0
    """A sine of this period, which starts at its mean and rises; 0: none."""
    diurnal_swing: Share = 0.5
    """How far the sine goes from the mean, as a share of it."""
    steps: tuple[tuple[Seconds, Factor], ...] = ()
    """[second, factor]: from there on the rate is so many times the mean one."""


class Requests(msgspec.Struct, frozen=True, kw_only=True):
    """One stream of requests; a scenario merges all of its streams."""

    kind: Literal["independent", "chat", "documents", "agents", "batch", "trace"] = "independent"
    """independent requests; chat with growing prefixes; long documents; loops of agents that share
    prefixes; batch jobs, each of which comes at once; or a trace file."""
    rate: Positive | None = None
    """Requests a second on average; a trace keeps its own if there is none."""
    cv: Positive = 1.0
    """Coefficient of variation of the gaps (Gamma); 1: Poisson. Of conversations, loops and jobs it
    is that of their starts, and so is the pattern. Not of traces."""
    pattern: Pattern = Pattern()
    tier: str = ""
    """Empty: as the trace has it, or the first tier of the scenario."""
    tenant: str = ""
    """Who asks; lengths of answers are learned for each."""
    model: str = ""
    """Empty: as the trace has it, or the model of the first workers."""
    from_s: Seconds = 0.0
    """When it starts; a trace from its beginning."""
    until_s: Positive = inf
    """When it ends."""
    prompt: tuple[Count, Count] | None = None
    """Median and 99th percentile of the prompt tokens (log-normal); none: as is usual of the kind.
    For chat and agents: of what each turn adds."""
    output: tuple[Count, Count] | None = None
    """The same of the output tokens."""
    max_tokens: Count | None = None
    """What clients tell with every request: answers are cut to it, and the gateway may reckon with
    it. None: they tell nothing."""
    turns: Mean | None = None
    """Mean turns of a conversation, calls of an agent, or requests of a batch job; without it there
    is one batch job, at `from_s`, with all that `rate` gives until the end."""
    think_s: Positive | None = None
    """Mean time between two turns, answer included."""
    shared: Tokens | None = None
    """Tokens of prefix (system prompt, tools), before each prompt, that the requests share; for
    chat and agents those of each of the `families`."""
    families: Count | None = None
    """Chats or agents of how many kinds, each with a prefix of its own."""
    resumable: Share = 1.0
    """Share of the answers that can go on elsewhere, once begun; the others end with their worker,
    as those with logprobs or of several choices do."""
    file: str = ""
    """Of a trace: its path, in the file relative to the scenario."""
    most_prompt: Count | None = None
    """Prompts of a trace are cut to this."""


class Gateways(msgspec.Struct, frozen=True, kw_only=True):
    """Gateway replicas, among which requests are spread by chance."""

    count: Count = 1
    every_s: Positive = 0.25
    """How often each tells the others what it has in flight."""
    delay_s: Seconds = 0.01
    """How old such news is when it comes."""
    loss: Share = 0.0
    """Share of the news that never comes."""


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """Between gateways and workers."""

    latency_s: Seconds = 0.001
    """One way."""
    bytes_per_s: Positive = inf
    """Of each worker's link, shared fairly among what is on its way there; infinite: no limit."""
    kv_latency_s: Seconds = 0.002
    """What handing over a prompt's KV cache takes besides its bytes."""
    kv_bytes_per_s: Positive = 50e9
    """Of each machine's link for KV cache, each way, shared fairly; within a machine it is faster.
    50e9 is a 400 Gbit/s network."""
    jitter_s: Seconds = 0.0
    """How late gateways notice that a step has ended, on average (exponential), as busy ones do.
    What comes next is never noticed before."""
    probe_s: Positive = 2.0
    """How often a worker is asked how it is."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Trouble. With `every_s` it comes again and again."""

    kind: Literal["slow", "hang", "crash", "partition", "link"]
    """slow: steps take `factor` times as long. hang: steps stop, then go on. crash: all that is
    there is lost, and the worker starts anew after `for_s` and its start-up time. partition:
    gateways and worker don't hear of each other. link: KV cache to and from the worker's machine
    takes `factor` times as long."""
    worker: str
    """Its name: w0. Or * for all of them."""
    at_s: Seconds
    """When it begins."""
    for_s: Positive = inf
    """How long it lasts."""
    factor: Positive = 3.0
    """How many times longer steps take, if slow, or transfers, if link."""
    every_s: Seconds = 0.0
    """0: only once."""
    gateway: str = "*"
    """Of a partition: g0, g1, ... or * for all."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run needs but policy and seed."""

    name: str = ""
    """What reports call it; none: as the file."""
    about: str
    """One sentence: what does it test?"""
    seconds: Positive
    """In which requests arrive; it goes on until they are answered."""
    warmup_s: Seconds = 0.0
    """Requests that arrive before are served but not counted."""
    drain_s: Seconds = 120.0
    """How long after the last arrival until what is not answered counts as a miss."""
    workers: tuple[Workers, ...]
    """The fleet."""
    tiers: Mapping[str, SimTier]
    """The promises, by name."""
    requests: tuple[Requests, ...]
    """What comes, all at the same time."""
    load: Positive = 1.0
    """All rates times this; a trace without a rate goes so much faster."""
    gateways: Gateways = Gateways()
    """One, unless said."""
    network: Network = Network()
    """Quick and quiet, unless said."""
    faults: tuple[Fault, ...] = ()
    """What goes wrong."""
    first_token_timeout_s: Positive = 600.0
    """Patience with a worker until a first token, as `timeouts.first_token_s` of a gateway."""
    stall_timeout_s: Positive = 60.0
    """And between two tokens, as `timeouts.stall_s`."""
    margin: Annotated[float, Meta(ge=0, lt=1, description="a share")] = 0.0
    """Share of a promise that headroom keeps free for what cannot be foreseen."""
    engine_priority: bool = False
    """Whether engines serve tiers in the order of their weight too, as vLLM does with
    --scheduling-policy priority; else first come, first served."""

    @property
    def urgency(self) -> dict[str, int]:
        """0 for the tier that is served first, 1 for the next, and so on."""
        ranked = sorted(self.tiers, key=lambda name: self.tiers[name].rank, reverse=True)
        return {name: place for place, name in enumerate(ranked)}

    @property
    def model(self) -> str:
        """Which model is meant where none is named."""
        return self.workers[0].model

    @property
    def tier(self) -> str:
        """Which tier is meant where none is named."""
        return next(iter(self.tiers))
