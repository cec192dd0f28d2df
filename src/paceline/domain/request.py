"""What is one generation, and through which states does it go?"""

from __future__ import annotations

from enum import Enum
from math import inf

import msgspec
from msgspec.structs import replace

from paceline.domain.kvevents import PromptTokens, TokenBlocks
from paceline.domain.promise import Promise

BLOCK_BYTES = 256
"""Bytes of prompt text in one block of `Request.blocks`, about 64 tokens of English."""


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """One generation, reduced to what decisions need; its text stays at the gateway."""

    id: str
    model: str
    tenant: str
    tier: str
    promise: Promise
    weight: float = 1.0
    prompt_bytes: int = 0
    """Length of the prompt's JSON text; the kernel learns the tokens in it."""
    prompt_tokens: int | None = None
    """Exact count, where the client sent token ids, or the prompt was tokenised."""
    max_tokens: int | None = None
    blocks: tuple[int, ...] = ()
    """Hash chain over the prompt in `block_bytes` each: block i names all text up to its end."""
    token_blocks: tuple[TokenBlocks, ...] = ()
    """The same in the engines' own blocks, for each size of them: only where the tokens are known
    and engines tell what they have cached."""
    streaming: bool = True
    seed: int = 0
    """Breaks ties; drawn by the host so that the kernel stays without chance."""
    block_bytes: int = BLOCK_BYTES
    overload: str = "queue"
    """When the promise can no longer be kept: queue, shed or degrade."""
    preemptible: bool = False
    """It may be paused for tiers of more weight."""
    resumable: bool = False
    """Once begun, it can go on elsewhere from its last token."""
    shareable: bool = True
    """One worker may prefill its prompt, and another one answer it."""
    deadline_s: float = inf
    """From arrival to the end of the answer."""
    instead: Request | None = None
    """What it becomes if its promise cannot be kept and `overload` is degrade."""
    batch: str = ""
    """What its client calls the work that it is a part of; empty: it is of none."""

    def with_tokens(self, found: PromptTokens) -> Request:
        """Now that its prompt is tokenised; another model than its own would see other tokens."""
        instead = self.instead
        if instead is not None and instead.model == self.model:
            instead = instead.with_tokens(found)
        return replace(self, prompt_tokens=found.count, token_blocks=found.blocks, instead=instead)


class State(Enum):
    """Where a request stands."""

    QUEUED = "queued"
    HANDED = "handed"
    """A worker prefills its prompt, for another one to write the answer."""
    PREFILLING = "prefilling"
    """Sent to a worker; no token yet."""
    DECODING = "decoding"
    DONE = "done"
    """Answered whole."""
    FAILED = "failed"
    """Ended with an error, before or within its answer."""
    SHED = "shed"
    """Turned away on purpose."""
    LEFT = "left"
    """The client went away."""


class Event(Enum):
    """What moves a request from one state to the next."""

    PREFILL = "prefill"
    """Its prompt was sent to a worker that prefills it for another one."""
    PREFILLED = "prefilled"
    """That is done: it can be sent to the other one."""
    DISPATCHED = "dispatched"
    FIRST_TOKEN = "first token"  # noqa: S105
    ENDED = "ended"
    DISPATCH_FAILED = "dispatch failed"
    BROKE = "broke"
    GAVE_UP = "gave up"
    SHED = "shed"
    CLIENT_LEFT = "client left"
    STOPPED = "stopped"
    """Taken off its worker, or lost by it, to go on elsewhere."""


LIFECYCLE: dict[State, dict[Event, State]] = {
    State.QUEUED: {
        Event.DISPATCHED: State.PREFILLING,
        Event.PREFILL: State.HANDED,
        Event.GAVE_UP: State.FAILED,
        Event.SHED: State.SHED,
        Event.CLIENT_LEFT: State.LEFT,
    },
    State.HANDED: {
        Event.PREFILLED: State.QUEUED,
        Event.DISPATCHED: State.PREFILLING,
        Event.DISPATCH_FAILED: State.QUEUED,
        Event.STOPPED: State.QUEUED,
        Event.CLIENT_LEFT: State.LEFT,
    },
    State.PREFILLING: {
        Event.FIRST_TOKEN: State.DECODING,
        Event.ENDED: State.DONE,
        Event.DISPATCH_FAILED: State.QUEUED,
        Event.STOPPED: State.QUEUED,
        Event.CLIENT_LEFT: State.LEFT,
    },
    State.DECODING: {
        Event.ENDED: State.DONE,
        Event.BROKE: State.FAILED,
        Event.STOPPED: State.QUEUED,
        Event.CLIENT_LEFT: State.LEFT,
    },
    State.DONE: {},
    State.FAILED: {},
    State.SHED: {},
    State.LEFT: {},
}
"""Which event leads where. What a state does not name is a late echo and changes nothing."""
