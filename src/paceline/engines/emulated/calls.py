"""How does a client's request become generations, and their tokens an answer?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paceline.enginemodel import Generation
from paceline.engines.emulated import tokens
from paceline.engines.emulated.asks import (
    Ask,
    ChatAsk,
    CompletionAsk,
    EmbeddingsAsk,
    MessagesAsk,
    Refusal,
    ResponsesAsk,
)
from paceline.engines.emulated.engine import Engine
from paceline.engines.emulated.faults import SPOILS, Fault
from paceline.engines.emulated.formats import (
    Chat,
    Completion,
    Embeddings,
    Format,
    Part,
)
from paceline.engines.emulated.settings import EngineSettings
from paceline.engines.emulated.typed_events import Messages, Responses
from paceline.wire.http1 import LAST_CHUNK, chunk, response_head
from paceline.wire.server import ServerConnection

ENDPOINTS: dict[str, tuple[type[Ask], type[Format]]] = {
    "/v1/chat/completions": (ChatAsk, Chat),
    "/v1/completions": (CompletionAsk, Completion),
    "/v1/responses": (ResponsesAsk, Responses),
    "/v1/messages": (MessagesAsk, Messages),
    "/v1/embeddings": (EmbeddingsAsk, Embeddings),
}

STREAM_HEAD = response_head(
    200,
    [
        ("server", "uvicorn"),
        ("content-type", "text/event-stream; charset=utf-8"),
        ("transfer-encoding", "chunked"),
    ],
)


def part_of(ask: Ask, index: int, prompt: list[int], engine: Engine, s: EngineSettings) -> Part:
    """Decide in advance how long the answer to a prompt will be. Refusal if it does not fit."""
    room = engine.scheduler.context_limit - len(prompt)
    window = f"This model's maximum context length is {engine.scheduler.context_limit} tokens."
    if not prompt:
        raise Refusal(400, "The prompt is empty.", "prompt")
    if room < 1:
        raise Refusal(
            400,
            f"{window} However, your prompt contains {len(prompt)} input tokens, which exceeds this"
            " limit even without any output tokens. Please reduce the length of the input prompt."
            f" (parameter=input_tokens, value={len(prompt)})",
            "input_tokens",
        )
    limit = room if ask.limit is None else ask.limit
    if not 1 <= limit <= room:
        raise Refusal(
            400,
            f"{window} However, you requested {limit} output tokens and your prompt contains"
            f" {len(prompt)} input tokens. (parameter=max_tokens, value={limit})",
            "max_tokens",
        )
    # A continuation gets the rest of what the whole answer would have been.
    begun = tokens.partial_answer(prompt)
    question = prompt[: len(prompt) - begun]
    rest = tokens.answer_length(question, s.mean_answer_tokens, s.seed) - begun
    wanted = limit if ask.ignore_eos else max(rest, ask.min_tokens or 0, 1)
    stops = wanted <= limit and not ask.ignore_eos
    return Part(
        index=index,
        prompt=prompt,
        first_number=tokens.next_number(prompt),
        tokens=min(wanted, limit),
        finish_reason="stop" if stops else "length",
    )


class Call:
    """One HTTP request in progress: its generations and the connection that reads them."""

    def __init__(
        self,
        connection: ServerConnection,
        engine: Engine,
        answer: Format,
        stream: bool,
        fault: Fault | None = None,
    ) -> None:
        self.connection = connection
        self.engine = engine
        self.answer = answer
        self.stream = stream
        self.fault = fault
        """What shall go wrong within the stream."""
        self.hold: Callable[[str, int], dict[str, Any]] | None = None
        """Has a prompt held for another engine, by its name and tokens; gives where."""
        self.gone = False
        """Nobody waits for the answer any more."""
        self.open_parts = len(answer.parts)
        self.generation_ids: list[str] = []

    def start(self, asks: Ask, salt: str, names: Sequence[str], received: bool = False) -> None:
        """`received`: another engine has prefilled the prompt."""
        if self.stream:
            self.connection.send(STREAM_HEAD)
        size = self.engine.scheduler.profile.block_size
        for part, name in zip(self.answer.parts, names, strict=True):
            generation = Generation(
                id=name,
                prompt_tokens=len(part.prompt),
                output_tokens=part.tokens,
                # With the answer's own tokens, so that the next turn finds them too.
                blocks=tokens.BlockChain(part.prompt, size, part.token_ids, salt),
                priority=asks.priority or 0,
                hold=self.hold is not None and part.tokens == 1,
                received=len(part.prompt) if received else 0,
            )
            reader = Streamed(self, part) if self.stream else Collected(self, part)
            self.generation_ids.append(name)
            self.engine.start(generation, reader, part.finish_reason)

    def part_finished(self) -> None:
        self.open_parts -= 1
        if self.open_parts:
            return
        if self.stream:
            self.connection.send(chunk(self.answer.closing()) + LAST_CHUNK)
            self.connection.finish()
        else:
            if self.hold is not None and self.answer.answer_tokens == 1:
                prompt_tokens = self.answer.prompt_tokens
                self.answer.kv_transfer_params = self.hold(self.generation_ids[0], prompt_tokens)
            self.connection.answer(200, self.answer.whole())

    def spoil(self, frame: bytes) -> None:
        """The time of the fault has come: send what it makes of a token's frame."""
        assert self.fault is not None
        if not SPOILS[self.fault.kind](self.connection, frame):
            self.abort()

    def abort(self) -> None:
        self.gone = True
        for name in self.generation_ids:
            self.engine.abort(name)


class Collected:
    """A part of an answer that is sent whole."""

    def __init__(self, call: Call, part: Part) -> None:
        self.call = call
        self.part = part

    def on_admitted(self, cached_tokens: int) -> None:
        self.part.cached_tokens = cached_tokens

    def on_token(self) -> None:
        pass

    def on_finished(self) -> None:
        self.call.part_finished()


class Streamed(Collected):
    """A part of an answer that is sent token by token."""

    def __init__(self, call: Call, part: Part) -> None:
        super().__init__(call, part)
        self.number = part.first_number
        self.last = part.numbers[-1]
        self.spoilt = part.first_number + call.fault.after_tokens if call.fault else -1
        self.send = call.connection.send
        self.write = call.answer.token(part)

    def on_token(self) -> None:
        number = self.number
        self.number = number + 1
        if number == self.last:
            write = self.call.answer.token(self.part, self.part.finish_reason)
        else:
            write = self.write
        data = write(number)
        frame = b"%x\r\n%b\r\n" % (len(data), data)
        if number == self.part.first_number:
            opening = self.call.answer.opening(self.part)
            frame = (chunk(opening) if opening else b"") + frame
        if number == self.spoilt:
            self.call.spoil(frame)
        else:
            self.send(frame)
