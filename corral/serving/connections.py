"""HTTP connections with limits: how many there are, how long they may be idle, and how much of one is read at a time.

uvicorn speaks HTTP. This wraps its connections and its requests, and knows no HTTP: a connection is idle while none of its
requests runs, whatever arrives on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from corral.serving.admission import ServerLimits
from corral.system import process_limit

_SPARE_CONNECTIONS = 256  # for clients that have not sent a request yet
_READ_BYTES = (
    4096  # at a time, so that a body in chunks of one byte, which are slow to read, does not hold up other requests
)
_MAX_IDLE_BYTES = 2**21  # twice the largest body, so that a client that sends one in vain still gets the error

_current: ContextVar[_Connection] = ContextVar("connection")


class Connections:
    """The connections of a server.

    One is closed if its first request line and headers do not arrive in time, if it is idle for too long between requests, if
    it goes on sending a body that was refused, or if its client takes nothing of what is sent. If there are too many, a new
    one replaces the one that has been idle for longest.

    Args:
        app: what answers the requests.
        limits: how long each may take.
    """

    def __init__(self, app: ASGIApp, limits: ServerLimits) -> None:
        self.limits = limits
        self.most = limits.max_open + _SPARE_CONNECTIONS
        if files := process_limit("NOFILE"):
            self.most = min(self.most, files * 3 // 4)  # the rest is for models, a database, replicas
        self.open: set[_Connection] = set()
        self.idle: dict[_Connection, None] = {}
        """Connections without a request, the longest idle first."""
        self.buffer = memoryview(bytearray(_READ_BYTES))
        """For all connections: what arrived is taken out before anything else is read."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, during which its connection is not idle."""
        connection = _current.get(None)
        with contextlib.nullcontext() if connection is None else connection.busy():
            await self._app(scope, receive, send)

    @property
    def protocol(self) -> type[asyncio.Protocol]:
        """What creates a connection, for uvicorn's setting `http`."""

        def create(**settings: Any) -> _Connection:
            return _Connection(self, AutoHTTPProtocol(**settings))

        return cast(type[asyncio.Protocol], create)

    def abort(self) -> None:
        """Close all connections at once."""
        for connection in list(self.open):
            connection.abort()


class _Connection(asyncio.BufferedProtocol):
    """One connection, around uvicorn's."""

    def __init__(self, connections: Connections, http: asyncio.Protocol) -> None:
        self._all = connections
        self._http = http
        self._requests = 0
        self._idle_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request, in the place of another connection if there are too many."""
        self.transport = cast(asyncio.Transport, transport)
        self._socket = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # some systems refuse if the client is gone already
            # asyncio sets it only on sockets that it created. Without it, a body waits 40 ms until its head is acknowledged.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._all.open.add(self)
        if len(self._all.open) > self._all.most and self._all.idle:
            next(iter(self._all.idle)).abort()
        self._start_timer(self._all.limits.header_seconds)
        self._http.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client disconnected, or the connection was closed."""
        self._stop_timer()
        self._stall_timer = _cancel(self._stall_timer)
        self._all.open.discard(self)
        self._http.connection_lost(exc)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to put what arrived."""
        return self._all.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process what arrived. On an idle connection, it is part of a head, or of a body that was refused."""
        _current.set(self)  # the task of a request that begins here inherits it
        self._http.data_received(bytes(self._all.buffer[:nbytes]))
        if not self._requests:
            self._idle_bytes += nbytes
            if self._idle_bytes > _MAX_IDLE_BYTES:
                self.abort()

    def eof_received(self) -> bool | None:
        """The client sends no more."""
        return self._http.eof_received()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is sent to: watch whether it reads at all."""
        self._http.pause_writing()
        self._abort_if_stalled()

    def resume_writing(self) -> None:
        """The client has read."""
        self._stall_timer = _cancel(self._stall_timer)
        self._http.resume_writing()

    @contextlib.contextmanager
    def busy(self) -> Generator[None]:
        """A request of this connection runs."""
        self._stop_timer()
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests and self in self._all.open:
                self._start_timer(self._all.limits.keep_alive_seconds)

    def abort(self) -> None:
        """Close the connection at once."""
        self._stop_timer()
        self.transport.abort()

    def _abort_if_stalled(self, before: float = float("inf")) -> None:
        """Abort if the client has taken nothing of so many bytes, else look again later."""
        pending = self.transport.get_write_buffer_size()
        with contextlib.suppress(OSError):  # not every system says what it holds itself
            import fcntl  # POSIX only, and so not at the top
            import termios

            pending += int.from_bytes(fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        if pending >= before:
            self.abort()
            return
        seconds = self._all.limits.stalled_seconds
        self._stall_timer = asyncio.get_running_loop().call_later(seconds, self._abort_if_stalled, pending)

    def _start_timer(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self.abort)
        self._all.idle[self] = None
        self._idle_bytes = 0

    def _stop_timer(self) -> None:
        self._all.idle.pop(self, None)
        self._timer = _cancel(self._timer)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
