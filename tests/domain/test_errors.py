"""Errors: one status each, in the shape that OpenAI's clients read."""

import json
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.domain import errors
from paceline.domain.errors import (
    ConfigError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PacelineError,
    RateLimited,
    Unauthorized,
    Unavailable,
)

LEAVES = sorted(
    {
        error
        for error in vars(errors).values()
        if isinstance(error, type)
        and issubclass(error, PacelineError)
        and error is not PacelineError
        and not error.__name__.startswith("_")
    },
    key=lambda error: error.status,
)


def test_each_leaf_has_a_status_of_its_own() -> None:
    statuses = [leaf.status for leaf in LEAVES]
    assert statuses == [400, 401, 403, 404, 405, 408, 413, 429, 431, 500, 502, 503, 504]


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    told = [line.split()[1:3] for line in (errors.__doc__ or "").splitlines() if "──" in line]
    assert told == [[leaf.__name__, str(leaf.status)] for leaf in LEAVES]


def test_server_trouble_is_never_blamed_on_the_request() -> None:
    for leaf in LEAVES:
        assert (leaf.type == "server_error") == (leaf.status >= 500), leaf


@given(st.text(), st.none() | st.text())
def test_a_body_has_openais_shape_whatever_the_message(message: str, param: str | None) -> None:
    body = json.loads(InvalidRequest(message, param=param).to_openai())
    assert body == {
        "error": {
            "message": message,
            "type": "invalid_request_error",
            "param": param,
            "code": "invalid_request",
        }
    }


def test_an_unknown_model_is_named() -> None:
    error = NotFound.model("gpt-9")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert "gpt-9" in str(error)


@pytest.mark.parametrize(
    ("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (59.5, "60")]
)
def test_retry_after_is_in_whole_seconds_and_never_early(seconds: float, header: str) -> None:
    for leaf in (RateLimited, Unavailable):
        error = leaf("later", retry_after_s=seconds)
        assert error.headers() == (("Retry-After", header),)
        assert error.retry_after_s == seconds


def test_an_endless_wait_is_told_as_a_long_one() -> None:
    assert RateLimited("later", retry_after_s=inf).headers() == (("Retry-After", "3600"),)


def test_heads_say_what_http_asks_for() -> None:
    assert Unauthorized("no").headers() == (("WWW-Authenticate", "Bearer"),)
    assert MethodNotAllowed("no", allowed=["GET", "HEAD"]).headers() == (("Allow", "GET, HEAD"),)
    assert InvalidRequest("no").headers() == ()


def test_a_code_may_be_finer_than_its_leaf() -> None:
    error = RateLimited("too many tokens", retry_after_s=1, code="tokens_per_minute")
    assert error.code == "tokens_per_minute"
    assert RateLimited("again", retry_after_s=1).code == "rate_limit_exceeded"


def test_a_config_error_tells_every_problem_on_a_line_of_its_own() -> None:
    error = ConfigError(["a is wrong", "b is wrong"])
    assert error.problems == ("a is wrong", "b is wrong")
    assert str(error) == "a is wrong\nb is wrong"
