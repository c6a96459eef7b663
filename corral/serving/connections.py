"""HTTP connections with limits: time to send a head, time without reading, size of refused bodies, and their number."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from corral.serving.admission import ServerLimits
from corral.serving.logs import new_request_id
from corral.serving.protocol import Refused
from corral.system import process_limit

_MAX_BODY_CHUNKS = 4096
_MAX_DISCARDED_BYTES = 2**21  # twice the largest body, so that a client that sends one in vain still gets the error
_SPARE_CONNECTIONS = 256  # for clients that have not sent a request yet


def connection_type(limits: ServerLimits) -> type[H11Protocol]:
    """Create the class of connections with these limits, for uvicorn."""
    max_connections = limits.max_open + _SPARE_CONNECTIONS
    if files := process_limit("NOFILE"):
        max_connections = min(max_connections, files * 3 // 4)  # the rest is for models, a database, replicas
    return type("LimitedConnection", (Connection,), {"limits": limits, "max_connections": max_connections, "idle": {}})


class Connection(H11Protocol):
    """uvicorn's connection with limits.

    It is closed when a head takes too long to arrive, when the client does not read, and when the client goes on sending
    a body that was refused. If there are too many connections, a new one replaces the one that has been idle for longest.
    """

    limits: ServerLimits
    max_connections: ClassVar[int]
    idle: ClassVar[dict[Connection, None]]
    """Connections between requests, the longest idle first."""
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _discarded_bytes = 0
    """Bytes received since the last response."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for a head."""
        super().connection_made(transport)
        # asyncio sets this only for sockets it created. Without it, a body waits 40 ms for the acknowledgement of its head.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.conn = _ChunkCountingReader(h11.SERVER, self.limits.header_bytes)
        self._start_head_timer()
        if len(self.connections) > self.max_connections:
            oldest = next(iter(self.idle))
            oldest._stop_head_timer()
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        super().connection_lost(exc)
        self._stop_head_timer()
        self._stall_timer = _cancel(self._stall_timer)

    def data_received(self, data: bytes) -> None:
        """Process received bytes. Between requests they are part of a head, or of a body that was refused."""
        super().data_received(data)
        if self._is_answering:
            self._stop_head_timer()
            return
        self._start_head_timer()
        self._discarded_bytes += len(data)
        if self._discarded_bytes > _MAX_DISCARDED_BYTES:
            self.transport.abort()

    def on_response_complete(self) -> None:
        """Count the connection as idle, unless the next request has arrived already."""
        super().on_response_complete()
        if not self._is_answering and not self.transport.is_closing():
            self.idle[self] = None

    def pause_writing(self) -> None:
        """The client does not read: start the timer."""
        super().pause_writing()
        self._stall_timer = _cancel(self._stall_timer)
        self._stall_timer = self.loop.call_later(self.limits.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read: stop the timer."""
        super().resume_writing()
        self._stall_timer = _cancel(self._stall_timer)

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP, a head that is too large or a body of too many chunks with an error in OpenAI's form."""
        error = sys.exception()
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        most = self.limits.header_bytes
        messages = {
            413: f"the body comes in more than the {_MAX_BODY_CHUNKS} chunks this server takes",
            431: f"request line and headers are larger than the {most} bytes this server takes",
        }
        refused = (
            Refused(hint, messages[hint]) if hint in messages else Refused(400, "this is not a request in HTTP/1.1")
        )
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(refused.body().model_dump()).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("x-request-id", new_request_id()),
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

    def _start_head_timer(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.limits.header_seconds, self.transport.abort)
            self.idle[self] = None
            self._discarded_bytes = 0

    def _stop_head_timer(self) -> None:
        self._head_timer = _cancel(self._head_timer)
        self.idle.pop(self, None)


class _ChunkCountingReader(h11.Connection):
    """h11's connection, for bodies of a limited number of chunks: a chunk of one byte takes as long to read as a kilobyte."""

    _chunks = 0

    def next_event(self) -> Any:
        """The next event. Raises: h11.RemoteProtocolError (malformed HTTP, or a body of too many chunks)."""
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._chunks += 1
            if self._chunks > _MAX_BODY_CHUNKS:
                raise h11.RemoteProtocolError("too many chunks", error_status_hint=413)
        elif isinstance(event, h11.Request):
            self._chunks = 0
        return event


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
