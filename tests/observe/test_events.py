"""Who follows the gateway: do they hear of everything, and cost nothing when they are slow?"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse

from paceline.domain.commands import Dispatch, Hold
from paceline.domain.errors import Unavailable
from paceline.host import Decision
from paceline.kernel import Kernel
from paceline.observe import events
from paceline.observe.events import MOST_LISTENERS, MOST_TOLD, event_routes


class Busy:
    """A gateway of which a test says what it decides."""

    def __init__(self) -> None:
        self.log: list[Decision] = []
        self.now = 100.0
        self.over = asyncio.Event()

    def ready(self) -> bool:
        return True

    def decisions(self) -> list[Decision]:
        return self.log

    def decides(self, number: int) -> None:
        for i in range(number):
            self.log.append(Decision(self.now, Dispatch(f"r{i}", "w", "least cost")))
        self.log.append(Decision(self.now, Hold("r", "no room")))


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Busy:
    monkeypatch.setattr(events, "EVERY_S", 0.0)
    return Busy()


async def opened(busy: Busy) -> Any:
    """Yields the moments as they come."""
    (route,) = event_routes(Kernel(), busy, lambda: busy.now, busy.over)
    answer = await route.endpoint(Request({"type": "http"}))
    assert isinstance(answer, StreamingResponse)
    return answer.body_iterator


async def next_of(moments: Any) -> dict[str, Any]:
    frame: bytes = await anext(moments)
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    told: dict[str, Any] = msgspec.json.decode(frame[6:])
    return told


def test_each_decision_is_told_once(busy: Busy) -> None:
    async def play() -> None:
        moments = await opened(busy)
        assert (await next_of(moments))["decisions"] == []
        busy.decides(2)
        busy.now += 1
        told = await next_of(moments)
        assert told["count"] == {"Dispatch": 2, "Hold": 1}
        assert [d["command"]["type"] for d in told["decisions"]] == ["Dispatch", "Dispatch", "Hold"]
        busy.now += 1
        assert (await next_of(moments))["count"] == {}

    asyncio.run(play())


def test_who_reads_slowly_gets_one_moment_of_bounded_size(busy: Busy) -> None:
    async def play() -> None:
        moments = await opened(busy)
        await next_of(moments)
        for _ in range(10):
            busy.decides(100)
            busy.now += 1
        told = await next_of(moments)
        assert told["count"]["Dispatch"] == 1000
        assert len(told["decisions"]) == MOST_TOLD

    asyncio.run(play())


def test_only_so_many_may_listen_and_who_leaves_makes_room(busy: Busy) -> None:
    async def play() -> None:
        (route,) = event_routes(Kernel(), busy, lambda: busy.now, busy.over)
        listeners = []
        for _ in range(MOST_LISTENERS):
            answer = await route.endpoint(Request({"type": "http"}))
            await anext(answer.body_iterator)
            listeners.append(answer.body_iterator)
        with pytest.raises(Unavailable):
            await route.endpoint(Request({"type": "http"}))
        await listeners[0].aclose()
        await route.endpoint(Request({"type": "http"}))

    asyncio.run(play())


def test_the_stream_ends_with_the_gateway(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "EVERY_S", 1000.0)

    async def play() -> None:
        moments = await opened(busy)
        await next_of(moments)
        asyncio.get_running_loop().call_soon(busy.over.set)
        with pytest.raises(StopAsyncIteration):
            await anext(moments)

    asyncio.run(play())
