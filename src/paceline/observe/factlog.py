"""How is every fact written down without costing a token, and without ever filling the disk?

Lines are gathered and written by a thread a few times a second. A file that is full becomes the
first of the older ones (`.1`, `.2`, ...) of which only so many are kept. Each file can be replayed
by itself: one that starts within the life of a gateway begins with the workers as they were.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import structlog

from paceline.domain.commands import Command
from paceline.domain.errors import ConfigError
from paceline.domain.facts import Fact
from paceline.kernel.log import Noted, lines

WRITE_S = 0.25
"""Between two writes."""
REST = 40
"""Writes that are left out after one that failed."""
AT_ONCE = 32
"""Facts put into lines together: it keeps tokens waiting for 50 µs, and takes half the time."""
MAX_WAITING = 32 * 2**20
"""Bytes that wait for a slow disk; then they are given up, and the next file begins."""

log = structlog.get_logger("paceline")

Head = Callable[[bool], bytes]
"""The first lines of a file; true: it starts within the life of the gateway."""


class FactLog:
    """The newest file and the older ones."""

    def __init__(self, path: Path, max_bytes: float, files: int, head: Head) -> None:
        """What stands under this name already is kept, as the first of the older files."""
        self._path = path
        self._max_bytes = max_bytes
        self._older = [path.with_name(f"{path.name}.{n}") for n in range(1, files)]
        self._head = head
        self._noted: list[Noted] = []
        """Not in lines yet."""
        self._lines: list[bytes] = []
        self._waiting = 0
        self._size = 0
        """Bytes of the newest file."""
        self._lived = path.exists()
        """It has more than its head: it is worth keeping."""
        self._rest = 0
        """Writes to be left out; above 0, the last one failed."""
        self._writing: asyncio.Future[None] | None = None
        try:
            self._begin(head(False))
        except OSError as error:
            raise ConfigError([f"log_facts: {path}: {error.strerror or error}"]) from None

    def write(self, now: float, fact: Fact, commands: Sequence[Command]) -> None:
        """Note what has happened, and what followed."""
        noted = self._noted
        noted.append((now, fact, commands))
        if len(noted) >= AT_ONCE:
            self._encode()

    def _encode(self) -> None:
        noted, self._noted = self._noted, []
        text = lines(noted)
        self._lines.append(text)
        self._waiting += len(text)

    async def run(self) -> None:
        """Write what has been noted, again and again."""
        try:
            while True:
                await asyncio.sleep(WRITE_S)
                try:
                    data, head = self._taken()
                    self._writing = asyncio.ensure_future(asyncio.to_thread(self._put, data, head))
                    await asyncio.shield(self._writing)
                except Exception:  # no log is worth a stream
                    log.exception("a bug kept facts from being written")
        finally:
            if self._writing is not None:
                await self._writing

    def close(self) -> None:
        """Write what has been noted since, when nothing else does."""
        self._put(*self._taken())

    def _taken(self) -> tuple[bytes, bytes]:
        """What is to be written; and the head of a new file, if one is to begin after it.

        Taken on the event loop, so that no fact comes between the last line of the one file and the
        workers at the head of the other.
        """
        self._encode()
        texts, self._lines = self._lines, []
        if self._waiting > MAX_WAITING and not self._rest:
            self._rest = 1
            log.error("facts are lost", path=str(self._path), because="the disk is too slow")
        lost, self._waiting = self._rest > 0, 0
        if lost:
            self._rest = max(self._rest - 1, 1)
            return b"", self._head(True) if self._rest == 1 else b""
        data = b"".join(texts)
        self._size += len(data)
        return data, self._head(True) if self._size >= self._max_bytes else b""

    def _put(self, data: bytes, head: bytes) -> None:
        broken = self._rest > 0
        try:
            if data:
                with self._path.open("ab") as file:
                    file.write(data)
                self._lived = True
            if head:
                self._begin(head)
                self._rest = 0
        except OSError as error:  # a full disk costs no request
            self._rest = REST
            if not broken:
                log.error("facts are lost", path=str(self._path), because=str(error))
        else:
            if broken and head:
                log.info("facts are written down again", path=str(self._path))

    def _begin(self, head: bytes) -> None:
        """A new file; what stood in the newest one is then the first of the older ones."""
        new = self._path.with_name(f"{self._path.name}.new")
        new.write_bytes(head)
        if self._lived:
            files = [self._path, *self._older]
            for file, older in reversed(list(pairwise(files))):
                if file.exists():
                    file.replace(older)
        new.replace(self._path)
        self._size, self._lived = len(head), False
