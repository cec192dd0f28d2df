"""Which tokens does the engine compute in its next step?

Continuous batching as in vLLM's V1 scheduler: decodes first, then prompts in chunks up to a budget
of tokens, new requests while there is room, and preemption by recomputation when the KV cache is
full. One thing is simpler: a request takes the blocks of its whole prompt when it is admitted, not
chunk by chunk.

All decoding streams advance by one token with each step, so nothing is done for a stream but at the
steps where it needs a block or ends: a step costs O(events), some sixteenth of O(streams).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from heapq import heappop, heappush
from itertools import chain
from operator import attrgetter

import msgspec

from paceline.enginemodel.blocks import BlockPool
from paceline.enginemodel.profile import Chance, Load, Profile


class Generation(msgspec.Struct, frozen=True):
    """What the engine shall compute, decided in advance."""

    id: str
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int] = ()
    """Hash chain over the prompt, one for each full block of the profile's size. May go on past the
    prompt, where the caller knows the answer: then a next turn finds that too."""
    priority: int = 0
    """Lower runs earlier, if the engine schedules by priority."""


class Counters(msgspec.Struct):
    """What only grows, as engines report it."""

    prompt_tokens: int = 0
    """Prompt tokens of admitted requests, cached ones included."""
    generated_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0


class _Running:
    """A generation's place in the engine. Counts are as of `joined` while it decodes."""

    __slots__ = (
        "arrival",
        "computed",
        "ends",
        "generation",
        "grows",
        "id",
        "joined",
        "looked_at",
        "named",
        "order",
        "produced",
        "unnamed",
    )

    def __init__(self, generation: Generation, order: tuple[int, int]) -> None:
        self.generation = generation
        self.id = generation.id
        self.order = order
        """The least is served first, the greatest preempted first."""
        self.produced = 0
        self.computed = 0
        """Tokens in the KV cache."""
        self.named: list[int] = []
        self.unnamed = 0
        self.looked_at = 0
        """Full blocks for which a name was considered."""
        self.joined = self.ends = self.grows = 0
        """Steps: the one before the first decode, the last one, the next that needs a block."""


class StepPlan(msgspec.Struct, frozen=True, gc=False):
    """A step to be run now."""

    load: Load
    seconds: float
    admitted: dict[str, int]
    """Requests that left the queue, with their prompt tokens found in the cache."""
    chunks: Sequence[tuple[_Running, int]]
    """Prompts with the tokens of them that are computed."""


class StepOutcome(msgspec.Struct, frozen=True, gc=False):
    """What a step gave: one token for each id in `finished` and in `Scheduler.decoding`."""

    first: Sequence[str]
    """Requests whose first token it was; they may be finished with it."""
    finished: Sequence[str]


_by_order = attrgetter("order")


class Scheduler:
    """One engine. `plan` a step, let its seconds pass, `complete` it; `add`, `abort` any time."""

    def __init__(
        self, profile: Profile, *, by_priority: bool = False, rng: Chance | None = None
    ) -> None:
        if profile.max_num_batched_tokens < profile.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        self.profile = profile
        self.pool = BlockPool(profile.kv_tokens // profile.block_size)
        self.context_limit = min(profile.max_model_len, self.pool.blocks * profile.block_size)
        """Tokens of prompt and answer that one request may have."""
        self.slowdown = 1.0
        """How many times longer than by its profile a step takes: throttling, a bad neighbour."""
        self.counters = Counters()
        self._by_priority = by_priority
        self._rng = rng
        self._arrivals = 0
        self._requests: dict[str, _Running] = {}
        self._queue: list[tuple[tuple[int, int], _Running]] = []
        """A heap; aborted requests stay in it until they come up."""
        self._prefilling: dict[str, _Running] = {}
        self._decoding: dict[str, _Running] = {}
        self._context = 0
        """Tokens of the decoding streams."""
        self._head_waits_for_room = False
        """The head of the queue did not fit, and nothing was given back since."""
        self._growths: defaultdict[int, list[_Running]] = defaultdict(list)
        self._endings: defaultdict[int, list[_Running]] = defaultdict(list)

    @property
    def running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        return len(self._requests) - self.running

    @property
    def kv_used(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        return self.pool.used / self.pool.blocks

    @property
    def decoding(self) -> Collection[str]:
        """Requests that get a token with each step, live."""
        return self._decoding.keys()

    def add(self, generation: Generation) -> None:
        """Queue a request. ValueError if it could never be finished."""
        tokens = generation.prompt_tokens + generation.output_tokens
        if generation.prompt_tokens < 1 or generation.output_tokens < 1:
            raise ValueError(f"{generation.id}: needs a prompt and an answer of one token at least")
        if tokens > self.context_limit:
            raise ValueError(f"{generation.id}: {tokens} tokens, {self.context_limit} fit")
        if generation.id in self._requests:
            raise ValueError(f"{generation.id}: is here already")
        self._arrivals += 1
        priority = generation.priority if self._by_priority else 0
        request = _Running(generation, (priority, self._arrivals))
        self._requests[request.id] = request
        self._enqueue(request)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks at once. False if it is not here."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._leave(request)
        return True

    def plan(self) -> StepPlan | None:
        """The next step; None if there is nothing to do. Complete it before planning another."""
        preempted = self._grow(self.counters.steps + 1)
        budget = self.profile.max_num_batched_tokens - len(self._decoding)
        chunks: list[tuple[_Running, int]] = []
        for request in self._prefilling.values():
            if budget <= 0:
                break
            budget -= self._chunk(request, budget, chunks)
        admitted: dict[str, int] = {}
        while budget > 0 and not preempted:
            fresh = self._admit()
            if fresh is None:
                break
            if fresh.produced == 0:
                admitted[fresh.id] = fresh.computed
            budget -= self._chunk(fresh, budget, chunks)
        if not chunks and not self._decoding:
            return None
        load = Load(
            streams=len(self._decoding),
            prefill=sum(tokens for _, tokens in chunks),
            context=self._context,
            attention=sum(p * (request.computed + p / 2) for request, p in chunks),
        )
        seconds = self.profile.step_seconds(load, self._rng) * self.slowdown
        return StepPlan(load, seconds, admitted, chunks)

    def complete(self, plan: StepPlan) -> StepOutcome:
        """The planned step has been run."""
        self.counters.steps += 1
        step = self.counters.steps
        self._context += len(self._decoding)
        self.counters.generated_tokens += len(self._decoding)
        finished, first = [], []
        for request in self._endings.pop(step, ()):
            self._finish(request)
            finished.append(request.id)
        for request, tokens in plan.chunks:
            if self._prefilling.get(request.id) is not request:
                continue  # aborted while the step ran
            request.computed += tokens
            self._name_full_blocks(request)
            if request.computed < request.generation.prompt_tokens + request.produced:
                continue
            self.counters.generated_tokens += 1
            if request.produced == 0:
                first.append(request.id)
            request.produced += 1
            if request.produced == request.generation.output_tokens:
                self._finish(request)
                finished.append(request.id)
            else:
                self._join(request, step)
        return StepOutcome(first, finished)

    # Where a request stands.

    def _enqueue(self, request: _Running) -> None:
        if not self._queue or request.order < self._queue[0][0]:
            self._head_waits_for_room = False
        heappush(self._queue, (request.order, request))

    def _admit(self) -> _Running | None:
        """Move the head of the queue into the batch, if there is one and it fits."""
        queue, pool = self._queue, self.pool
        while queue and self._requests.get(queue[0][1].id) is not queue[0][1]:
            heappop(queue)
            self._head_waits_for_room = False
        if (
            not queue
            or self._head_waits_for_room
            or len(self._prefilling) + len(self._decoding) >= self.profile.max_num_seqs
        ):
            return None
        request = queue[0][1]
        tokens = request.generation.prompt_tokens + request.produced
        size = self.profile.block_size
        # The last token is always computed: from it comes the next.
        names = request.generation.blocks[: (tokens - 1) // size]
        hits = names[: pool.known(names)]
        fresh = -(-tokens // size) - len(hits)
        if fresh + pool.idle(hits) > pool.free:
            self._head_waits_for_room = True
            return None
        heappop(queue)
        pool.hold(hits)
        pool.take(fresh)
        request.named, request.unnamed, request.looked_at = list(hits), fresh, len(hits)
        request.computed = len(hits) * size
        self._prefilling[request.id] = request
        if request.produced == 0:
            self.counters.prompt_tokens += tokens
            self.counters.prefix_queried_tokens += tokens
            self.counters.prefix_hit_tokens += request.computed
        return request

    def _chunk(self, request: _Running, budget: int, chunks: list[tuple[_Running, int]]) -> int:
        left = request.generation.prompt_tokens + request.produced - request.computed
        tokens = min(left, budget)
        chunks.append((request, tokens))
        return tokens

    def _join(self, request: _Running, step: int) -> None:
        """The prompt is computed: decode from the next step on."""
        del self._prefilling[request.id]
        self._decoding[request.id] = request
        self._context += request.generation.prompt_tokens + request.produced
        request.joined = step
        request.ends = step + request.generation.output_tokens - request.produced
        self._endings[request.ends].append(request)
        request.grows = step + 1 + -request.computed % self.profile.block_size
        self._growths[request.grows].append(request)

    def _grow(self, step: int) -> bool:
        """Give a block to each stream that needs one in this step; True if others had to go."""
        preempted = False
        for request in sorted(self._growths.pop(step, ()), key=_by_order):
            while request.id in self._decoding and self.pool.free == 0:
                everyone = chain(self._decoding.values(), self._prefilling.values())
                self._preempt(max(everyone, key=_by_order))
                preempted = True
            if request.id in self._decoding:
                self.pool.take(1)
                request.unnamed += 1
                request.grows = step + self.profile.block_size
                self._growths[request.grows].append(request)
        return preempted

    def _preempt(self, request: _Running) -> None:
        """Take its blocks; it is queued again and computes prompt and answer anew."""
        self.counters.preemptions += 1
        self._leave(request)
        self._enqueue(request)

    def _finish(self, request: _Running) -> None:
        del self._requests[request.id]
        self._leave(request)

    def _leave(self, request: _Running) -> None:
        """Out of the batch, if it is in it; its blocks are free, and cached where named."""
        if self._decoding.pop(request.id, None) is not None:
            steps = self.counters.steps - request.joined
            request.produced += steps
            request.computed += steps
            self._context -= request.generation.prompt_tokens + request.produced
            _discard(self._growths, request.grows, request)
            _discard(self._endings, request.ends, request)
        elif self._prefilling.pop(request.id, None) is None:
            return
        self._name_full_blocks(request)
        self.pool.drop(request.named, request.unnamed)
        request.named, request.unnamed, request.looked_at, request.computed = [], 0, 0, 0
        self._head_waits_for_room = False

    def _name_full_blocks(self, request: _Running) -> None:
        full = request.computed // self.profile.block_size
        for name in request.generation.blocks[request.looked_at : full]:
            if self.pool.name(name):
                request.named.append(name)
                request.unnamed -= 1
        request.looked_at = max(request.looked_at, full)


def _discard(due: dict[int, list[_Running]], step: int, request: _Running) -> None:
    """Take a request off the list of a step, if the list is still to come."""
    waiting = due.get(step, [])
    if request in waiting:
        waiting.remove(request)
