"""What can go wrong for the one who asks, and how is it said?

    PacelineError
    ├── InvalidRequest      400  the body or a header cannot be read
    ├── Unauthorized        401  no key, or a wrong one
    ├── Forbidden           403  the key does not allow this
    ├── NotFound            404  unknown model, or a path that Paceline does not serve
    ├── MethodNotAllowed    405  the path exists, the method does not
    ├── RequestTimeout      408  the client was too slow in sending its request
    ├── PayloadTooLarge     413  the body is over the limit
    ├── RateLimited         429  over a quota, or no room now: retry later
    ├── HeadersTooLarge     431  the head is over the limit
    ├── ConfigError         500  the configuration cannot be used
    ├── UpstreamFailed      502  every attempt at a worker failed
    ├── Unavailable         503  no worker is there at all
    └── UpstreamTimeout     504  the last attempt took too long

Each leaf has one status. Bodies have the shape of OpenAI's API, which clients already understand.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import ClassVar

import msgspec

MAX_RETRY_AFTER_S = 3600
"""The longest wait that a client is told: nobody plans further, and clients give up."""


class PacelineError(Exception):
    """Anything that ends in an error response. The message is a sentence for the one who asked."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    """OpenAI's coarse name: whose fault it is."""
    code: str = "internal_error"
    """OpenAI's fine name: what is wrong, for programs."""

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The field or header that is wrong."""
        if code is not None:
            self.code = code

    def to_openai(self) -> bytes:
        """The body of the response."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})

    def headers(self) -> tuple[tuple[str, str], ...]:
        """What the response's head must say beside the status."""
        return ()


class InvalidRequest(PacelineError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class Unauthorized(PacelineError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def headers(self) -> tuple[tuple[str, str], ...]:
        return (("WWW-Authenticate", "Bearer"),)


class Forbidden(PacelineError):
    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class NotFound(PacelineError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"

    @classmethod
    def model(cls, name: str) -> NotFound:
        """No model goes by this name here."""
        return cls(f"The model {name!r} does not exist.", code="model_not_found", param="model")


class MethodNotAllowed(PacelineError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.allowed = tuple(allowed)

    def headers(self) -> tuple[tuple[str, str], ...]:
        return (("Allow", ", ".join(self.allowed)),)


class RequestTimeout(PacelineError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class PayloadTooLarge(PacelineError):
    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class _RetryLater(PacelineError):
    """Asking again after a while may succeed."""

    def __init__(self, message: str, *, retry_after_s: float, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s

    def headers(self) -> tuple[tuple[str, str], ...]:
        # Whole seconds by RFC 9110, section 10.2.3; rounded up so that nobody comes too early.
        seconds = ceil(min(max(self.retry_after_s, 1), MAX_RETRY_AFTER_S))
        return (("Retry-After", str(seconds)),)


class RateLimited(_RetryLater):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class HeadersTooLarge(PacelineError):
    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class UpstreamFailed(PacelineError):
    status = 502
    code = "upstream_failed"


class Unavailable(_RetryLater):
    status = 503
    code = "unavailable"


class UpstreamTimeout(PacelineError):
    status = 504
    code = "upstream_timeout"


class ConfigError(PacelineError):
    """All that is wrong with a configuration, one sentence a problem."""

    status = 500
    code = "invalid_config"

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))
