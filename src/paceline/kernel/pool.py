"""The workers of one model: which may be chosen, and what is learned across them?"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import msgspec

from paceline.domain.request import BLOCK_BYTES, Request
from paceline.domain.worker import Worker
from paceline.kernel.prefix import DEFAULT_BLOCKS, PrefixIndex
from paceline.kernel.worker import WorkerState
from paceline.policy.lengths import OutputLengths, TokensPerByte
from paceline.policy.standing import Ask, Standing
from paceline.policy.steptime import pool_prior


class Pool:
    """One model's workers, each at its place: the `Fleet` that a policy chooses from."""

    def __init__(self, margin: float = 0.0) -> None:
        self._margin = margin
        self.workers: dict[str, WorkerState] = {}
        self.ids: list[str] = []
        """Worker ids by place."""
        self.turn = 0
        """Dispatches so far."""
        self.prefixes = PrefixIndex()
        self.lengths = OutputLengths()
        self.tokens_per_byte = TokensPerByte()
        self._by_place: list[WorkerState] = []
        self._free: list[int] = []
        self._standings: list[Standing | None] = []
        self._usable: list[int] = []
        self._usable_until = -inf

    def add(self, worker: Worker) -> WorkerState:
        """A worker joins. It starts from what its like have been seen to do."""
        known = [w.timing.model() for w in self.workers.values() if w.timing.samples]
        place = self._free.pop() if self._free else len(self._by_place)
        state = WorkerState(worker, place, pool_prior(known) if known else None)
        self.workers[worker.id] = state
        here = slice(place, place + 1)  # one to replace, or the end
        self.ids[here], self._by_place[here], self._standings[here] = [worker.id], [state], [None]
        self.prefixes.add(place)
        self.regroup()
        return state

    def remove(self, state: WorkerState) -> None:
        """A worker has left for good; its place may be taken by another."""
        if self.workers.pop(state.worker.id, None) is not None:
            self.prefixes.remove(state.place)
            self._free.append(state.place)
            self.regroup()

    def touch(self, state: WorkerState) -> None:
        """A worker's state has changed."""
        self._standings[state.place] = None

    def usable(self, now: float, avoid: Sequence[str] = ()) -> list[int]:
        """Places that may get new work; those to `avoid` only if there are no others."""
        if now >= self._usable_until:
            self._usable = [w.place for w in self._by_place if w.usable(now)]
            returns = [w.ejected_until for w in self._by_place if w.ejected_until > now]
            self._usable_until = min(returns, default=inf)
        fresh = [i for i in self._usable if self.ids[i] not in avoid] if avoid else []
        return fresh or self._usable

    def regroup(self) -> None:
        """Which workers are usable may have changed."""
        self._usable_until = -inf

    def load(self, place: int) -> int:
        """Requests in flight on the worker at a place."""
        return len(self._by_place[place].ledger.entries)

    def standing(self, place: int, now: float) -> Standing:
        """The worker at a place as a router sees it."""
        standing = self._standings[place]
        if standing is None:
            standing = self._standings[place] = self._by_place[place].standing(now)
        return standing

    def ask(self, request: Request, waited_s: float, now: float) -> Ask:
        """What a policy needs to know of a request."""
        prompt = self.prompt_tokens(request)
        held = self.prefixes.depths(request.blocks)
        per_block = prompt * BLOCK_BYTES / max(request.prompt_bytes, 1)
        promise = request.promise
        if waited_s and promise.ttft_s < inf:
            promise = msgspec.structs.replace(promise, ttft_s=max(promise.ttft_s - waited_s, 0.0))
        return Ask(
            promise=promise,
            margin=self._margin,
            weight=request.weight,
            prompt_tokens=prompt,
            output_tokens=self.lengths.expected(request.model, request.tenant, request.max_tokens),
            cached={
                place: min(depth * per_block, prompt - 1) * self._by_place[place].trust
                for place, depth in held.items()
            },
            blocks_held=held,
            blocks=len(request.blocks),
            seed=request.seed,
            now=now,
        )

    def prompt_tokens(self, request: Request) -> float:
        """Tokens of the prompt: told, or as many as such text has had."""
        if request.prompt_tokens is not None:
            return float(request.prompt_tokens)
        return max(1.0, self.tokens_per_byte.tokens(request.model, request.prompt_bytes))

    def sized(self, state: WorkerState) -> None:
        """A report came: the engine's cache is as large as it says."""
        report = state.report
        if report is not None and report.kv_capacity_tokens:
            per_block = max(self.tokens_per_byte.tokens(state.worker.model, BLOCK_BYTES), 1.0)
            self.prefixes.add(state.place, int(report.kv_capacity_tokens / per_block) + 1)
        else:
            self.prefixes.add(state.place, DEFAULT_BLOCKS)
