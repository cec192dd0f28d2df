"""May a request say of which batch it is, and who gets to know?"""

from __future__ import annotations

import pytest
from scripted import Part, always, answer, scripted, stream

from paceline.domain.errors import InvalidRequest
from paceline.gateway.intake import batch_of
from stand import live_gateway, on_loop

HEADER = "x-paceline-batch"


@pytest.mark.parametrize("streaming", [True, False])
@on_loop
async def test_a_request_is_of_the_batch_that_its_header_names_and_engines_hear_nothing_of_it(
    streaming: bool,
) -> None:
    script: Part = stream() if streaming else answer()
    async with scripted(always(script)) as (engine,), live_gateway(engine.url) as gateway:
        body = {"messages": [], "stream": streaming}
        assert (await gateway.ask(body, **{HEADER: "nightly:2026-11-21_v1.2"})).status == 200
        assert (await gateway.ask(body)).status == 200
        assert [o.request.batch for o in gateway.outcomes] == ["nightly:2026-11-21_v1.2", ""]
        assert all(HEADER not in asked.headers for asked in engine.asked)


@pytest.mark.parametrize("name", ["", "x" * 65, "two words", "a,b", "a/b", "nächtlich", "a\tb"])
@on_loop
async def test_a_name_that_is_none_is_refused_in_a_sentence(name: str) -> None:
    async with scripted(always(stream())) as (engine,), live_gateway(engine.url) as gateway:
        reply = await gateway.ask(**{HEADER: name})
        assert (reply.status, reply.error["param"]) == (400, HEADER)
        assert "must be 1 to 64 characters of A-Z a-z 0-9 . _ : -" in reply.error["message"]
        assert not engine.asked


def test_names_have_one_to_64_characters_to_the_very_end() -> None:
    assert batch_of({}) == ""
    assert batch_of({HEADER: "x" * 64}) == "x" * 64
    with pytest.raises(InvalidRequest):
        batch_of({HEADER: "a\n"})
