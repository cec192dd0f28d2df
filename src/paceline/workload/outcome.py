"""What became of one request, as its client saw it?"""

from __future__ import annotations

import msgspec

from paceline.domain.promise import Promise


class Outcome(msgspec.Struct, frozen=True):
    index: int
    """Place in the trace."""
    at_s: float
    """When it was due, since the start of the replay."""
    behind_s: float
    """How much later it was sent: the driver's own delay, which counts into the TTFT."""
    ended_s: float
    """When its last byte or its failure came, since the start of the replay."""
    tier: str = ""
    tenant: str = ""
    model: str = ""
    worker: str = ""
    """As the gateway names it in x-paceline-worker."""
    status: int = 0
    """HTTP status; 0 if there was no answer at all."""
    error: str = ""
    """Why it is not answered whole; empty if it is."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float | None = None
    """From when it was due to the first content; None if none came."""
    itl_s: float = 0.0
    """Mean gap between tokens; 0 with fewer than two."""
    stall_s: float = 0.0
    """Worst gap between chunks."""
    gaps: dict[int, int] = {}
    """All gaps, in the buckets of `histogram`."""

    @property
    def ok(self) -> bool:
        """Answered whole."""
        return not self.error

    @property
    def refused(self) -> bool:
        """Turned away on purpose, before any work was done."""
        return self.status in (429, 503)

    def miss(self, promise: Promise) -> str:
        """What broke the promise first: failed, ttft, itl or stall; empty if it was kept."""
        if self.error or self.ttft_s is None:
            return "failed"
        if promise.kept(self.ttft_s, self.itl_s, self.stall_s):
            return ""
        if self.ttft_s > promise.ttft_s:
            return "ttft"
        return "itl" if self.itl_s > promise.itl_s else "stall"
