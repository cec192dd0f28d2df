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
    sglang,
    trtllm,
    vllm,
)

from paceline.domain.worker import WorkerReport
from paceline.engines import probe
from paceline.engines.adapter import ADAPTERS, make_adapter

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


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


def test_sglang_tells_its_load_its_cache_and_its_window() -> None:
    assert report_of("sglang", sglang()) == WorkerReport(
        healthy=True,
        running=3,
        waiting=2,
        kv_used=0.25,
        kv_capacity_tokens=65536,
        block_size=16,
        preemptions_total=4.0,
        prefix_queries_total=1000.0,
        prefix_hits_total=320.0,
        max_model_len=4096,
        prefill_budget=4096,
    )


def test_ranks_behind_one_sglang_server_count_together() -> None:
    page = answer(recording("sglang_loads_two_ranks.json"))
    report = report_of("sglang", sglang() | {"/v1/loads": page})
    assert (report.running, report.waiting, report.kv_capacity_tokens) == (7, 1, 131_072)
    assert report.kv_used == 0.5


def test_sglang_without_loads_is_known_by_its_metrics() -> None:
    """Which count the requests of each priority again."""
    pages = sglang() | {"/v1/loads": answer(status=404)}
    report = report_of("sglang", pages)
    assert (report.running, report.waiting, report.kv_used) == (2, 1, 0.2)
    assert report.kv_capacity_tokens == 65536


def test_sglang_without_metrics_tells_its_load_nevertheless() -> None:
    report = report_of("sglang", sglang() | {"/metrics": answer(status=404)})
    assert (report.running, report.kv_used, report.kv_capacity_tokens) == (3, 0.25, 65536)
    assert report.prefix_hits_total is None


def test_sglang_before_it_had_the_new_paths_tells_how_it_was_started() -> None:
    pages = sglang()
    pages["/get_server_info"] = pages.pop("/server_info")
    assert report_of("sglang", pages).block_size == 16


def test_sglang_that_does_not_split_prompts_has_no_budget_to_tell() -> None:
    info = answer(b'{"page_size":1,"chunked_prefill_size":-1}')
    report = report_of("sglang", sglang() | {"/server_info": info})
    assert (report.healthy, report.prefill_budget) == (True, None)


def test_sglang_serves_adapters_under_its_own_name() -> None:
    assert report_of("sglang", sglang(), name="m:my-lora").healthy
    report = report_of("sglang", sglang(), name="other:my-lora")
    assert report.because == "serves m, not other:my-lora"


def test_sglang_that_starts_or_hangs_is_not_healthy() -> None:
    report = report_of("sglang", sglang() | {"/health": answer(status=503)})
    assert (report.healthy, report.because) == (False, "HTTP 503")


def test_tensorrt_llm_tells_its_load_its_cache_and_its_window() -> None:
    assert report_of("trtllm", trtllm()) == WorkerReport(
        healthy=True,
        running=3,
        waiting=2,
        kv_used=0.25,
        kv_capacity_tokens=65536,
        block_size=32,
        prefix_queries_total=1000.0,
        prefix_hits_total=320.0,
        max_model_len=8192,
        prefill_budget=8192,
    )


def test_tensorrt_llm_without_prometheus_is_known_by_its_last_step() -> None:
    assert report_of("trtllm", without_prometheus()) == WorkerReport(
        healthy=True,
        running=3,
        waiting=1,
        kv_used=0.25,
        kv_capacity_tokens=65536,
        block_size=32,
        prefix_queries_total=3200.0,
        prefix_hits_total=1024.0,
        prefill_budget=8192,
    )


def test_tensorrt_llm_that_made_no_step_since_is_idle() -> None:
    pages = without_prometheus()

    async def test(url: str, session: aiohttp.ClientSession) -> None:
        adapter = make_adapter("trtllm", url, "m", "")
        assert (await adapter.report(session)).running == 3
        pages["/metrics"] = answer(b"[]")
        report = await adapter.report(session)
        assert (report.running, report.waiting, report.kv_used) == (0, 0, 0.0)
        assert report.kv_capacity_tokens == 65536

    against(pages, test)


def test_tensorrt_llm_without_statistics_is_healthy_and_says_no_more() -> None:
    silent = without_prometheus() | {"/metrics": answer(b"[]")}
    assert report_of("trtllm", silent) == WorkerReport(healthy=True)


def test_tensorrt_llm_whose_engine_failed_is_not_healthy() -> None:
    report = report_of("trtllm", trtllm() | {"/health": answer(b"LLM is unavailable.", 503)})
    assert (report.healthy, report.because) == (False, "HTTP 503")


def without_prometheus() -> dict[str, Said]:
    pages = trtllm()
    del pages["/prometheus/metrics"]
    return pages


# What is sent depends on how the engine was started.


def priority_of(kind: str, pages: dict[str, Said], path: str, urgency: int) -> float | None:
    async def run() -> float | None:
        async with recorded(pages) as url, aiohttp.ClientSession() as session:
            adapter = make_adapter(kind, url, "m", "")
            assert adapter.extras(path, urgency) == {}, "nothing is known of it yet"
            assert (await adapter.report(session)).healthy
            return adapter.extras(path, urgency).get("priority")

    return asyncio.run(run())


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_more_urgent_come_first_whichever_way_the_numbers_of_an_engine_run(path: str) -> None:
    reversed_ = recording("sglang_server_info.json").replace(b'first":false', b'first":true')
    upside_down = sglang() | {"/server_info": answer(reversed_)}
    assert [priority_of("sglang", sglang(), path, urgency) for urgency in (0, 1, 2)] == [0, -1, -2]
    assert [priority_of("sglang", upside_down, path, urgency) for urgency in (0, 1, 2)] == [0, 1, 2]
    told = [priority_of("trtllm", trtllm(), path, urgency) for urgency in (0, 1, 2)]
    assert told == [1.0, 0.5, pytest.approx(1 / 3)]


def test_no_priority_is_sent_to_an_engine_that_does_not_know_it() -> None:
    fcfs = recording("sglang_server_info.json").replace(b'scheduling":true', b'scheduling":false')
    assert priority_of("sglang", sglang() | {"/server_info": answer(fcfs)}, CHAT, 1) is None
    assert priority_of("sglang", sglang() | {"/server_info": answer(status=404)}, CHAT, 1) is None
    before = answer(recording("trtllm_openapi_1_2.json"))
    assert priority_of("trtllm", trtllm() | {"/openapi.json": before}, CHAT, 1) is None
    assert priority_of("trtllm", trtllm() | {"/openapi.json": answer(status=500)}, CHAT, 1) is None
    for kind, pages in (("sglang", sglang()), ("trtllm", trtllm())):
        assert priority_of(kind, pages, "/v1/messages", 1) is None


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
    paths = ("/health", "/metrics", "/v1/models", "/v1/loads", "/server_info", "/slots", "/props")
    report = report_of(kind, dict.fromkeys(paths, trouble))
    assert not report.healthy
    assert because in report.because


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("page", [b"", b"\xff\x00{", b"[]", b'{"data":[{"id":7}]}', b"null"])
def test_nonsense_is_not_taken_for_figures(kind: str, page: bytes) -> None:
    paths = ("/health", "/metrics", "/v1/models", "/v1/loads", "/server_info", "/slots", "/props")
    report = report_of(kind, dict.fromkeys(paths, answer(page)))
    assert (report.running, report.kv_capacity_tokens) in {(None, None), (0, None)}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_engine_that_is_not_there_is_not_healthy(kind: str) -> None:
    async def run() -> WorkerReport:
        async with aiohttp.ClientSession() as session:
            return await make_adapter(kind, "http://127.0.0.1:1", "m", "").report(session)

    report = asyncio.run(run())
    assert (report.healthy, report.because) == (False, "connection refused")
