"""How does one request go from its client to an engine and back, whatever happens on the way?"""

from __future__ import annotations

from time import monotonic
from typing import Any

import msgspec
import structlog

from paceline.domain.commands import Dispatch, Fail, Shed
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
    StreamEnded,
)
from paceline.domain.outcome import Outcome
from paceline.domain.request import Request
from paceline.gateway.flavors import FLAVORS, OTHER, Flavor, Usage, usage
from paceline.gateway.intake import Body, with_fields
from paceline.gateway.link import EngineLink
from paceline.gateway.ports import Host
from paceline.gateway.relay import Relay
from paceline.wire.http1 import HOP_BY_HOP, LAST_CHUNK, ResponseHead, chunk, response_head
from paceline.wire.server import HttpRequest, ServerConnection

log = structlog.get_logger("paceline")

RETRYABLE = frozenset((401, 403, 408, 429, *range(500, 600)))
"""Engine statuses that another engine may not give: overload, breakage, or our own wrong key."""
BLAMELESS = frozenset((408, 429))


class Timeouts(msgspec.Struct, frozen=True):
    """How long an engine may keep a request waiting, in seconds."""

    connect_s: float = 5.0
    first_token_s: float = 600.0
    stall_s: float = 120.0


class Exchange:
    """One request's life at the gateway: across attempts, until the client has its answer."""

    __slots__ = (
        "_client",
        "_host",
        "_http",
        "_link",
        "_relay",
        "arrived_at",
        "body",
        "command",
        "done_at",
        "error",
        "first_at",
        "request",
        "sent_at",
        "status",
        "urgency",
        "usage",
    )

    def __init__(
        self,
        host: Host,
        client: ServerConnection,
        http: HttpRequest,
        body: Body | None,
        request: Request,
        urgency: int,
        now: float,
    ) -> None:
        self._host = host
        self._client = client
        self._http = http
        self._link: EngineLink | None = None
        self._relay: Relay | None = None
        self.body = body
        self.request = request
        self.urgency = urgency
        self.arrived_at = now
        self.sent_at = 0.0
        self.first_at = 0.0
        """When the first token was there; 0 for answers that are no streams."""
        self.done_at = 0.0
        """When it was over; 0: it is not."""
        self.command: Dispatch | None = None
        self.status = 0
        self.error = ""
        self.usage = Usage()

    # What the host runs.

    def dispatch(self, command: Dispatch, now: float) -> None:
        """Send the request to a worker."""
        self.command = command
        self._link = self._host.link(command.worker_id)
        self._send(now, fresh=False)

    def _send(self, now: float, fresh: bool) -> None:
        link = self._link
        assert link is not None
        self.sent_at = now
        connection = link.connection(fresh)
        payload, strip = self._payload(link)
        http = self._http
        target = f"{http.path}?{http.query}" if http.query else http.path
        self._relay = Relay(
            self,
            self._client,
            connection,
            link.watch,
            self._host.gaps(self),
            self._flavor,
            strip,
            plain=http.version == "1.0",
            now=now,
        )
        head = link.head(http.method, target, http.headers, self.request.id, len(payload))
        connection.start(self._relay, head + payload)

    def _payload(self, link: EngineLink) -> tuple[bytes, bool]:
        """The body for the engine, and whether the usage that we ask for must be cut out again."""
        data, body = self._http.body, self.body
        if body is None:
            return data, False
        fields: dict[str, Any] = {}
        name = link.worker.serves_as or link.worker.model
        if body.model is not None and body.model != name:
            fields["model"] = name
        flavor, strip = self._flavor, False
        if flavor is not OTHER:
            fields.update(link.dialect.extras(self._http.path, self.urgency))
            if flavor.openai_usage and body.stream:
                options = body.stream_options or {}
                strip = not options.get("include_usage")
                if strip:
                    fields["stream_options"] = {**options, "include_usage": True}
        return (with_fields(data, fields) if fields else data), strip

    def shed(self, command: Shed) -> None:
        """Turn the request away."""
        kind = Unavailable if command.unavailable else RateLimited
        self.refuse(kind(command.because, retry_after_s=command.retry_after_s))

    def fail(self, command: Fail) -> None:
        """Every attempt was in vain."""
        kind = UpstreamTimeout if command.timed_out else UpstreamFailed
        self.refuse(kind(command.because))

    def refuse(self, error: PacelineError) -> None:
        """Answer with an error."""
        self.error = str(error)
        self._over(error.status)
        self._answer(error)

    def _answer(self, error: PacelineError) -> None:
        self._client.answer(error.status, error.to_openai(), headers=self._own_headers(error))

    # What the relay tells.

    def on_head(self, head: ResponseHead, started: bytes) -> bool:
        """The engine refuses: pass its word on, or try another."""
        if head.status not in RETRYABLE:
            return True
        reason = f"HTTP {head.status}"
        if head.status not in (401, 403):  # such a body may quote the engine's key
            reason += f": {started[:300].decode('utf-8', 'replace')}"
        self._failed(reason.strip().rstrip(":"), blame=head.status not in BLAMELESS)
        return False

    def on_answer(self, now: float, token: bool) -> bytes:
        """The answer begins: nothing can be retried from here on."""
        relay = self._relay
        assert relay is not None
        assert relay.head is not None
        head = relay.head
        if token:
            self.first_at = now
            self._host.tell(FirstTokenSeen(self.request.id, now))
        self.status = head.status
        self._http.body, self.body = b"", None  # a long prompt need not outlive its sending
        headers = [(n, v) for n, v in head.headers if n not in HOP_BY_HOP and n != "x-request-id"]
        headers += self._own_headers()
        waited_ms = (self.sent_at - self.arrived_at) * 1e3
        engine_ms = (now - self.sent_at) * 1e3
        name = "ttft" if token else "engine"
        headers.append(("server-timing", f"queue;dur={waited_ms:.1f}, {name};dur={engine_ms:.1f}"))
        if self._http.version == "1.0":
            self._http.keep_alive = False
        elif head.length is None:
            headers.append(("transfer-encoding", "chunked"))
        if head.length is not None and head.status not in (204, 304):
            headers.append(("content-length", str(head.length)))
        if not self._http.keep_alive:
            headers.append(("connection", "close"))
        return response_head(head.status, headers)

    def on_complete(self, now: float) -> None:
        """The answer has passed whole."""
        relay, link = self._relay, self._link
        assert relay is not None
        assert relay.head is not None
        assert link is not None
        connection = relay.connection
        relay.release()
        if relay.head.keep_alive:
            link.keep(connection)
        else:
            connection.close()
        self.usage = found = usage(relay.tail)
        output = found.output_tokens if found.output_tokens is not None else relay.tokens
        if relay.failed:
            self.error = "the engine reported an error within the stream"
            self._host.tell(StreamBroke(self.request.id, link.worker.id, self.error))
        else:
            self._host.tell(
                StreamEnded(
                    self.request.id,
                    output,
                    itl_s=self.itl_s,
                    stall_s=relay.stall_s,
                    prompt_tokens=found.prompt_tokens,
                    cached_tokens=found.cached_tokens,
                )
            )
        self._over(self.status)
        self._client.finish()

    def on_trouble(self, because: str) -> None:
        """The engine died, or does not speak as it should."""
        relay = self._relay
        assert relay is not None
        if self.status:
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
        if self._relay is not None:
            self._relay.abandon()
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
        silent_s = now - relay.last_at
        if self.status:
            if silent_s > timeouts.stall_s:
                self._broke(f"no token for {silent_s:.0f} s")
        elif relay.connection.connecting and silent_s > timeouts.connect_s:
            self._failed(f"no connection within {timeouts.connect_s:g} s", timed_out=True)
        elif silent_s > timeouts.first_token_s:
            self._failed(f"no answer within {timeouts.first_token_s:g} s", timed_out=True)

    def _failed(self, because: str, timed_out: bool = False, blame: bool = True) -> None:
        """Nothing has reached the client yet: the kernel may try another worker."""
        if self._relay is not None:
            self._relay.abandon()
            self._relay = None
        assert self._link is not None
        worker_id = self._link.worker.id
        self._host.tell(DispatchFailed(self.request.id, worker_id, because, timed_out, blame))

    def _broke(self, because: str) -> None:
        """The client has a part of the answer: end it so that nobody takes it for the whole."""
        relay, link = self._relay, self._link
        assert relay is not None
        assert link is not None
        relay.abandon()
        self.error = because
        self._host.tell(StreamBroke(self.request.id, link.worker.id, because))
        self._over(self.status)
        self._cut(UpstreamFailed(f"the stream broke: {because}"))

    def _cut(self, error: PacelineError) -> None:
        """End an answer within: by an event that says so, else by a broken connection."""
        if not self.first_at:
            self._client.abort()
            return
        event = self._flavor.error_event(error.to_openai())
        self._client.send(event if self._http.version == "1.0" else chunk(event) + LAST_CHUNK)
        self._client.finish()

    def on_bug(self) -> None:
        """Handling this request raised what it should not have: end it, and no other."""
        log.exception("a bug ended a request", request_id=self.request.id)
        if self.done_at:
            self._client.abort()
            return
        if self._relay is not None:
            self._relay.abandon()
        begun = self.status > 0
        error = PacelineError("Paceline itself failed at this request.")
        self.error = error.message
        try:
            self._host.tell(ClientLeft(self.request.id))  # no worker is to blame
        finally:
            self._over(self.status or error.status)
            if begun:
                self._cut(error)
            else:
                self._answer(error)

    def _over(self, status: int) -> None:
        self.status = status
        self.done_at = monotonic()
        self._client.context = None
        try:
            self._host.closed(self)
        finally:
            self._relay = None  # it names its owner: let no cycle stay behind

    @property
    def _flavor(self) -> Flavor:
        return FLAVORS.get(self._http.path, OTHER)

    def _own_headers(self, error: PacelineError | None = None) -> list[tuple[str, str]]:
        headers = [("x-request-id", self.request.id), ("x-paceline-tier", self.request.tier)]
        if self.command is not None:
            headers.append(("x-paceline-worker", self.command.worker_id))
        if error is not None:
            headers += error.headers()
        return headers

    # What became of it.

    def outcome(self) -> Outcome:
        """The request, now that it is over."""
        command, found = self.command, self.usage
        return Outcome(
            request=self.request,
            worker=self.worker_id,
            status=self.status,
            error=self.error,
            attempts=command.attempt if command is not None else 0,
            because=command.because if command is not None else "",
            predicted=command.predicted if command is not None else None,
            queued_s=(self.sent_at or self.done_at) - self.arrived_at,
            ttft_s=(self.first_at or self.done_at) - self.arrived_at,
            itl_s=self.itl_s,
            stall_s=self._relay.stall_s if self._relay is not None else 0.0,
            seconds=self.done_at - self.arrived_at,
            prompt_tokens=found.prompt_tokens,
            cached_tokens=found.cached_tokens,
            output_tokens=self.output_tokens,
        )

    @property
    def worker_id(self) -> str:
        return self.command.worker_id if self.command is not None else ""

    @property
    def output_tokens(self) -> int:
        if self.usage.output_tokens is not None:
            return self.usage.output_tokens
        return self._relay.tokens if self._relay is not None else 0

    @property
    def itl_s(self) -> float:
        """Mean gap between tokens; 0 where there were not two."""
        relay, tokens = self._relay, self.output_tokens
        if relay is None or tokens < 2 or not self.first_at:
            return 0.0
        return (relay.token_at - relay.first_at) / (tokens - 1)
