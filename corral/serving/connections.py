"""A connection of the HTTP server that does not wait for ever: for the head of a request, or for a client to read; and that
takes no more of a body than is of use. There are so many of them and no more.

Kept apart from what is said over it: it does not know routes, keys or answers.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from corral.serving.admission import Bounds
from corral.serving.http_responses import request_number
from corral.serving.protocol import Refused
from corral.system import process_limit

_MOST_PIECES = 4096
_UNWANTED_BYTES = 2**21  # twice the largest body: who sends that much in vain still hears why
_SPARE_CONNECTIONS = 256  # for those who have not asked yet


def connection_type(bounds: Bounds) -> type[H11Protocol]:
    """The class of connections that keep to these bounds, for uvicorn."""
    most = bounds.under_way + _SPARE_CONNECTIONS
    if files := process_limit("NOFILE"):
        most = min(most, files * 3 // 4)  # the rest is for models, a database, replicas
    return type("BoundedConnection", (Connection,), {"bounds": bounds, "most": most, "waiting": {}})


class Connection(H11Protocol):
    """uvicorn's connection, closed when a head takes too long to come, what was sent too long to be read, or what is sent in
    vain does not end. Where there are too many, the one that has been between requests for longest gives way to the newest."""

    bounds: Bounds
    most: ClassVar[int]
    """Of this class at a time."""
    waiting: ClassVar[dict[Connection, None]]
    """Those between requests, in the order in which they came to be so."""
    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _unwanted = 0
    """Bytes since the last answer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        # asyncio does so for sockets it made itself. A body is sent after its head, and would wait for the client's
        # acknowledgement of that, which takes 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.conn = _Reader(h11.SERVER, self.bounds.header_bytes)
        self._wait_for_head()
        if len(self.connections) > self.most:
            oldest = next(iter(self.waiting))
            oldest._forget_head()
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all waiting."""
        super().connection_lost(exc)
        self._forget_head()
        self._stalled = _stopped(self._stalled)

    def data_received(self, data: bytes) -> None:
        """Take what came. Between requests it is part of a head, or of a body that nobody wanted."""
        super().data_received(data)
        if self._is_answering:
            self._forget_head()
            return
        self._wait_for_head()
        self._unwanted += len(data)
        if self._unwanted > _UNWANTED_BYTES:
            self.transport.abort()

    def on_response_complete(self) -> None:
        """Go on: with a request that has come already, or between requests."""
        super().on_response_complete()
        if not self._is_answering and not self.transport.is_closing():
            self.waiting[self] = None

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
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        most = self.bounds.header_bytes
        words = {
            413: f"the body comes in more than the {_MOST_PIECES} pieces this server takes",
            431: f"request line and headers are larger than the {most} bytes this server takes",
        }
        refused = Refused(hint, words[hint]) if hint in words else Refused(400, "this is not a request in HTTP/1.1")
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
            self.waiting[self] = None
            self._unwanted = 0

    def _forget_head(self) -> None:
        self._head = _stopped(self._head)
        self.waiting.pop(self, None)


class _Reader(h11.Connection):
    """h11's, for bodies of so many pieces: each takes as long to read as a kilobyte, and a piece may be a byte."""

    _pieces = 0

    def next_event(self) -> Any:
        """The next event. Raises: h11.RemoteProtocolError (this is no HTTP, or a body comes in too many pieces)."""
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._pieces += 1
            if self._pieces > _MOST_PIECES:
                raise h11.RemoteProtocolError("too many pieces", error_status_hint=413)
        elif isinstance(event, h11.Request):
            self._pieces = 0
        return event


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
