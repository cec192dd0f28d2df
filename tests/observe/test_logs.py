"""Logs: one line a request, JSON for machines and pretty for eyes, and never a key."""

import io
import json
from collections.abc import Iterator
from math import inf
from typing import get_args, get_type_hints

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from paceline.config.settings import Logging
from paceline.domain.commands import Prediction
from paceline.domain.outcome import Outcome
from paceline.domain.promise import Promise
from paceline.domain.request import Request
from paceline.observe.logs import LEVELS, configure, request_lines

REQUEST = Request("req-1", "llama-70b", "acme", "premium", Promise(0.5, 0.04), prompt_bytes=1024)
OUTCOME = Outcome(
    request=REQUEST,
    worker="127.0.0.1:9001",
    status=200,
    error="",
    attempts=1,
    because="lowest cost",
    predicted=Prediction(ttft_s=0.12, itl_s=0.02, headroom=0.5),
    queued_s=0.001,
    ttft_s=0.1,
    itl_s=0.021,
    stall_s=0.06,
    seconds=3.2,
    prompt_tokens=100,
    cached_tokens=0,
    output_tokens=150,
)


def named(model: str) -> Outcome:
    return replace(OUTCOME, request=replace(REQUEST, model=model))


class Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _forget_configuration() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_a_request_is_one_json_object_on_one_line() -> None:
    out = io.BytesIO()
    configure(stream=out)
    request_lines([(0.0, OUTCOME)])
    assert out.getvalue().count(b"\n") == 1
    told = json.loads(out.getvalue())
    assert told.pop("timestamp").endswith("Z")
    assert told == {
        "event": "request",
        "level": "info",
        "id": "req-1",
        "tenant": "acme",
        "tier": "premium",
        "model": "llama-70b",
        "worker": "127.0.0.1:9001",
        "status": 200,
        "because": "lowest cost",
        "attempts": 1,
        "kept": True,
        "queued_s": 0.001,
        "predicted_ttft_s": 0.12,
        "ttft_s": 0.1,
        "predicted_itl_s": 0.02,
        "itl_s": 0.021,
        "stall_s": 0.06,
        "seconds": 3.2,
        "prompt_bytes": 1024,
        "prompt_tokens": 100,
        "cached_tokens": 0,
        "output_tokens": 150,
    }


def test_what_is_not_known_is_left_out() -> None:
    out = io.BytesIO()
    unsent = replace(OUTCOME, worker="", predicted=None, because="", prompt_tokens=None)
    configure(stream=out)
    request_lines([(0.0, unsent)])
    told = json.loads(out.getvalue())
    unknown = {"worker", "predicted_ttft_s", "predicted_itl_s", "because", "prompt_tokens", "error"}
    assert not unknown & set(told)


def test_a_request_that_was_degraded_or_moved_says_so() -> None:
    out = io.BytesIO()
    lower = replace(REQUEST, tier="standard", model="llama-8b")
    configure(stream=out)
    request_lines([(0.0, replace(OUTCOME, degraded_to=lower, moved=2))])
    told = json.loads(out.getvalue())
    assert (told["tier"], told["model"]) == ("premium", "llama-70b")
    assert (told["to_tier"], told["to_model"]) == ("standard", "llama-8b")
    assert told["moved"] == 2
    assert "paused" not in told


def test_times_are_told_to_the_microsecond() -> None:
    out = io.BytesIO()
    configure(stream=out)
    request_lines([(0.0, replace(OUTCOME, ttft_s=0.1 + 0.2))])
    assert b'"ttft_s":0.3,' in out.getvalue()


def test_what_would_take_for_ever_is_told_as_unknown() -> None:
    out = io.BytesIO()
    never = Prediction(ttft_s=inf, itl_s=0.02, headroom=-inf)
    configure(stream=out)
    request_lines([(0.0, replace(OUTCOME, predicted=never))])
    assert json.loads(out.getvalue())["predicted_ttft_s"] is None


def test_each_line_has_the_time_of_its_request() -> None:
    out = io.BytesIO()
    configure(stream=out)
    request_lines([(0.25, OUTCOME), (86400.0, named("m"))])
    first, second = map(json.loads, out.getvalue().splitlines())
    assert first["timestamp"] == "1970-01-01T00:00:00.250000Z"
    assert (second["timestamp"], second["model"]) == ("1970-01-02T00:00:00Z", "m")


@given(st.text())
def test_no_text_of_a_client_can_break_a_line(text: str) -> None:
    out = io.BytesIO()
    configure(stream=out)
    request_lines([(0.0, named(text))])
    assert out.getvalue().count(b"\n") == 1
    assert json.loads(out.getvalue()).get("model", "") == text


def test_a_terminal_gets_pretty_lines_and_no_escape_codes_of_clients() -> None:
    out = Terminal()
    configure(stream=out)
    request_lines([(0.0, named("\x1b[2Jm"))])
    told = out.getvalue().decode()
    assert not told.startswith("{")
    assert "premium" in told
    assert "\x1b[2J" not in told


def test_the_style_can_be_told_against_the_terminal() -> None:
    terminal, pipe = Terminal(), io.BytesIO()
    configure(style="json", stream=terminal).info("started")
    assert json.loads(terminal.getvalue())["event"] == "started"
    configure(style="pretty", stream=pipe).info("started")
    assert b"started" in pipe.getvalue()
    assert b"\x1b" not in pipe.getvalue()


@pytest.mark.parametrize(
    ("level", "lines"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1), ("off", 0)]
)
def test_a_level_silences_what_is_less_urgent(level: str, lines: int) -> None:
    out = io.BytesIO()
    log = configure(level, stream=out)
    log.debug("a")
    request_lines([(0.0, OUTCOME)])
    log.warning("b")
    log.error("c")
    assert out.getvalue().count(b"\n") == lines


def test_the_levels_are_those_of_the_config() -> None:
    assert set(LEVELS) == set(get_args(get_type_hints(Logging)["level"]))


def test_what_json_cannot_say_is_said_by_its_repr_which_hides_secrets() -> None:
    class Key:
        def __repr__(self) -> str:
            return "Key(…)"

    out = io.BytesIO()
    configure(stream=out).info("started", key=Key(), error=ValueError("no"))
    told = json.loads(out.getvalue())
    assert (told["key"], told["error"]) == ("Key(…)", "ValueError('no')")


def test_a_log_that_cannot_be_written_costs_no_request() -> None:
    class Full(io.BytesIO):
        def write(self, _data: object) -> int:
            raise OSError("No space left on device")

    configure(stream=Full())
    request_lines([(0.0, OUTCOME)])


def test_other_modules_log_to_the_same_place() -> None:
    out = io.BytesIO()
    configure(stream=out)
    structlog.get_logger().info("hello", port=1)
    assert json.loads(out.getvalue())["port"] == 1
