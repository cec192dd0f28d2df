"""Is an answer right, or is it at least clear that it is not?

Token i of every answer is the text " t<i>", so that what is lost, doubled or out of order shows.
All is read from the bytes as they came, by a parser of its own: it trusts neither the gateway's nor
a library's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from enum import Enum
from typing import Any

import msgspec

MOVES = True
"""A stream whose worker fails goes on elsewhere. False: it ends with an error event."""

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Verdict(Enum):
    """What a client may make of an answer."""

    RIGHT = "right"
    REFUSED = "refused"
    """An HTTP error in OpenAI's shape."""
    BROKEN = "broken"
    """It ends with an event that says so."""
    CUT = "cut"
    """The connection ended within it, which every client notices."""
    HUNG = "hung"
    """It never ended."""
    WRONG = "wrong"
    """A client would believe what is not so."""


CLEAR = (Verdict.RIGHT, Verdict.REFUSED, Verdict.BROKEN)


class Question(msgspec.Struct, frozen=True):
    """What one client asks for."""

    number: int
    tokens: int
    path: str = CHAT
    usage: bool = True
    """Whether the token counts are wanted at the end."""
    model: str = "m"

    def http(self) -> bytes:
        """The request; its connection is closed after the answer."""
        text = f"question {self.number:06} " + "of many " * 12
        prompt = {"messages": [{"role": "user", "content": text}]}
        body: dict[str, Any] = {
            **(prompt if self.path == CHAT else {"prompt": text}),
            "model": self.model,
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "stream": True,
        }
        if self.usage:
            body["stream_options"] = {"include_usage": True}
        data = json.dumps(body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nhost: chaos\r\nconnection: close\r\n"
        return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


class Answer(msgspec.Struct, frozen=True):
    """What came of a question."""

    verdict: Verdict
    tokens: int = 0
    """How many came, in order, before whatever went wrong."""
    because: str = ""
    worker: str = ""
    """The one that the gateway named."""
    prompt_tokens: int = 0


class Flaw(Exception):
    """An answer is not what it should be; the message says in what."""


def judge(question: Question, raw: bytes, over: bool = True) -> Answer:
    """Read all that came on a connection; `over`: the gateway closed it."""
    if not over:
        return Answer(Verdict.HUNG, raw.count(b"data: "), "it never ended")
    head, _, body = raw.partition(b"\r\n\r\n")
    status = head[9:12].decode()
    lines = head.decode("latin-1").split("\r\n")[1:]
    headers = dict(line.split(": ", 1) for line in lines if ": " in line)
    worker = headers.get("x-paceline-worker", "")
    try:
        if not head.startswith(b"HTTP/1.1 "):
            return Answer(Verdict.CUT, 0, "no answer at all" if not raw else "not HTTP")
        if status != "200":
            return Answer(Verdict.REFUSED, 0, f"{status}: {_error(json.loads(body))}", worker)
        payload, whole = dechunked(body)
        reading = Reading(question)
        for event in payload.decode().split("\n\n")[:-1]:
            reading.take(event)
        if reading.error:
            verdict = Verdict.BROKEN
        elif not whole:
            return Answer(Verdict.CUT, reading.tokens, "the connection ended", worker)
        else:
            verdict = Verdict.RIGHT
            reading.check_end()
        if not whole or not payload.endswith(b"\n\n"):
            raise Flaw("an end that is none")
    except (ValueError, KeyError, TypeError, Flaw) as flaw:
        return Answer(Verdict.WRONG, 0, f"{flaw!r} in …{raw[-400:]!r}", worker)
    return Answer(verdict, reading.tokens, reading.error, worker, reading.prompt_tokens)


class Reading:
    """One stream, event by event. Raises Flaw at the first that should not be."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.tokens = 0
        self.prompt_tokens = 0
        self.error = ""
        self._id = ""
        self._finish = ""
        self._done = self._counted = False

    def take(self, event: str) -> None:
        if event.startswith(":"):
            return  # a comment, as keep-alives are
        if self._done:
            raise Flaw(f"{event!r} after the end")
        if event == "data: [DONE]":
            self._done = True
            return
        if not event.startswith("data: "):
            raise Flaw(f"no event: {event!r}")
        body = json.loads(event[6:])
        if self.error:
            raise Flaw(f"{event!r} after the error")
        if "error" in body:
            self.error = _error(body) or "unnamed"
            return
        self._id = self._id or body["id"]
        if body["id"] != self._id:
            raise Flaw(f"the id changes from {self._id} to {body['id']}")
        for choice in body["choices"]:
            self._choice(choice)
        if body.get("usage") is not None:
            self._usage(body["usage"])

    def _choice(self, choice: dict[str, Any]) -> None:
        chat = self.question.path == CHAT
        text = (choice["delta"].get("content") or "") if chat else choice["text"]
        role = choice["delta"].get("role") if chat else None
        if choice["index"] or self._finish or (role and self.tokens):
            raise Flaw(f"after {self.tokens} tokens: {choice}")
        for word in text.split(" ")[1:]:
            if word != f"t{self.tokens}":
                raise Flaw(f"{word!r} comes where t{self.tokens} should")
            self.tokens += 1
        self._finish = choice["finish_reason"] or ""

    def _usage(self, usage: dict[str, Any]) -> None:
        if self._counted or not self.question.usage:
            raise Flaw("token counts that nobody asked for")
        self._counted = True
        self.prompt_tokens = usage["prompt_tokens"]
        if usage["completion_tokens"] != self.question.tokens:
            raise Flaw(f"{usage} where {self.question.tokens} came")
        if usage["total_tokens"] != self.prompt_tokens + self.question.tokens:
            raise Flaw(f"{usage} does not add up")

    def check_end(self) -> None:
        """Is nothing missing?"""
        if self.tokens != self.question.tokens or self._finish != "length" or not self._done:
            end = f"finish_reason {self._finish!r}, done: {self._done}"
            raise Flaw(f"it ends after {self.tokens} of {self.question.tokens} tokens, {end}")
        if self._counted != self.question.usage:
            raise Flaw("the token counts are missing")


def dechunked(body: bytes) -> tuple[bytes, bool]:
    """The content of a chunked body, and whether it is whole."""
    content, at = bytearray(), 0
    while (eol := body.find(b"\r\n", at)) >= 0:
        size = int(body[at:eol], 16)
        at = eol + 2 + size
        if body[at : at + 2] != b"\r\n":
            break
        if not size:
            if at + 2 < len(body):
                raise Flaw("bytes after the last chunk")
            return bytes(content), True
        content += body[eol + 2 : at]
        at += 2
    return bytes(content), False


def _error(body: dict[str, Any]) -> str:
    """The message of an error in OpenAI's shape."""
    error = body["error"]
    if not {"message", "type", "param", "code"} <= set(error):
        raise Flaw(f"an error without OpenAI's shape: {body}")
    return str(error["message"])


def counts(answers: Iterable[Answer]) -> dict[str, int]:
    """How many had which verdict."""
    return dict(Counter(answer.verdict.value for answer in answers))


def right(answers: Iterable[Answer]) -> int:
    return sum(answer.verdict is Verdict.RIGHT for answer in answers)


def nothing_failed(answers: list[Answer]) -> None:
    """Every answer is whole."""
    _only((Verdict.RIGHT,), answers)
    prompts = {a.prompt_tokens for a in answers if a.prompt_tokens}
    assert len(prompts) <= 2, f"alike questions, one number for each endpoint, and not {prompts}"


def ends_right_or_clearly(answers: list[Answer]) -> None:
    """No client is left waiting, or with an answer that only seems whole."""
    _only(CLEAR, answers)


def survives(answers: list[Answer]) -> None:
    """A worker failed with streams under way while others were there to go on with them."""
    (nothing_failed if MOVES else ends_right_or_clearly)(answers)


def _only(fine: tuple[Verdict, ...], answers: list[Answer]) -> None:
    bad = [answer for answer in answers if answer.verdict not in fine]
    assert not bad, f"{counts(answers)}; the first bad one: {bad[0]}"
