"""How do the events of several workers become one stream that its client takes for a single one?

Only later workers' events are touched, and only in what would show the change: who wrote them, the
role that opens an answer, the tokens that count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw

from paceline.gateway.flavors import CHAT, DONE

IDENTITY = ("id", "object", "created", "model", "system_fingerprint")
"""Members of an event that are the same throughout a stream."""
OPENING = re.compile(rb'"role"\s*:\s*"')
FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')

TOKEN_IDS = re.compile(rb'token_ids"\s*:\s*\[[\d,\s]*\]')
"""Those of the answer, and those of the prompt."""
PROMPT_IDS = re.compile(rb'(?<="prompt_)' + TOKEN_IDS.pattern)
NO_IDS = b'token_ids":null'
_IDS = b'token_ids":['

_members = msgspec.json.Decoder(dict[str, Raw]).decode


class Seam:
    """Joins a later worker's events to those that the client has."""

    __slots__ = ("_again", "_identity", "_produced", "rewritten")

    def __init__(self, identity: Mapping[str, Raw], produced: int, again: str = "") -> None:
        self._identity = identity
        self._produced = produced
        """Tokens that other workers have written before."""
        self.rewritten = 0
        """Of these, the ones that this worker has written again."""
        self._again = again
        """White space that the client has, and the worker was asked to write again."""

    def joined(self, event: bytes) -> bytes | None:
        """The event as it goes on the stream; None: the client has had its like already."""
        start = event.find(b"{")
        if start < 0 or not event.startswith(b"data:"):
            return event
        if (
            b'"role"' in event
            and OPENING.search(event)
            and not CHAT.search(event)
            and not FINISHED.search(event)
        ):
            return None
        members = _members(event[start:])
        members |= {name: told for name, told in self._identity.items() if name in members}
        if self._again and "choices" in members:
            new = self._without_again(members["choices"])
            if new is None:
                return None
            members["choices"] = new
        usage = members.get("usage")
        if usage is not None and (counts := msgspec.json.decode(usage)):
            members["usage"] = Raw(msgspec.json.encode(self._usage(counts)))
        return b"data: " + msgspec.json.encode(members)

    def _without_again(self, raw: Raw) -> Raw | None:
        """What is new in the choices; None: nothing. A token written again counts once."""
        choices = msgspec.json.decode(raw)
        for choice in choices:
            delta = choice.get("delta") or {}
            if text := delta.get("content"):
                same = _common(text, self._again)
                delta["content"] = text[same:]
                self._again = self._again[same:] if same == len(text) else ""
                if same == len(text):
                    self.rewritten += 1
                    if not choice.get("finish_reason"):
                        return None
        return Raw(msgspec.json.encode(choices))

    def _usage(self, counts: dict[str, Any]) -> dict[str, Any]:
        """What other workers wrote was prompt to this one, and is answer to the client."""
        moved = min(self._produced - self.rewritten, counts.get("prompt_tokens") or 0)
        for name, more in (("prompt_tokens", -moved), ("completion_tokens", moved)):
            if isinstance(counts.get(name), int):
                counts[name] += more
        details = counts.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
            details["cached_tokens"] = min(details["cached_tokens"], counts["prompt_tokens"])
        return counts


def _common(one: str, other: str) -> int:
    """Length of the part at the start that both share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def ending(
    identity: Mapping[str, Raw], finish_reason: str, prompt_tokens: int | None, tokens: int
) -> bytes:
    """The last events of a stream whose worker got no further than its last token.

    `finish_reason` and `prompt_tokens` are given where the client still lacks what tells them.
    """
    events = b""
    if finish_reason:
        text = bytes(identity.get("object", b"")) == b'"text_completion"'
        said: dict[str, Any] = {"text": ""} if text else {"delta": {}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        events += _event({**identity, "choices": [choice]})
    if prompt_tokens is not None:
        counts = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        }
        events += _event({**identity, "choices": [], "usage": counts})
    return events + DONE


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(body)


def without_ids(frames: bytes) -> bytes:
    """Chunks without the token ids in them, of which the client knows nothing, and as long as
    before: so they need no new frames."""
    parts: list[bytes] = []
    begin = 0
    while (start := frames.find(_IDS, begin)) >= 0:
        start += len(_IDS) - 1
        end = frames.find(b"]", start) + 1
        size = end - start
        parts += (frames[begin:start], (b"null" if size >= 4 else b"[]").ljust(size))
        begin = end
    parts.append(frames[begin:])
    return b"".join(parts)
