"""One request between a client and engines that exist only as bytes: no socket, no clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import h11
import msgspec

from paceline.domain.commands import Dispatch, Move, Pause
from paceline.domain.facts import (
    DispatchFailed,
    Fact,
    StreamBroke,
    StreamStopped,
)
from paceline.domain.outcome import Outcome
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker
from paceline.engines.adapter import make_adapter
from paceline.engines.emulated.asks import ChatAsk, CompletionAsk
from paceline.engines.emulated.formats import Chat, Completion, Part
from paceline.engines.emulated.tokens import next_number, partial_answer
from paceline.gateway.exchange import Exchange
from paceline.gateway.intake import read
from paceline.gateway.outcome import outcome_of
from paceline.gateway.ports import Turn
from paceline.gateway.relay import GAP_BOUNDS
from paceline.gateway.resume import resumable
from paceline.gateway.steps import StepWatch
from paceline.wire.http1 import LAST_CHUNK, chunk
from paceline.wire.server import HttpRequest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ASKS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Count!"}]},
    TEXT: {"prompt": "Count!", "max_tokens": 100},
}


def urgency(tier: str) -> int:
    return {"standard": 0, "low": 3, "lowest": 4}[tier]


def stream(request: bytes, tokens: int, name: str = "w", created: int = 1) -> bytes:
    """What an emulated engine answers, were its whole answer `tokens` long."""
    head, _, body = request.partition(b"\r\n\r\n")
    chat = CHAT.encode() in head
    ask = msgspec.json.decode(body, type=ChatAsk if chat else CompletionAsk)
    (prompt,) = ask.prompts()
    left = tokens - partial_answer(prompt)
    limit = left if ask.limit is None else ask.limit
    assert left > 0
    part = Part(
        index=0,
        prompt=prompt,
        first_number=next_number(prompt),
        tokens=min(left, limit),
        finish_reason="length" if limit < left else "stop",
    )
    options = ask.stream_options
    form = (Chat if chat else Completion)(
        name,
        created,
        ask.model or "m",
        [part],
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        token_ids=bool(ask.return_token_ids),
    )
    opening = form.opening(part)
    events = [opening] if opening else []
    write, last = form.token(part), form.token(part, part.finish_reason)
    events += [write(i) for i in part.numbers[:-1]] + [last(part.numbers[-1])]
    if ask.return_token_ids and not chat:  # as vLLM does, which the emulated engine leaves out
        ids = json.dumps(prompt, separators=(",", ":")).encode()
        first, *others = events
        events = [first.replace(b'"token_ids"', b'"prompt_token_ids":%b,"token_ids"' % ids)]
        none = b'"prompt_token_ids":null,"token_ids"'
        events += [event.replace(b'"token_ids"', none) for event in others]
    return SSE + b"".join(map(chunk, [*events, form.closing()])) + LAST_CHUNK


class Connection:
    """An engine's side: what it was asked, and its mouth."""

    connecting = None
    carried = 1

    def __init__(self) -> None:
        self.reader: Any = None
        self.request = b""
        self.open = True

    def start(self, reader: Any, request: bytes, until: float = 0.0) -> None:
        self.reader, self.request = reader, request

    def pause(self) -> None: ...
    def resume(self) -> None: ...

    def close(self) -> None:
        self.open, self.reader = False, None

    @property
    def body(self) -> Any:
        return json.loads(self.request.partition(b"\r\n\r\n")[2])

    def say(self, *reads: bytes) -> Connection:
        for data in reads:
            if self.reader is not None:
                self.reader.on_bytes(data)
        return self

    def die(self) -> None:
        reader, self.reader = self.reader, None
        if reader is not None:
            reader.on_closed("the engine closed the connection", True)


class Link:
    """A worker as an exchange sees it."""

    def __init__(self, worker: Worker, on_step: Callable[[Any], None]) -> None:
        self.worker = worker
        self.dialect = make_adapter(worker.kind, worker.url, worker.serves_as, "")
        self.watch = StepWatch(on_step)
        self.connections: list[Connection] = []
        self.transfer = None

    def connection(self, fresh: bool) -> Connection:
        self.connections.append(Connection())
        return self.connections[-1]

    def head(self, method: str, target: str, *rest: object) -> bytes:
        return f"{method} {target} HTTP/1.1\r\n\r\n".encode()

    def keep(self, connection: Connection) -> None:
        connection.reader = None


class Client:
    """A client that keeps all that it gets."""

    context: object = None

    def __init__(self) -> None:
        self.got = b""
        self.keeps_up = True
        self.over = ""

    def send(self, data: bytes) -> bool:
        assert not self.over
        self.got += data
        return self.keeps_up

    def finish(self) -> None:
        assert not self.over
        self.over = "finished"

    def abort(self) -> None:
        self.over = "aborted"

    def answer(self, status: int, body: bytes, headers: Sequence[tuple[str, str]] = ()) -> None:
        self.got += body
        self.over = str(status)


class Line:
    """The host: sends the request to its workers in turn, as often as it comes back."""

    def __init__(
        self,
        path: str = CHAT,
        version: str = "1.1",
        kinds: Sequence[str] = ("vllm",),
        **fields: Any,
    ) -> None:
        self.facts: list[Fact] = []
        self.outcome: Outcome | None = None
        self.on_fact: Callable[[Fact], None] = lambda fact: None
        self.links = [
            Link(Worker(f"w{n}", "m", "http://x", kind, serves_as=f"m{n}"), lambda step: None)
            for n, kind in enumerate(kinds)
        ]
        self.client = Client()
        http = HttpRequest()
        http.method, http.path, http.version = "POST", path, version
        http.body = json.dumps({"model": "m", "stream": True, **ASKS[path], **fields}).encode()
        self.version = version
        body = read(http.body)
        request = Request(
            id="r",
            model="m",
            tenant="t",
            tier="standard",
            promise=Promise(),
            resumable=resumable(path, "POST", http.body),
        )
        self.attempts = 0
        self.turns: list[tuple[Turn, str]] = []
        self.exchange = Exchange(
            cast(Any, self), cast(Any, self.client), http, body, request, urgency, 0
        )

    # The host's part.

    def note(self, exchange: Exchange, turn: Turn, because: str) -> None:
        self.turns.append((turn, because))

    def link(self, worker_id: str) -> Any:
        return self.links[int(worker_id[1:])]

    def gaps(self, exchange: Exchange) -> list[int]:
        return [0] * (len(GAP_BOUNDS) + 1)

    def closed(self, exchange: Exchange) -> None:
        self.outcome = outcome_of(exchange)

    def tell(self, fact: Fact) -> None:
        self.facts.append(fact)
        self.on_fact(fact)

    # The kernel's part.

    def send(self, now: float = 0.0) -> Connection:
        """Send the request to the next worker; gives the connection it is on."""
        self.attempts += 1
        link = self.links[(self.attempts - 1) % len(self.links)]
        command = Dispatch("r", link.worker.id, "its turn", attempt=self.attempts)
        self.exchange.dispatch(command, now)
        return link.connections[-1] if link.connections else Connection()

    def retry_always(self) -> None:
        """From here on the request goes elsewhere at once, within the fact that wants it."""

        def again(fact: Fact) -> None:
            stopped = isinstance(fact, DispatchFailed | StreamStopped)
            if stopped or (isinstance(fact, StreamBroke) and fact.resumable):
                self.send()

        self.on_fact = again

    @property
    def connection(self) -> Connection:
        """The newest one."""
        return self.links[(self.attempts - 1) % len(self.links)].connections[-1]

    def stop(self, now: float = 0.0, move: bool = False) -> None:
        self.exchange.stop((Move if move else Pause)("r", "told so"), now)

    # What came of it.

    def of(self, kind: type[Fact]) -> list[Any]:
        return [fact for fact in self.facts if isinstance(fact, kind)]

    @property
    def told(self) -> list[str]:
        return [type(fact).__name__ for fact in self.facts]

    @property
    def body(self) -> bytes:
        """The body, as an independent parser reads it. It must be whole."""
        if self.version == "1.0":
            return self.client.got.partition(b"\r\n\r\n")[2]
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
        parser.send(h11.EndOfMessage())
        parser.receive_data(self.client.got)
        body = b""
        while not isinstance(found := parser.next_event(), h11.EndOfMessage):
            assert found is not h11.NEED_DATA, "the answer is not whole"
            body += bytes(found.data) if isinstance(found, h11.Data) else b""
        assert not parser.trailing_data[0]
        return body

    @property
    def events(self) -> list[Any]:
        """The events; each must be whole."""
        *events, rest = self.body.split(b"\n\n")
        assert rest == b""
        assert all(event.startswith(b"data: ") for event in events)
        return [e[6:] if e == b"data: [DONE]" else json.loads(e[6:]) for e in events]

    @property
    def choices(self) -> list[Any]:
        return [c for e in self.events if isinstance(e, dict) for c in e.get("choices", ())]

    @property
    def text(self) -> str:
        found = [c.get("text") or c.get("delta", {}).get("content") for c in self.choices]
        return "".join(text or "" for text in found)
