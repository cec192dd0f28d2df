"""What is known of a request that is not over?"""

from __future__ import annotations

from math import inf

from paceline.domain.commands import Command, Move, Pause, Prediction
from paceline.domain.request import LIFECYCLE, Event, Request, State
from paceline.kernel.handover import HandOver
from paceline.kernel.worker import WorkerState
from paceline.policy.standing import Ask


class Live:
    """A request from its arrival to its end, across workers."""

    __slots__ = (
        "arrived_at",
        "ask",
        "attempt",
        "because",
        "begun_at",
        "cost",
        "deadline",
        "failures",
        "handover",
        "leaving",
        "left",
        "needs_s",
        "predicted",
        "produced",
        "request",
        "returns",
        "state",
        "timed_out",
        "told_wait",
        "tried",
        "waits",
        "whole",
        "worker",
    )

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.state = State.QUEUED
        self.arrived_at = now
        """When it came in, or when it was last taken off a worker after its first token."""
        self.deadline = now + request.promise.ttft_s
        """Until when its next token must come."""
        self.needs_s = 0.0
        """Expected seconds from now to that token, if it were sent now."""
        self.cost = float(request.prompt_tokens or request.prompt_bytes / 4)
        """Prompt tokens, about: what its turn costs the others."""
        self.attempt = 0
        """Workers that it was sent to so far."""
        self.failures = 0
        """Those that failed it."""
        self.produced = 0
        """Tokens that the client has."""
        self.begun_at = inf
        """When the first token came."""
        self.leaving: type[Pause] | type[Move] | None = None
        """How it was asked to leave its worker, where it is until it has."""
        self.left = ""
        """The worker that it was moved off, until it is sent to another."""
        self.tried: list[str] = []
        """Workers that failed it."""
        self.worker: WorkerState | None = None
        self.predicted: Prediction | None = None
        self.because = ""
        """Why the last attempt failed."""
        self.timed_out = False
        self.waits = False
        """It is at the dispatcher."""
        self.returns = False
        """It is there again, after a worker."""
        self.handover: HandOver | None = None
        """Its prompt, where one worker prefills it for another."""
        self.whole = not request.shareable
        """It is prefilled where it is answered: no other may, or one has failed to."""
        self.told_wait = False
        self.ask: Ask | None = None
        """How it was last put to the policy."""

    def move(self, event: Event) -> bool:
        """Follow the lifecycle; False for a late echo, which changes nothing."""
        after = LIFECYCLE[self.state].get(event)
        if after is None:
            return False
        self.state = after
        return True

    @property
    def avoids(self) -> list[str]:
        """Workers that it goes to only if there is no other."""
        return [*self.tried, self.left] if self.left else self.tried

    @property
    def may_leave(self) -> bool:
        """Can it be taken off its worker, and has not been asked to yet?"""
        begun = self.state is State.DECODING or self.produced
        return not self.leaving and (self.request.resumable or not begun)

    def leave(self, order: type[Pause] | type[Move], because: str) -> Command:
        """Ask it to leave its worker."""
        self.leaving = order
        return order(self.request.id, because)

    def becomes(self, request: Request) -> None:
        """It asks for less from here on; the time that it has waited counts."""
        self.request = request
        self.deadline = self.arrived_at + request.promise.ttft_s
        self.told_wait = False

    def failed(self, worker_id: str, because: str, timed_out: bool = False) -> None:
        """A worker did not answer it to the end."""
        self.failures += 1
        self.tried.append(worker_id)
        self.because = f"{worker_id}: {because}"
        self.timed_out = timed_out

    def stopped(self, produced: int, now: float) -> None:
        """It was taken off its worker, and shall go on from its last token.

        With a token, the promise of the first one is settled.
        """
        self.told_wait = False
        if produced:
            self.produced, self.arrived_at = produced, now
            self.deadline = inf
