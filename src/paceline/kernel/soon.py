"""What will a worker have cached by the time that a prompt sent there now gets its turn?

The prompts that were sent there just before it: its engine tells of their blocks only once they are
computed, and serves them to whoever waits behind. So a dispatch counts for a while as if it had
been told of, and the many that come at once with one beginning keep together.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from paceline.domain.kvevents import TokenBlocks
from paceline.kernel.holders import Holders, depths

LASTS_S = 2.0
"""A dispatch counts for so long at least, and for twice as long at most: an engine tells of most
prompts sooner. By then it has told, or the prompt has been given up."""
MOST_BLOCKS = 100_000
"""Remembered at once, twice over: 200 prompts of 8,000 tokens in blocks of 16."""


class Soon:
    """The blocks of dispatches, in two generations: one that fills, and the one before."""

    def __init__(self) -> None:
        self._new, self._old = Holders(), Holders()
        self._began_at = -inf

    def sent(self, place: int, prompt: Iterable[TokenBlocks], now: float) -> None:
        """A prompt has gone to the worker at this place."""
        self._pass(now)
        for blocks in prompt:
            for name in blocks.names:
                self._new.add(name, 1 << place)
        if len(self._new) > MOST_BLOCKS:
            self._turn(now)

    def cached_tokens(self, blocks: TokenBlocks, prompt_tokens: int, now: float) -> dict[int, int]:
        """How many tokens of a prompt will need no prefill, by place."""
        self._pass(now)
        new, old = self._new, self._old
        if not new and not old:
            return {}
        found = depths(
            blocks.reusable(prompt_tokens), lambda name: new.get(name, 0) | old.get(name, 0)
        )
        return {place: depth * blocks.size for place, depth in found.items()}

    def forget(self) -> None:
        """A worker has lost what it had, or has left: few of the others' are lost with it."""
        self._new, self._old = Holders(), Holders()

    def _pass(self, now: float) -> None:
        if now - self._began_at >= 2 * LASTS_S:
            self.forget()
            self._began_at = now
        elif now - self._began_at >= LASTS_S:
            self._turn(now)

    def _turn(self, now: float) -> None:
        self._old, self._new, self._began_at = self._new, Holders(), now
