"""What is known of a prompt that one worker prefills for another?"""

from __future__ import annotations

from paceline.domain.commands import Prediction
from paceline.kernel.ledger import Entry
from paceline.kernel.worker import WorkerState


class HandOver:
    """From the order to prefill until the other worker has fetched it."""

    __slots__ = (
        "paired",
        "predicted_s",
        "ready",
        "sent_at",
        "step_s",
        "tokens",
        "trouble",
        "worker",
    )

    def __init__(
        self, worker: WorkerState, sent_at: float, predicted_s: float, tokens: float
    ) -> None:
        self.worker = worker
        """The one that prefills it."""
        self.sent_at = sent_at
        self.predicted_s = predicted_s
        """From then until the first token, by step times and links alone; 0: nobody said."""
        self.tokens = tokens
        self.paired = worker.worker.transfer == "sglang"
        """Both workers begin at once: nothing waits between them."""
        self.ready = False
        """It is prefilled, and waits to be fetched."""
        self.trouble = worker.troubles
        self.step_s = 0.0
        """What the other worker's part should take without the transfer."""

    def fetched_by(self, entry: Entry, predicted: Prediction | None, transfer_s: float) -> None:
        """The other worker is asked to fetch it."""
        entry.fetches = True
        entry.cached, entry.uncached = entry.prompt - 1.0, 1.0
        if predicted is not None:
            self.step_s = max(predicted.ttft_s / predicted.ttft_factor - transfer_s, 0.0)

    @property
    def until(self) -> float:
        """Until when it is sure to be kept.

        The lease begins when the prefill ends, which nobody here sees: word of it may be late. It
        cannot have been before it was sent.
        """
        return self.sent_at + self.worker.worker.lease_s

    def holds(self, now: float, transfer_s: float = 0.0) -> bool:
        """May another worker begin to fetch it now? Too late it would get another prompt's cache,
        and nobody would notice; so after any trouble of the worker nothing is taken from it."""
        worker = self.worker
        sound = worker.troubles == self.trouble and not worker.draining
        return sound and now + transfer_s < self.until
