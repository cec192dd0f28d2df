"""Are a worker's GPUs known from its exporter, and does nothing depend on that?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from dcgm_exporter import HOT, WELL, page
from recorded_engine import Said, against, answer
from structlog.testing import capture_logs

from paceline.domain.gpu import Gpus
from paceline.domain.worker import Worker
from paceline.engines import probe
from paceline.engines.dcgm import gpus_of
from paceline.engines.gpus import GpuWatch


def worker(name: str, url: str, *indices: int) -> Worker:
    return Worker(name, "m", f"http://{name}", gpus=Gpus(url, indices))


def test_a_page_tells_of_each_gpu_in_our_units() -> None:
    (gpu, hot) = gpus_of(page([WELL, HOT]).encode()).values()
    assert (gpu.index, gpu.name) == (0, "NVIDIA H100 80GB HBM3")
    assert (gpu.utilisation, gpu.sm_active, gpu.tensor_active) == (0.98, 0.731, 0.082)
    assert (gpu.memory_active, gpu.memory_used_mib, gpu.power_w) == (0.644, 71920, 512.365)
    assert (gpu.clock_mhz, gpu.temperature_c, gpu.last_xid) == (1980, 61, 0)
    assert gpu.reasons == ()
    assert (hot.index, hot.reasons) == (1, ("heat_software", "heat_hardware"))


def test_the_older_name_of_the_clocks_reasons_is_known_and_idling_is_none() -> None:
    old = {"DCGM_FI_DEV_CLOCK_THROTTLE_REASONS": 0x4 | 0x1, "DCGM_FI_DEV_SM_CLOCK": 210}
    (gpu,) = gpus_of(page([old], uuid="uuid").encode()).values()
    assert gpu.reasons == ("power_cap",)
    assert gpu.utilisation is None


def test_what_an_exporter_leaves_blank_is_unknown() -> None:
    blank = dict.fromkeys(WELL, 9223372036854775794) | {"DCGM_FI_DEV_GPU_UTIL": 3}
    (gpu,) = gpus_of(page([blank]).encode()).values()
    assert (gpu.utilisation, gpu.clock_mhz, gpu.last_xid) == (0.03, None, None)


def test_of_a_divided_gpu_the_busiest_part_counts() -> None:
    parts = [
        page([{"DCGM_FI_PROF_SM_ACTIVE": active}], f',GPU_I_PROFILE="1g.10gb",GPU_I_ID="{i}"')
        for i, active in enumerate((0.1, 0.9))
    ]
    (gpu,) = gpus_of("".join(parts).encode()).values()
    assert gpu.sm_active == 0.9


@pytest.mark.parametrize("said", ["", "<html>no</html>", 'DCGM_FI_DEV_GPU_UTIL{gpu="x"} 1\n'])
def test_a_page_without_gpus_tells_of_none(said: str) -> None:
    assert gpus_of(said.encode()) == {}


Asked = Callable[[GpuWatch], Awaitable[None]]


def watched(pages: dict[str, Said], asked: Asked, *indices: int) -> None:
    """With a watch over one worker, whose exporter has these pages."""

    async def test(url: str, session: aiohttp.ClientSession) -> None:
        await asked(GpuWatch(lambda: [worker("w", url, *indices), Worker("x", "m", "http://x")]))

    against(pages, test)


async def ask(watch: GpuWatch) -> None:
    async with aiohttp.ClientSession() as session:
        await watch.ask(session)


def test_workers_of_one_machine_each_have_their_own_gpus() -> None:
    async def test(url: str, session: aiohttp.ClientSession) -> None:
        watch = GpuWatch(lambda: [worker("w0", url, 0, 1), worker("w1", url, 2), worker("w2", url)])
        await watch.ask(session)
        found = {name: [gpu.index for gpu in watch.latest(name)] for name in ("w0", "w1", "w2")}
        assert found == {"w0": [0, 1], "w1": [2], "w2": [0, 1, 2]}
        assert watch.latest("x") == ()

    against({"/metrics": answer(page([WELL, WELL, WELL]))}, test)


def test_a_lowered_clock_is_remembered_though_the_gpu_idles_by_now() -> None:
    pages: dict[str, Said] = {"/metrics": answer(page([WELL]))}

    async def test(watch: GpuWatch) -> None:
        for gpu in (WELL, HOT, WELL | {"DCGM_FI_DEV_SM_CLOCK": 210}):
            pages["/metrics"] = answer(page([gpu]))
            await ask(watch)
        (now,), (then,) = watch.latest("w"), watch.telling("w")
        assert (now.clock_mhz, now.best_clock_mhz, now.lowered_by) == (210, 1980, ())
        assert (then.clock_mhz, then.best_clock_mhz) == (1095, 1980)
        assert then.lowered_by == ("heat_software", "heat_hardware")

    watched(pages, test)


def test_a_power_cap_lowers_a_clock_only_if_it_was_higher_before() -> None:
    capped = WELL | {"DCGM_FI_DEV_CLOCKS_EVENT_REASONS": 0x4, "DCGM_FI_DEV_SM_CLOCK": 1905}
    pages: dict[str, Said] = {}

    async def test(watch: GpuWatch) -> None:
        lowered = []
        for gpu in (WELL, capped, capped | {"DCGM_FI_DEV_SM_CLOCK": 1410}):
            pages["/metrics"] = answer(page([gpu]))
            await ask(watch)
            lowered.append(watch.latest("w")[0].lowered_by)
        assert lowered == [(), (), ("power_cap",)]

    watched(pages, test)


def test_an_exporter_that_is_away_is_spoken_of_once_and_forgotten() -> None:
    pages: dict[str, Said] = {"/metrics": answer(page([HOT]))}

    async def test(watch: GpuWatch) -> None:
        await ask(watch)
        pages["/metrics"] = answer(status=500)
        with capture_logs() as said:
            await ask(watch)
            await ask(watch)
            assert watch.latest("w") == watch.telling("w") == ()
            pages["/metrics"] = answer(page([WELL]))
            await ask(watch)
            await ask(watch)
        assert [line["log_level"] for line in said] == ["warning", "info"]
        assert said[0]["because"] == "HTTP 500"
        assert len(watch.latest("w")) == 1

    watched(pages, test)


def test_a_gpu_that_is_not_there_is_spoken_of_once() -> None:
    async def test(watch: GpuWatch) -> None:
        with capture_logs() as said:
            await ask(watch)
            await ask(watch)
        assert [line["gpus"] for line in said] == ["GPU 7"]
        assert [gpu.index for gpu in watch.latest("w")] == [0]

    watched({"/metrics": answer(page([WELL]))}, test, 0, 7)


async def silent(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    return web.Response()


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"# HELP nothing\n" * 10_000)


@pytest.mark.parametrize(("said", "why"), [(silent, "no answer"), (endless, "more than")])
def test_an_exporter_that_says_nothing_or_too_much_is_left(
    said: Said, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "TIMEOUT_S", 0.2 if said is silent else 30.0)

    async def test(watch: GpuWatch) -> None:
        with capture_logs() as lines:
            await ask(watch)
        assert lines[0]["because"].startswith(why)
        assert watch.latest("w") == ()

    watched({"/metrics": said}, test)


def test_the_watch_survives_its_own_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        def broken() -> list[Worker]:
            raise RuntimeError("a bug")

        with capture_logs() as said:
            task = asyncio.create_task(GpuWatch(broken).run())
            while not said:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
