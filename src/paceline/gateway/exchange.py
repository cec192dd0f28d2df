"""How does one request go from its client to an engine and back, whatever happens on the way?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

import structlog

from paceline.domain.commands import Degrade, Dispatch, Fail, Move, Pause, Prediction, Shed
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
from paceline.domain.outcome import Outcome
from paceline.domain.request import Request
from paceline.gateway.flavors import FLAVORS, OTHER, Flavor
from paceline.gateway.intake import Body, payload, wants_usage
from paceline.gateway.link import EngineLink, Timeouts
from paceline.gateway.ports import Host, Turn
from paceline.gateway.relay import Relay
from paceline.gateway.reply import answer_head, last_events, refusal
from paceline.gateway.resume import Produced
from paceline.gateway.seam import Seam
from paceline.gateway.sieve import Sieve
from paceline.gateway.tally import Tally
from paceline.wire.http1 import ResponseHead
from paceline.wire.server import HttpRequest, ServerConnection

log = structlog.get_logger("paceline")

RETRYABLE = frozenset((401, 403, 408, 429, *range(500, 600)))
"""Engine statuses that another engine may not give: overload, breakage, or our own wrong key."""
BLAMELESS = frozenset((408, 429))
BROKE = "the stream broke"


class Exchange:
    """One request's life at the gateway: across attempts, until the client has its answer.

    Once a part of the answer has reached the client, a further attempt writes only what is left.
    """

    __slots__ = (
        "_client",
        "_extra_headers",
        "_flows",
        "_host",
        "_http",
        "_link",
        "_predicted",
        "_produced",
        "_relay",
        "_tally",
        "_urgency",
        "arrived_at",
        "asked",
        "body",
        "command",
        "done_at",
        "error",
        "first_at",
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
        """`urgency`: of a tier, as engines with priorities are to be told."""
        self._host = host
        self._client = client
        self._http = http
        self._extra_headers = extra_headers
        self._link: EngineLink | None = None
        self._relay: Relay | None = None
        """The attempt under way; none while the request waits for a worker."""
        self._flows = False
        """Its answer passes to the client."""
        self._tally = Tally()
        self._produced = Produced() if request.resumable else None
        self._predicted: Prediction | None = None
        self._urgency = urgency
        self.body = body
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
        self.status = 0
        self.error = ""

    # What the host runs.

    def dispatch(self, command: Dispatch, now: float) -> None:
        """Send the request to a worker, or what is left of it."""
        self.command = command
        self._link = self._host.link(command.worker_id)
        if not self.begun:
            self._predicted = command.predicted
            self.sent_at = now
        self._send(now, fresh=False)

    @property
    def begun(self) -> bool:
        """The client has a part of the answer."""
        return self.status > 0

    def _send(self, now: float, fresh: bool) -> None:
        link, http, produced = self._link, self._http, self._produced
        assert link is not None
        data: bytes | None = http.body
        seam = None
        if self.begun:
            data = self._rest(link)
            if data is None:
                self._failed(f"{link.worker.kind} cannot go on with this answer", blame=False)
                return
            if not data:
                self._end_here("length")
                return
            assert produced is not None
            produced.moves_on()
            seam = Seam(produced.identity, self._tally.tokens, produced.again(http.path))
        assert data is not None
        keep_ids = produced is not None
        urgency = self._urgency(self.request.tier)
        ask = payload(data, self.body, http.path, link.worker, link.dialect, urgency, keep_ids)
        plain = http.version == "1.0"
        sieve = Sieve(self._flavor, ask.strip_usage, plain, ask.cut_ids, produced, seam)
        connection = link.connection(fresh)
        gaps = self._host.gaps(self)
        relay = Relay(self, self._client, connection, link.watch, gaps, sieve, now)
        self._relay = relay
        target = f"{http.path}?{http.query}" if http.query else http.path
        head = link.head(http.method, target, http.headers, self.request.id, len(ask.data))
        connection.start(relay, head + ask.data)

    def _rest(self, link: EngineLink) -> bytes | None:
        """What is left to be asked of this worker; None: it cannot go on."""
        if self._produced is None:
            return None
        path, body = self._http.path, self._http.body
        return self._produced.rest(path, body, link.dialect, self._tally.tokens)

    def stop(self, command: Pause | Move, now: float) -> None:
        """Take the request off its worker. Where that would harm its answer, nothing happens."""
        relay, link = self._relay, self._link
        if relay is None or link is None or self.done_at:
            return
        if self._flows and (self._is_whole or not self._goes_on or self._rest(link) is None):
            return
        relay.resume(now)
        self._leave()
        self._off("paused" if isinstance(command, Pause) else "moved", command.because)
        self._host.tell(StreamStopped(self.request.id, link.worker.id, self._tally.tokens))

    def _off(self, turn: Turn, because: str) -> None:
        """The request is off its worker, and not over."""
        self._tally.came_off(turn)
        self._host.note(self, turn, because)

    @property
    def _goes_on(self) -> bool:
        """Can the answer go on from where it stands?"""
        return self._produced is not None and self._produced.can_go_on

    @property
    def _is_whole(self) -> bool:
        """Does the client have all of the answer but the formalities?"""
        return self._produced is not None and self._produced.finished

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
            self._cut(error)
        else:
            self._answer(error)

    def _answer(self, error: PacelineError) -> None:
        self._client.answer(error.status, error.to_openai(), headers=self._own_headers(error))

    # What the relay tells.

    def on_head(self, head: ResponseHead, started: bytes) -> bool:
        """The engine refuses: pass its word on, or try another."""
        retry = head.status in RETRYABLE
        if not retry and not self.begun:
            return True
        self._failed(refusal(head, started), blame=retry and head.status not in BLAMELESS)
        return False

    def on_answer(self, now: float, token: bool) -> bytes:
        """The answer begins, or goes on: what has passed cannot be taken back."""
        relay = self._relay
        assert relay is not None
        assert relay.head is not None
        self._flows = True
        if self.begun:
            self._tally.goes_on(now)
            return b""
        if token:
            self.first_at = now
        head = relay.head
        self.status = head.status
        if self._produced is None:
            self._http.body, self.body = b"", None  # a long prompt need not outlive its sending
        spent_s = {"queue": self.sent_at - self.arrived_at}
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
                StreamBroke(self.request.id, link.worker.id, self.error, self._tally.tokens)
            )
        else:
            self._host.tell(self._tally.ended(self.request.id))
        self._over(self.status)
        self._client.finish()

    def _end_here(self, finish_reason: str = "") -> None:
        """The client has the whole answer: add what its worker left unsaid."""
        produced, tally = self._produced, self._tally
        assert produced is not None
        prompt = tally.prompt_tokens
        if prompt is None:
            prompt = produced.prompt_tokens or self.request.prompt_tokens
        wanted = prompt if self.body is not None and wants_usage(self.body) else None
        events = produced.last_words(finish_reason, wanted, tally.tokens)
        self._client.send(last_events(self._http, events))
        self._host.tell(tally.ended(self.request.id))
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
            self._tally.wrote(relay, self._produced)

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
        self._leave()
        assert self._link is not None
        worker_id = self._link.worker.id
        self._host.tell(DispatchFailed(self.request.id, worker_id, because, timed_out, blame))

    def _broke(self, because: str) -> None:
        """The client has a part of the answer: it goes on elsewhere, or nobody shall take it for
        the whole."""
        assert self._link is not None
        self._leave()
        if self._is_whole:
            self._end_here()
            return
        goes_on, tokens = self._goes_on, self._tally.tokens
        worker_id = self._link.worker.id
        if goes_on:
            self._off("moved", BROKE)
        self._host.tell(StreamBroke(self.request.id, worker_id, because, tokens, goes_on))
        if not goes_on:
            self.refuse(UpstreamFailed(because))

    def _cut(self, error: PacelineError) -> None:
        """End an answer within: by an event that says so, else by a broken connection."""
        if not self.first_at:
            self._client.abort()
            return
        event = self._flavor.error_event(error.to_openai())
        self._client.send(last_events(self._http, event))
        self._client.finish()

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
        self._http.body, self.body = b"", None
        self._host.closed(self)

    @property
    def _flavor(self) -> Flavor:
        return FLAVORS.get(self._http.path, OTHER)

    def _own_headers(self, error: PacelineError | None = None) -> list[tuple[str, str]]:
        headers = [("x-request-id", self.request.id), ("x-paceline-tier", self.request.tier)]
        headers += self._extra_headers
        if self.command is not None:
            headers.append(("x-paceline-worker", self.command.worker_id))
        if error is not None:
            headers += error.headers()
        return headers

    # What became of it.

    def outcome(self) -> Outcome:
        """The request, now that it is over."""
        command, tally = self.command, self._tally
        return Outcome(
            request=self.asked,
            worker=self.worker_id,
            status=self.status,
            error=self.error,
            attempts=command.attempt if command is not None else 0,
            because=command.because if command is not None else "",
            predicted=self._predicted,
            queued_s=(self.sent_at or self.done_at) - self.arrived_at,
            ttft_s=(self.first_at or self.done_at) - self.arrived_at,
            itl_s=tally.itl_s,
            stall_s=tally.stall_s,
            seconds=self.done_at - self.arrived_at,
            prompt_tokens=tally.prompt_tokens,
            cached_tokens=tally.cached_tokens,
            output_tokens=tally.tokens,
            degraded_to=self.request if self.request is not self.asked else None,
            moved=tally.moved,
            paused=tally.paused,
        )

    @property
    def worker_id(self) -> str:
        return self.command.worker_id if self.command is not None else ""
