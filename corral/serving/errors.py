"""The errors that a server answers with, in OpenAI's form: status, type, code, and whether and when to try again.

    InputError → Refused       any request that is answered with an error
      database_unavailable, engine_unavailable, server_full, shutting_down    503, with `Retry-After`

A full queue estimates its own wait (`RequestQueue.wait_seconds`), and a used-up quota says when it is renewed (`accounts`).
"""

from __future__ import annotations

import math

from pydantic import BaseModel

from corral.errors import InputError

_DATABASE_SECONDS = 1
_ENGINE_SECONDS = 5
_SHUTDOWN_SECONDS = 5
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_OWN_TYPES = {"insufficient_quota"}  # OpenAI's type of this code is the code
_RETRIED = {408, 409, 429}  # by OpenAI's clients, as is everything from 500 on
_MOST_RETRY_SECONDS = 60  # after which OpenAI's clients try again; they do not wait longer
_MAX_QUOTED = 1000


class Refused(InputError):
    """A request that is answered with an error.

    Args:
        status: the HTTP status.
        what: the message for people.
        param: the field of the request.
        code: the error code for programs.
        retry_seconds: when the same request may succeed, rounded up to whole seconds and at least 1; None: never.
    """

    def __init__(
        self,
        status: int,
        what: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(what, where=param)
        self.status = status
        self.code = code
        self.retry_seconds = None if retry_seconds is None else max(1, math.ceil(retry_seconds))

    def body(self) -> ErrorBody:
        """The body of the response, and the last event of a stream."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        if self.code in _OWN_TYPES:
            kind = self.code
        param = None if self.where is None else _shorten(self.where)
        return ErrorBody(error=ErrorDetail(message=_shorten(self.what), type=kind, param=param, code=self.code))

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response: `Retry-After` if a retry helps, `x-should-retry` where clients would retry in vain.

        OpenAI's clients repeat a request twice on many statuses, by default within a second.
        """
        headers = {} if self.retry_seconds is None else {"retry-after": str(self.retry_seconds)}
        is_retried = self.status in _RETRIED or self.status >= 500
        if is_retried and (self.retry_seconds is None or self.retry_seconds > _MOST_RETRY_SECONDS):
            headers["x-should-retry"] = "false"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def _shorten(text: str) -> str:
    """Leave out the middle of a long text, which may quote what a client sent."""
    half = _MAX_QUOTED // 2
    return text if len(text) <= _MAX_QUOTED else f"{text[:half]} … {text[-half:]}"


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of an error response, and the last event of a stream that failed."""

    error: ErrorDetail


def database_unavailable() -> Refused:
    """The database cannot be reached, is locked, or does not answer."""
    what = "the database of this server cannot be used now"
    return Refused(503, what, retry_seconds=_DATABASE_SECONDS, code="database_unavailable")


def engine_unavailable(what: str, retry_seconds: float | None = None) -> Refused:
    """No engine takes the request; `retry_seconds` if an engine says when it will."""
    seconds = _ENGINE_SECONDS if retry_seconds is None else retry_seconds
    return Refused(503, what, retry_seconds=seconds, code="engine_unavailable")


def server_full(count: str, retry_seconds: float) -> Refused:
    """The server has no place for the request; `count` says how many requests there are."""
    return Refused(503, f"this server is full: {count}", retry_seconds=retry_seconds, code="server_full")


def shutting_down() -> Refused:
    """The server ends when its running requests are done."""
    what = "this server is shutting down and takes no more requests"
    return Refused(503, what, retry_seconds=_SHUTDOWN_SECONDS, code="shutting_down")
