"""Which worker has least to prefill and least in its KV cache?"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    Fact,
    FirstTokenSeen,
    Prefilled,
    RequestArrived,
    StepsSeen,
    StreamBroke,
    StreamEnded,
    StreamStopped,
)
from paceline.domain.request import Request
from paceline.policy.fleet import Choice, Fleet, lowest
from paceline.policy.standing import Ask

OVERLAP_WEIGHT = 4.0
"""What a block to prefill counts, in blocks to decode with (`overlap_score_weight`): 1 in the
source, 4 did best of 0.5 to 4 on the scenarios."""
BLOCK_TOKENS = 16
"""Tokens of a block, for people: the choice does not depend on it."""
MOST_REQUESTS = 65_536
"""Requests remembered: those that are shed before a choice never say so."""


class _Prompt(msgspec.Struct, frozen=True):
    """What a request takes of a KV cache."""

    tokens: float
    blocks: tuple[int, ...]
    each: float
    """Tokens of a block."""
    expected: float
    """Tokens of its answer, 1 or more."""

    @classmethod
    def of(cls, ask: Ask, request: Request | None) -> _Prompt:
        if request is None or not request.blocks:
            return cls(ask.prompt_tokens, (), 0.0, max(ask.output_tokens, 1.0))
        each = ask.prompt_tokens * request.block_bytes / max(request.prompt_bytes, 1)
        each = min(each, ask.prompt_tokens / len(request.blocks))
        return cls(ask.prompt_tokens, request.blocks, each, max(ask.output_tokens, 1.0))


class _Active:
    """Prompts in flight on one worker. Who has a block has all before it: they are hash chains."""

    def __init__(self) -> None:
        self.prompts: dict[str, _Prompt] = {}
        self._owners: dict[int, tuple[int, float]] = {}
        """Block → how many prompts have it, and its tokens."""
        self._tokens = 0.0

    def load(self) -> float:
        """Tokens in use."""
        return self._tokens

    def added_by(self, prompt: _Prompt) -> float:
        """Tokens of a prompt that no active one has."""
        if not prompt.blocks:
            return prompt.tokens
        known = bisect_left(prompt.blocks, True, key=lambda block: block not in self._owners)
        return prompt.tokens - known * prompt.each

    def add(self, request_id: str, prompt: _Prompt) -> None:
        self.prompts[request_id] = prompt
        self._tokens += self.added_by(prompt)
        for block in prompt.blocks:
            owners, tokens = self._owners.get(block, (0, prompt.each))
            self._owners[block] = owners + 1, tokens

    def remove(self, request_id: str) -> None:
        prompt = self.prompts.pop(request_id)
        self._tokens -= prompt.tokens - len(prompt.blocks) * prompt.each
        for block in prompt.blocks:
            owners, tokens = self._owners.pop(block)
            if owners > 1:
                self._owners[block] = owners - 1, tokens
            else:
                self._tokens -= tokens

    def alone(self, prompt: _Prompt) -> float:
        """Tokens of an active prompt that it shares with no other."""
        if not prompt.blocks:
            return prompt.tokens
        shared = bisect_left(prompt.blocks, True, key=lambda block: self._owners[block][0] == 1)
        return prompt.tokens - shared * prompt.each

    def began(self, request_id: str) -> None:
        """Its first token came."""

    def grew(self, tokens_each: float) -> None:
        """Every stream got so many tokens."""


class _Growing(_Active):
    """And their answers."""

    def __init__(self) -> None:
        super().__init__()
        self._grown = 0.0
        """Tokens that a stream would have got that has been here from the start."""
        self._begun: dict[str, float] = {}
        """Streams, and `_grown` at their first token."""
        self._streams: NDArray[np.float64] | None = None
        """A column each: tokens that it has alone, `_begun`, expected tokens."""

    def load(self) -> float:
        if self._streams is None:
            begun_at, alone_of = self._begun, self.alone
            rows = [
                (alone_of(prompt), begun_at[request_id], prompt.expected)
                for request_id, prompt in self.prompts.items()
                if request_id in begun_at
            ]
            self._streams = np.array(rows).reshape(-1, 3).T
        alone, begun, expected = self._streams
        produced = self._grown - begun
        to_come = np.maximum(1.0 - produced / expected, 0.0)
        return self._tokens + float(((alone + produced) * to_come - alone).sum())

    def add(self, request_id: str, prompt: _Prompt) -> None:
        super().add(request_id, prompt)
        self._streams = None

    def remove(self, request_id: str) -> None:
        super().remove(request_id)
        self._begun.pop(request_id, None)
        self._streams = None

    def began(self, request_id: str) -> None:
        self._begun[request_id] = self._grown
        self._streams = None

    def grew(self, tokens_each: float) -> None:
        self._grown += tokens_each


class KvCost:
    """The one with the lowest `weight × prefill blocks + decode blocks` once it has the request.

    Prefill blocks: uncached tokens ahead and its own. Decode blocks: prompts of the requests in
    flight and its own, where a block that several of them share counts once. Temperature 0. Blocks
    count in tokens, without rounding.

    Source: NVIDIA Dynamo's KV router, https://docs.nvidia.com/dynamo/user-guides/kv-cache-aware-routing
    """

    _books: ClassVar[type[_Active]] = _Active

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}
        """Those that are not over, for the blocks of their prompts."""
        self._active: dict[str, _Active] = {}
        """By worker that has any."""
        self._where: dict[str, str] = {}
        """Worker of each request."""

    def __call__(self, fleet: Fleet, ask: Ask, places: Sequence[int]) -> Choice:
        self._leave(ask.request_id)  # asked again, the last word counts
        prompt = _Prompt.of(ask, self._requests.get(ask.request_id))
        prefill, decode = [], []
        for i in places:
            active = self._active.get(fleet.ids[i]) or self._books()
            own = ask.prompt_tokens - ask.cached.get(i, 0.0)
            prefill.append((fleet.standing(i, ask.now).ahead + own) / BLOCK_TOKENS)
            decode.append((active.load() + active.added_by(prompt)) / BLOCK_TOKENS)
        costs = [OVERLAP_WEIGHT * p + d for p, d in zip(prefill, decode, strict=True)]
        i = lowest(places, costs, ask.seed)
        self._active.setdefault(fleet.ids[i], self._books()).add(ask.request_id, prompt)
        self._where[ask.request_id] = fleet.ids[i]
        k = places.index(i)
        return Choice(i, f"least blocks: {prefill[k]:.0f} to prefill, {decode[k]:.0f} to decode")

    def learn(self, fact: Fact, now: float) -> None:
        """Keep the books of what is active where."""
        match fact:
            case StepsSeen() if fact.worker_id in self._active:
                active = self._active[fact.worker_id]
                for step in fact.steps:
                    active.grew(step.count * step.tokens / max(step.streams, 1))
            case RequestArrived():
                if len(self._requests) >= MOST_REQUESTS:
                    del self._requests[next(iter(self._requests))]
                self._requests[fact.request.id] = fact.request
            case FirstTokenSeen() if fact.request_id in self._where:
                self._active[self._where[fact.request_id]].began(fact.request_id)
            case Prefilled() | DispatchFailed() | StreamStopped() | StreamBroke():
                self._leave(fact.request_id)
            case StreamEnded() | ClientLeft():
                self._leave(fact.request_id)
                self._requests.pop(fact.request_id, None)

    def _leave(self, request_id: str) -> None:
        worker = self._where.pop(request_id, None)
        if worker is not None:
            self._active[worker].remove(request_id)
            if not self._active[worker].prompts:
                del self._active[worker]


class KvCostOutput(KvCost):
    """As `kv-cost`, with the blocks of the answer as it grows; all blocks that a stream has for
    itself count by the share of its expected answer that is still to come.

    The expected length is the one learned here, where Dynamo asks the client for it.

    Source: NVIDIA Dynamo's KV router with `--router-track-output-blocks`,
    https://docs.nvidia.com/dynamo/user-guides/kv-cache-aware-routing
    """

    _books = _Growing
