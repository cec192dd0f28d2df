"""Which endpoint is meant, is the request sound, and who may ask it?

`/v1/*` of the engines goes through the relay; what Paceline answers itself is a Starlette
application on uvicorn's protocol, to which the socket is handed over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from paceline.domain.errors import (
    HeadersTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PacelineError,
    PayloadTooLarge,
    RequestTimeout,
    Unavailable,
)
from paceline.domain.kvevents import PromptTokens
from paceline.domain.request import Request
from paceline.domain.way_down import with_way_down
from paceline.gateway.auth import Directory
from paceline.gateway.exchange import Exchange
from paceline.gateway.handover import shareable
from paceline.gateway.intake import (
    Body,
    batch_of,
    exact_blocks,
    max_tokens,
    multipart_model,
    prefix_blocks,
    prompt_size,
    prompt_text,
    read,
)
from paceline.gateway.ports import Host, Prompts
from paceline.gateway.quota import Quotas
from paceline.gateway.resume import resumable
from paceline.wire.server import HttpRequest, ServerConnection

log = structlog.get_logger("paceline")

OWN = re.compile(r"/(health(/.*)?|v1/(models|files|batches)(/.*)?)?")
"""Paths that Paceline answers itself."""
METHODS = ("POST", "GET", "DELETE")
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
WORTH_BYTES = 1024
"""Prompts of less text are not tokenised: to prefill their 200 tokens costs no more than to know
them."""
LEAST_WAIT_S = 0.005
WAIT_S_A_BYTE = 2e-6
"""How long a prompt may take to be tokenised: about twice what it takes alone, 4 microseconds a
token of 4 bytes."""
MOST_WAIT_S = 0.05
MOST_WAIT_SHARE = 0.1
"""Of the TTFT promise."""
REFUSALS: dict[int, type[PacelineError]] = {
    400: InvalidRequest,
    408: RequestTimeout,
    413: PayloadTooLarge,
    431: HeadersTooLarge,
}


class Gateway:
    """The handler of the clients' listener."""

    def __init__(
        self,
        host: Host,
        directory: Directory,
        names: Mapping[str, str],
        own: ASGIApp,
        random_bytes: Callable[[int], bytes] = os.urandom,
        quotas: Quotas | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        self.directory = directory
        self.quotas = quotas or Quotas()
        """What tenants may use; the host tells it of each request that is over."""
        self.names = names
        """Public names and aliases of the models, each with the model it means."""
        self._host = host
        self.prompts = prompts
        """Who tokenises the prompts of models that have a tokenizer."""
        self._random = random_bytes
        self.trace: Callable[[str, HttpRequest], None] | None = None
        """Shown each request that is let in, with its id, to begin its trace in its headers."""
        self._uvicorn = uvicorn.Config(own, log_config=None, access_log=False, lifespan="off")
        self._uvicorn.load()
        self._state = ServerState()

    def on_request(self, connection: ServerConnection, http: HttpRequest) -> None:
        """Answer, or start the exchange that will."""
        now = monotonic()
        request_id = http.headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id) or self._host.knows(request_id):
            request_id = self._random(16).hex()
        try:
            if OWN.fullmatch(http.path):
                self._hand_over(connection, http)
            elif http.path.startswith("/v1/"):
                self._relay(connection, http, request_id, now)
            else:
                raise NotFound(f"{http.path} does not exist; the API is under /v1/")
        except PacelineError as error:
            headers = [("x-request-id", request_id), *error.headers()]
            connection.answer(error.status, error.to_openai(), headers=headers)
        except Exception:  # a bug costs one request, not the others
            exchange = connection.context
            if isinstance(exchange, Exchange):
                exchange.on_bug()
            else:
                log.exception("a bug ended a request", id=request_id)
                failed = PacelineError("Paceline itself failed at this request.")
                connection.answer(failed.status, failed.to_openai())

    def _relay(
        self, connection: ServerConnection, http: HttpRequest, request_id: str, now: float
    ) -> None:
        if http.method not in METHODS:
            raise MethodNotAllowed(f"{http.method} is not supported here.", allowed=METHODS)
        headers = http.headers
        tenant = self.directory.identify(headers)
        body = read(http.body) if _is_json(http) else None
        service_tier = body.service_tier if body is not None else None
        tier, promise = self.directory.resolve(tenant, headers, service_tier or None)
        model = self._model(http, body)
        text = prompt_text(body) if body is not None else b""
        size, tokens = prompt_size(text)
        forms = self._host.block_forms(model) if tokens is not None else ()
        blocks = exact_blocks(body, forms) if body is not None and forms else ()
        streaming = body is not None and bool(body.stream)
        request = Request(
            id=request_id,
            model=model,
            tenant=tenant.name,
            tier=tier.name,
            promise=promise,
            weight=tier.weight,
            overload=tier.overload,
            preemptible=tier.preemptible,
            deadline_s=tier.deadline_s,
            resumable=streaming and resumable(http.path, http.method, http.body),
            prompt_bytes=size,
            prompt_tokens=tokens,
            max_tokens=max_tokens(body) if body is not None else None,
            blocks=prefix_blocks(text),
            token_blocks=blocks,
            streaming=streaming,
            shareable=body is not None and shareable(http.path, http.method, body),
            seed=int.from_bytes(self._random(4), "big"),
            batch=batch_of(headers),
        )
        request = with_way_down(request, self.directory.tiers, self.names.get)
        urgency = self.directory.urgency
        rate = self.quotas.admit(request, now)  # the last that may refuse: what is let in must end
        if self.trace is not None:
            self.trace(request_id, http)
        exchange = Exchange(self._host, connection, http, body, request, urgency, now, rate)
        connection.context = exchange
        if not self._tokenised(exchange, http):
            self._host.open(exchange)

    def _tokenised(self, exchange: Exchange, http: HttpRequest) -> bool:
        """Is the prompt tokenised first? So where its tokens may change what is decided."""
        request, prompts, host = exchange.request, self.prompts, self._host
        is_text = request.prompt_tokens is None and request.prompt_bytes >= WORTH_BYTES
        if prompts is None or not is_text:
            return False
        if not prompts.reads(request.model, http.path, len(http.body)):
            return False
        forms = host.block_forms(request.model)

        def told(tokens: PromptTokens | None) -> None:
            if exchange.done_at:
                return
            try:
                if tokens is not None:
                    exchange.asked = exchange.request = request.with_tokens(tokens)
                host.open(exchange, monotonic() - exchange.arrived_at)
            except Exception:
                exchange.on_bug()

        patience_s = min(
            LEAST_WAIT_S + request.prompt_bytes * WAIT_S_A_BYTE,
            MOST_WAIT_S,
            MOST_WAIT_SHARE * request.promise.ttft_s,
        )
        waits = bool(forms) and prompts.read(
            request.id, request.model, http.path, http.body, forms, patience_s, told
        )
        if waits:
            host.track(exchange)
        return waits

    def _model(self, http: HttpRequest, body: Body | None) -> str:
        """The model that a request is for."""
        asked = body.model if body is not None else multipart_model(http.body)
        if asked is None:
            models = set(self.names.values())
            if len(models) == 1:
                return models.pop()
            raise InvalidRequest("name a model: several are served here", param="model")
        model = self.names.get(asked)
        if model is None:
            raise NotFound.model(asked)
        return model

    def _hand_over(self, connection: ServerConnection, http: HttpRequest) -> None:
        """Let uvicorn answer this one; afterwards the connection is closed."""
        protocol = HttpToolsProtocol(self._uvicorn, self._state, app_state={})
        target = f"{http.path}?{http.query}" if http.query else http.path
        headers: dict[str, Any] = dict(http.headers)
        for name in ("connection", "transfer-encoding", "expect", "upgrade"):
            headers.pop(name, None)
        headers |= {"content-length": len(http.body), "connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"{http.method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")
        connection.take_over(protocol)
        protocol.data_received(head + http.body)

    def on_client_left(self, connection: ServerConnection) -> None:
        """The client went away while its answer was under way."""
        if isinstance(connection.context, Exchange):
            connection.context.on_client_left()

    def on_writable(self, connection: ServerConnection) -> None:
        """The client reads again."""
        if isinstance(connection.context, Exchange):
            connection.context.on_writable()

    def on_refused(self, status: int, because: str) -> tuple[bytes, str]:
        """A request never became one."""
        if status == Unavailable.status:
            return Unavailable(because, retry_after_s=1.0).to_openai(), "application/json"
        return REFUSALS[status](because).to_openai(), "application/json"


def _is_json(http: HttpRequest) -> bool:
    if http.method != "POST":
        return False
    kind = http.headers.get("content-type", "application/json").lower()
    return not kind.startswith(("multipart/", "audio/", "application/octet-stream"))
