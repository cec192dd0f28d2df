"""What is in flight on a worker, by what was sent there and what has come back?

Totals are kept, not summed: a step costs the same whether one stream is decoding or five hundred.
"""

from __future__ import annotations

from collections import deque
from math import inf

from paceline.domain.request import Request


def class_of(request: Request) -> tuple[float, float]:
    """Its ITL promise (seconds, to two digits: headers may ask for anything) and its weight."""
    return float(f"{request.promise.itl_s:.2g}"), request.weight


class Entry:
    """One request on one worker."""

    __slots__ = (
        "ahead",
        "cached",
        "deadline",
        "decoding",
        "due_at",
        "fetches",
        "grown",
        "had",
        "left",
        "passes_on",
        "promised",
        "prompt",
        "request",
        "sent_at",
        "share",
        "uncached",
    )

    def __init__(
        self,
        request: Request,
        prompt: float,
        cached: float,
        sent_at: float,
        deadline: float = inf,
        had: int = 0,
        left: float = 0.0,
        share: float = 0.75,
    ) -> None:
        self.request = request
        self.prompt = prompt
        """Prompt tokens, estimated if not told."""
        self.cached = cached
        self.uncached = max(prompt - cached, 1.0)
        self.sent_at = sent_at
        self.ahead = 0.0
        """Prompt tokens of others that were still to be prefilled then."""
        self.deadline = deadline
        """Until when its first token must come."""
        self.promised: tuple[float, float] | None = None
        """The ITL promise and weight that it counts under; None: its answer comes from another."""
        self.due_at = sent_at
        """When an answer that is no stream is taken to have been prefilled."""
        self.decoding = False
        self.grown = 0.0
        """Tokens that every stream of the worker had been given when its own first one came."""
        self.had = had
        """Tokens of its answer that are part of the prompt here."""
        self.left = left
        """Tokens expected to come, when it was sent."""
        self.share = share
        """Quantile of the length of answers that stands for its own."""
        self.passes_on = False
        """Only its prompt is computed here, for another worker to fetch."""
        self.fetches = False
        """Its prompt is computed by another worker."""


class Ledger:
    """The requests of one worker and their sums."""

    __slots__ = (
        "_base",
        "_blind",
        "_grown",
        "_held",
        "ahead",
        "arriving",
        "blind",
        "due",
        "entries",
        "held",
        "passing",
        "promised",
        "streams",
    )

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.streams = 0
        """Requests that are decoding."""
        self.blind = 0
        """Those among them that are no streams, so that the relay does not see their tokens."""
        self.ahead = 0.0
        """Prompt tokens sent and not yet known to be prefilled."""
        self.arriving = 0.0
        """Context that those prompts will add to the KV cache."""
        self.promised: dict[tuple[float, float], int] = {}
        """How many requests are of each class: decisions take time for each."""
        self.due = 0.0
        """Context that all will have at their ends, as expected when they were sent."""
        self.passing = 0
        """Requests whose prompt is prefilled here for another worker."""
        self.held = 0.0
        """Context that waits to be fetched by other workers."""
        self._held: dict[str, tuple[float, float]] = {}
        """Of each request: tokens, and until when they are kept at the latest."""
        self._blind: deque[Entry] = deque()
        # Every decoding stream grows by the same tokens a step, so the context of all is
        # _base + streams * _grown, with _base = sum of (prompt - _grown at its first token).
        self._base = 0.0
        self._grown = 0.0

    @property
    def kv(self) -> float:
        """Tokens of context of the decoding streams."""
        return self._base + self.streams * self._grown

    def given(self, entry: Entry) -> float:
        """Tokens of its answer that a request was given here."""
        return self._grown - entry.grown if entry.decoding else 0.0

    def sent(self, entry: Entry) -> None:
        """A request went to the worker."""
        self.entries[entry.request.id] = entry
        entry.ahead = self.ahead
        self.ahead += entry.uncached
        self.arriving += entry.prompt
        self.due += entry.prompt + entry.left
        request = entry.request
        if entry.passes_on:
            self.passing += 1
            return
        entry.promised = key = class_of(request)
        self.promised[key] = self.promised.get(key, 0) + 1
        if not entry.request.streaming:
            self._blind.append(entry)

    def decodes(self, entry: Entry) -> None:
        """A request's prompt is known to be prefilled."""
        if entry.decoding:
            return
        entry.decoding = True
        entry.grown = self._grown
        self.ahead -= entry.uncached
        self.arriving -= entry.prompt
        self._base += entry.prompt - self._grown
        self.streams += 1
        self.blind += not entry.request.streaming

    def hold(self, request_id: str, tokens: float, until: float) -> None:
        """A prompt is prefilled, and kept for another worker to fetch."""
        self.fetched(request_id)
        self._held[request_id] = tokens, until
        self.held += tokens

    def fetched(self, request_id: str) -> None:
        """It need not be kept any longer."""
        tokens, _ = self._held.pop(request_id, (0.0, 0.0))
        self.held = self.held - tokens if self._held else 0.0

    def settle_held(self, now: float) -> None:
        """What nobody has fetched in time has been given up."""
        while self._held:
            request_id = next(iter(self._held))
            if self._held[request_id][1] > now:
                break
            self.fetched(request_id)

    def grew(self, tokens_each: float) -> None:
        """A step gave every stream so many tokens."""
        self._grown += tokens_each

    def settle_blind(self, now: float) -> None:
        """Requests whose tokens nobody sees are taken to decode once their prefill is due."""
        while self._blind and (self._blind[0].due_at <= now or self._gone(self._blind[0])):
            entry = self._blind.popleft()
            if not self._gone(entry):
                self.decodes(entry)

    def _gone(self, entry: Entry) -> bool:
        return self.entries.get(entry.request.id) is not entry

    def left(self, request_id: str) -> Entry | None:
        """A request is no longer on the worker, for whatever reason."""
        entry = self.entries.pop(request_id, None)
        if entry is None:
            return None
        key = entry.promised
        if key is not None:
            self.promised[key] -= 1
            if not self.promised[key]:
                del self.promised[key]
        self.passing -= entry.passes_on
        self.due -= entry.prompt + entry.left
        if entry.decoding:
            self.streams -= 1
            self.blind -= not entry.request.streaming
            self._base -= entry.prompt - entry.grown
        else:
            self.ahead -= entry.uncached
            self.arriving -= entry.prompt
        if not self.entries:  # let no rounding stay behind
            self.ahead = self.arriving = self.due = self._base = self._grown = 0.0
            self._blind.clear()
        return entry
