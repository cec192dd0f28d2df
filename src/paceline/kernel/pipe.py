"""How much must be under way to a worker so that it is never idle?"""

from __future__ import annotations

from math import inf

RATE = 0.05
"""How fast the rate follows the last prompts."""
FORGET = 0.02
"""Of the least delay, with each prompt."""


class Pipe:
    """How prompts come through a worker: at which rate, and with which delay beyond prefill.

    The product of bandwidth and delay (Cardwell et al., BBR, 2016) is what must be under way, there
    and back: next to nothing for an engine nearby, much for one far away, or for a whole fleet
    behind one URL.
    """

    __slots__ = ("_lone_s", "_lone_tokens", "rate")

    def __init__(self) -> None:
        self.rate = 0.0
        """Tokens a second, on average lately; the highest ones come of wrong guesses on caches."""
        self._lone_tokens = 0.0
        self._lone_s = inf
        """The quickest prompt of late of those that had none before them; infinite: none came."""

    @property
    def delay_s(self) -> float:
        """What a lone prompt takes beyond being prefilled; 0 until one has shown it."""
        if self._lone_s == inf:
            return 0.0
        return max(self._lone_s - self._lone_tokens / self.rate, 0.0)

    def through(self, tokens: float, ahead: float, seconds: float) -> None:
        """A first token came for a prompt, so many seconds after it was sent behind others."""
        if seconds <= 0.0:
            return
        pace = RATE if self.rate else 1.0
        self.rate += pace * ((ahead + tokens) / seconds - self.rate)
        if ahead:  # it has waited for those
            return
        slower_s = seconds - self._lone_s - (tokens - self._lone_tokens) / self.rate
        if slower_s <= 0.0:
            self._lone_tokens, self._lone_s = tokens, seconds
        else:
            self._lone_s += FORGET * slower_s
