"""The refusals that carry `Retry-After`: one function for each cause, which says when the client may try again.

A full queue estimates its own wait (`RequestQueue.wait_seconds`), and a used-up quota says when it is renewed (`accounts`).
"""

from __future__ import annotations

import math

from corral.serving.protocol import Refused

_DATABASE_SECONDS = 1
_ENGINE_SECONDS = 5
_SHUTDOWN_SECONDS = 5


class Busy(Refused):
    """A request that may be sent again later.

    Args:
        status: 429 if the caller's quota is used up; 503 if the server is full, or what it needs cannot be used now.
        what: the message for people.
        retry_seconds: the value of `Retry-After`; rounded up to whole seconds, at least 1.
        code: the error code for programs.
    """

    def __init__(self, status: int, what: str, *, retry_seconds: float, code: str) -> None:
        super().__init__(status, what, code=code, retry_seconds=max(1, math.ceil(retry_seconds)))


def database_unavailable() -> Busy:
    """The database cannot be reached, is locked, or does not answer."""
    what = "the database of this server cannot be used now"
    return Busy(503, what, retry_seconds=_DATABASE_SECONDS, code="database_unavailable")


def engine_unavailable(what: str, retry_seconds: float | None = None) -> Busy:
    """No engine takes the request; `retry_seconds` if an engine says when it will."""
    seconds = _ENGINE_SECONDS if retry_seconds is None else retry_seconds
    return Busy(503, what, retry_seconds=seconds, code="engine_unavailable")


def server_full(count: str, retry_seconds: float) -> Busy:
    """The server has no place for the request; `count` says how many requests there are."""
    return Busy(503, f"this server is full: {count}", retry_seconds=retry_seconds, code="server_full")


def shutting_down() -> Busy:
    """The server ends when its running requests are done."""
    what = "this server is shutting down and takes no more requests"
    return Busy(503, what, retry_seconds=_SHUTDOWN_SECONDS, code="shutting_down")
