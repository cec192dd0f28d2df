"""What does the admin API say? Its answers, as far as they are shown.

Whatever a gateway leaves out has a default: an older or newer one is shown as well as can be.
"""

from __future__ import annotations

import msgspec


class Report(msgspec.Struct, frozen=True):
    """What an engine says of itself."""

    healthy: bool = False
    because: str = ""
    running: float | None = None
    waiting: float | None = None
    kv_used: float | None = None
    preemptions_total: float | None = None


class InFlight(msgspec.Struct, frozen=True):
    streams: int = 0
    arriving: int = 0
    uncached_tokens_ahead: float = 0
    context_tokens: float = 0


class Timing(msgspec.Struct, frozen=True):
    """What was learned of a worker's steps, in seconds and tokens a second."""

    slowdown: float = 1.0
    samples: int = 0
    step_s: float = 0.0
    prefill_budget: int = 0
    prefill_tokens_per_s: float = 0.0


class Room(msgspec.Struct, frozen=True):
    """How a worker stands just now."""

    headroom: float = 1.0
    least: str = ""
    """What has the least room: ttft, itl or kv."""
    ttft_s: float | None = None
    itl_s: float = 0.0
    slowdown: float = 1.0
    kv_used: float | None = None


class Slower(msgspec.Struct, frozen=True):
    """Times as long as they should that a worker's last steps took."""

    than_itself: float = 1.0
    than_like: float = 1.0
    seen_ago_s: float = 0.0
    found: bool = False
    """It is called slow in the findings."""


class Accuracy(msgspec.Struct, frozen=True):
    count: int = 0
    error: float = 0.0
    bias: float = 0.0


class Worker(msgspec.Struct, frozen=True):
    id: str
    model: str = ""
    url: str = ""
    kind: str = ""
    role: str = "both"
    node: str = ""
    cost_per_hour: float = 0.0
    usable: bool = False
    draining: bool = False
    ejected_for_s: float = 0.0
    report: Report | None = None
    in_flight: InFlight = InFlight()
    timing: Timing = Timing()
    room: Room = Room()
    slower: Slower | None = None
    """None: not known."""
    predictions: dict[str, Accuracy] = {}


class Pool(msgspec.Struct, frozen=True):
    workers: list[Worker] = []


class Fleet(msgspec.Struct, frozen=True):
    policy: str = ""
    ready: bool = True
    held: dict[str, int] = {}
    models: dict[str, Pool] = {}


class Promise(msgspec.Struct, frozen=True):
    """Seconds; None: nothing is promised."""

    ttft_s: float | None = None
    itl_s: float | None = None
    stall_s: float | None = None


class Tier(msgspec.Struct, frozen=True):
    name: str
    promise: Promise = Promise()
    attain: float = 0.95
    weight: float = 1.0
    overload: str = "queue"
    preemptible: bool = False


class Tiers(msgspec.Struct, frozen=True):
    tiers: list[Tier] = []


class Usage(msgspec.Struct, frozen=True):
    streams: int = 0
    left: dict[str, float] = {}
    """Of each limit a minute: requests, tokens."""
    refused: int = 0


class Tenant(msgspec.Struct, frozen=True):
    name: str
    tier: str = ""
    keys: int = 0
    max_streams: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    usage: Usage = Usage()


class Tenants(msgspec.Struct, frozen=True):
    tenants: list[Tenant] = []


class Predicted(msgspec.Struct, frozen=True):
    ttft_s: float = 0.0
    itl_s: float = 0.0
    headroom: float = 0.0
    cached_tokens: int = 0


class RunnerUp(msgspec.Struct, frozen=True):
    worker_id: str
    costs_more: float
    ttft_s: float
    itl_s: float


class Command(msgspec.Struct, frozen=True):
    type: str = ""
    request_id: str = ""
    because: str = ""
    worker_id: str = ""
    predicted: Predicted | None = None
    attempt: int = 1
    produced: int = 0
    prefilled_at: str = ""
    runner_up: RunnerUp | None = None
    retry_after_s: float | None = None
    tier: str = ""
    model: str = ""


class Decision(msgspec.Struct, frozen=True):
    at: float
    """Unix time."""
    command: Command


class Decisions(msgspec.Struct, frozen=True):
    decisions: list[Decision] = []
    """Newest first."""


class Quantiles(msgspec.Struct, frozen=True):
    p50: float
    p90: float
    p99: float
    count: int = 0


class Engines(msgspec.Struct, frozen=True):
    workers: int = 0
    healthy: int = 0
    running: float | None = None
    waiting: float | None = None
    kv_used: float | None = None
    preemptions: float = 0


class Figures(msgspec.Struct, frozen=True):
    """What became of the requests of a window. Quantiles in seconds."""

    of: dict[str, str] = {}
    requests: int = 0
    requests_per_s: float | None = None
    kept: int = 0
    attainment: float | None = None
    burn: float | None = None
    shed: int = 0
    failed: int = 0
    output_tokens_per_s: float | None = None
    ttft_s: Quantiles | None = None
    itl_s: Quantiles | None = None
    stall_s: Quantiles | None = None
    queued_s: Quantiles | None = None
    gap_s: Quantiles | None = None
    engine: Engines | None = None
    gap_counts: list[int] | None = None


class Summary(msgspec.Struct, frozen=True):
    at: float = 0.0
    window_s: float = 0.0
    covered_s: float = 0.0
    total: Figures = Figures()
    groups: list[Figures] = []


class Slot(msgspec.Struct, frozen=True, rename={"begin": "from"}):
    begin: float
    """Unix time."""
    seconds: float
    total: Figures = Figures()


class History(msgspec.Struct, frozen=True):
    at: float = 0.0
    window_s: float = 600.0
    slot_s: float = 10.0
    gap_bounds_s: list[float] = []
    slots: list[Slot] = []
    """Oldest first; those without anything are left out."""


class Hurt(msgspec.Struct, frozen=True):
    promises_lost: float = 0
    seconds_lost: float = 0.0
    streams: int = 0
    tiers: dict[str, float] = {}
    tenants: dict[str, float] = {}


class Finding(msgspec.Struct, frozen=True):
    kind: str
    says: str
    remedy: str = ""
    since: float = 0.0
    model: str = ""
    worker: str = ""
    node: str = ""
    tenant: str = ""
    evidence: dict[str, float | str | None] = {}
    hurt: Hurt = Hurt()


class Diagnosis(msgspec.Struct, frozen=True):
    at: float = 0.0
    window_s: float = 0.0
    requests: int = 0
    promises_lost: int = 0
    overdue: int = 0
    """Of them: the first token is still awaited."""
    findings: list[Finding] = []
    """Worst first."""
    notes: list[str] = []
    """Where the GPUs' utilisation misleads."""


class Stall(msgspec.Struct, frozen=True):
    at: float
    what: str = "step"
    seconds: float = 0.0
    late_s: float = 0.0
    cause: str = ""
    split: dict[str, float] = {}
    streams: int = 0
    tiers: dict[str, float] = {}
    request_id: str = ""


class Stalls(msgspec.Struct, frozen=True):
    at: float = 0.0
    causes: list[str] = []
    workers: dict[str, list[Stall]] = {}


class Spent(msgspec.Struct, frozen=True):
    cost: float = 0.0
    worker_s: float = 0.0
    output_tokens: int = 0
    kept_tokens: int = 0
    cost_per_million_tokens: float | None = None
    cost_per_million_kept_tokens: float | None = None
    of: dict[str, str] = {}


class Batch(Spent, frozen=True):
    """Requests of one tenant that belong together, since the first of them."""

    done: int = 0
    failed: int = 0
    under_way: int = 0
    waiting: int = 0
    last_seen: float = 0.0
    """Unix time."""


class Batches(msgspec.Struct, frozen=True):
    at: float = 0.0
    groups: list[Batch] = []
    """The one that was seen last at first."""


class Cost(msgspec.Struct, frozen=True):
    covered_s: float = 0.0
    total: Spent = Spent()
    unallocated: Spent = Spent()
    groups: list[Spent] = []
