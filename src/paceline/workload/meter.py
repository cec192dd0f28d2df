"""When did the tokens of one answer come?

Fed with the bytes of a stream as they are read, each with one time; it does no I/O and reads no
clock. JSON is decoded until the first content, and afterwards only where a chunk does not say that
the answer goes on: the end, an error, usage.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from paceline.workload.histogram import bucket

_tokens_so_far = re.compile(rb'"completion_tokens": ?(\d+)').search
_decode = msgspec.json.Decoder(dict[str, Any]).decode

UNDER_WAY = (b'"finish_reason":null', b'"finish_reason": null')
"""Marks a chunk that is only tokens. A token's text can't hold it: its quotes are escaped."""


class Meter:
    """The times and counts of one answer. All times are on the clock that `feed` is given."""

    __slots__ = (
        "_last_at",
        "_so_far",
        "_tail",
        "chunk_tokens",
        "error",
        "exact",
        "first_at",
        "first_tokens",
        "gaps",
        "keep_text",
        "output_tokens",
        "prompt_tokens",
        "stall_s",
        "text",
        "whole",
    )

    def __init__(self, *, exact: bool = False, keep_text: bool = False) -> None:
        self.exact = exact
        """Each chunk tells the tokens so far (`continuous_usage_stats`); else it is one."""
        self.keep_text = keep_text
        self.text: list[str] = []
        self.first_at: float | None = None
        """The first chunk with content, reasoning, refusal or tool call: never the role chunk."""
        self.stall_s = 0.0
        """The worst gap between two reads with tokens."""
        self.gaps: dict[int, int] = {}
        """Gaps divided by the tokens after them, in buckets of `histogram`."""
        self.chunk_tokens = 0
        self.first_tokens = 0
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        """The engine's own count, if it gave one."""
        self.whole = False
        """The answer came to its end, in whatever way it ended."""
        self.error = ""
        self._tail = b""
        self._last_at = 0.0
        self._so_far = 0

    def feed(self, data: bytes, now: float) -> None:
        """Take what one read brought. Chunks that come together count as one."""
        if self._tail:
            data = self._tail + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._tail = data.split(b"\n\n")
        tokens = 0
        for event in events:
            if self.first_at is None and not tokens:
                tokens += self._look_into(event)
            else:
                tokens += self._count(event)
        if tokens:
            self._take(tokens, now)

    @property
    def itl_s(self) -> float:
        """The mean gap between tokens; 0 with fewer than two.

        If the engine counted more tokens than chunks came, all chunks are taken to hold equally
        many; one more is the end-of-text token, which is counted and not sent.
        """
        later = float(self.chunk_tokens - self.first_tokens)
        if self.first_at is None or later <= 0:
            return 0.0
        counted = self.output_tokens or 0
        if counted > self.chunk_tokens + 1:
            later *= counted / self.chunk_tokens
        return (self._last_at - self.first_at) / later

    def _take(self, tokens: int, now: float) -> None:
        self.chunk_tokens += tokens
        if self.first_at is None:
            self.first_at = now
            self.first_tokens = tokens
        else:
            gap_s = now - self._last_at
            if gap_s > self.stall_s:
                self.stall_s = gap_s
            index = bucket(gap_s / tokens)
            self.gaps[index] = self.gaps.get(index, 0) + tokens
        self._last_at = now

    def _count(self, event: bytes) -> int:
        """Tokens of an event after the first content, decoded only if it may be more than that."""
        if self.keep_text or not (UNDER_WAY[0] in event or UNDER_WAY[1] in event):
            return self._look_into(event)
        return self._new_tokens(event) if self.exact else 1

    def _look_into(self, event: bytes) -> int:
        """Tokens of any event, decoded; notes usage, errors and the end on the way."""
        data = b"\n".join(
            line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")
        )
        if not data:
            return 0  # A comment that keeps the connection alive.
        if data == b"[DONE]":
            self.whole = True
            return 0
        try:
            chunk = _decode(data)
        except msgspec.DecodeError:
            self.error = "a chunk of the stream is not JSON"
            return 0
        if chunk.get("error"):
            self.error = error_text(chunk)
        if usage := chunk.get("usage"):
            self.prompt_tokens = usage.get("prompt_tokens")
            self.output_tokens = usage.get("completion_tokens")
        choice = next(iter(chunk.get("choices") or ()), None)
        if choice is None:
            return 0
        if choice.get("finish_reason"):
            self.whole = True
        text = _content(choice)
        if self.keep_text:
            self.text.append(text)
        if not text:
            return 0
        return self._new_tokens(event) if self.exact else 1

    def _new_tokens(self, event: bytes) -> int:
        """What the event's own usage adds to the tokens so far; 1 if it has none."""
        told = _tokens_so_far(event)
        before, self._so_far = self._so_far, int(told[1]) if told else self._so_far + 1
        return max(0, self._so_far - before)


def _content(choice: dict[str, Any]) -> str:
    """The text that a choice adds; a tool call counts by its existence."""
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    for key in ("content", "reasoning_content", "reasoning", "refusal"):
        if text := delta.get(key):
            return str(text)
    return "call" if delta.get("tool_calls") else ""


def error_text(body: dict[str, Any]) -> str:
    """The message of an error in any of the shapes that engines use."""
    error = body.get("error", body)
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or "an error without a message")
