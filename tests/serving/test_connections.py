"""Clients that are slow to ask and slow to read, on raw sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import pytest

from corral.serving import connections
from corral.serving.admission import Admission, ServerLimits
from corral.serving.connections import Connections
from tests.serving.conftest import ASKED, Endless, Serve, chat_head, wait_for

HEALTH = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def read_to_the_end(raw: socket.socket) -> bytes:
    """All that is sent until the connection is closed, in whatever way."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := raw.recv(65536):
            received += piece
    return received


def test_headers_or_a_body_that_do_not_arrive_time_out(serve: Serve) -> None:
    server = serve("Hello", Admission(ServerLimits(header_seconds=0.4, body_seconds=0.4)))
    head = chat_head("content-length: 100")
    for sent, start in (("", b""), ("POST / HT", b""), (head[:-2], b""), (head + "{", b"HTTP/1.1 408")):
        with server.connect(sent) as raw:
            answer = read_to_the_end(raw)
            assert answer.startswith(start), answer
            assert bool(answer) == bool(start)


def test_a_connection_is_kept_between_requests_for_its_time_and_no_longer(serve: Serve) -> None:
    server = serve("Hello", Admission(ServerLimits(header_seconds=0.2, keep_alive_seconds=1.5)))
    with server.connect(HEALTH) as raw:
        while not raw.recv(65536).endswith(b"}"):
            pass
        assert not wait_for(lambda: not server.server.connections.open, 0.6), "longer than it takes a first head"
        raw.sendall(HEALTH.encode() + b"GET /hea")
        assert read_to_the_end(raw).startswith(b"HTTP/1.1 200"), "and half of a head does not keep it longer"


def test_connections_are_opened_with_tcp_nodelay(serve: Serve) -> None:
    server = serve("Hello")
    with server.connect(HEALTH) as raw:
        assert raw.recv(12) == b"HTTP/1.1 200"
        (connection,) = server.server.connections.open
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_client_that_does_not_read_is_disconnected(serve: Serve) -> None:
    admission = Admission(ServerLimits(stalled_seconds=0.5))
    server = serve(Endless(delay_seconds=0).engine, admission)
    body = json.dumps({"model": "m", "stream": True, "messages": ASKED, "n": 16, "max_tokens": 8000})
    with server.connect(receive_buffer=4096) as raw:
        raw.sendall((chat_head(f"content-length: {len(body)}") + body).encode())
        assert wait_for(lambda: admission.queue.running == 1)
        assert wait_for(lambda: admission.queue.running == 0)
        assert not server.server.connections.open


def test_a_client_that_reads_slowly_is_kept(serve: Serve) -> None:
    """For three times as long as one that reads nothing, and far behind the engine."""
    server = serve(Endless(delay_seconds=0).engine, Admission(ServerLimits(stalled_seconds=2)))
    body = json.dumps({"model": "m", "stream": True, "messages": ASKED, "n": 16, "max_tokens": 8000})
    with server.connect(receive_buffer=2**16) as raw:
        raw.sendall((chat_head(f"content-length: {len(body)}") + body).encode())
        assert wait_for(lambda: bool(server.server.connections.open))
        (connection,) = server.server.connections.open
        assert wait_for(lambda: connection.transport.get_write_buffer_size() > 2**16)
        for _ in range(120):
            assert raw.recv(2**13)
            time.sleep(0.05)


def test_discarding_a_refused_body_is_bounded_in_bytes(serve: Serve) -> None:
    server = serve("Hello")
    with server.connect(chat_head("content-length: 99999999999")) as raw:
        assert raw.recv(12) == b"HTTP/1.1 413"
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 2**27:
                raw.sendall(b" " * 2**16)
                sent += 2**16
        assert sent < 2**25, "two MiB, and what the system holds on the way"
    assert server.call("GET", "/health")[0] == 200


def test_a_body_in_chunks_of_one_byte_is_read_a_little_at_a_time(serve: Serve) -> None:
    """What is read at once is parsed at once, and such chunks take long to parse."""
    server = serve("Hello")
    body = json.dumps({"model": "m", "messages": ASKED})
    chunks = "".join(f"1\r\n{each}\r\n" for each in " " * 3000 + body) + "0\r\n\r\n"
    with server.connect() as raw:
        for _ in range(2):
            raw.sendall((chat_head("transfer-encoding: chunked") + chunks).encode())
            assert raw.recv(12) == b"HTTP/1.1 200"
            while not raw.recv(65536).endswith(b"}"):
                pass
        (connection,) = server.server.connections.open
        assert len(connection.get_buffer(-1)) <= 4096


def test_over_the_connection_limit_the_longest_idle_one_is_closed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_SPARE_CONNECTIONS", 0)
    admission = Admission(ServerLimits(at_once=1, waiting=0, header_seconds=60))
    most = admission.limits.max_open
    server = serve("Hello", admission)
    open_connections = server.server.connections.open
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


def test_connections_use_at_most_three_quarters_of_the_open_file_limit(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = serve("Hello").server.config.app
    for files, most in ((256, 192), (10**6, 704 + 256), (None, 704 + 256)):
        monkeypatch.setattr("corral.serving.connections.process_limit", lambda _, files=files: files)
        assert Connections(app, ServerLimits()).most == most


def test_a_large_body_that_is_refused_at_once_still_gets_a_response(serve: Serve) -> None:
    server = serve("Hello")
    for path, status in (("/nowhere", 404), ("/v1/models", 405)):
        assert server.call("POST", path, b" " * 900_000)[0] == status
