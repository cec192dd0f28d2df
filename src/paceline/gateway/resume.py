"""What has a stream produced so far, and with which request does it go on elsewhere?"""

from __future__ import annotations

import re
from array import array
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Raw

from paceline.domain.continuation import READ, can_go_on
from paceline.gateway.ports import Dialect
from paceline.gateway.seam import IDENTITY, ending

CHAT = "/v1/chat/completions"
PATHS = (CHAT, "/v1/completions")
LIMITS = ("max_tokens", "max_completion_tokens", "min_tokens")
KEPT_BYTES = 16 * 1024
"""What is kept of a stream as it came, before it is boiled down to text and token ids."""
LAST_BYTES = 1024
"""Where the word that a stream is at its end stands."""
OBJECT_BYTES = 41
"""What Python needs for a piece of it beside its bytes."""

_EVENT = re.compile(rb"^data: ?(\{.*)", re.MULTILINE)
_ENDING = re.compile(
    rb'^data: ?\[DONE\]|"finish_reason"\s*:\s*"|"choices"\s*:\s*\[\s*\]', re.MULTILINE
)
_MANY_PROMPTS = re.compile(rb'\[\s*["\[]')

_Fields = msgspec.defstruct(
    "_Fields",
    [
        ("stream", bool | None, None),
        ("prompt", Raw, Raw(b"")),
        *((name, Any, None) for name in READ),
    ],
)
_fields = msgspec.json.Decoder(_Fields).decode


def resumable(path: str, method: str, body: bytes) -> bool:
    """Can the answer to this request go on from its last token, should its worker not end it?"""
    if path not in PATHS or method != "POST":
        return False
    try:
        asked = msgspec.structs.asdict(_fields(body))
        prompt = bytes(asked.pop("prompt"))
        if _MANY_PROMPTS.match(prompt) and len(msgspec.json.decode(prompt, type=list[Raw])) > 1:
            return False
    except (msgspec.MsgspecError, RecursionError):
        return False
    return bool(asked["stream"]) and can_go_on(asked)


Empty = Literal[""] | None
NoItems = Annotated[list[Any], msgspec.Meta(max_length=0)] | None


class _Delta(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """Nothing but text. What a model thought stays out of the messages of a chat: an answer that
    goes on without its thoughts would be another one. Nor are tool calls begun twice.
    """

    content: str | None = None
    role: str | None = None
    reasoning: Empty = None
    reasoning_content: Empty = None
    refusal: Empty = None
    tool_calls: NoItems = None
    function_call: None = None
    audio: None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    index: Literal[0] = 0
    logprobs: None = None


class _Event(msgspec.Struct, gc=False):
    """An event of an answer that can go on: what has more in it does not fit."""

    choices: Annotated[list[_Choice], msgspec.Meta(max_length=1)] = []
    usage: Raw = Raw(b"null")


_events = msgspec.json.Decoder(list[_Event]).decode
_members = msgspec.json.Decoder(dict[str, Raw]).decode


class Produced:
    """What the client has of one answer.

    Pieces are kept as they passed, which costs next to nothing, and boiled down by the dozen.
    """

    __slots__ = (
        "_base",
        "_blanks",
        "_first",
        "_ids",
        "_pieces",
        "_plain_text",
        "_silent",
        "_size",
        "_texts",
        "_written",
        "counted",
        "done",
        "finish_reason",
        "identity",
        "prompt_tokens",
    )

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._texts: list[str] = []
        self._written = 0  # tokens of the present worker of which the client has the text
        self._silent = 0  # tokens since, whose text is yet to come: parts of a character
        self._blanks = 0  # how many of the last tokens are white space
        self._first = True  # the present worker is the first one
        self._plain_text = True  # nothing but one run of text has come
        self._base: array[int] | None = None  # what the present worker was asked, if known
        self._ids: array[int] | None = array("I")  # what it wrote; None: it does not tell
        self.identity: dict[str, Raw] = {}
        """What all events of the stream share; empty: none has come."""
        self.prompt_tokens: int | None = None
        """Tokens of the client's prompt, if the first worker told them."""
        self.finish_reason: str | None = None
        self.counted = False
        """The usage has come."""
        self.done = False
        """The stream's last event has come."""

    def add(self, piece: bytes) -> None:
        """Whole events passed to the client, in chunk frames or without."""
        self._pieces.append(piece)
        self._size += len(piece) + OBJECT_BYTES
        if self._size > KEPT_BYTES:
            self.boil()

    @property
    def ended(self) -> bool:
        """Did the newest piece say that nothing more will come?"""
        if self._pieces:
            return _ENDING.search(self._pieces[-1][-LAST_BYTES:]) is not None
        return self.done or self.counted or self.finish_reason is not None

    def boil(self) -> None:
        """Keep of the pieces what an answer needs to go on."""
        if not self._pieces:
            return
        events = b"\n".join([b"", *self._pieces])
        self._pieces.clear()
        self._size = 0
        self.done = self.done or b"\ndata: [DONE]" in events
        found = _EVENT.findall(events)
        try:
            if found and not self.identity:
                first = _members(found[0])
                self.identity = {name: first[name].copy() for name in IDENTITY if name in first}
            self._take(_events(b"[%b]" % b",".join(found)))
        except (msgspec.MsgspecError, UnicodeError, OverflowError):
            self._plain_text = False  # whatever it is, text alone it is not

    def _take(self, events: list[_Event]) -> None:
        texts = []
        for event in events:
            if not event.choices:
                self.counted = self.counted or event.usage != b"null"
                continue
            choice = event.choices[0]
            delta = choice.delta
            text = choice.text if delta is None else delta.content
            if text:
                texts.append(text)
                self._blanks = self._blanks + 1 if text.isspace() else 0
                self._written += self._silent + 1
                self._silent = 0
            elif delta is None or delta.role is None:
                self._silent += 1
            if choice.token_ids is not None:
                self._take_ids(choice)
            elif text:
                self._ids = None
            if choice.finish_reason:
                self.finish_reason = choice.finish_reason
        self._texts.append("".join(texts))

    def _take_ids(self, choice: _Choice) -> None:
        if choice.prompt_token_ids is not None:
            self._base, self._ids = array("I", choice.prompt_token_ids), array("I")
            if self._first:
                self.prompt_tokens = len(self._base)
        if self._ids is not None and choice.token_ids is not None:
            self._ids.extend(choice.token_ids)

    @property
    def can_go_on(self) -> bool:
        """Is what has come one run of text, and understood?"""
        self.boil()
        return self._plain_text and bool(self.identity)

    @property
    def finished(self) -> bool:
        """Does nothing of the answer itself lack?"""
        self.boil()
        return self.done or self.counted or self.finish_reason is not None

    @property
    def leg_tokens(self) -> int | None:
        """What the present worker has added to the answer; None: that was more than text."""
        self.boil()
        if self._ids:
            return len(self._ids)
        return self._written if self._plain_text else None

    def moves_on(self) -> None:
        """What comes next is another worker's."""
        self.boil()
        self._first = False
        self._written = self._silent = 0
        if self._base is not None and self._ids is not None:
            self._base += self._ids
            self._ids = array("I")
        else:
            self._base = self._ids = None

    def rest(self, path: str, body: bytes, dialect: Dialect, produced: int) -> bytes | None:
        """The request for what is left of an answer of which the client has `produced` tokens.

        None: this kind of engine cannot go on with it. Empty: nothing is left to be written.
        """
        self.boil()
        text, ids = "".join(self._texts).removesuffix(self.again(path)), None
        if not text and not self._ids and (self._first or self._base is None):
            return body  # nothing has been written
        asked: dict[str, Any] = msgspec.json.decode(body)
        reads = dialect.token_ids(path) or _is_ids(asked.get("prompt"))
        # With stop strings an engine holds back the text of tokens that it has told: that text
        # would be lost, while a continuation by text writes it again.
        if self._base is not None and self._ids is not None and reads and not asked.get("stop"):
            asked["prompt"], ids = self._base.tolist(), self._ids.tolist()
        longer = dialect.continuation(path, asked, text, ids)
        if longer is None:
            return None
        anew = self._blanks if path == CHAT else 0  # tokens to be written again
        for name in LIMITS:
            limit = longer.get(name)
            if isinstance(limit, int | float):
                left = max(int(limit) - produced, 0)
                if not left and name != "min_tokens":
                    return b""
                longer[name] = left + anew
        return msgspec.json.encode(longer)

    def again(self, path: str) -> str:
        """White space at the end of a chat's text, which the next worker has to write again: many
        templates trim messages, and nobody tells which."""
        text = "".join(self._texts)
        return text[len(text.rstrip()) :] if path == CHAT else ""

    def last_words(self, finish_reason: str, prompt_tokens: int | None, tokens: int) -> bytes:
        """The events that the client lacks, of which `finish_reason` may be one.

        `prompt_tokens` are given if it wants to know the usage.
        """
        if self.done:
            return b""
        counted = None if self.counted else prompt_tokens
        return ending(self.identity, finish_reason, counted, tokens)


def _is_ids(prompt: Any) -> bool:
    """Did the client write its prompt in token ids?"""
    return isinstance(prompt, list) and bool(prompt) and type(prompt[0]) is int
