"""Is an engine taken for what it is?"""

import asyncio

import aiohttp
import pytest
from aiohttp import web
from recorded_engine import (
    Said,
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

from paceline.engines.detect import Detected, detect


def detected(pages: dict[str, Said]) -> Detected | None:
    async def run() -> Detected | None:
        async with recorded(pages) as url, aiohttp.ClientSession() as session:
            return await detect(session, url + "/", "")

    return asyncio.run(run())


def test_vllm_is_known_by_what_it_owns() -> None:
    assert detected(vllm()) == Detected("vllm", ("m",), "0.32.0", 4096)


def test_vllm_that_hides_its_models_is_known_by_its_metrics() -> None:
    assert detected(vllm() | {"/v1/models": answer(status=401)}) == Detected(
        "vllm", version="0.32.0"
    )


def test_sglang_is_known_by_what_it_owns() -> None:
    assert detected(sglang()) == Detected("sglang", ("m",), max_model_len=4096)


def test_sglang_that_hides_its_models_is_known_by_its_metrics() -> None:
    assert detected(sglang() | {"/v1/models": answer(status=401)}) == Detected("sglang")


def test_tensorrt_llm_is_known_by_what_it_owns() -> None:
    assert detected(trtllm()) == Detected("trtllm", ("m",), "1.3.0")


def test_the_steps_of_tensorrt_llm_are_left_for_its_reports() -> None:
    """Who reads them takes them away."""

    readers = []

    async def steps(request: web.Request) -> web.Response:
        readers.append(request.path)
        return answer(recording("trtllm_steps.json"))

    assert detected(trtllm() | {"/metrics": steps})
    assert readers == []


def test_llamacpp_is_known_by_its_properties() -> None:
    assert detected(llamacpp()) == Detected("llamacpp", ("m",), "b6900-abcdef12", 512)


def test_llamacpp_without_properties_is_known_by_its_name() -> None:
    pages = llamacpp() | {"/props": not_offered(), "/metrics": not_offered()}
    found = detected(pages)
    assert found is not None
    assert (found.kind, found.serves_as) == ("llamacpp", "m")


def test_anything_else_speaks_the_openai_api() -> None:
    found = detected({"/v1/models": answer(recording("openai_models.json"))})
    assert found == Detected("openai", ("gpt-large", "gpt-small"))


@pytest.mark.parametrize("pages", [llamacpp_that_loads(), {"/v1/models": answer(status=500)}])
def test_an_engine_that_is_not_ready_is_not_judged(pages: dict[str, Said]) -> None:
    assert detected(pages) is None


def test_an_engine_that_is_not_there_is_not_judged() -> None:
    async def run() -> Detected | None:
        async with aiohttp.ClientSession() as session:
            return await detect(session, "http://127.0.0.1:1", "")

    assert asyncio.run(run()) is None


def test_the_served_name_is_clear_only_if_there_is_one() -> None:
    assert Detected("openai", ("one",)).serves_as == "one"
    assert Detected("openai", ("one", "two")).serves_as == ""
    assert Detected("openai").serves_as == ""
