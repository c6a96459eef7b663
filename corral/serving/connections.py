"""A connection of the HTTP server that does not wait for ever: for the head of a request, or for a client to read.

Kept apart from what is said over it: it does not know routes, keys or answers.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from corral.serving.door import Bounds
from corral.serving.protocol import Refused
from corral.serving.replies import request_number


def connection_type(bounds: Bounds) -> type[H11Protocol]:
    """The class of connections that keep to these bounds, for uvicorn."""

    return type("BoundedConnection", (Connection,), {"bounds": bounds})


class Connection(H11Protocol):
    """uvicorn's connection, closed when a head takes too long to come, or what was sent too long to be read."""

    bounds: Bounds
    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all waiting."""
        super().connection_lost(exc)
        self._head = _stopped(self._head)
        self._stalled = _stopped(self._stalled)

    def data_received(self, data: bytes) -> None:
        """Take what came. Between requests it is part of a head, or of a body that nobody wanted."""
        super().data_received(data)
        if self._is_answering:
            self._head = _stopped(self._head)
        else:
            self._wait_for_head()

    def pause_writing(self) -> None:
        """The client does not read as fast as is written."""
        super().pause_writing()
        self._stalled = _stopped(self._stalled)
        self._stalled = self.loop.call_later(self.bounds.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._stalled = _stopped(self._stalled)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or has too large a head, in OpenAI's shape."""
        error = sys.exception()
        is_large = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        most = self.bounds.header_bytes
        large = Refused(431, f"request line and headers are larger than the {most} bytes this server takes")
        refused = large if is_large else Refused(400, "this is not a request in HTTP/1.1")
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(refused.body().model_dump()).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("x-request-id", request_number()),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=refused.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        # uvicorn has no cycle before the first request, whatever its types say.
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _wait_for_head(self) -> None:
        if self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(self.bounds.header_seconds, self.transport.abort)


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
