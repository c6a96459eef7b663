"""Clients that are slow to ask and slow to read, on raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import pytest

from corral.serving import connections
from corral.serving.admission import Admission, ServerLimits
from corral.serving.connections import Connection, connection_type
from corral.serving.database import Database
from corral.serving.keys import KeyStore
from tests.serving.conftest import ASKED, Endless, Serve, chat_head, wait_for

HEALTH = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def test_headers_or_a_body_that_do_not_arrive_time_out(serve: Serve) -> None:
    server = serve("Hello", Admission(ServerLimits(header_seconds=0.4, body_seconds=0.4)))
    head = chat_head("content-length: 100")
    for sent, start in (("", b""), ("POST / HT", b""), (head[:-2], b""), (head + "{", b"HTTP/1.1 408")):
        with server.connect(sent) as raw:
            try:
                answer = raw.makefile("rb").read()
            except ConnectionResetError:
                answer = b""
            assert answer.startswith(start), answer
            assert bool(answer) == bool(start)
    # A second head on a connection that was good is no better.
    with server.connect(HEALTH) as raw:
        assert raw.recv(9) == b"HTTP/1.1 "
        raw.sendall(b"GET /hea")
        with contextlib.suppress(ConnectionResetError):
            while raw.recv(4096):
                pass


def test_connections_are_opened_with_tcp_nodelay(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    connection_made = Connection.connection_made
    options: list[int] = []

    def watched(self: Connection, transport: asyncio.Transport) -> None:
        connection_made(self, transport)
        options.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(Connection, "connection_made", watched)
    assert serve("Hello").call("GET", "/health")[0] == 200
    assert options == [1]


def test_a_client_that_does_not_read_is_disconnected(serve: Serve) -> None:
    admission = Admission(ServerLimits(stalled_seconds=0.5))
    server = serve(Endless(delay_seconds=0).engine, admission)
    body = json.dumps({"model": "m", "stream": True, "messages": ASKED, "n": 16, "max_tokens": 8000})
    with server.connect(receive_buffer=4096) as raw:
        raw.sendall((chat_head(f"content-length: {len(body)}") + body).encode())
        assert wait_for(lambda: admission.queue.running == 1)
        assert wait_for(lambda: admission.queue.running == 0)


def test_discarding_a_refused_body_is_bounded_in_time(serve: Serve) -> None:
    server = serve("Hello", Admission(ServerLimits(header_seconds=0.4)))
    with server.connect(chat_head("content-length: 99999999999")) as raw:
        assert raw.recv(12) == b"HTTP/1.1 413"
        with contextlib.suppress(OSError):
            for _ in range(10**6):
                raw.sendall(b" " * 2**16)
            raise AssertionError("it took 64 GB")
    assert server.call("GET", "/health")[0] == 200


def test_discarding_a_refused_body_is_bounded_in_bytes(serve: Serve) -> None:
    with serve("Hello").connect(chat_head("content-length: 99999999999")) as raw:
        assert raw.recv(12) == b"HTTP/1.1 413"
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 2**27:
                raw.sendall(b" " * 2**16)
                sent += 2**16
        assert sent < 2**25, "two MiB, and what the system holds on the way"


def test_a_body_in_too_many_chunks_closes_the_connection_with_or_without_a_key(
    serve: Serve, database: Database
) -> None:
    chunked = "transfer-encoding: chunked"
    with_key = chat_head(chunked, f"authorization: Bearer {KeyStore(database).add('alice')[1]}")
    server = serve("Hello", Admission(keys=KeyStore(database)))
    for head in (chat_head(chunked), with_key):
        with server.connect(head) as raw, contextlib.suppress(OSError):
            for _ in range(1000):
                raw.sendall(b"1\r\n \r\n" * 1000)
            raise AssertionError("it read a million pieces")
    body = json.dumps({"model": "m", "messages": ASKED})
    good = "".join(f"1\r\n{each}\r\n" for each in body) + "0\r\n\r\n"
    with server.connect() as raw:
        for _ in range(3):  # each request of a connection may have as many
            raw.sendall((with_key + "1\r\n \r\n" * 3000 + good).encode())
            assert raw.recv(12) == b"HTTP/1.1 200"
            while not raw.recv(65536).endswith(b"}"):
                pass


def test_over_the_connection_limit_the_longest_idle_one_is_closed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_SPARE_CONNECTIONS", 0)
    admission = Admission(ServerLimits(at_once=1, waiting=0))
    most = admission.limits.max_open
    server = serve("Hello", admission)
    open_connections = server.server.server_state.connections
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(most)]
        assert wait_for(lambda: len(open_connections) == most)
        # One that asked and was answered waits for less long than those that never did.
        idle[0].sendall(HEALTH.encode())
        assert idle[0].recv(12) == b"HTTP/1.1 200"
        for _ in range(10):
            assert server.call("GET", "/health")[0] == 200
        idle += [stack.enter_context(server.connect()) for _ in range(10)]
        assert server.call("GET", "/health")[0] == 200
        assert len(open_connections) <= most
        with contextlib.suppress(ConnectionResetError):
            assert idle[1].recv(1) == b""
        for raw in (idle[0], idle[-1]):
            raw.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                assert raw.recv(65536), "it is open"


def test_connections_use_at_most_three_quarters_of_the_open_file_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, most in ((256, 192), (10**6, 704 + 256), (None, 704 + 256)):
        monkeypatch.setattr("corral.serving.connections.process_limit", lambda _, files=files: files)
        assert connection_type(ServerLimits()).max_connections == most


def test_a_large_body_that_is_refused_at_once_still_gets_a_response(serve: Serve) -> None:
    server = serve("Hello")
    for path, status in (("/nowhere", 404), ("/v1/models", 405)):
        assert server.call("POST", path, b" " * 900_000)[0] == status
