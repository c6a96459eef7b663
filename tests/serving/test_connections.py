"""Clients that are slow to ask and slow to read, on raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from corral.answering.answerer import Answerer
from corral.serving import connections
from corral.serving.admission import Admission, ServerLimits
from corral.serving.api_keys import KeyStore
from corral.serving.connections import Connection, connection_type
from corral.serving.database import Database
from corral.serving.generation import ServedModel
from corral.serving.served_models import ServedModels
from corral.template import Template
from tests.serving.conftest import Endless, serve_in_thread, serve_with_handle
from tests.serving.test_app import ASKED, CHAT, call, wait_for


def test_headers_or_a_body_that_do_not_arrive_time_out(scripted_model: Callable[..., ServedModel]) -> None:
    admission = Admission(ServerLimits(header_seconds=0.4, body_seconds=0.4))
    with serve_with_handle(ServedModels([scripted_model("Hello")]), admission) as (url, _):
        place = (str(urlsplit(url).hostname), urlsplit(url).port or 0)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n"
        for sent, answered in (("", b""), ("POST / HT", b""), (head, b""), (head + "\r\n{", b"HTTP/1.1 408")):
            with socket.create_connection(place, timeout=30) as raw:
                raw.sendall(sent.encode())
                try:
                    got = raw.makefile("rb").read()
                except ConnectionResetError:
                    got = b""
                assert got.startswith(answered), got
                assert bool(got) == bool(answered)
        # A second head on a connection that was good is no better.
        with socket.create_connection(place, timeout=30) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert raw.recv(9) == b"HTTP/1.1 "
            raw.sendall(b"GET /hea")
            with contextlib.suppress(ConnectionResetError):
                while raw.recv(4096):
                    pass


def test_connections_are_opened_with_tcp_nodelay(
    scripted_model: Callable[..., ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Connection.connection_made
    found: list[int] = []

    def seen(self: Connection, transport: asyncio.Transport) -> None:
        made(self, transport)
        found.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(Connection, "connection_made", seen)
    with serve_in_thread(scripted_model("Hello")) as url:
        assert call(url, "GET", "/health")[0] == 200
    assert found == [1]


def test_a_client_that_does_not_read_is_disconnected(tiny_template: Template) -> None:
    endless = Endless(delay_seconds=0)
    admission = Admission(ServerLimits(stalled_seconds=0.5))
    with serve_with_handle(ServedModels([ServedModel(Answerer(endless.engine, tiny_template), "m")]), admission) as (
        url,
        _,
    ):
        place = urlsplit(url)
        body = json.dumps({"model": "m", "stream": True, "messages": ASKED, "n": 16, "max_tokens": 8000}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect((str(place.hostname), place.port or 0))
            raw.sendall(head.encode() + b"\r\n" + body)
            assert wait_for(lambda: admission.queue.running == 1)
            assert wait_for(lambda: admission.queue.running == 0)


def test_discarding_a_refused_body_is_bounded_in_time(scripted_model: Callable[..., ServedModel]) -> None:
    admission = Admission(ServerLimits(header_seconds=0.4))
    with serve_with_handle(ServedModels([scripted_model("Hello")]), admission) as (url, _):
        place = (str(urlsplit(url).hostname), urlsplit(url).port or 0)
        with socket.create_connection(place, timeout=30) as raw:
            raw.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n".encode())
            assert raw.recv(12) == b"HTTP/1.1 413"
            with contextlib.suppress(OSError):
                for _ in range(10**6):
                    raw.sendall(b" " * 2**16)
                raise AssertionError("it took 64 GB")
        assert call(url, "GET", "/health")[0] == 200


def test_discarding_a_refused_body_is_bounded_in_bytes(scripted_model: Callable[..., ServedModel]) -> None:
    with serve_with_handle(ServedModels([scripted_model("Hello")]), Admission()) as (url, _):
        place = (str(urlsplit(url).hostname), urlsplit(url).port or 0)
        with socket.create_connection(place, timeout=30) as raw:
            raw.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n".encode())
            assert raw.recv(12) == b"HTTP/1.1 413"
            sent = 0
            with contextlib.suppress(OSError):
                while sent < 2**27:
                    raw.sendall(b" " * 2**16)
                    sent += 2**16
            assert sent < 2**25, "two MiB, and what the system holds on the way"


def test_a_body_in_too_many_chunks_closes_the_connection_with_or_without_a_key(
    scripted_model: Callable[..., ServedModel], database: Database
) -> None:
    secret = KeyStore(database).add("alice")[1]
    asked = json.dumps({"model": "scripted", "messages": ASKED})
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"
    with serve_with_handle(ServedModels([scripted_model("Hello")]), Admission(keys=KeyStore(database))) as (url, _):
        place = (str(urlsplit(url).hostname), urlsplit(url).port or 0)
        for key in ("", f"authorization: Bearer {secret}\r\n"):
            with socket.create_connection(place, timeout=30) as raw:
                raw.sendall(f"{head}{key}\r\n".encode())
                sent = 0
                with contextlib.suppress(OSError):
                    while sent < 10**6:
                        raw.sendall(b"1\r\n \r\n" * 1000)
                        sent += 1000
                    raise AssertionError("it read a million pieces")
        good = "".join(f"1\r\n{each}\r\n" for each in asked) + "0\r\n\r\n"
        with socket.create_connection(place, timeout=30) as raw:
            for _ in range(3):  # each request of a connection may have as many
                pieces = "1\r\n \r\n" * 3000
                raw.sendall(f"{head}authorization: Bearer {secret}\r\n\r\n{pieces}{good}".encode())
                assert raw.recv(12) == b"HTTP/1.1 200"
                while not raw.recv(65536).endswith(b"}"):
                    pass


def test_over_the_connection_limit_the_longest_idle_one_is_closed(
    scripted_model: Callable[..., ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_SPARE_CONNECTIONS", 0)
    admission = Admission(ServerLimits(at_once=1, waiting=0))
    most = admission.limits.max_open
    with (
        serve_with_handle(ServedModels([scripted_model("Hello")]), admission) as (url, server),
        contextlib.ExitStack() as stack,
    ):
        place = (str(urlsplit(url).hostname), urlsplit(url).port or 0)
        idle = [stack.enter_context(socket.create_connection(place, timeout=30)) for _ in range(most)]
        assert wait_for(lambda: len(server.server_state.connections) == most)
        # One that asked and was answered waits for less long than those that never did.
        idle[0].sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert idle[0].recv(12) == b"HTTP/1.1 200"
        for _ in range(10):
            assert call(url, "GET", "/health")[0] == 200
        idle += [stack.enter_context(socket.create_connection(place, timeout=30)) for _ in range(10)]
        assert call(url, "GET", "/health")[0] == 200
        assert len(server.server_state.connections) <= most
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


def test_a_large_body_that_is_refused_at_once_still_gets_a_response(scripted_model: Callable[..., ServedModel]) -> None:
    with serve_with_handle(ServedModels([scripted_model("Hello")]), Admission()) as (url, _):
        for path, status in (("/nowhere", 404), ("/v1/models", 405)):
            assert call(url, "POST", path, b" " * 900_000)[0] == status
