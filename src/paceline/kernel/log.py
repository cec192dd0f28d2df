"""How is an incident kept, and lived through again?

A log is one JSON line a fact: `[now, fact, commands]`, after a first line with the settings.
Replayed into a fresh kernel it gives the same commands: the log is the bug report. A log that is
`continued` begins within the life of a kernel: with the workers as they were then, but without what
was learned of them, and without the requests that were under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from paceline.domain.commands import Command
from paceline.domain.facts import Fact, WorkerAdded, WorkerRemoved, WorkerReported
from paceline.kernel.kernel import Kernel, Settings


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One fact, when it was handled, and what followed."""

    now: float
    fact: Fact
    commands: Sequence[Command]


class Opening(Settings, frozen=True):
    """The first line: the kernel's settings, and how the log began."""

    continued: bool = False
    """Within the life of the kernel."""
    unix_at_0: float = 0.0
    """Unix time when `now` was 0."""


Noted = tuple[float, Fact, Sequence[Command]]
"""What an entry says, before it is one."""

_encoder = msgspec.json.Encoder()
_encode = _encoder.encode
_decode = msgspec.json.Decoder(Entry).decode
_decode_opening = msgspec.json.Decoder(Opening).decode
_decode_settings = msgspec.json.Decoder(Settings).decode


def opening(settings: Settings, continued: bool = False, unix_at_0: float = 0.0) -> bytes:
    """The first line of a log."""
    told = msgspec.structs.asdict(settings)
    return _encode(Opening(**told, continued=continued, unix_at_0=unix_at_0)) + b"\n"


def known_workers(kernel: Kernel, now: float) -> Iterator[bytes]:
    """The lines by which a log that is continued tells of the workers that are there."""
    for worker_id, state in kernel.workers.items():
        yield line(now, WorkerAdded(state.worker), ())
        if state.report is not None:
            yield line(now, WorkerReported(worker_id, state.report), ())
        if state.draining:
            yield line(now, WorkerRemoved(worker_id), ())


def read(lines: Iterable[bytes]) -> tuple[Opening, list[Entry]]:
    """What a log says. Of a last line that was not written to its end nothing is read."""
    first, *texts = lines
    whole = [text for text in texts if text.endswith(b"\n")]
    return _decode_opening(first), [_decode(text) for text in whole]


def line(now: float, fact: Fact, commands: Sequence[Command]) -> bytes:
    """The line for one fact."""
    return _encode(Entry(now, fact, commands)) + b"\n"


def lines(noted: Sequence[Noted]) -> bytes:
    """The same for many."""
    return _encoder.encode_lines(noted)


def replay(lines: Iterable[bytes]) -> Iterator[tuple[Entry, list[Command]]]:
    """Each recorded entry with the commands that a fresh kernel gives for its fact."""
    found = iter(lines)
    kernel = Kernel(_decode_settings(next(found)))
    for text in found:
        entry = _decode(text)
        yield entry, kernel.handle(entry.fact, entry.now)
