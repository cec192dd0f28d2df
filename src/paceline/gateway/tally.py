"""What did one answer come to, whichever workers wrote it?"""

from __future__ import annotations

from paceline.domain.facts import StreamEnded
from paceline.gateway.flavors import usage
from paceline.gateway.ports import Turn
from paceline.gateway.relay import Relay
from paceline.gateway.resume import Produced


class Tally:
    """Tokens and their timing over all workers of an answer. What a slow client costs is left out.

    Counts are the engines' own where they gave them.
    """

    __slots__ = (
        "_span_s",
        "_token_at",
        "cached_tokens",
        "moved",
        "paused",
        "prompt_tokens",
        "stall_s",
        "tokens",
    )

    def __init__(self) -> None:
        self._span_s = 0.0  # all gaps together
        self._token_at = 0.0  # when the newest token came; 0: none yet
        self.stall_s = 0.0
        self.tokens = 0
        self.prompt_tokens: int | None = None
        """Of the prompt as the client wrote it."""
        self.cached_tokens: int | None = None
        self.moved = self.paused = 0

    def wrote(self, relay: Relay, produced: Produced | None) -> None:
        """A worker has done its part."""
        told = usage(relay.tail)
        before = self.tokens - relay.rewritten  # by others alone: to this worker it was prompt
        if told.prompt_tokens is not None:
            self.prompt_tokens = max(told.prompt_tokens - before, 0)
        self.cached_tokens = told.cached_tokens
        added = produced.leg_tokens if produced is not None else None
        if told.output_tokens is not None:
            self.tokens = before + told.output_tokens
        elif added is not None:
            self.tokens += added
        else:
            self.tokens = before + relay.tokens
        if relay.token_at:
            self._span_s += relay.token_at - relay.first_at
            self.stall_s = max(self.stall_s, relay.stall_s)
            self._token_at = relay.token_at

    def came_off(self, turn: Turn) -> None:
        """Its worker has it no more."""
        self.moved += turn == "moved"
        self.paused += turn == "paused"

    def goes_on(self, now: float) -> None:
        """The next worker's first token is there. The way to it was a gap as any other."""
        gap_s = now - self._token_at
        self._span_s += gap_s
        self.stall_s = max(self.stall_s, gap_s)

    @property
    def itl_s(self) -> float:
        """Mean gap between tokens; 0 where there were not two."""
        return self._span_s / (self.tokens - 1) if self.tokens > 1 and self._token_at else 0.0

    def ended(self, request_id: str) -> StreamEnded:
        """The fact that this was all."""
        return StreamEnded(
            request_id,
            self.tokens,
            itl_s=self.itl_s,
            stall_s=self.stall_s,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
        )
