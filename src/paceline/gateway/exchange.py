"""How does one request go from its client to an engine and back, whatever happens on the way?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from time import monotonic

import structlog

from paceline.domain.commands import (
    Degrade,
    Dispatch,
    Fail,
    Move,
    Pause,
    Prediction,
    Prefill,
    Shed,
)
from paceline.domain.errors import (
    PacelineError,
    RateLimited,
    Unavailable,
    UpstreamFailed,
    UpstreamTimeout,
)
from paceline.domain.facts import (
    ClientLeft,
    DispatchFailed,
    FirstTokenSeen,
    StreamBroke,
    StreamStopped,
)
from paceline.domain.request import Request
from paceline.gateway.answer import Answer
from paceline.gateway.asking import Asking
from paceline.gateway.handover import HandOver
from paceline.gateway.intake import Body
from paceline.gateway.link import EngineLink, Timeouts
from paceline.gateway.ports import Host, Turn
from paceline.gateway.relay import Relay
from paceline.gateway.reply import BLAMELESS, RETRYABLE, answer_head, cut, last_events, refusal
from paceline.wire.http1 import ResponseHead
from paceline.wire.server import HttpRequest, ServerConnection

log = structlog.get_logger("paceline")

BROKE = "the stream broke"


class Exchange:
    """One request's life at the gateway: across attempts, until the client has its answer.

    Once a part of the answer has reached the client, a further attempt writes only what is left.
    """

    __slots__ = (
        "_asking",
        "_client",
        "_extra_headers",
        "_flows",
        "_handover",
        "_host",
        "_http",
        "_link",
        "_relay",
        "answer",
        "arrived_at",
        "asked",
        "command",
        "done_at",
        "error",
        "first_at",
        "predicted",
        "prefill_s",
        "prefilled_at",
        "request",
        "sent_at",
        "status",
    )

    def __init__(
        self,
        host: Host,
        client: ServerConnection,
        http: HttpRequest,
        body: Body | None,
        request: Request,
        urgency: Callable[[str], int],
        now: float,
        extra_headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._host = host
        self._client = client
        self._http = http
        self._extra_headers = extra_headers
        self._link: EngineLink | None = None
        self._relay: Relay | None = None
        """The attempt under way; none while the request waits for a worker."""
        self._flows = False
        """Its answer passes to the client."""
        self._handover: HandOver | None = None
        """From the worker that prefills the prompt to the one that answers, if there are two."""
        self.answer = Answer(http.path, request.resumable)
        self.predicted: Prediction | None = None
        self._asking = Asking(http, body, request.id, urgency)
        self.asked = request
        """What the client asked for."""
        self.request = request
        """What it gets: the same, unless it is degraded."""
        self.arrived_at = now
        self.sent_at = 0.0
        self.first_at = 0.0
        """When the first token was there; 0 for answers that are no streams."""
        self.done_at = 0.0
        """When it was over; 0: it is not."""
        self.command: Dispatch | None = None
        self.prefilled_at = ""
        """The worker that had prefilled the prompt, if not the one that answered."""
        self.prefill_s = 0.0
        self.status = 0
        self.error = ""

    # What the host runs.

    def prefill(self, command: Prefill, now: float) -> None:
        """Have a worker prefill the prompt for the one that will answer."""
        self._drop_handover()
        link = self._host.link(command.worker_id)
        self.predicted, self.sent_at = command.predicted, now
        self._handover = handover = HandOver(self, self._host, link, self._http.path, now)
        handover.start(self._asking.prompt(link, self.request.tier, handover), now)

    def dispatch(self, command: Dispatch, now: float) -> None:
        """Send the request to a worker, or what is left of it."""
        self.command = command
        self._link = self._host.link(command.worker_id)
        if not command.prefilled_at:
            self._drop_handover()
            if not self.begun:
                self.predicted, self.sent_at = command.predicted, now
        # What is to be fetched once is sent once: never again over a new connection.
        self._send(now, fresh=bool(command.prefilled_at))

    @property
    def begun(self) -> bool:
        """The client has a part of the answer."""
        return self.status > 0

    def _send(self, now: float, fresh: bool) -> None:
        link, http, answer, command = self._link, self._http, self.answer, self.command
        assert link is not None
        assert command is not None
        data: bytes | None = http.body
        seam = handed = None
        until = inf
        if command.prefilled_at or (link.transfer is not None and link.transfer.together):
            handover = self._handover
            handed = handover.fetch(command.prefilled_at, now) if handover is not None else None
            if handover is None or handed is None:
                self._failed("what was to be prefilled for it is not there", blame=False)
                return
            until = handover.until
        elif self.begun:
            data = answer.rest(http.body, link.dialect)
            if data is None:
                self._failed(f"{link.worker.kind} cannot go on with this answer", blame=False)
                return
            if not data:
                self._end_here("length")
                return
            seam = answer.seam()
        assert data is not None
        message, sieve = self._asking.whole(data, link, self.request.tier, answer, seam, handed)
        connection = link.connection(fresh)
        gaps = self._host.gaps(self)
        relay = Relay(self, self._client, connection, link.watch, gaps, sieve, now)
        self._relay = relay
        connection.start(relay, message, until)

    def _drop_handover(self) -> None:
        """Nobody will fetch what was prefilled, if anything was."""
        handover, self._handover = self._handover, None
        if handover is not None:
            handover.drop()

    @property
    def prefills_at(self) -> str:
        """The worker that is at its prompt, for another one to answer."""
        handover = self._handover
        return handover.worker_id if handover is not None and handover.under_way else ""

    def stop(self, command: Pause | Move, now: float) -> None:
        """Take the request off its worker. Where that would harm its answer, nothing happens."""
        relay, link, answer, worker_id = self._relay, self._link, self.answer, self.prefills_at
        if self.done_at:
            return
        if relay is not None and link is not None:
            if self._flows and not answer.can_move(self._http.body, link.dialect):
                return
            worker_id = link.worker.id
            relay.resume(now)
            self._leave()
        elif not worker_id:
            return
        self._drop_handover()
        self._off("paused" if isinstance(command, Pause) else "moved", command.because)
        self._host.tell(StreamStopped(self.request.id, worker_id, answer.tokens))

    def _off(self, turn: Turn, because: str) -> None:
        """The request is off its worker, and not over."""
        self.answer.tally.came_off(turn)
        self._host.note(self, turn, because)

    def degrade(self, command: Degrade) -> None:
        """Let the request be what it becomes when its promise cannot be kept."""
        if self.request.instead is not None and not self.begun:
            self.request = self.request.instead

    def shed(self, command: Shed) -> None:
        """Turn the request away."""
        self._host.note(self, "shed", command.because)
        kind = Unavailable if command.unavailable else RateLimited
        self.refuse(kind(command.because, retry_after_s=command.retry_after_s))

    def fail(self, command: Fail) -> None:
        """Every attempt was in vain."""
        kind = UpstreamTimeout if command.timed_out else UpstreamFailed
        self.refuse(kind(command.because))

    def refuse(self, error: PacelineError) -> None:
        """Answer with an error; or end with one what the client has of its answer."""
        self._conclude(UpstreamFailed(f"the stream broke: {error}") if self.begun else error)

    def end(self, error: PacelineError) -> None:
        """Nobody goes on with this request, and no worker is to blame."""
        self._leave()
        try:
            self._host.tell(ClientLeft(self.request.id))
        finally:
            self._conclude(error)

    def _conclude(self, error: PacelineError) -> None:
        self.error = str(error)
        begun = self.begun
        self._over(self.status or error.status)
        if begun:
            cut(self._client, self._http, error, within_tokens=self.first_at > 0)
        else:
            headers = self._own_headers(error)
            self._client.answer(error.status, error.to_openai(), headers=headers)

    # What the worker tells that prefills for another one.

    def on_unprefilled(self, because: str, timed_out: bool, blame: bool) -> bool:
        """Nobody can fetch the prompt. Where both work together that is the end of this attempt,
        unless the other one has had all that it needs: then False."""
        handover = self._handover
        if self._flows or handover is None:
            return False
        self._handover = None
        self._leave()
        worker_id = handover.worker_id
        self._host.tell(DispatchFailed(self.request.id, worker_id, because, timed_out, blame))
        return True

    # What the relay tells.

    def on_head(self, head: ResponseHead, started: bytes) -> bool:
        """The engine refuses: pass its word on, or try another."""
        retry = head.status in RETRYABLE
        if not retry and not self.begun:
            return True
        # A prompt that could not be fetched says nothing of the worker that wanted to.
        blame = retry and head.status not in BLAMELESS and self._handover is None
        self._failed(refusal(head.status, started), blame=blame)
        return False

    def on_answer(self, now: float, token: bool) -> bytes:
        """The answer begins, or goes on: what has passed cannot be taken back."""
        relay = self._relay
        assert relay is not None
        assert relay.head is not None
        self._flows = True
        if self.begun:
            self.answer.tally.goes_on(now)
            return b""
        if token:
            self.first_at = now
        head = relay.head
        self.status = head.status
        if self.answer.produced is None:
            self._asking.forget()
        spent_s = {"queue": self.sent_at - self.arrived_at}
        if self._handover is not None:
            self.prefilled_at, self.prefill_s = self._handover.worker_id, self._handover.took_s
            spent_s["prefill"] = self.prefill_s
        spent_s["ttft" if token else "engine"] = now - self.sent_at
        return answer_head(self._http, head, self._own_headers(), spent_s)

    def on_first_token(self, now: float) -> None:
        """The client has the first token that this worker wrote."""
        self._host.tell(FirstTokenSeen(self.request.id, now))

    def on_complete(self, now: float) -> None:
        """The answer has passed whole."""
        relay, link = self._relay, self._link
        assert relay is not None
        assert relay.head is not None
        assert link is not None
        self._leave(keep=relay.head.keep_alive)
        if relay.failed:
            self.error = "the engine reported an error within the stream"
            self._host.tell(
                StreamBroke(self.request.id, link.worker.id, self.error, self.answer.tokens)
            )
        else:
            self._host.tell(self.answer.ended(self.request.id))
        self._over(self.status)
        self._client.finish()

    def _end_here(self, finish_reason: str = "") -> None:
        """The client has the whole answer: add what its worker left unsaid."""
        events = self.answer.last_words(
            finish_reason, self._asking.body, self.request.prompt_tokens
        )
        self._client.send(last_events(self._http, events))
        self._host.tell(self.answer.ended(self.request.id))
        self._over(self.status)
        self._client.finish()

    def _leave(self, keep: bool = False) -> None:
        """Be done with the worker; closing the connection frees the engine's slot at once."""
        relay, self._relay = self._relay, None
        if relay is None:
            return
        assert self._link is not None
        connection = relay.connection
        if keep:
            relay.release()
            self._link.keep(connection)
        else:
            relay.abandon()
        if self._flows:
            self._flows = False
            self.answer.wrote(relay)

    def on_trouble(self, because: str) -> None:
        """The engine died, or does not speak as it should."""
        relay = self._relay
        assert relay is not None
        if self._flows:
            self._broke(because)
        elif relay.connection.carried > 1 and not relay.heard:
            relay.abandon()  # the kept-alive connection had ended unseen
            self._send(monotonic(), fresh=True)
        else:
            self._failed(because)

    # What the client does.

    def on_client_left(self) -> None:
        """Nobody waits for the answer any more."""
        if self.done_at:
            return
        self._leave()
        self.error = "the client left"
        try:
            self._host.tell(ClientLeft(self.request.id))
        finally:
            self._over(self.status or 499)

    def on_writable(self) -> None:
        """The client reads again."""
        if self._relay is not None:
            self._relay.resume(monotonic())

    # Trouble.

    def expire(self, timeouts: Timeouts, now: float) -> None:
        """Has the engine been silent for too long?"""
        if self._handover is not None:
            self._handover.look(timeouts, now)
        relay = self._relay
        if relay is None or self.done_at or relay.paused:
            return
        connecting = bool(relay.connection.connecting)
        because = timeouts.passed(now - relay.last_at, connecting, self._flows)
        if because and self._flows:
            self._broke(because)
        elif because:
            self._failed(because, timed_out=True)

    def _failed(self, because: str, timed_out: bool = False, blame: bool = True) -> None:
        """Nothing of this attempt has reached the client: the kernel may try another worker."""
        relay, handover, self._handover = self._relay, self._handover, None
        if relay is not None and relay.connection.connecting and handover is not None:
            handover.fetched = False  # the worker does not know of it
        self._leave()
        assert self._link is not None
        worker_id = self._link.worker.id
        self._host.tell(DispatchFailed(self.request.id, worker_id, because, timed_out, blame))
        if handover is not None:  # now that this worker is known not to be of help
            handover.drop()

    def _broke(self, because: str) -> None:
        """The client has a part of the answer: it goes on elsewhere, or nobody shall take it for
        the whole."""
        assert self._link is not None
        self._leave()
        if self.answer.is_whole:
            self._end_here()
            return
        goes_on, tokens = self.answer.goes_on, self.answer.tokens
        worker_id = self._link.worker.id
        if goes_on:
            self._off("moved", BROKE)
        self._host.tell(StreamBroke(self.request.id, worker_id, because, tokens, goes_on))
        if not goes_on:
            self.refuse(UpstreamFailed(because))

    def on_bug(self) -> None:
        """Handling this request raised what it should not have: end it, and no other."""
        log.exception("a bug ended a request", id=self.request.id)
        if self.done_at:
            self._client.abort()
            return
        self.end(PacelineError("Paceline itself failed at this request."))

    def _over(self, status: int) -> None:
        self.status = status
        self.done_at = monotonic()
        self._client.context = None
        self._drop_handover()
        self._asking.forget()
        self._host.closed(self)

    def _own_headers(self, error: PacelineError | None = None) -> list[tuple[str, str]]:
        headers = [("x-request-id", self.request.id), ("x-paceline-tier", self.request.tier)]
        headers += self._extra_headers
        if self.command is not None:
            headers.append(("x-paceline-worker", self.command.worker_id))
        if error is not None:
            headers += error.headers()
        return headers

    @property
    def worker_id(self) -> str:
        return self.command.worker_id if self.command is not None else ""
