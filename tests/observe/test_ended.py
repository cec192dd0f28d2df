"""Is everybody told of every request that is over, soon enough?"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from outcomes import OUTCOME
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from paceline.kernel import Kernel
from paceline.observe.ended import AT_ONCE, SOON_S, Ended, Over
from paceline.observe.metrics import Metrics
from paceline.observe.sheet import MOST_ROWS

LIFE = SimpleNamespace(sent_at=0.1, first_at=0.2, done_at=1.0)


class Listening:
    def __init__(self) -> None:
        self.heard: list[int] = []
        """How many requests, each time."""

    def __call__(self, over: Over) -> None:
        self.heard.append(len(over))


def end(ended: Ended, count: int) -> None:
    """So many requests end at the same moment."""

    async def all_of_them() -> None:
        for _ in range(count):
            ended.add(LIFE, OUTCOME)

    asyncio.run(all_of_them())


def test_a_lone_request_is_told_of_soon() -> None:
    listening = Listening()

    async def one_ends() -> None:
        Ended([listening]).add(LIFE, OUTCOME)
        assert not listening.heard
        async with asyncio.timeout(60):
            while not listening.heard:  # noqa: ASYNC110 (nobody tells the test)
                await asyncio.sleep(SOON_S)

    asyncio.run(one_ends())
    assert listening.heard == [1]


def test_many_requests_are_told_of_together_and_each_once() -> None:
    one, other = Listening(), Listening()
    ended = Ended([one, other])
    end(ended, 2 * AT_ONCE + 3)
    assert one.heard == other.heard == [AT_ONCE, AT_ONCE]
    ended.tell()
    ended.tell()
    assert one.heard == other.heard == [AT_ONCE, AT_ONCE, 3]


def test_a_bug_in_one_who_listens_costs_the_others_nothing() -> None:
    def broken(over: Over) -> None:
        raise ZeroDivisionError

    listening = Listening()
    ended = Ended([broken, listening])
    with capture_logs() as said:
        end(ended, 1)
        ended.tell()
    assert listening.heard == [1]
    assert said[0]["log_level"] == "error"


def test_whoever_reads_the_metrics_finds_the_request_that_has_just_ended() -> None:
    metrics = Metrics(Kernel(), {}, [0.1])
    ended = Ended([], [metrics.count])
    metrics.before_reading = ended.count
    end(ended, 1)
    families = text_string_to_metric_families(metrics.text().decode())
    (requests,) = [family for family in families if family.name == "paceline_requests"]
    assert [sample.value for sample in requests.samples] == [1.0]


def test_a_full_sheet_is_counted_though_nobody_asks() -> None:
    counted: list[int] = []
    ended = Ended([], [lambda sheet: counted.append(len(sheet.who))])
    end(ended, MOST_ROWS + AT_ONCE)
    assert counted == [MOST_ROWS]
    ended.count()
    ended.count()
    assert counted == [MOST_ROWS, AT_ONCE]
