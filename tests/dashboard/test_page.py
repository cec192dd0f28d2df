"""Does the page tell the story, whatever the gateway says or leaves out?"""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fake_admin import FakeAdmin
from shown import dashboard, document, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paceline.dashboard import said
from paceline.dashboard.causes import WAYS
from paceline.dashboard.page import PARTS
from paceline.dashboard.parts import View
from paceline.dashboard.source import Missing, Source

ENDPOINTS = ("fleet", "tiers", "diagnosis", "summary", "history", "stalls", "decisions", "tenants",
             "cost")  # fmt: skip
CSS = (Path(said.__file__).parent / "page.css").read_text()


class Balanced(HTMLParser):
    """Fails on elements that are closed in another order than they were opened."""

    VOID = frozenset({"meta", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def sound(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    return parser


def test_a_busy_fleet_has_every_section() -> None:
    text = document(FakeAdmin())
    assert set(PARTS) <= set(sound(text).ids)
    assert "takes 3.1 times as long" in text
    assert text.count('class="tile ') == 64
    assert "costs" in text
    assert "(2) Paceline" in text
    assert "2,712 requests in 30 s, 17 promises broken, 5 of them overdue" in text


def test_a_worker_is_shown_closely_when_it_is_chosen() -> None:
    fake = FakeAdmin()
    name = fake.names[13]
    text = document(fake, View(worker=name))
    assert "worker" in sound(text).ids
    assert f"Worker {name}" in text
    assert "slow worker" in text


def test_a_worker_that_has_left_is_no_error() -> None:
    assert "not in the fleet" in document(FakeAdmin(4), View(worker="gone"))


def test_all_is_well_is_said_too() -> None:
    text = document(FakeAdmin(8, 100, calm=True))
    assert "Nothing found." in text
    assert "97% utilised, and every promise is kept" in text
    assert "No single gap was late" in text


@pytest.mark.parametrize("lacking", [*([name] for name in ENDPOINTS), list(ENDPOINTS)], ids=str)
def test_what_a_gateway_does_not_tell_is_explained_and_the_rest_is_shown(
    lacking: list[str],
) -> None:
    fake = FakeAdmin(4)
    fake.lacking = set(lacking)
    text = document(fake, View(worker=fake.names[0]))
    assert set(PARTS) <= set(sound(text).ids)
    assert "This gateway does not tell." in text
    assert ("Slow worker" in text or "slow worker" in text) == ("diagnosis" not in lacking or (
        "stalls" not in lacking))  # fmt: skip


def test_a_fleet_without_anything_says_what_to_do() -> None:
    fake = FakeAdmin(0, calm=True)
    bare: dict[str, Any] = {
        "tiers": {"tiers": []},
        "tenants": {"tenants": []},
        "cost": {},
        "summary": {},
    }
    for name, told in bare.items():
        setattr(fake, name, lambda _, told=told: told)
    text = document(fake)
    sound(text)
    for hint in ("Add one under", "Set them under", "List them under", "cost_per_hour"):
        assert hint in text


def test_batches_are_shown_where_there_are_any_the_last_ones_first() -> None:
    text = document(FakeAdmin(4))
    assert "batches" in sound(text).ids
    assert 'href="#batches"' in text
    assert text.index("nightly:summaries") < text.index("relabel_7")
    assert "1.5 h ago" in text
    assert "batches" not in document(FakeAdmin(4, calm=True))
    older = FakeAdmin(4)
    older.lacking = {"cost"}
    assert "batches" not in document(older)


def test_of_many_batches_the_last_ones_are_shown_and_where_all_are() -> None:
    fake = FakeAdmin(4)
    told = fake.batches()
    fake.batches = lambda: {**told, "groups": told["groups"] * 10}  # type: ignore[method-assign]
    text = document(fake)
    assert text.count("nightly:summaries") == 7
    assert "The last 20 of 30" in text


def test_no_name_becomes_markup() -> None:
    hostile = '"><script>alert(1)</script>'
    fake = FakeAdmin(2)
    fake.names = [f"{hostile}{i}" for i in range(2)]
    told = fake.tenants({})
    told["tenants"][0]["name"] = hostile
    fake.tenants = lambda _: told  # type: ignore[method-assign]
    text = document(fake, View(worker=fake.names[0], show=hostile, model=hostile))
    sound(text)
    assert "<script>alert" not in text


def test_every_cause_has_a_name_a_colour_and_a_hatch() -> None:
    from paceline.words import CAUSES

    for cause in WAYS:
        assert f".ink.{cause} " in CSS, cause
        assert cause in CAUSES or cause.replace("_", " ").isalpha()
    fills = [line for line in CSS.splitlines() if line.startswith(".ink.")]
    assert len({line.partition("{")[2] for line in fills}) == len(WAYS)


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    text = document(FakeAdmin(4))
    assert re.findall(r'(?:src|href)="(?:https?:)?//', text) == []
    assert "url(http" not in CSS


# The process's answers.


def test_it_answers_page_style_and_script_packed_and_nothing_else() -> None:
    async def asked() -> None:
        async with aiohttp.ClientSession(shown) as session:
            for path, kind in (("", "html"), ("page.css", "css"), ("page.js", "javascript")):
                async with session.get(f"/{path}") as answer:
                    assert answer.status == 200
                    assert kind in answer.headers["content-type"]
                    assert answer.headers["content-encoding"] == "gzip"
                    assert "default-src 'none'" in answer.headers["content-security-policy"]
                    assert await answer.text()
            for path in ("page.py", "nothing.css", "%2e%2e/app.py", "..%2fapp.py", "sections"):
                async with session.get(f"/{path}") as answer:
                    assert answer.status == 404

    with dashboard(FakeAdmin(2)) as shown:
        asyncio.run(asked())


def test_many_who_look_cost_the_gateway_no_more_than_one() -> None:
    fake = FakeAdmin(2)

    async def look_all() -> None:
        async with aiohttp.ClientSession(shown) as session:
            await asyncio.gather(*(session.get("/") for _ in range(10)))

    with dashboard(fake) as shown:
        asyncio.run(look_all())
    assert fake.asked.count("fleet") <= 3


# What the gateway says.


async def told(answer: Response, kind: type[Any] = said.Tiers) -> Any:
    async def endpoint(request: Request) -> Response:
        return answer

    app = Starlette(routes=[Route("/paceline/v1/tiers", endpoint)])
    with served(app) as url:
        async with aiohttp.ClientSession(url) as session:
            return await Source(session).get("tiers", kind)


@pytest.mark.parametrize(
    ("answer", "because"),
    [
        (Response(status_code=404), "does not tell"),
        (Response(status_code=500), "does not answer"),
        (Response(b"<html>"), "not understood"),
        (Response(b'{"tiers": 7}'), "not understood"),
    ],
)
def test_a_bad_answer_is_told_and_not_fatal(answer: Response, because: str) -> None:
    found = asyncio.run(told(answer))
    assert isinstance(found, Missing)
    assert because in found.because


def test_what_is_new_in_an_answer_does_not_matter() -> None:
    found = asyncio.run(told(Response(b'{"tiers": [], "more": {"x": 1}}')))
    assert found == said.Tiers()


def test_a_gateway_that_is_gone_is_told() -> None:
    async def ask() -> Any:
        async with aiohttp.ClientSession("http://127.0.0.1:1") as session:
            return await Source(session).get("tiers", said.Tiers)

    found = asyncio.run(ask())
    assert isinstance(found, Missing)
    assert "does not answer" in found.because


def test_what_was_not_measured_is_null_and_shown_as_a_dash() -> None:
    """JSON has no infinity, and a window may have had no time in it."""
    figures = {"requests": 1, "requests_per_s": None, "attainment": None, "ttft_s": None}
    fake = FakeAdmin(2)
    fake.summary = lambda query: {"total": figures, "groups": []}  # type: ignore[method-assign]
    text = document(fake)
    assert "not understood" not in text
    assert "<dt>requests/s</dt><dd" in text
