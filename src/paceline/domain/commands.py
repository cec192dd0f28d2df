"""What shall be done? Commands, imperative, each with its reason."""

from __future__ import annotations

import msgspec


class Prediction(msgspec.Struct, frozen=True):
    """What a request may expect on the worker it is sent to."""

    ttft_s: float
    """Median expectation, from arrival at the gateway."""
    itl_s: float
    headroom: float
    """Least of (promise - predicted)/promise over all that is touched; below 0: one breaks."""
    ttft_spread: float = 0.0
    """Standard deviation of log(outcome / predicted) that is reckoned with."""
    itl_spread: float = 0.0
    cached_tokens: int = 0
    """Prompt tokens believed to be in the worker's KV cache."""
    ttft_factor: float = 1.0
    """What of `ttft_s` corrects for how outcomes of late differed from step times alone."""
    itl_factor: float = 1.0
    """The same of `itl_s`."""


class RunnerUp(msgspec.Struct, frozen=True):
    """The road not taken: the next best worker, and what was expected of it."""

    worker_id: str
    costs_more: float
    """Above the worker chosen, in broken promises; of those that tie it may be below 0."""
    ttft_s: float
    itl_s: float


class Dispatch(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    worker_id: str
    because: str
    predicted: Prediction | None = None
    """None for policies that don't predict."""
    attempt: int = 1
    produced: int = 0
    """Tokens that the client has already: the answer goes on after them."""
    prefilled_at: str = ""
    """The worker that has the prompt's KV cache for it; empty: it prefills the prompt itself."""
    runner_up: RunnerUp | None = None
    """None where there was no other, and for policies that do not compare."""


class Prefill(msgspec.Struct, frozen=True, tag=True):
    """Have a worker prefill the prompt for another one, which writes the answer.

    Answered by the fact `Prefilled`, or by `DispatchFailed` of this worker. Where both work on it
    at once (`Worker.transfer` sglang) the `Dispatch` to the other follows immediately.
    """

    request_id: str
    worker_id: str
    because: str
    predicted: Prediction | None = None
    """Of the whole way, transfer included."""
    attempt: int = 1


class Hold(msgspec.Struct, frozen=True, tag=True):
    """Keep the request at the gateway for now."""

    request_id: str
    because: str


class Shed(msgspec.Struct, frozen=True, tag=True):
    """Turn the request away: 429, or 503 with `unavailable`, when no worker is there at all."""

    request_id: str
    because: str
    retry_after_s: float
    unavailable: bool = False


class Fail(msgspec.Struct, frozen=True, tag=True):
    """The retry budget is spent: 502, or 504 if the last attempt timed out."""

    request_id: str
    because: str
    timed_out: bool = False


class Pause(msgspec.Struct, frozen=True, tag=True):
    """Take a request off its worker and keep its tokens: others need the room.

    Answered by the fact `StreamStopped`, or by nothing if it cannot be stopped without harm.
    """

    request_id: str
    because: str


class Move(msgspec.Struct, frozen=True, tag=True):
    """Take a request off its worker and keep its tokens: it shall go on elsewhere at once.

    Answered as `Pause` is.
    """

    request_id: str
    because: str


class Degrade(msgspec.Struct, frozen=True, tag=True):
    """From now on the request is what its `instead` says: a lower tier, or another model."""

    request_id: str
    tier: str
    model: str
    because: str


Command = Dispatch | Prefill | Hold | Shed | Fail | Pause | Move | Degrade
