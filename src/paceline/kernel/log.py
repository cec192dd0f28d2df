"""How is an incident kept, and lived through again?

A log is one JSON line a fact: `[now, fact, commands]`, after a first line with the settings.
Replayed into a fresh kernel it gives the same commands: the log is the bug report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from paceline.domain.commands import Command
from paceline.domain.facts import Fact
from paceline.kernel.kernel import Kernel, Settings


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One fact, when it was handled, and what followed."""

    now: float
    fact: Fact
    commands: Sequence[Command]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Entry).decode
_decode_settings = msgspec.json.Decoder(Settings).decode


def opening(settings: Settings) -> bytes:
    """The first line of a log."""
    return _encode(settings) + b"\n"


def line(now: float, fact: Fact, commands: Sequence[Command]) -> bytes:
    """The line for one fact."""
    return _encode(Entry(now, fact, commands)) + b"\n"


def replay(lines: Iterable[bytes]) -> Iterator[tuple[Entry, list[Command]]]:
    """Each recorded entry with the commands that a fresh kernel gives for its fact."""
    found = iter(lines)
    kernel = Kernel(_decode_settings(next(found)))
    for text in found:
        entry = _decode(text)
        yield entry, kernel.handle(entry.fact, entry.now)
