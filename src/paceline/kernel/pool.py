"""The workers of one model: which may be chosen, and what is learned across them?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from paceline.domain.commands import Prediction
from paceline.domain.kvevents import BlockForm
from paceline.domain.promise import Promise
from paceline.domain.request import BLOCK_BYTES, Request
from paceline.domain.worker import Worker
from paceline.kernel.blocks import BlockIndex
from paceline.kernel.demand import Demand
from paceline.kernel.prefix import DEFAULT_BLOCKS, PrefixIndex
from paceline.kernel.soon import Soon
from paceline.kernel.worker import Accuracy, WorkerState
from paceline.policy.headroom import residents_itl_s
from paceline.policy.lengths import OutputLengths, TokensPerByte, own_share
from paceline.policy.links import TransferTime
from paceline.policy.pressure import Outlook
from paceline.policy.standing import Ask, Correction, Standing
from paceline.policy.steptime import StepTimeEstimator, pool_prior

USUAL_RATE = 0.02
"""How fast the mean of what requests need follows the last ones."""
OUTCOME_RATE = 0.005
"""How fast the corrections of predictions follow the last outcomes: some 200 of them."""
FORESEEN = 0.65
"""Share of what the load changed of an answer's ITL that outcomes are cleared of: while a fleet
fills, all come later than predicted, and soon after no more; but in a flood they will again."""
STALE_S = 0.25
"""A standing is made anew after this even if nothing happened: rates fade."""


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
        """Of all workers a guess, by what was sent to them."""
        self.blocks = BlockIndex()
        """Of those whose engines tell what they cache, what they told."""
        self.soon = Soon()
        """And what they will tell, of what was just sent to them."""
        self.ttft = Accuracy(OUTCOME_RATE)
        self.itl = Accuracy(OUTCOME_RATE)
        """Of what step times alone would predict."""
        self.handover = Accuracy(OUTCOME_RATE)
        """The same of TTFTs where one worker prefills and another answers."""
        self._links: dict[tuple[str, str], TransferTime] = {}
        """Between nodes, or workers where those are not named."""
        self.lengths = OutputLengths()
        self.tokens_per_byte = TokensPerByte()
        self._block_bytes = BLOCK_BYTES
        """As of the last request."""
        self._usual_tokens = 0.0
        self.demand = Demand()
        self._by_place: list[WorkerState] = []
        self._free: list[int] = []
        self._standings: list[Standing | None] = []
        self._usable: list[int] = []
        self._sources: list[int] = []
        self._usable_until = -inf

    def add(self, worker: Worker) -> WorkerState:
        """A worker joins."""
        place = self._free.pop() if self._free else len(self._by_place)
        state = WorkerState(worker, place)
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
            self.blocks.forget(state.place)
            self.soon.forget()
            self._free.append(state.place)
            self.regroup()

    @property
    def usual_tokens(self) -> float:
        """Uncached prompt tokens of requests, on average lately; 0 before the first one."""
        return self._usual_tokens

    def touch(self, state: WorkerState) -> None:
        """A worker's state has changed."""
        standing = self._standings[state.place]
        if standing is not None:
            standing.made_at = -inf

    def stepped(self, state: WorkerState) -> None:
        """Steps of a worker were seen: most change nothing but the time of the last one."""
        standing = self._standings[state.place]
        if standing is not None:
            standing.last_step_at = state.last_step_at
            if state.differs(standing):
                standing.made_at = -inf

    def link(self, source: int, place: int) -> TransferTime | None:
        """The way from one place to another; None if one cannot take over from the other."""
        giver, taker = self._by_place[source].worker, self._by_place[place].worker
        if not taker.takes_from(giver):
            return None
        ends = giver.node or giver.id, taker.node or taker.id
        found = self._links.get(ends)
        if found is None:
            found = self._links[ends] = TransferTime(learns=not giver.pairs)
        return found

    @property
    def handed(self) -> Correction:
        """How TTFTs turn out, where one worker prefills and another answers."""
        return self.handover.correction

    def prefill_limit(self, source: int) -> float:
        """Prompt tokens ahead of a worker below which it may prefill another for others."""
        return self._by_place[source].prefill_limit

    def lease_s(self, source: int) -> float:
        """How long a worker is sure to keep what it has prefilled for others."""
        return self._by_place[source].worker.lease_s

    def dispatched(self, uncached: float) -> None:
        """A request with so many tokens to prefill was sent to a worker."""
        pace = USUAL_RATE if self.turn else 1.0
        self._usual_tokens += pace * (uncached - self._usual_tokens)
        self.turn += 1

    def usable(self, now: float, avoid: Sequence[str] = ()) -> list[int]:
        """Places that may get new work, prefill for others left aside; those to `avoid` only if
        there are no others."""
        if now >= self._usable_until:
            usable = [w for w in self._by_place if w.usable(now)]
            self._usable = [w.place for w in usable if w.worker.answers]
            self._sources = [w.place for w in usable if w.worker.prefills]
            returns = [w.ejected_until for w in self._by_place if w.ejected_until > now]
            self._usable_until = min(returns, default=inf)
        fresh = [i for i in self._usable if self.ids[i] not in avoid] if avoid else []
        return fresh or self._usable

    def sources(self, now: float, avoid: Sequence[str] = ()) -> list[int]:
        """Places that may prefill for others."""
        self.usable(now)
        return [i for i in self._sources if self.ids[i] not in avoid] if avoid else self._sources

    def usable_beside(self, worker: WorkerState, now: float) -> bool:
        """Is there a worker that may get new work, other than this one?"""
        return any(place != worker.place for place in self.usable(now))

    def regroup(self) -> None:
        """Which workers are usable may have changed."""
        self._usable_until = -inf

    def at(self, place: int) -> WorkerState:
        """The worker at a place."""
        return self._by_place[place]

    def load(self, place: int) -> int:
        """Requests in flight on the worker at a place, from here and from other gateways."""
        worker = self._by_place[place]
        return len(worker.ledger.entries) + worker.elsewhere.requests

    def remembered(self, place: int) -> int:
        """Prompt blocks that the worker at a place is believed to have cached."""
        return self.prefixes.size(place)

    def standing(self, place: int, now: float) -> Standing:
        """The worker at a place as a router sees it."""
        standing = self._standings[place]
        if standing is None or now - standing.made_at > STALE_S:
            state = self._by_place[place]
            self._inherit(state)
            outlook = self.outlook(state, now)
            standing = state.standing(now, self.ttft, self.itl, outlook, self._usual_tokens)
            self._standings[place] = standing
        return standing

    def outcome(self, state: WorkerState, predicted: Prediction, itl_s: float, now: float) -> None:
        """An answer came with that ITL, where another was predicted."""
        state.itl.add(predicted.itl_s, itl_s)
        expected_s = predicted.itl_s / predicted.itl_factor
        standing = self._standings[state.place]
        if standing is not None:
            expected_s *= (residents_itl_s(standing, now) / expected_s) ** FORESEEN
        self.itl.add(expected_s, itl_s)

    def outlook(self, state: WorkerState, now: float) -> Outlook | None:
        """What a worker's streams will need of its KV cache; None while it is far from full."""
        if not state.kv_is_scarce():
            state.outlook = None
        elif state.outlook is None or now - state.outlook_at > STALE_S:
            ledger, others = state.ledger, state.elsewhere
            contexts, left = [], []
            for entry in ledger.entries.values():
                given, request = ledger.given(entry), entry.request
                contexts.append(entry.prompt + given)
                left.append(
                    self.lengths.left(
                        request.model,
                        request.tenant,
                        entry.had + given,
                        request.max_tokens,
                        entry.share,
                    )
                )
            if ledger.held:
                contexts.append(ledger.held)
                left.append(0.0)
            outlook = Outlook(contexts, left, state.report.block_size if state.report else None)
            if others.requests:
                mean = (
                    sum(left) / len(left) if left else self.lengths.left(state.worker.model, "", 0)
                )
                held = others.context + others.context_arriving
                outlook.add_unknown(others.requests, held, mean)
            state.outlook, state.outlook_at = outlook, now
        return state.outlook

    def _inherit(self, state: WorkerState) -> None:
        """A worker that nothing was seen of yet is taken to be like the others."""
        if not state.timing.samples:
            known = [w.timing.model() for w in self.workers.values() if w.timing.samples]
            if known:
                state.timing = StepTimeEstimator(pool_prior(known))

    def ask(
        self,
        request: Request,
        waited_s: float,
        now: float,
        produced: int = 0,
        overdue: bool = False,
    ) -> Ask:
        """What a policy needs to know of a request, of whose answer so many tokens are there."""
        prompt = self.prompt_tokens(request)
        held = self.prefixes.depths(request.blocks)
        self._block_bytes = request.block_bytes
        per_block = prompt * request.block_bytes / max(request.prompt_bytes, 1)
        promise = request.promise
        output = self.lengths.expected(request.model, request.tenant, request.max_tokens)
        if produced:  # its first token came long ago
            promise = Promise(inf, promise.itl_s, promise.stall_s)
            output = max(output - produced, 0.25 * output)
        elif waited_s and promise.ttft_s < inf:
            left_s = max(promise.ttft_s - waited_s, 0.0)
            promise = Promise(left_s, promise.itl_s, promise.stall_s)
        cached = {
            place: min(depth * per_block, prompt - 1) * self._by_place[place].trust
            for place, depth in held.items()
        }
        if request.token_blocks:
            cached = self._known(request, prompt, cached, now)
        return Ask(
            request_id=request.id,
            promise=promise,
            margin=self._margin,
            weight=request.weight,
            prompt_tokens=prompt + produced,
            usual_tokens=self._usual_tokens or prompt,
            output_tokens=output,
            output_left=self.lengths.left(
                request.model, request.tenant, produced, request.max_tokens, own_share(self.turn)
            ),
            cached=cached,
            blocks_held=held,
            blocks=len(request.blocks),
            seed=request.seed,
            now=now,
            overdue=overdue,
            claims=self.demand.above(request, now),
            waited_s=waited_s,
        )

    def _known(
        self, request: Request, prompt: float, guessed: Mapping[int, float], now: float
    ) -> dict[int, float]:
        """How much of a prompt is cached, by place: where all is told as told, or as will be told
        of what was just sent there; elsewhere the more of what was told and what is guessed."""
        found = {
            place: tokens for place, tokens in guessed.items() if not self.blocks.follows(place)
        }
        for blocks in request.token_blocks:
            told = self.blocks.cached_tokens(blocks, int(prompt))
            for cached in (told, self.soon.cached_tokens(blocks, int(prompt), now)):
                for place, tokens in cached.items():
                    found[place] = max(float(tokens), found.get(place, 0.0))
        return found

    def block_forms(self, now: float) -> Sequence[BlockForm]:
        """In what blocks a prompt is to be named; none where that would not matter: no engine tells
        what it caches, or there is nothing to choose."""
        if not len(self.blocks) or len(self.usable(now)) < 2:
            return ()
        return self.blocks.forms(lambda place: self._by_place[place].worker.name_there)

    def prompt_tokens(self, request: Request) -> float:
        """Tokens of the prompt: told, or as many as such text has had."""
        if request.prompt_tokens is not None:
            return float(request.prompt_tokens)
        return max(1.0, self.tokens_per_byte.tokens(request.model, request.prompt_bytes))

    def sized(self, state: WorkerState) -> None:
        """A report came: the engine's cache is as large as it says."""
        report = state.report
        if report is not None and report.kv_capacity_tokens:
            model, size = state.worker.model, self._block_bytes
            per_block = max(self.tokens_per_byte.tokens(model, size), 1.0)
            self.prefixes.add(state.place, int(report.kv_capacity_tokens / per_block) + 1)
        else:
            self.prefixes.add(state.place, DEFAULT_BLOCKS)
