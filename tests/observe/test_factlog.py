"""Is what happened written down, in files that can each be replayed, whatever the disk does?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from structlog.testing import capture_logs

from paceline.domain.errors import ConfigError
from paceline.domain.facts import ClientLeft, Fact, RequestArrived, WorkerAdded, WorkerReported
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.domain.worker import Worker, WorkerReport
from paceline.kernel import Kernel, Settings
from paceline.kernel.log import Entry, known_workers, opening, read, replay
from paceline.observe import factlog
from paceline.observe.factlog import FactLog


class Fleet:
    """A kernel whose facts are written down."""

    def __init__(self, path: Path, max_bytes: float = 4000, files: int = 4) -> None:
        self.path = path
        self.now = 0.0
        self.asked = 0
        self.kernel = Kernel(Settings(policy="round-robin"))
        self.log = FactLog(path, max_bytes, files, self.head)
        for i in range(2):
            self.tell(WorkerAdded(Worker(f"w{i}", "m", f"http://w{i}")))
            self.tell(WorkerReported(f"w{i}", WorkerReport(healthy=True)))

    def head(self, continued: bool) -> bytes:
        first = opening(self.kernel.settings, continued, unix_at_0=1000.0)
        return b"".join([first, *known_workers(self.kernel, self.now)])

    def tell(self, fact: Fact) -> None:
        self.now += 0.1
        self.log.write(self.now, fact, self.kernel.handle(fact, self.now))

    def serve(self, requests: int) -> None:
        for _ in range(requests):
            self.asked += 1
            self.tell(RequestArrived(Request(f"r{self.asked}", "m", "t", "standard", Promise())))
            self.tell(ClientLeft(f"r{self.asked}"))

    def entries(self) -> list[Entry]:
        """Of all files, oldest first, without what is said again at their heads."""
        found = []
        for file in sorted(self.path.parent.glob("facts.log*"), key=age, reverse=True):
            first, entries = read(lines_of(file))
            start = 4 if first.continued else 0
            found += entries[start:]
        return found


def age(file: Path) -> int:
    return int(file.suffix[1:]) if file.suffix != ".log" else 0


def lines_of(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


def arrivals(entries: list[Entry]) -> list[str]:
    return [e.fact.request.id for e in entries if isinstance(e.fact, RequestArrived)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "facts.log"


def test_no_fact_is_lost_between_two_files(path: Path) -> None:
    fleet = Fleet(path, files=100)
    for _ in range(20):
        fleet.serve(5)
        fleet.log.close()
    assert len(list(path.parent.glob("facts.log*"))) > 5
    assert arrivals(fleet.entries()) == [f"r{i}" for i in range(1, 101)]


def test_each_file_can_be_replayed_by_itself(path: Path) -> None:
    fleet = Fleet(path)
    for _ in range(20):
        fleet.serve(5)
        fleet.log.close()
    files = list(path.parent.glob("facts.log*"))
    for file in files:
        first, entries = read(lines_of(file))
        assert first.continued
        assert first.unix_at_0 == 1000.0
        assert {type(entry.fact) for entry in entries[:4]} == {WorkerAdded, WorkerReported}
        assert len(list(replay(lines_of(file)))) == len(entries)


def test_a_log_of_a_whole_life_gives_the_same_commands(path: Path) -> None:
    fleet = Fleet(path, max_bytes=1e9)
    fleet.serve(20)
    fleet.log.close()
    assert not read(lines_of(path))[0].continued
    assert all(list(entry.commands) == again for entry, again in replay(lines_of(path)))


def test_the_disk_is_never_fuller_than_was_said(path: Path) -> None:
    fleet = Fleet(path, max_bytes=4000, files=3)
    for _ in range(50):
        fleet.serve(3)
        fleet.log.close()
    sizes = [file.stat().st_size for file in path.parent.iterdir()]
    assert len(sizes) == 3
    assert sum(sizes) < 3 * 4000 + 3 * 2000


def test_what_an_earlier_process_wrote_is_kept(path: Path) -> None:
    before = Fleet(path)
    before.serve(3)
    before.log.close()
    written = path.read_bytes()
    Fleet(path)
    assert path.with_name("facts.log.1").read_bytes() == written


@contextmanager
def full_disk() -> Iterator[None]:
    with (
        mock.patch.object(Path, "open", side_effect=OSError(28, "No space left on device")),
        mock.patch.object(Path, "write_bytes", side_effect=OSError(28, "No space left on device")),
    ):
        yield


def test_a_full_disk_is_said_once_and_stops_nothing_and_older_files_stay(path: Path) -> None:
    fleet = Fleet(path)
    fleet.serve(20)
    fleet.log.close()
    fleet.serve(1)
    fleet.log.close()
    older = path.with_name("facts.log.1").read_bytes()
    with capture_logs() as said:
        with full_disk():
            for _ in range(3 * factlog.REST):
                fleet.serve(2)
                fleet.log.close()
        assert [event["event"] for event in said] == ["facts are lost"]
        for _ in range(factlog.REST + 1):
            fleet.serve(1)
            fleet.log.close()
        assert [event["event"] for event in said][1:] == ["facts are written down again"]
    assert path.with_name("facts.log.2").read_bytes() == older
    first, entries = read(lines_of(path))
    assert first.continued
    assert arrivals(entries)[-1] == f"r{fleet.asked}"


def test_a_disk_that_has_room_for_heads_only_does_not_push_older_files_out(path: Path) -> None:
    fleet = Fleet(path)
    fleet.serve(20)
    fleet.log.close()
    kept = {file.name: file.read_bytes() for file in path.parent.iterdir() if file != path}
    with mock.patch.object(Path, "open", side_effect=OSError(28, "No space left on device")):
        for _ in range(5 * factlog.REST):
            fleet.serve(1)
            fleet.log.close()
    assert {name: path.with_name(name).read_bytes() for name in kept} == kept


def test_a_last_line_that_was_cut_is_left_out(path: Path) -> None:
    fleet = Fleet(path, max_bytes=1e9)
    fleet.serve(2)
    fleet.log.close()
    path.write_bytes(path.read_bytes()[:-20])
    _, entries = read(lines_of(path))
    assert len(entries) == 4 + 2 * 2 - 1


def test_a_log_that_cannot_be_begun_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="log_facts"):
        Fleet(tmp_path / "nowhere" / "facts.log")


def test_a_slow_disk_loses_facts_and_not_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factlog, "MAX_WAITING", 1000)
    fleet = Fleet(path, max_bytes=1e9)
    fleet.log.close()
    fleet.serve(20)
    fleet.log.close()
    fleet.serve(1)
    fleet.log.close()
    first, entries = read(lines_of(path))
    assert first.continued
    assert arrivals(entries) == ["r21"]


def test_it_writes_by_itself_and_to_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factlog, "WRITE_S", 0.001)
    fleet = Fleet(path, max_bytes=1e9)

    async def live() -> None:
        writing = asyncio.create_task(fleet.log.run())
        for _ in range(50):
            fleet.serve(2)
            await asyncio.sleep(0.001)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        fleet.serve(1)
        fleet.log.close()

    asyncio.run(live())
    assert arrivals(fleet.entries()) == [f"r{i}" for i in range(1, 102)]
