"""Which tokens does the engine compute in its next step?

Continuous batching as in vLLM's V1 scheduler: decodes first, then prompts in chunks up to a budget
of tokens, new requests while there is room, and preemption by recomputation when the KV cache is
full. One thing is simpler: a request takes the blocks of its whole prompt when it is admitted, not
chunk by chunk.

All decoding streams advance by one token with each step, so nothing is done for a stream but when
it joins or leaves, and steps of the same streams are alike: they may be planned and run in one go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from heapq import heappop, heappush
from itertools import chain
from operator import attrgetter

import msgspec

from paceline.enginemodel.blocks import BlockPool, Journal
from paceline.enginemodel.generation import Generation, Running
from paceline.enginemodel.plan import StepOutcome, StepPlan
from paceline.enginemodel.profile import Chance, Load, Profile


class Counters(msgspec.Struct):
    """What only grows, as engines report it."""

    prompt_tokens: int = 0
    """Prompt tokens of admitted requests, cached ones included."""
    generated_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    received_tokens: int = 0
    """Prompt tokens from other engines."""
    preemptions: int = 0
    steps: int = 0


_by_order = attrgetter("order")


class Scheduler:
    """One engine. `plan` a step, let its seconds pass, `complete` it; `add`, `abort` any time."""

    def __init__(
        self,
        profile: Profile,
        *,
        by_priority: bool = False,
        rng: Chance | None = None,
        name_tokens: int = 0,
        journal: Journal | None = None,
    ) -> None:
        if profile.max_num_batched_tokens < profile.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        self.profile = profile
        self.name_tokens = name_tokens or profile.block_size
        """Tokens under one name of a generation's `blocks`; a multiple of the block size."""
        self.pool = BlockPool(
            profile.kv_tokens // profile.block_size,
            self.name_tokens // profile.block_size,
            journal,
        )
        self.context_limit = min(profile.max_model_len, self.pool.blocks * profile.block_size)
        """Tokens of prompt and answer that one request may have."""
        self.slowdown = 1.0
        """How many times longer than by its profile a step takes: throttling, a bad neighbour."""
        self.counters = Counters()
        self._by_priority = by_priority
        self._rng = rng
        self._arrivals = 0
        self._requests: dict[str, Running] = {}
        self._queue: list[tuple[tuple[int, int], Running]] = []
        """A heap; aborted requests stay in it until they come up."""
        self._prefilling: dict[str, Running] = {}
        self._decoding: dict[str, Running] = {}
        self._held: dict[str, tuple[Sequence[int], int]] = {}
        """Blocks of prompts that other engines have yet to fetch: named ones, and how many more."""
        self._context = 0
        """Tokens of the decoding streams."""
        self._head_waits_for_room = False
        """The head of the queue did not fit, and nothing was given back since."""
        self._endings: dict[int, list[Running]] = {}
        self._ending_steps: list[int] = []
        """A heap of the keys of `_endings`."""
        self._growths = [0] * profile.block_size
        """Streams that need a block in each step of that number, modulo the size of a block."""
        self._grown = 0
        """The last step for which blocks were given."""

    @property
    def running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        return len(self._requests) - self.running

    @property
    def held(self) -> Collection[str]:
        """Requests that are over, and whose blocks another engine has yet to fetch, live."""
        return self._held.keys()

    @property
    def kv_used(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        return self.pool.used / self.pool.blocks

    @property
    def decoding(self) -> Collection[str]:
        """Requests that get a token with each step, live."""
        return self._decoding.keys()

    @property
    def context(self) -> int:
        """Tokens of the decoding streams."""
        return self._context

    def prompt_left(self) -> int:
        """Tokens to be computed until all that is here decodes."""
        left = 0
        for request in self._prefilling.values():
            left += max(request.generation.prompt_tokens + request.produced - request.computed, 1)
        for _, request in self._queue:
            if self._requests.get(request.id) is request:  # it was not aborted
                done = self.name_tokens * self.pool.known(request.generation.blocks)
                done = max(done, request.received)
                left += max(request.generation.prompt_tokens + request.produced - done, 1)
        return left

    def __contains__(self, request_id: str) -> bool:
        """Is the request here, and not over?"""
        return request_id in self._requests

    def produced(self, request_id: str, ended: int = 0) -> int:
        """Tokens of the answer so far, with so many steps of the plan under way over."""
        request = self._requests[request_id]
        if request_id not in self._decoding:
            return request.produced
        return request.produced + self.counters.steps + ended - request.joined

    def produced_of(self, request_ids: Iterable[str], ended: int = 0) -> list[int | None]:
        """The same of many requests; None of those that are not here."""
        requests, decoding, steps = self._requests, self._decoding, self.counters.steps + ended
        return [
            None
            if (request := requests.get(name)) is None
            else request.produced + (steps - request.joined if name in decoding else 0)
            for name in request_ids
        ]

    def add(self, generation: Generation) -> None:
        """Queue a request. ValueError if it could never be finished."""
        tokens = generation.prompt_tokens + generation.output_tokens
        if generation.prompt_tokens < 1 or generation.output_tokens < 1:
            raise ValueError(f"{generation.id}: needs a prompt and an answer of one token at least")
        if tokens > self.context_limit:
            raise ValueError(f"{generation.id}: {tokens} tokens, {self.context_limit} fit")
        if generation.hold and generation.output_tokens > 1:
            raise ValueError(f"{generation.id}: what is held for others answers with one token")
        if generation.id in self._requests or generation.id in self._held:
            raise ValueError(f"{generation.id}: is here already")
        self._arrivals += 1
        priority = generation.priority if self._by_priority else 0
        request = Running(generation, (priority, self._arrivals))
        self._requests[request.id] = request
        self._enqueue(request)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks at once. False if it is not here."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._leave(request)
        return True

    def release(self, request_id: str) -> bool:
        """Free the blocks that were held for another engine. False if there are none."""
        held = self._held.pop(request_id, None)
        if held is None:
            return False
        self.pool.drop(*held)
        self._head_waits_for_room = False
        return True

    def plan(self, most: int = 1) -> StepPlan | None:
        """The next step, or up to `most` of them as long as they are alike; None: nothing to do.

        Complete it before planning another.
        """
        preempted = self._grow(self.counters.steps + 1)
        streams = len(self._decoding)
        budget = self.profile.max_num_batched_tokens - streams
        chunks: list[tuple[Running, int]] = []
        for request in self._prefilling.values():
            if budget <= 0:
                break
            budget -= self._chunk(request, budget, chunks)
        admitted: dict[str, int] = {}
        while budget > 0 and not preempted and self._queue:
            fresh = self._admit()
            if fresh is None:
                break
            if fresh.produced == 0:
                admitted[fresh.id] = len(fresh.named) * self.name_tokens
            budget -= self._chunk(fresh, budget, chunks)
        if chunks:
            prefill = sum(tokens for _, tokens in chunks)
            attention = sum(p * (request.computed + p / 2) for request, p in chunks)
            load = Load(streams, prefill, self._context, attention)
            seconds = self.profile.step_seconds(load, self._rng) * self.slowdown
            return StepPlan(load, seconds, admitted, chunks, 1, seconds, 0.0, preempted)
        if not streams:
            return None
        load = Load(streams, 0, self._context)
        alike = 1 if preempted or most == 1 else self._alike(most)
        seconds, rise_s = self.profile.step_seconds(load), 0.0
        if alike > 1:
            last = Load(streams, 0, self._context + streams * (alike - 1))
            rise_s = (self.profile.step_seconds(last) - seconds) / (alike - 1)
            seconds += 0.5 * (alike - 1) * rise_s
        usual, worst = self.profile.noise(self._rng, alike) if self._rng else (1.0, 1.0)
        seconds *= self.slowdown
        rise_s *= self.slowdown * usual
        return StepPlan(
            load,
            seconds * usual * alike,
            admitted,
            chunks,
            alike,
            seconds * worst,
            rise_s,
            preempted,
        )

    def complete(self, plan: StepPlan, steps: int = 0) -> StepOutcome:
        """The planned steps have been run, or only the first so many of them."""
        steps = steps or plan.steps
        counters, streams = self.counters, len(self._decoding)
        step = counters.steps = counters.steps + steps
        if step > self._grown:
            self.pool.take(self._needed(self._grown, step - self._grown))
            self._grown = step
        self._context += streams * steps
        counters.generated_tokens += streams * steps
        first: list[str] = []
        resumed: list[str] = []
        finished: list[str] = []
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
            counters.generated_tokens += 1
            (resumed if request.produced else first).append(request.id)
            request.produced += 1
            if request.produced == request.generation.output_tokens:
                self._finish(request)
                finished.append(request.id)
            else:
                self._join(request, step)
        return StepOutcome(first, resumed, finished)

    def _alike(self, most: int) -> int:
        """How many of the next steps are decodes of the same streams, with room for their blocks.

        Whoever waits is waiting for room, which nobody gives back before a stream ends.
        """
        endings = self._ending_steps
        while endings[0] not in self._endings:
            heappop(endings)
        step = self.counters.steps
        most = min(most, endings[0] - step)
        free = self.pool.free
        if self._needed(step + 1, most - 1) <= free:
            return most
        alike = 1
        while (free := free - self._growths[(step + alike + 1) % len(self._growths)]) >= 0:
            alike += 1
        return alike

    def _needed(self, step: int, more: int) -> int:
        """Blocks that the `more` steps after `step` take."""
        growths = self._growths
        size = len(growths)
        rounds, rest = divmod(more, size)
        first = (step + 1) % size
        begun = growths[first : first + rest]
        begun += growths[: rest - len(begun)]
        return rounds * len(self._decoding) + sum(begun)

    # Where a request stands.

    def _enqueue(self, request: Running) -> None:
        if not self._queue or request.order < self._queue[0][0]:
            self._head_waits_for_room = False
        heappush(self._queue, (request.order, request))

    def _admit(self) -> Running | None:
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
        names = request.generation.blocks[: (tokens - 1) // self.name_tokens]
        hits = names[: pool.known(names)] if names else ()
        fresh = -(-tokens // size) - len(hits) * pool.per_name
        if fresh + pool.idle(hits) > pool.free:
            self._head_waits_for_room = True
            return None
        heappop(queue)
        pool.hold(hits)
        pool.take(fresh)
        request.named, request.unnamed, request.looked_at = list(hits), fresh, len(hits)
        cached = len(hits) * self.name_tokens
        request.computed = max(cached, min(request.received, tokens - 1))
        self._prefilling[request.id] = request
        if request.produced == 0:
            self.counters.prompt_tokens += tokens
            self.counters.prefix_queried_tokens += tokens
            self.counters.prefix_hit_tokens += cached
            self.counters.received_tokens += request.computed - cached
        request.received = 0  # if it is preempted, they are lost
        return request

    def _chunk(self, request: Running, budget: int, chunks: list[tuple[Running, int]]) -> int:
        left = request.generation.prompt_tokens + request.produced - request.computed
        tokens = min(left, budget)
        chunks.append((request, tokens))
        return tokens

    def _join(self, request: Running, step: int) -> None:
        """The prompt is computed: decode from the next step on."""
        del self._prefilling[request.id]
        self._decoding[request.id] = request
        self._context += request.generation.prompt_tokens + request.produced
        request.joined = step
        request.ends = step + request.generation.output_tokens - request.produced
        ending = self._endings.get(request.ends)
        if ending is None:
            self._endings[request.ends] = [request]
            heappush(self._ending_steps, request.ends)
        else:
            ending.append(request)
        size = self.profile.block_size
        request.grows = step + 1 + -request.computed % size
        self._growths[request.grows % size] += 1

    def _grow(self, step: int) -> Sequence[str]:
        """Give a block to each stream that needs one in this step; gives those who had to go."""
        if step == self._grown:
            return ()
        self._grown = step
        pool, size = self.pool, self.profile.block_size
        needed = self._growths[step % size]
        if not needed:
            return ()
        if needed <= pool.free:
            pool.take(needed)
            return ()
        self._grown = step - 1  # until each has its block
        due = [
            r for r in self._decoding.values() if step >= r.grows and not (step - r.grows) % size
        ]
        served: list[Running] = []
        preempted: list[str] = []
        for request in sorted(due, key=_by_order):
            while request.id in self._decoding and pool.free == 0:
                everyone = chain(self._decoding.values(), self._prefilling.values())
                last = max(everyone, key=_by_order)
                if last in served:
                    served.remove(last)
                    last.unnamed += 1
                self._preempt(last)
                preempted.append(last.id)
            if request.id in self._decoding:
                pool.take(1)
                served.append(request)
        self._grown = step
        return preempted

    def _preempt(self, request: Running) -> None:
        """Take its blocks; it is queued again and computes prompt and answer anew."""
        self.counters.preemptions += 1
        self._leave(request)
        self._enqueue(request)

    def _finish(self, request: Running) -> None:
        del self._requests[request.id]
        if request.generation.hold:
            del self._prefilling[request.id]
            self._held[request.id] = request.named, request.unnamed
        else:
            self._leave(request)

    def _leave(self, request: Running) -> None:
        """Out of the batch, if it is in it; its blocks are free, and cached where named."""
        if self._decoding.pop(request.id, None) is not None:
            steps = self.counters.steps - request.joined
            request.produced += steps
            request.computed += steps
            self._context -= request.generation.prompt_tokens + request.produced
            size = self.profile.block_size
            self._growths[request.grows % size] -= 1
            if self._grown >= request.grows:
                request.unnamed += (self._grown - request.grows) // size + 1
            ending = self._endings.get(request.ends)  # None: it ends with this step
            if ending is not None:
                ending.remove(request)
                if not ending:
                    del self._endings[request.ends]
        elif self._prefilling.pop(request.id, None) is None:
            return
        self._name_full_blocks(request)
        self.pool.drop(request.named, request.unnamed)
        request.named, request.unnamed, request.looked_at, request.computed = [], 0, 0, 0
        self._head_waits_for_room = False

    def _name_full_blocks(self, request: Running) -> None:
        full = request.computed // self.name_tokens
        if full <= request.looked_at:
            return
        names, journal = request.generation.blocks, self.pool.journal
        for at, name in enumerate(names[request.looked_at : full], request.looked_at):
            if self.pool.name(name):
                request.named.append(name)
                request.unnamed -= self.pool.per_name
                if journal is not None:
                    journal.stored(names, at)
        request.looked_at = full
