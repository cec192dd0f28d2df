"""What became of a request?"""

from __future__ import annotations

import msgspec

from paceline.domain.commands import Prediction
from paceline.domain.request import Request


class Outcome(msgspec.Struct, frozen=True):
    """A request that is over, as its client met it."""

    request: Request
    """As it was asked for: whatever becomes of it, this is what was promised."""
    worker: str
    """The last one that it was sent to; empty if none."""
    status: int
    """HTTP status; 499 if the client left before an answer."""
    error: str
    """Empty if all went well."""
    attempts: int
    because: str
    """Why this worker."""
    predicted: Prediction | None
    queued_s: float
    """From arrival until it was sent to that worker."""
    ttft_s: float
    """From arrival to the first token; to the end for answers that are no streams."""
    itl_s: float
    """Mean gap between tokens; 0 where there were not two."""
    stall_s: float
    seconds: float
    """From arrival to the end."""
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int
    degraded_to: Request | None = None
    """As it was served instead, by a lower tier or another model; None: as it was asked for."""
    moved: int = 0
    """How often it was taken off its worker to go on elsewhere, or was lost by it."""
    paused: int = 0
    """How often it was taken off its worker for others."""
    prefilled_at: str = ""
    """The worker that had prefilled its prompt; empty: the one that answered."""
    prefill_s: float = 0.0
    """What that took, from sending the prompt to hearing that it is done."""
    path: str = ""
    """Of the endpoint that was asked."""

    @property
    def kept(self) -> bool:
        """Was the promise kept, and the deadline?"""
        if self.error or self.status >= 400 or self.seconds > self.request.deadline_s:
            return False
        return self.request.promise.kept(self.ttft_s, self.itl_s, self.stall_s)
