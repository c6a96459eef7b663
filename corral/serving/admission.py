"""Who may come in, how many at once, for how long, and what is counted of it.

Every request for work, on whichever route, goes through `Door.answer`: quota, queue, deadline, the client that goes, usage. It
does not know what is asked or how it is answered: a request under way is Work to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request, Response
from pydantic import BaseModel

from corral.serving.api_keys import Keys
from corral.serving.auth import Caller, Callers
from corral.serving.http_responses import (
    FAULT,
    ClientGone,
    Event,
    EventStream,
    Outcome,
    json_reply,
    trace,
    while_connected,
)
from corral.serving.prometheus import Metrics
from corral.serving.protocol import Refused, Usage
from corral.serving.request_queue import Busy, Place, Places

__all__ = ["Bounds", "Caller", "Door", "Event", "Work"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What all requests together, and one alone, may take of a server; what one may ask of a model is in Limits."""

    at_once: int = 128
    """Requests that are worked on at the same time."""
    waiting: int = 512
    """Requests that wait for that."""
    max_seconds: float = 600
    """From when a request has come whole to the end of its answer."""
    header_bytes: int = 16 * 2**10
    """Request line and headers."""
    header_seconds: float = 10
    """For which a connection may take over request line and headers."""
    body_seconds: float = 30
    """For which a request may take over its body."""
    stalled_seconds: float = 60
    """For which a client may read nothing of what was sent."""

    @property
    def under_way(self) -> int:
        """Requests of any kind at the same time: those for work, and some for what takes no work."""
        return self.at_once + self.waiting + 64


class Work(Protocol):
    """A request under way, on whichever route."""

    @property
    def usage(self) -> Usage:
        """The tokens of prompt and answer so far; read at any time, also while it works and after it was cancelled."""
        ...

    def whole(self) -> Coroutine[Any, Any, BaseModel]:
        """The answer."""
        ...

    def events(self) -> AsyncGenerator[Event, None]:
        """The events of a stream."""
        ...

    def cancel(self) -> None:
        """Stop the work; harmless once it has ended. Called once it is over, however it ended."""
        ...


class Door:
    """The one way to the engines.

    Args:
        keys: where keys are kept; None: anybody may ask.
    """

    def __init__(self, bounds: Bounds | None = None, keys: Keys | None = None) -> None:
        self.bounds = bounds or Bounds()
        self.callers = Callers(keys)
        # Where there are no keys, all who ask are one.
        reserved = 0 if keys is None or self.bounds.at_once == 1 else max(1, self.bounds.at_once // 8)
        self.places = Places(self.bounds.at_once, self.bounds.waiting, reserved)
        self.metrics = Metrics(self.places)
        self.is_closing = False
        """Whether new work is refused, so that what is under way may end."""

    async def caller(self, request: Request) -> Caller:
        """Who asks; the guard in front of the routes found it out."""
        return request.state.caller

    async def answer(
        self, request: Request, make: Callable[[], Awaitable[Work]], *, stream: bool, model: str
    ) -> Response:
        """Answer a request whose body was read, whole or as a stream.

        Args:
            make: begins the work; awaited once there is a place. It may raise Refused, and may be cancelled.
            model: the name of a model that is served: never what a client wrote.

        Raises:
            Refused: 429: the key's quota; 503: no place, or the server ends; 504: its time was up; what `make` and the work
                raise.
        """
        self._admit(request.state.caller)
        visit = _Visit(self, request.state.caller, model)
        limit = asyncio.timeout_at(visit.deadline)
        outcome: Outcome = "failed"
        response: Response | None = None
        try:
            async with limit:
                work = await while_connected(request.receive, visit.enter(make))
                if stream:
                    response = EventStream(visit.events(work), visit.end, visit.deadline, _late())
                    return response
                answer = await while_connected(request.receive, work.whole())
                outcome = "ended"
                return json_reply(answer)
        except ClientGone:
            outcome = "gone"
            return Response(status_code=499)  # nobody reads it
        except TimeoutError:
            if not limit.expired():
                raise
            outcome = "late"
            raise _late() from None
        finally:
            if response is None:
                visit.end(outcome)

    async def close(self) -> None:
        """Write down what was used."""
        await self.callers.close()

    def _admit(self, caller: Caller) -> None:
        """Raises: Busy."""
        if self.is_closing:
            what = "this server is ending, and takes no more requests"
            raise Busy(503, what, retry_seconds=5, code="shutting_down")
        self.callers.admit(caller, self.places.seconds_each)


def _late() -> Refused:
    return Refused(504, "the time that this server gives a request was up", code="deadline_exceeded")


class _Visit:
    """One request for work, from the queue to its end."""

    def __init__(self, door: Door, caller: Caller, model: str) -> None:
        self.deadline = asyncio.get_running_loop().time() + door.bounds.max_seconds
        self._door = door
        self._caller = caller
        self._model = model
        self._came = time.perf_counter()
        self._place: Place | None = None
        self._work: Work | None = None
        self._has_failed = False

    async def enter(self, make: Callable[[], Awaitable[Work]]) -> Work:
        """Wait for a place, and begin. Raises: Refused."""
        door = self._door
        try:
            self._place = await door.places.take(self._caller.key)
        except Busy:
            door.callers.turned_away(self._caller)
            raise
        door.metrics.entered(self._seconds)
        self._work = work = await make()
        door.callers.began(self._caller, work)
        return work

    async def events(self, work: Work) -> AsyncGenerator[Event, None]:
        """The work's events; a fault of ours is the last one."""
        has_begun = False
        try:
            async with contextlib.aclosing(work.events()) as events:
                async for event in events:
                    if not has_begun and work.usage.completion_tokens:
                        has_begun = True
                        self._door.metrics.began(self._model, self._seconds)
                    yield event
        except Exception as error:
            self._has_failed = True
            _log.error("a stream broke: %s", trace(error))
            yield Event(FAULT.body().model_dump_json())

    def end(self, outcome: Outcome) -> None:
        """Leave: stop the work, count it, give the place back."""
        door = self._door
        if self._work is not None:
            self._work.cancel()
            outcome = "failed" if self._has_failed else outcome
            door.metrics.ended(self._model, outcome, self._seconds, self._work.usage)
        door.callers.left(self._caller, self._work)
        if self._place is not None:
            door.places.give_back(self._place)

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._came
