"""Do rows and columns say what became of each request?"""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from outcomes import OUTCOME, REQUEST

from paceline.observe import sheet as module
from paceline.observe.sheet import LEFT, Places, Sheets, Who, sheet_of

WHOLE = replace(OUTCOME, request=replace(REQUEST, streaming=False), itl_s=0.0)


def test_a_row_has_what_the_request_came_to_and_its_who_what_it_shares_with_others() -> None:
    sheet = sheet_of(OUTCOME, replace(OUTCOME, ttft_s=0.7, attempts=3))
    assert sheet.who.tolist() == [0, 0]
    assert sheet.whos == [Who("", "m", "premium", "acme", "w0", 200, False, "", None)]
    assert sheet.ttft_s.tolist() == [0.1, 0.7]
    assert sheet.kept.tolist() == [1.0, 0.0]
    assert sheet.output_tokens.tolist() == [100.0, 100.0]
    assert sheet.retries.tolist() == [0.0, 2.0]
    assert sheet.rare.tolist() == [0.0, 1.0]


def test_what_ended_badly_is_not_sound_and_only_a_stream_has_a_first_token_to_see() -> None:
    failed = replace(OUTCOME, status=502, error="it died")
    left = replace(OUTCOME, error=LEFT)
    early = replace(OUTCOME, status=499)
    sheet = sheet_of(OUTCOME, WHOLE, failed, left, early, replace(OUTCOME, itl_s=0.0))
    assert sheet.sound.tolist() == [True, True, False, False, False, True]
    assert sheet.streams.tolist() == [True, False, False, False, False, True]
    assert sheet.gaps.tolist() == [True, False, False, False, False, False]
    assert sheet.left.tolist() == [False, False, False, True, True, False]


def test_each_who_is_asked_once_for_its_place_until_places_are_forgotten() -> None:
    asked: list[str] = []

    def place(who: Who) -> int:
        asked.append(who.worker)
        return len(asked)

    places, sheets = Places(place), Sheets()
    for worker in ("a", "b", "a"):
        sheets.add(replace(OUTCOME, worker=worker))
    assert places.of(sheets.take()).tolist() == [1, 2, 1]
    for worker in ("c", "b"):
        sheets.add(replace(OUTCOME, worker=worker))
    assert places.of(sheets.take()).tolist() == [3, 2]
    places.forget()
    sheets.add(replace(OUTCOME, worker="b"))
    assert places.of(sheets.take()).tolist() == [4]
    assert asked == ["a", "b", "c", "b"]


def test_too_many_whos_are_numbered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WHOS", 2)
    sheets, places = Sheets(), Places(lambda who: int(who.worker))
    for worker in range(10):
        sheets.add(replace(OUTCOME, worker=str(worker)))
        sheet = sheets.take()
        assert len(sheet.whos) <= 3
        assert places.of(sheet).tolist() == [worker]
