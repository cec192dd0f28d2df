"""What happened? Facts, in the past tense: all that the kernel ever learns of the world.

Times within facts are seconds on the host's monotonic clock, the same as `now` of `handle`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from paceline.domain.kvevents import BlocksChanged, BlocksUnknown
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport


class Step(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One step of a worker's continuous batch, as its chunks' arrival at the gateway showed it.

    Or several that were alike: then `seconds` is their mean.
    """

    ended_at: float
    """Arrival of the (last) step's first chunk."""
    seconds: float
    """Time since the step before ended; 0 if the worker had no stream to show it."""
    streams: int
    """Streams that got a token, without those that got their first one."""
    tokens: int
    """Tokens of those streams in one step: more than `streams` where chunks hold several."""
    count: int = 1
    """Steps told in one: of the same streams, and none of them gave a first token."""


class RequestArrived(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    request: Request
    waited_s: float = 0.0
    """Since it came in: its prompt was tokenised before."""


class FirstTokenSeen(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    at: float


class StepsSeen(msgspec.Struct, frozen=True, tag=True):
    """Steps of a worker, each told once all its streams have come, or the next has begun."""

    worker_id: str
    steps: Sequence[Step]


class StreamEnded(msgspec.Struct, frozen=True, tag=True):
    """The answer is complete. Counts are the engine's own where it gave them."""

    request_id: str
    output_tokens: int
    itl_s: float = 0.0
    """Mean gap between tokens; 0 with fewer than two."""
    stall_s: float = 0.0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


class Prefilled(msgspec.Struct, frozen=True, tag=True):
    """A worker has prefilled a prompt for another one, and holds it until it is fetched."""

    request_id: str
    worker_id: str
    at: float
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """The engine's own counts, where it gave them."""
    since: float = 0.0
    """Before then it had not ended, so that the lease cannot have begun; 0: nobody looked."""


class DispatchFailed(msgspec.Struct, frozen=True, tag=True):
    """A request met trouble on its worker before its first token."""

    request_id: str
    worker_id: str
    because: str
    timed_out: bool = False
    blame: bool = True
    """The worker's fault (refused, died, 5xx): avoid it for a while. False: it is overloaded."""


class StreamBroke(msgspec.Struct, frozen=True, tag=True):
    """A stream ended in error after its first token."""

    request_id: str
    worker_id: str
    because: str
    produced: int = 0
    """Tokens of the answer so far, those of earlier workers included."""
    resumable: bool = False
    """Can it go on from its last token?"""
    blame: bool = True
    """The worker's fault: avoid it for a while."""


class StreamStopped(msgspec.Struct, frozen=True, tag=True):
    """A request was taken off its worker as was wished, and can go on from its last token."""

    request_id: str
    worker_id: str
    produced: int
    """Tokens of the answer so far; 0: it had not begun."""


class ClientLeft(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class WorkerAdded(msgspec.Struct, frozen=True, tag=True):
    worker: Worker


class WorkerRemoved(msgspec.Struct, frozen=True, tag=True):
    """No new work for this worker; what it has may finish."""

    worker_id: str


class WorkerReported(msgspec.Struct, frozen=True, tag=True):
    worker_id: str
    report: WorkerReport


class PeerLoad(msgspec.Struct, frozen=True, gc=False):
    """What another gateway has in flight on one worker."""

    worker_id: str
    streams: int
    """Requests decoding."""
    arriving: int
    """Requests sent and not yet decoding."""
    context: float
    """Tokens of context of the decoding streams."""
    context_arriving: float
    """What the arriving ones will add to it."""
    ahead: float
    """Prompt tokens not yet prefilled."""
    prefill_rate: float
    """Prompt tokens a second, lately."""


class PeerReported(msgspec.Struct, frozen=True, tag=True):
    """Another gateway told what it has in flight; workers that it doesn't name have nothing."""

    gateway: str
    loads: Sequence[PeerLoad]
    age_s: float = 0.0
    """How old the news was when it came."""


class TimerFired(msgspec.Struct, frozen=True, tag=True):
    """The deadline that `Kernel.next_deadline` named has come."""


Fact = (
    RequestArrived
    | FirstTokenSeen
    | StepsSeen
    | StreamEnded
    | Prefilled
    | DispatchFailed
    | StreamBroke
    | StreamStopped
    | ClientLeft
    | WorkerAdded
    | WorkerRemoved
    | WorkerReported
    | PeerReported
    | BlocksChanged
    | BlocksUnknown
    | TimerFired
)
