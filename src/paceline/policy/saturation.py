"""How many prompt tokens in flight keep a prefill worker busy?

Fewer leave gaps between its steps; more only wait there, where nobody can overtake them any more.
So it gets as many as the smallest load at which its prefill rate stops growing. The rates are
measured at loads of one step's tokens, of twice as many, and so on. Now and then the next higher
load is tried while there is work enough, for the rate there is not known otherwise.
"""

from __future__ import annotations

LEVELS = 5
GROWTH = 1.05
"""By how much the rate must grow for twice the load to be worth it."""
TRIAL = 16
"""Among so many prompts one may go beyond the limit."""
FADE = 0.97
"""Weight of what was measured, after each further prompt."""
KNOWN_S = 0.5
"""A rate is known once it was measured for so long."""


class Saturation:
    """Of one worker, from what its prompts take."""

    __slots__ = ("_level", "_seconds", "_tokens", "_turn", "_until")

    def __init__(self) -> None:
        self._level = 0
        self._turn = 0
        self._until = 0.0
        self._tokens = [0.0] * LEVELS
        self._seconds = [0.0] * LEVELS

    def limit(self, step_tokens: float) -> float:
        """While fewer prompt tokens than this are ahead, it may get another prompt."""
        trial = self._turn % TRIAL == TRIAL - 1 and self._level < LEVELS - 1
        return step_tokens * 2.0 ** (self._level + trial)

    def sent(self) -> None:
        """A prompt was sent there."""
        self._turn += 1

    def done(
        self, ahead: float, step_tokens: float, tokens: float, sent_at: float, at: float
    ) -> None:
        """A prompt of so many tokens is through, that had so many ahead of it when it was sent."""
        seconds = max(at - max(sent_at, self._until), 0.0)
        self._until = max(self._until, at)
        level = 0
        while level < LEVELS - 1 and ahead >= step_tokens * 2.0**level:
            level += 1
        self._tokens[level] = FADE * self._tokens[level] + tokens
        self._seconds[level] = FADE * self._seconds[level] + seconds
        self._adjust()

    def _adjust(self) -> None:
        level = self._level
        if level + 1 < LEVELS and self._gains(level):
            self._level += 1
        elif level > 0 and self._known(level - 1) and not self._gains(level - 1):
            self._level -= 1

    def _gains(self, level: int) -> bool:
        """Is the rate at the next level so much higher than at this one? No, if not known."""
        if not self._known(level) or not self._known(level + 1):
            return False
        return self._rate(level + 1) > GROWTH * self._rate(level)

    def _known(self, level: int) -> bool:
        return self._seconds[level] > KNOWN_S

    def _rate(self, level: int) -> float:
        return self._tokens[level] / self._seconds[level]
