"""A cheap load of HTTP requests from one process: sockets, and as much of HTTP/1.1 as corral's server uses.

An HTTP library would need more CPU time than the server that is measured on the same machine.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

_IDLE_SECONDS = 2.0  # the server closes idle connections after 5


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a request.

    Attributes:
        status: HTTP status; 0 if the connection broke.
        body: the body, or the error.
        began: when it was due, in seconds of the performance counter.
        seconds: from then to the last byte.
        retry: whether it has a retry-after header.
    """

    status: int
    body: bytes
    began: float
    seconds: float
    retry: bool = False


class Client:
    """Sends requests for chat completions over reused connections."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self._port = port
        self._key = f"authorization: Bearer {key}\r\n" if key else ""
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []

    async def ask(self, body: dict[str, Any], due: float | None = None) -> Reply:
        """Send one request and read its whole response or stream; `due` is when it should have been sent."""
        began = time.perf_counter() if due is None else due
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\ncontent-type: application/json\r\n"
            f"{self._key}content-length: {len(content)}\r\n\r\n"
        )
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        keep = False
        try:
            connection = self._reuse() or await self._connect()
            reader, writer = connection
            writer.write(head.encode() + content)
            status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
            parts = [part async for part in _body(reader, headers)]
            keep = headers.get("connection") != "close"
        except (OSError, EOFError, asyncio.IncompleteReadError) as error:
            return Reply(0, repr(error).encode(), began, time.perf_counter() - began)
        finally:
            if connection is not None and keep:
                self._idle.append((*connection, time.monotonic()))
            elif connection is not None:
                connection[1].close()
        return Reply(status, b"".join(parts), began, time.perf_counter() - began, "retry-after" in headers)

    def _reuse(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """The connection that was used last, unless the server may be about to close it."""
        if self._idle and self._idle[-1][2] < time.monotonic() - _IDLE_SECONDS:
            self.close()
        return self._idle.pop()[:2] if self._idle else None

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)

    def close(self) -> None:
        """Close idle connections."""
        for _, writer, _ in self._idle:
            writer.close()
        self._idle.clear()


def _head(data: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = data.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(first.split()[1]), {name.strip().lower(): value.strip().lower() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncGenerator[bytes, None]:
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers.get("content-length", "0")))
        return
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readline()


async def open_loop(rate: float, seconds: float, one: Callable[[float], Awaitable[Reply]]) -> list[Reply]:
    """Start `rate` requests per second, whether earlier ones have ended or not, and wait for all."""
    tasks: list[asyncio.Task[Reply]] = []
    start = time.perf_counter()
    for i in range(int(rate * seconds)):
        due = start + i / rate
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        tasks.append(asyncio.ensure_future(one(due)))
    return await asyncio.gather(*tasks)
