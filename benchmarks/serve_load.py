"""A cheap load from one process: HTTP/1.1 over sockets, as much of it as corral's server uses, and the bare engine's lines.

An HTTP library would need more CPU time than the server that is measured on the same machine.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

CHAT = "/v1/chat/completions"
_IDLE_SECONDS = 2.0  # the server closes idle connections after 5
_TOKEN = re.compile(rb'"content": ?"[^"]')
"""In an event that carries text; the first event of a stream carries the role alone."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a request.

    Attributes:
        status: HTTP status; 0 if the connection broke.
        body: the body, or the error.
        began: when it was due, in seconds of the performance counter.
        seconds: from then to the last byte.
        retry: whether it has a retry-after header.
        first: seconds to the first token, of a stream.
        tokens: how many parts with text came, of a stream.
    """

    status: int
    body: bytes
    began: float
    seconds: float
    retry: bool = False
    first: float | None = None
    tokens: int = 0


Ask: TypeAlias = Callable[[dict[str, Any], float | None], Awaitable[Reply]]
"""(body of a chat request, when it was due) → its reply."""


class Client:
    """Sends requests over reused connections."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self._port = port
        self._key = f"authorization: Bearer {key}\r\n" if key else ""
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []

    async def ask(self, body: dict[str, Any], due: float | None = None) -> Reply:
        """Send a request for a chat completion and read its whole response or stream.

        Args:
            due: when it should have been sent; now if None.
        """
        return await self.send("POST", CHAT, json.dumps(body).encode(), due)

    async def send(self, method: str, path: str, content: bytes = b"", due: float | None = None) -> Reply:
        """Send any request, its body as JSON."""
        began = time.perf_counter() if due is None else due
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\ncontent-type: application/json\r\n"
            f"{self._key}content-length: {len(content)}\r\n\r\n"
        )
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        keep = False
        first = None
        parts: list[bytes] = []
        try:
            connection = self._reuse() or await self._connect()
            reader, writer = connection
            writer.write(head.encode() + content)
            status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
            async for part in _body(reader, headers):
                if first is None and _TOKEN.search(part):
                    first = time.perf_counter() - began
                parts.append(part)
            keep = headers.get("connection") != "close"
        except (OSError, EOFError, asyncio.IncompleteReadError) as error:
            return Reply(0, repr(error).encode(), began, time.perf_counter() - began)
        finally:
            if connection is not None and keep:
                self._idle.append((*connection, time.monotonic()))
            elif connection is not None:
                connection[1].close()
        seconds, body = time.perf_counter() - began, b"".join(parts)
        return Reply(status, body, began, seconds, "retry-after" in headers, first, len(_TOKEN.findall(body)))

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


class BareClient:
    """Sends the same requests to the bare engine: one line of JSON, to which it answers with a line for each token."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def ask(self, body: dict[str, Any], due: float | None = None) -> Reply:
        """Send a request and read all its tokens; `due` as in `Client`."""
        began = time.perf_counter() if due is None else due
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(json.dumps(body).encode() + b"\n")
            tokens, first = 0, None
            while await reader.readline():
                tokens += 1
                first = first or time.perf_counter() - began
            return Reply(200, b"", began, time.perf_counter() - began, first=first, tokens=tokens)
        finally:
            writer.close()


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


async def closed_loop(ask: Ask, body: dict[str, Any], clients: int, each: int) -> tuple[list[Reply], float]:
    """Let so many clients send so many requests each, one after another. Returns: all replies, and the seconds they took."""

    async def one() -> list[Reply]:
        return [await ask(body, None) for _ in range(each)]

    began = time.perf_counter()
    replies = await asyncio.gather(*(one() for _ in range(clients)))
    return [reply for many in replies for reply in many], time.perf_counter() - began


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {f"p{q}_ms": 1000 * ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (50, 90, 99)}
