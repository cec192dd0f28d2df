"""What is known of a prompt that one worker prefills for another?"""

from __future__ import annotations

from math import inf

from paceline.domain.commands import Prediction
from paceline.kernel.ledger import Entry
from paceline.kernel.worker import WorkerState
from paceline.policy.links import TransferTime


class HandOver:
    """From the order to prefill until the other worker has fetched it."""

    __slots__ = (
        "_link",
        "_request_id",
        "load",
        "paired",
        "predicted_s",
        "ready",
        "sent_at",
        "since",
        "step_s",
        "tokens",
        "trouble",
        "worker",
    )

    def __init__(
        self,
        request_id: str,
        worker: WorkerState,
        link: TransferTime,
        tokens: float,
        sent_at: float,
        predicted_s: float,
    ) -> None:
        self._request_id = request_id
        self._link = link
        """To the worker that is likely to answer, as long as that is not settled."""
        link.awaits(request_id, tokens)
        self.worker = worker
        """The one that prefills it."""
        self.sent_at = self.since = sent_at
        self.predicted_s = predicted_s
        """From then until the first token, by step times and links alone; 0: nobody said."""
        self.tokens = tokens
        self.paired = worker.worker.pairs
        """Both workers begin at once: nothing waits between them."""
        self.ready = False
        """It is prefilled, and waits to be fetched."""
        self.trouble = worker.troubles
        self.step_s = 0.0
        """What the other worker's part should take without the transfer; 0: nobody said."""
        self.load = 0.0
        """Tokens on the link together with its own."""

    def fetch(self, entry: Entry, link: TransferTime, predicted: Prediction | None) -> None:
        """The other worker is asked to fetch it."""
        entry.fetches = True
        entry.cached, entry.uncached = entry.prompt - 1.0, 1.0
        self._link.forget(self._request_id)
        self._link = link
        self.load, now = link.on_it + self.tokens, entry.sent_at
        transfer_s = link.fetch_s(self.tokens, now)
        if predicted is not None and not self.paired:
            whole_s = predicted.ttft_s / predicted.ttft_factor
            self.step_s = max(whole_s - transfer_s, 0.0)
        due_at = inf if self.paired else now + transfer_s + self.step_s
        link.carries(self._request_id, self.tokens, due_at)

    def fetched(self, entry: Entry, at: float) -> None:
        """The first token is there: what is not of the other worker's step is the link's."""
        if self.step_s:
            self._link.observe(self.load, at - entry.sent_at - self.step_s, self.step_s)

    def over(self) -> None:
        """The prompt is where it was to go, or will not go there."""
        self._link.forget(self._request_id)

    @property
    def until(self) -> float:
        """Until when it is sure to be kept.

        The lease begins when the prefill ends, which nobody here sees: word of it may be late. It
        cannot have been before it was sent, nor when it was last seen to be under way.
        """
        return max(self.sent_at, self.since) + self.worker.worker.lease_s

    def holds(self, now: float, transfer_s: float = 0.0) -> bool:
        """May another worker begin to fetch it now? Too late it would get another prompt's cache,
        and nobody would notice; so after any trouble of the worker nothing is taken from it."""
        worker = self.worker
        sound = worker.troubles == self.trouble and not worker.draining
        return sound and now + transfer_s < self.until
