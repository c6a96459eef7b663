"""The process around the routes: addresses that cannot be used, and an end in bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from corral.answering.answerer import Answerer
from corral.engines.scripted import ScriptedEngine
from corral.errors import InputError
from corral.interrupts import Stopped
from corral.serving import server as module
from corral.serving.admission import Admission, ServerLimits
from corral.serving.api_keys import KeyStore, KeyUsage
from corral.serving.database import Database
from corral.serving.generation import ServedModel
from corral.serving.served_models import ServedModels
from corral.serving.server import ListenOptions, ModelOptions, Server, build_admission, serve
from corral.template import Template
from tests.serving.conftest import Endless, serve_with_handle
from tests.serving.test_app import ASKED, CHAT, call, wait_for


def refused(host: str = "127.0.0.1", port: int = 0, *, insecure: bool = False) -> InputError:
    """The address is tried before the model: a name that is no model shows that nothing was loaded."""
    with pytest.raises(InputError) as caught:
        serve(ModelOptions(["nowhere"]), ListenOptions(host, port, insecure), ServerLimits(), None)
    return caught.value


def test_a_used_or_invalid_port_is_an_error_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in refused(port=port).what
        assert str(port) in str(refused(port=port).where)
    for port in (-1, 65536):
        assert "is not a port" in refused(port=port).what


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_non_loopback_address_needs_insecure(host: str) -> None:
    error = refused(host)
    assert "keys" in error.what
    assert "--insecure" in str(error.hint)


def test_insecure_allows_a_non_loopback_address() -> None:
    assert "nowhere" in refused("0.0.0.0", insecure=True).what, "the address was taken: the model is what is missing"


def test_a_host_that_is_not_this_machines_is_an_error() -> None:
    assert "no-such-host.invalid" in refused("no-such-host.invalid").what
    assert "address" in refused("192.0.2.1", insecure=True).what
    assert "''" in refused("").what


def test_loopback_addresses_are_accepted() -> None:
    for host in ("127.0.0.1", "localhost", "127.8.8.8"):
        assert "nowhere" in refused(host).what


def test_a_valid_key_allows_a_non_loopback_address_and_a_revoked_one_does_not(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"

    def fault() -> str:
        with pytest.raises(InputError) as caught:
            serve(ModelOptions(["nowhere"]), ListenOptions("0.0.0.0", 0), ServerLimits(), url)
        return caught.value.what

    assert "there are no keys" in fault()
    with contextlib.closing(Database(url)) as database:
        KeyStore(database).add("alice")
    assert "nowhere" in fault(), "the address was taken: the model is what is missing"
    with contextlib.closing(Database(url)) as database:
        KeyStore(database).revoke("alice")
    assert "there are no keys" in fault()


@pytest.mark.parametrize(
    ("address", "insecure", "has_keys", "status"),
    [
        ("0.0.0.0", False, True, 401),
        ("0.0.0.0", True, True, 401),
        ("127.0.0.1", False, True, 401),
        ("127.0.0.1", False, False, 200),
        ("0.0.0.0", True, False, 200),
        ("::", False, False, 401),
    ],
)
def test_a_server_started_with_keys_refuses_requests_when_they_are_gone(
    address: str,
    insecure: bool,
    has_keys: bool,
    status: int,
    tmp_path: Path,
    scripted_model: Callable[..., ServedModel],
) -> None:
    """The keys were gone before the first request came; the listener of the test is a local one all the same."""
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as empty:
        admission = build_admission(
            address, ListenOptions(address, insecure=insecure), ServerLimits(), empty, has_keys=has_keys
        )
        with serve_with_handle(ServedModels([scripted_model("Hello")]), admission) as (url, _):
            assert call(url, "GET", "/v1/models")[0] == status


@pytest.mark.parametrize("origin", ["*", "example.org", "https://*.example.org", "https://a.example/page", "null"])
def test_an_invalid_cors_origin_is_refused(origin: str) -> None:
    with pytest.raises(InputError, match="origin"):
        serve(ModelOptions(["nowhere"]), ListenOptions(port=0, cors=[origin]), ServerLimits(), None)


class Stream:
    """A stream that was begun, read by hand."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "count"}]}
        self._connection.request("POST", CHAT, json.dumps(body), {"content-type": "application/json"})
        self.answer = self._connection.getresponse()

    def rest(self) -> str:
        try:
            return self.answer.read().decode()
        except (http.client.HTTPException, OSError):
            return "cut off"
        finally:
            self._connection.close()


@contextlib.contextmanager
def running_server(served: ServedModel) -> Generator[tuple[str, Server, Callable[[], None]]]:
    """A running server, and what sends it a signal."""
    with serve_with_handle(ServedModels([served]), Admission()) as (url, server):
        loops: list[asyncio.AbstractEventLoop] = []
        drained = server.on_tick

        async def on_tick(counter: int) -> bool:
            loops[:] = [asyncio.get_running_loop()]
            return await drained(counter)

        server.on_tick = on_tick  # type: ignore[method-assign]
        assert wait_for(lambda: bool(loops))
        yield url, server, lambda: loops[0].call_soon_threadsafe(server.stop, signal.SIGTERM) and None


def test_sigterm_finishes_running_streams_and_refuses_new_requests(tiny_template: Template) -> None:
    gate = threading.Event()

    def reply(ids: Any, sampling: Any, choice: int) -> Iterator[int]:
        yield 40
        while not gate.is_set():
            yield 41
        yield 42

    served = ServedModel(Answerer(ScriptedEngine(reply, delay_seconds=0.01), tiny_template), "m")
    with running_server(served) as (url, server, stop):
        stream = Stream(url)
        assert call(url, "GET", "/health/ready")[0] == 200
        stop()
        assert wait_for(lambda: call(url, "GET", "/health/ready")[0] == 503)
        assert call(url, "GET", "/health")[0] == 200
        status, answer, headers = call(url, "POST", CHAT, json.dumps({"model": "m", "messages": ASKED}))
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert int(headers["retry-after"]) > 0
        assert not server.should_exit
        gate.set()
        assert stream.rest().endswith("data: [DONE]\n\n")
        assert wait_for(lambda: server.should_exit)


def test_a_second_signal_stops_the_server_at_once(tiny_template: Template) -> None:
    endless = Endless()
    with running_server(ServedModel(Answerer(endless.engine, tiny_template), "m")) as (url, server, stop):
        stream = Stream(url)
        stop()
        assert wait_for(lambda: call(url, "GET", "/health/ready")[0] == 503)
        stop()
        assert stream.rest() == "cut off"
        assert server.force_exit
    assert endless.has_stopped(within=0)


def test_answers_over_the_grace_period_are_cancelled_without_a_traceback(
    tiny_template: Template, caplog: pytest.LogCaptureFixture
) -> None:
    endless = Endless()
    with running_server(ServedModel(Answerer(endless.engine, tiny_template), "m")) as (url, server, stop):
        server.grace_seconds = 0.3
        server.config.timeout_graceful_shutdown = 1
        stream = Stream(url)
        assert endless.started.wait(30)
        stop()
        assert stream.rest() == "cut off"
    assert endless.has_stopped(within=0)
    assert "Cancel 1 running task" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("is_told_again", [False, True])
def test_a_server_that_cannot_write_usage_logs_it_and_exits(
    is_told_again: bool,
    tmp_path: Path,
    scripted_model: Callable[..., ServedModel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As `serve` runs it, with signals."""
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 60 if is_told_again else 0.2)
    monkeypatch.setattr(module, "open_served_models", lambda *_, **__: ServedModels([scripted_model("Hello")]))
    over, written = threading.Event(), threading.Event()

    class Locked(KeyStore):
        """Keys of a database in which nothing can be written for as long as a server might wait."""

        def add_usage(self, day: str, usage: Mapping[str, KeyUsage]) -> None:
            if not over.wait(20):
                written.set()

    monkeypatch.setattr(module, "KeyStore", Locked)
    urls: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(module, "_print_address", lambda _, url, **__: urls.put(url))
    closing = threading.Event()
    close = Server.close

    async def watched(server: Server) -> None:
        asyncio.get_running_loop().call_later(0.1, closing.set)
        await close(server)

    monkeypatch.setattr(Server, "close", watched)
    url = f"sqlite:///{tmp_path / 'a.db'}"
    with contextlib.closing(Database(url)) as database:
        key, secret = KeyStore(database).add("alice")

    def ask_and_tell_to_end() -> None:
        headers = {"content-type": "application/json", "authorization": f"Bearer {secret}"}
        assert (
            call(urls.get(timeout=30), "POST", CHAT, json.dumps({"model": "scripted", "messages": ASKED}), headers)[0]
            == 200
        )
        os.kill(os.getpid(), signal.SIGTERM)
        if is_told_again:
            assert closing.wait(30)
            os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask_and_tell_to_end)
        with pytest.raises(Stopped) as caught:
            serve(ModelOptions(["m"]), ListenOptions(port=0), ServerLimits(), url)
        asking.result()
    over.set()
    assert not written.is_set(), "it waited"
    assert caught.value.signal == signal.SIGTERM
    assert f"key {key.id} used 1 requests" in caplog.text
