"""Does each adapter report what its engine says, and survive what a sick engine does?"""

import asyncio

import aiohttp
import pytest
from aiohttp import web
from recorded_engine import (
    Said,
    against,
    answer,
    llamacpp,
    llamacpp_that_loads,
    not_offered,
    recorded,
    recording,
    vllm,
)

from paceline.domain.worker import WorkerReport
from paceline.engines import probe
from paceline.engines.adapter import ADAPTERS, make_adapter


def report_of(kind: str, pages: dict[str, Said], name: str = "m") -> WorkerReport:
    async def run() -> WorkerReport:
        async with recorded(pages) as url, aiohttp.ClientSession() as session:
            return await make_adapter(kind, url, name, "").report(session)

    return asyncio.run(run())


def test_vllm_tells_its_load_its_cache_and_its_window() -> None:
    assert report_of("vllm", vllm()) == WorkerReport(
        healthy=True,
        running=3,
        waiting=2,
        kv_used=0.25,
        kv_capacity_tokens=23296,
        block_size=128,
        preemptions_total=4.0,
        prefix_queries_total=146.0,
        prefix_hits_total=128.0,
        max_model_len=4096,
    )


def test_vllm_before_version_1_used_other_names() -> None:
    page = answer(recording("vllm_metrics_before_v1.txt"))
    report = report_of("vllm", vllm() | {"/metrics": page})
    assert (report.running, report.kv_used, report.kv_capacity_tokens) == (1, 0.5, 16_000)
    assert (report.prefix_queries_total, report.prefix_hits_total) == (10.0, 5.0)


def test_engines_behind_one_vllm_server_count_together() -> None:
    page = answer(recording("vllm_metrics_two_engines.txt"))
    report = report_of("vllm", vllm() | {"/metrics": page})
    assert (report.running, report.waiting, report.kv_capacity_tokens) == (7, 1, 3200)
    assert report.kv_used == pytest.approx(0.3)


def test_vllm_without_metrics_is_healthy_and_says_no_more() -> None:
    report = report_of("vllm", vllm() | {"/metrics": answer(status=404)})
    assert report == WorkerReport(healthy=True, max_model_len=4096)


def test_vllm_whose_core_died_is_not_healthy() -> None:
    report = report_of("vllm", vllm() | {"/health": answer(status=503)})
    assert (report.healthy, report.because) == (False, "HTTP 503")


def test_vllm_that_serves_another_model_says_which() -> None:
    report = report_of("vllm", vllm(), name="llama-70b")
    assert (report.healthy, report.because) == (False, "serves m, not llama-70b")


def test_what_vllm_serves_is_asked_anew_after_it_was_ill() -> None:
    pages = vllm()

    async def test(url: str, session: aiohttp.ClientSession) -> None:
        adapter = make_adapter("vllm", url, "m", "")
        assert (await adapter.report(session)).healthy
        pages["/v1/models"] = answer(b'{"data":[{"id":"other"}]}')
        assert (await adapter.report(session)).healthy
        pages["/health"] = answer(status=500)
        assert not (await adapter.report(session)).healthy
        pages["/health"] = answer()
        assert (await adapter.report(session)).because == "serves other, not m"

    against(pages, test)


def test_llamacpp_tells_its_slots() -> None:
    assert report_of("llamacpp", llamacpp()) == WorkerReport(
        healthy=True,
        running=2,
        waiting=1,
        kv_used=29 / 1024,
        kv_capacity_tokens=1024,
        max_model_len=512,
    )


def test_llamacpp_without_metrics_counts_its_busy_slots() -> None:
    report = report_of("llamacpp", llamacpp() | {"/metrics": not_offered()})
    assert (report.running, report.waiting) == (1, None)


def test_llamacpp_without_metrics_and_slots_is_healthy() -> None:
    silent: dict[str, Said] = dict.fromkeys(("/metrics", "/slots", "/props"), not_offered())
    assert report_of("llamacpp", llamacpp() | silent) == WorkerReport(healthy=True)


def test_llamacpp_that_loads_its_model_is_not_healthy_yet() -> None:
    report = report_of("llamacpp", llamacpp_that_loads())
    assert (report.healthy, report.because) == (False, "loading")


def test_any_other_engine_is_healthy_if_it_lists_its_models() -> None:
    pages: dict[str, Said] = {"/v1/models": answer(recording("openai_models.json"))}
    assert report_of("openai", pages) == WorkerReport(healthy=True)


def test_an_engine_without_a_list_of_models_is_asked_for_its_health() -> None:
    assert report_of("openai", {"/health": answer("fine")}) == WorkerReport(healthy=True)
    assert not report_of("openai", {"/health": answer(status=503)}).healthy


def test_an_engine_that_refuses_our_key_is_not_healthy() -> None:
    async def guarded(request: web.Request) -> web.Response:
        return answer(recording("openai_models.json"), 200 if _has_key(request) else 401)

    async def test(url: str, session: aiohttp.ClientSession) -> None:
        assert (await make_adapter("openai", url, "m", "secret").report(session)).healthy
        refused = await make_adapter("openai", url, "m", "wrong").report(session)
        assert refused.because == "refuses the key (HTTP 401)"

    against({"/v1/models": guarded}, test)


def _has_key(request: web.Request) -> bool:
    return request.headers.get("authorization") == "Bearer secret"


async def hang(request: web.Request) -> web.Response:
    await asyncio.sleep(3600)
    return answer()


async def never_end(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(bytes(65536))


async def hang_up(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return answer()


async def lead_away(request: web.Request) -> web.Response:
    raise web.HTTPFound("/elsewhere")


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(
    ("trouble", "because"),
    [
        (hang, "within"),
        (never_end, "bytes"),
        (hang_up, ""),
        (lead_away, "HTTP 302"),
        (answer(b"\xff\x00", 500), "HTTP 500"),
    ],
)
def test_no_trouble_at_the_engine_is_an_exception_here(
    kind: str, trouble: Said, because: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "TIMEOUT_S", 0.2 if trouble is hang else 20.0)
    monkeypatch.setattr(probe, "MAX_BYTES", 100_000)
    paths = ("/health", "/metrics", "/v1/models", "/slots", "/props")
    report = report_of(kind, dict.fromkeys(paths, trouble))
    assert not report.healthy
    assert because in report.because


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("page", [b"", b"\xff\x00{", b"[]", b'{"data":[{"id":7}]}', b"null"])
def test_nonsense_is_not_taken_for_figures(kind: str, page: bytes) -> None:
    paths = ("/health", "/metrics", "/v1/models", "/slots", "/props")
    report = report_of(kind, dict.fromkeys(paths, answer(page)))
    assert (report.running, report.kv_capacity_tokens) in {(None, None), (0, None)}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_engine_that_is_not_there_is_not_healthy(kind: str) -> None:
    async def run() -> WorkerReport:
        async with aiohttp.ClientSession() as session:
            return await make_adapter(kind, "http://127.0.0.1:1", "m", "").report(session)

    report = asyncio.run(run())
    assert (report.healthy, report.because) == (False, "connection refused")
