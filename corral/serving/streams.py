"""How responses are sent: JSON, errors in OpenAI's form, and server-sent events, which stop when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from fastapi import Response
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Message, Receive, Scope, Send

from corral.serving.errors import Refused
from corral.serving.logs import traceback_without_message

T = TypeVar("T")

INTERNAL_ERROR = Refused(500, "this is a fault in the server, not in the request", code="internal_error")
"""What a client sees of an unexpected exception: no details."""

_PING = ServerSentEvent(comment="ping", sep="\n")
_PING_SECONDS = 5
_TURN_SECONDS = 0.005  # after which a stream lets others have the event loop
_LAST_SEND_SECONDS = 1
_log = logging.getLogger(__name__)
logging.getLogger("sse_starlette").setLevel(logging.INFO)  # at a lower level it logs what is sent


def _encode(body: BaseModel) -> str:
    """A body as JSON. An error may quote a lone surrogate from the request, which only ASCII can express."""
    try:
        return body.model_dump_json()
    except PydanticSerializationError:
        return json.dumps(body.model_dump())


def json_response(body: BaseModel | str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response, of a model or of text that is JSON already."""
    return Response(body if isinstance(body, str) else _encode(body), status, dict(headers or {}), "application/json")


def error_response(refused: Refused, headers: Mapping[str, str] | None = None) -> Response:
    """An error in OpenAI's form."""
    return json_response(refused.body(), refused.status, {**refused.headers, **(headers or {})})


class Event(NamedTuple):
    """One server-sent event."""

    data: str
    """One line, as JSON is."""
    name: str = ""
    """Only the Responses protocol names its events."""

    def encode(self) -> bytes:
        """The bytes on the wire."""
        return (f"event: {self.name}\n" if self.name else "").encode() + f"data: {self.data}\n\n".encode()


DONE = Event("[DONE]")
"""Ends a stream of chat or of text completions."""


def error_event(refused: Refused) -> Event:
    """Ends a stream of chat or of text completions that failed."""
    return Event(_encode(refused.body()))


Outcome: TypeAlias = Literal["ended", "failed", "gone", "late"]
"""How a request finished: it was answered, it failed, its client disconnected, or its time was up."""


class TimeLimit:
    """When a request must end, and the error that says so to its client.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float, error: Refused) -> None:
        self.error = error
        self._end = asyncio.get_running_loop().time() + seconds
        self._timeout: asyncio.Timeout | None = None

    def apply(self) -> asyncio.Timeout:
        """A context manager that raises TimeoutError when the time is up; one at a time."""
        self._timeout = asyncio.timeout_at(self._end)
        return self._timeout

    @property
    def is_over(self) -> bool:
        """Whether the last context manager raised the TimeoutError."""
        return self._timeout is not None and self._timeout.expired()

    def end_now(self, error: Refused) -> None:
        """End the request at once, with another error."""
        self.error, self._end = error, asyncio.get_running_loop().time()
        if self._timeout is not None:
            with contextlib.suppress(RuntimeError):  # it is not in use: the next one ends at once
                self._timeout.reschedule(self._end)


class EventStream(EventSourceResponse):
    """A stream of server-sent events, with a comment now and then while there are none.

    It ends early when the client disconnects, or with an error as its last event when its time is up or the events fail.

    Args:
        events: what is sent; they may raise Refused.
        on_end: called once, however the stream ends.
        limit: it also holds for a client that reads too slowly.
        error_event: the form of an error as the last event.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        on_end: Callable[[Outcome], None],
        limit: TimeLimit,
        error_event: Callable[[Refused], Event],
    ) -> None:
        # Proxies must neither keep nor gather what is sent: the headers of `EventSourceResponse` say so.
        super().__init__(self._chunks(events), ping=_PING_SECONDS, ping_message_factory=lambda: _PING)
        self._on_end = on_end
        self._limit = limit
        self._error_event = error_event
        self._outcome: Outcome = "gone"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        has_started = False

        async def send_noting(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            async with self._limit.apply():
                await super().__call__(scope, receive, send_noting)
        except TimeoutError:
            if not self._limit.is_over:
                raise
            self._outcome = "late"
            # If the client does not read, the connection is closed without a proper end.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_SEND_SECONDS):
                    if has_started:
                        last = self._error_event(self._limit.error).encode()
                        await send({"type": "http.response.body", "body": last, "more_body": False})
                    else:
                        await error_response(self._limit.error)(scope, receive, send)
        finally:
            self._on_end(self._outcome)

    async def _chunks(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
        loop = asyncio.get_running_loop()
        turn_end = loop.time() + _TURN_SECONDS
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    yield event.encode()
                    if loop.time() > turn_end:  # events that gathered while the client did not read all come at once
                        await asyncio.sleep(0)
                        turn_end = loop.time() + _TURN_SECONDS
        except Exception as error:
            self._outcome = "failed"
            if not isinstance(error, Refused):
                _log.error("a stream failed: %s", traceback_without_message(error))
            yield self._error_event(error if isinstance(error, Refused) else INTERNAL_ERROR).encode()
        else:
            self._outcome = "ended"


class ClientGone(Exception):
    """The client closed its connection."""


async def while_connected(receive: Receive, coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the coroutine's result; cancel it if the client disconnects. The request's body must have been read.

    Raises:
        ClientGone: the client disconnected first.
    """
    task = asyncio.create_task(coroutine)
    disconnect = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
