"""What is in flight on a worker, by what was sent there and what has come back?

Totals are kept, not summed: a step costs the same whether one stream is decoding or five hundred.
"""

from __future__ import annotations

from collections import deque
from math import inf

from paceline.domain.request import Request


class Entry:
    """One request on one worker."""

    __slots__ = (
        "cached",
        "deadline",
        "decoding",
        "due_at",
        "grown",
        "promised",
        "prompt",
        "request",
        "sent_at",
        "uncached",
    )

    def __init__(
        self,
        request: Request,
        prompt: float,
        cached: float,
        sent_at: float,
        deadline: float = inf,
    ) -> None:
        self.request = request
        self.prompt = prompt
        """Prompt tokens, estimated if not told."""
        self.cached = cached
        self.uncached = max(prompt - cached, 1.0)
        self.sent_at = sent_at
        self.deadline = deadline
        """Until when its first token must come."""
        self.promised: float | None = None
        """The ITL promise that it counts under; None: no promise of it can be broken any more."""
        self.due_at = sent_at
        """When an answer that is no stream is taken to have been prefilled."""
        self.decoding = False
        self.grown = 0.0


class Ledger:
    """The requests of one worker and their sums."""

    __slots__ = (
        "_base",
        "_blind",
        "_grown",
        "ahead",
        "arriving",
        "blind",
        "entries",
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
        self.promised: dict[float, float] = {}
        """Weight of the requests that have each ITL promise (seconds, to two digits: headers may
        ask for anything, and decisions take time for each)."""
        self._blind: deque[Entry] = deque()
        # Every decoding stream grows by the same tokens a step, so the context of all is
        # _base + streams * _grown, with _base = sum of (prompt - _grown at its first token).
        self._base = 0.0
        self._grown = 0.0

    @property
    def kv(self) -> float:
        """Tokens of context of the decoding streams."""
        return self._base + self.streams * self._grown

    def sent(self, entry: Entry) -> None:
        """A request went to the worker."""
        self.entries[entry.request.id] = entry
        self.ahead += entry.uncached
        self.arriving += entry.prompt
        entry.promised = itl_s = float(f"{entry.request.promise.itl_s:.2g}")
        self.promised[itl_s] = self.promised.get(itl_s, 0.0) + entry.request.weight
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

    def release(self, entry: Entry) -> None:
        """Nothing can break its promise any more: it is over, or broken already."""
        itl_s, entry.promised = entry.promised, None
        if itl_s is not None:
            self.promised[itl_s] -= entry.request.weight
            if self.promised[itl_s] < 1e-6:
                del self.promised[itl_s]

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
        self.release(entry)
        if entry.decoding:
            self.streams -= 1
            self.blind -= not entry.request.streaming
            self._base -= entry.prompt - entry.grown
        else:
            self.ahead -= entry.uncached
            self.arriving -= entry.prompt
        if not self.entries:  # let no rounding stay behind
            self.ahead = self.arriving = self._base = self._grown = 0.0
            self._blind.clear()
        return entry
