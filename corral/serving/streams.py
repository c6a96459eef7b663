"""How responses are sent: JSON, errors in OpenAI's form, and server-sent events, which stop when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from fastapi import Response
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from corral.serving.errors import Refused

T = TypeVar("T")

INTERNAL_ERROR = Refused(500, "this is a fault in the server, not in the request", code="internal_error")
"""What a client sees of an unexpected exception: no details."""


def json_response(body: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response in ASCII, because an error may quote a lone surrogate from the request."""
    return Response(json.dumps(body.model_dump()), status, dict(headers or {}), "application/json")


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

Outcome: TypeAlias = Literal["ended", "failed", "gone", "late"]
"""How a request finished: it was answered, it failed, its client disconnected, or its deadline passed."""

_LAST_SEND_SECONDS = 1


class EventStream(Response):
    """A stream of server-sent events, which ends early when the client disconnects or the deadline passes.

    Args:
        events: what is sent.
        on_end: called once, however the stream ends.
        deadline: on the event loop's clock; it also holds for a client that reads too slowly.
        deadline_error: the last event if the deadline passes.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        on_end: Callable[[Outcome], None],
        deadline: float,
        deadline_error: Refused,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end
        self._deadline = deadline
        self._deadline_error = deadline_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        outcome: Outcome = "failed"
        try:
            outcome = await while_connected(receive, self._send(send))
        except ClientGone:
            outcome = "gone"
        finally:
            self._on_end(outcome)

    async def _send(self, send: Send) -> Outcome:
        outcome: Outcome = "ended"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with asyncio.timeout_at(self._deadline), contextlib.aclosing(self._events) as events:
                async for event in events:
                    await send(_body_message(event.encode()))
        except TimeoutError:
            outcome = "late"
        # If the client does not read, the connection is closed without a proper end.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SEND_SECONDS):
                if outcome == "late":
                    await send(_body_message(Event(self._deadline_error.body().model_dump_json()).encode()))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        return outcome


def _body_message(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


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
