"""What does a client get to see of its engine's events?

All as they come, with few exceptions: the usage and the token ids for which only Paceline asked,
what would betray that another worker goes on with the stream, and whatever is no answer at all.
"""

from __future__ import annotations

import msgspec

from paceline.gateway.flavors import DONE, ERROR, USAGE, Flavor
from paceline.gateway.resume import Produced
from paceline.gateway.seam import NO_IDS, PROMPT_IDS, TOKEN_IDS, Seam, without_ids
from paceline.wire.http1 import LAST_CHUNK, Chunks, WireError, chunk, payloads

MAX_EVENT = 16 * 1024 * 1024
"""Bytes of an event that goes on in further chunks."""


class Sieve:
    """The events of one worker's answer, on their way to the client."""

    __slots__ = (
        "_edits",
        "_unfinished",
        "counted",
        "cut_ids",
        "failed",
        "flavor",
        "plain",
        "produced",
        "seam",
        "separator",
        "strip",
        "trouble",
    )

    def __init__(
        self,
        flavor: Flavor,
        strip: bool = False,
        plain: bool = False,
        cut_ids: bool = False,
        produced: Produced | None = None,
        seam: Seam | None = None,
    ) -> None:
        self.flavor = flavor
        self.strip = strip
        """The usage is not for the client."""
        self.plain = plain
        """The client cannot read chunks (HTTP/1.0)."""
        self.cut_ids = cut_ids
        """Nor are the token ids."""
        self.produced = produced
        """Remembers what passes, so that another worker can go on with it."""
        self.seam = seam
        """Joins it to what other workers wrote before."""
        self.separator = b"\n\n"
        self.counted = b""
        """The newest event with a usage, for the relay to take away."""
        self.failed = False
        """The engine reported an error within the stream."""
        self.trouble = ""
        """Why no more of this stream can be believed."""
        self._edits = plain or cut_ids or seam is not None
        self._unfinished = b""  # an event that goes on in the next chunk

    def end_of_events(self, payload: bytes) -> int:
        """Where the last whole event ends."""
        at = payload.rfind(self.separator)
        return at + len(self.separator) if at >= 0 else 0

    def tokens(self, frames: bytes) -> bytes:
        """Whole chunks of token events, as they pass to the client."""
        assert self.produced is not None
        self.produced.add(frames)
        return without_ids(frames) if self.cut_ids else frames

    def sift(self, frames: bytes, chunks: Chunks) -> tuple[bytes, int]:
        """Any whole chunks as this client shall see them, and how many tokens they hold."""
        payload = self._unfinished + b"".join(payloads(frames))
        end = self.end_of_events(payload)
        if chunks.done and (self.produced is None or payload[end:].strip() == DONE.strip()):
            end = len(payload)
        self._unfinished = payload[end:]
        if len(self._unfinished) > MAX_EVENT:
            raise WireError("an event of the stream is too large")
        events = payload[:end].split(self.separator)
        passed, tokens = self._pass(events)
        if chunks.done and self.produced is not None and not self.produced.ended:
            self.trouble = self.trouble or "the stream stops short of its end"
        same = len(passed) == len(events) and not (self._edits or self.trouble)
        if same and not chunks.uneven:
            return frames, tokens
        payload = self.separator.join(passed)
        if self.plain:
            return payload, tokens
        ending = LAST_CHUNK if chunks.done and not self.trouble else b""
        return (chunk(payload) if payload else b"") + ending, tokens

    def _pass(self, events: list[bytes]) -> tuple[list[bytes], int]:
        """The events that the client shall see, and how many tokens they hold. Remembers them."""
        passed: list[bytes] = []
        known: list[bytes] = []
        tokens = 0
        for event in events:
            token = self.flavor.token.search(event) is not None
            if self._is_no_answer(event, token):
                passed.append(b"")
                known.append(b"")
                break
            tokens += token
            counts = USAGE.search(event) is not None
            if counts:
                self.counted = event
            joined = event if self.seam is None else self.seam.joined(event)
            if joined is not None:
                known.append(joined)
                if token or not (counts and self.strip):
                    passed.append(self._without_ids(joined))
        if self.produced is not None and (whole := self.separator.join(known)):
            self.produced.add(whole)
        return passed, tokens

    def _without_ids(self, event: bytes) -> bytes:
        """What else the client shall not see. The ids of its prompt it has seen already."""
        if self.cut_ids:
            return TOKEN_IDS.sub(NO_IDS, event)
        if self.seam is not None and b"prompt_token_ids" in event:
            return PROMPT_IDS.sub(NO_IDS, event)
        return event

    def _is_no_answer(self, event: bytes, token: bool) -> bool:
        """Does the answer break off here?

        An error that the engine reports is for the client to see, unless another worker may go on.
        """
        if ERROR.search(event):
            self.failed = True
            if self.produced is not None:
                self.trouble = f"error in the stream: {event[:300].decode('utf-8', 'replace')}"
        elif not token and self.flavor.openai_usage and not _is_sound(event):
            self.trouble = f"an event that is no JSON: {event[:80]!r}"
        return bool(self.trouble)


def _is_sound(event: bytes) -> bool:
    """Can OpenAI's clients read this event?"""
    if not event.startswith(b"data:") or event.startswith(b"data: [DONE]"):
        return True
    try:
        msgspec.json.decode(event[5:], type=msgspec.Raw)
    except msgspec.MsgspecError:
        return False
    return True
