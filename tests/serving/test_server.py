"""The process around the routes: addresses that cannot be used, and an end in bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import json
import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from corral.engines.scripted import ScriptedEngine
from corral.errors import InputError
from corral.interrupts import Stopped
from corral.serving import server as module
from corral.serving.admission import ServerLimits
from corral.serving.database import Database
from corral.serving.keys import KeyStore, KeyUsage, today
from corral.serving.model_loading import ModelOptions
from corral.serving.models import ServedModels
from corral.serving.server import ListenOptions, Server, build_admission
from corral.serving.server import serve as serve_command
from tests.answering.test_settings import write_run
from tests.serving.conftest import (
    ASKED,
    CHAT,
    JSON,
    Endless,
    RunningServer,
    Serve,
    bearer,
    call,
    chat_head,
    wait_for,
)
from tests.serving.test_model_loading import promote_model


def serve_error(listen: ListenOptions, database: str | None = None) -> InputError:
    """The address is tried before the model: a name that is no model shows that nothing was loaded."""
    with pytest.raises(InputError) as caught:
        serve_command(ModelOptions(["nowhere"]), listen, ServerLimits(), database)
    return caught.value


def test_a_used_or_invalid_port_is_an_error_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = serve_error(ListenOptions("127.0.0.1", port))
        assert "in use" in error.what
        assert str(port) in str(error.where)
    for port in (-1, 65536):
        assert "is not a port" in serve_error(ListenOptions("127.0.0.1", port)).what


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_non_loopback_address_needs_insecure(host: str) -> None:
    error = serve_error(ListenOptions(host, 0))
    assert "keys" in error.what
    assert "--insecure" in str(error.hint)


@pytest.mark.parametrize(
    ("host", "insecure", "part"),
    [
        ("no-such-host.invalid", False, "no-such-host.invalid"),
        ("192.0.2.1", True, "address"),
        ("", False, "''"),
        # The address was taken: the model is what is missing.
        ("0.0.0.0", True, "nowhere"),
        ("127.0.0.1", False, "nowhere"),
        ("localhost", False, "nowhere"),
        ("127.8.8.8", False, "nowhere"),
    ],
)
def test_loopback_addresses_are_accepted_and_hosts_that_are_not_this_machines_are_errors(
    host: str, insecure: bool, part: str
) -> None:
    assert part in serve_error(ListenOptions(host, 0, insecure)).what


def test_a_valid_key_allows_a_non_loopback_address_and_a_revoked_one_does_not(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    listen = ListenOptions("0.0.0.0", 0)
    assert "there are no keys" in serve_error(listen, url).what
    with contextlib.closing(Database(url)) as database:
        KeyStore(database).add("alice")
    assert "nowhere" in serve_error(listen, url).what, "the address was taken: the model is what is missing"
    with contextlib.closing(Database(url)) as database:
        KeyStore(database).revoke("alice")
    assert "there are no keys" in serve_error(listen, url).what


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
    address: str, insecure: bool, has_keys: bool, status: int, sqlite: Database, serve: Serve
) -> None:
    """The keys were gone before the first request came; the listener of the test is a local one all the same."""
    listen = ListenOptions(address, insecure=insecure)
    admission = build_admission(address, listen, ServerLimits(), KeyStore(sqlite), has_keys=has_keys)
    assert serve("Hello", admission).call("GET", "/v1/models")[0] == status


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


class StoppableServer:
    """A running server, and what sends it a signal."""

    def __init__(self, running: RunningServer) -> None:
        self.running = running
        self.server = running.server
        self._loops: list[asyncio.AbstractEventLoop] = []
        on_tick = self.server.on_tick

        async def watched(counter: int) -> bool:
            self._loops[:] = [asyncio.get_running_loop()]
            return await on_tick(counter)

        self.server.on_tick = watched  # type: ignore[method-assign]
        assert wait_for(lambda: bool(self._loops))

    def stop(self) -> None:
        self._loops[0].call_soon_threadsafe(self.server.stop, signal.SIGTERM)

    def has_ready_status(self, status: int) -> bool:
        return wait_for(lambda: self.running.call("GET", "/health/ready")[0] == status)


def test_sigterm_finishes_running_streams_and_refuses_new_requests(serve: Serve) -> None:
    gate = threading.Event()

    def reply(ids: Any, sampling: Any, choice: int) -> Iterator[int]:
        yield 40
        while not gate.is_set():
            yield 41
        yield 42

    stoppable = StoppableServer(serve(ScriptedEngine(reply, delay_seconds=0.01)))
    stream = Stream(stoppable.running.url)
    assert stoppable.has_ready_status(200)
    stoppable.stop()
    assert stoppable.has_ready_status(503)
    assert stoppable.running.call("GET", "/health")[0] == 200
    status, answer, headers = stoppable.running.chat()
    assert (status, answer["error"]["code"]) == (503, "shutting_down")
    assert int(headers["retry-after"]) > 0
    assert not stoppable.server.should_exit
    gate.set()
    assert stream.rest().endswith("data: [DONE]\n\n")
    assert wait_for(lambda: stoppable.server.should_exit)


def test_a_second_signal_stops_the_server_at_once(serve: Serve) -> None:
    endless = Endless()
    stoppable = StoppableServer(serve(endless.engine))
    stream = Stream(stoppable.running.url)
    stoppable.stop()
    assert stoppable.has_ready_status(503)
    stoppable.stop()
    assert stream.rest() == "cut off"
    assert stoppable.server.force_exit
    assert endless.has_stopped()


def test_answers_over_the_grace_period_end_with_an_error(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """A stream with its last event, any other with its status."""
    endless = Endless()
    stoppable = StoppableServer(serve(endless.engine))
    stoppable.server.grace_seconds = 0.3
    stream = Stream(stoppable.running.url)
    assert endless.started.wait(30)
    with ThreadPoolExecutor(1) as threads:
        whole = threads.submit(stoppable.running.chat)
        assert wait_for(lambda: b"corral_requests_in_flight 2.0" in stoppable.server.admission.metrics.render())
        stoppable.stop()
        *_, last, end = stream.rest().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert not end
        status, answer, headers = whole.result()
    assert (status, answer["error"]["code"]) == (503, "shutting_down")
    assert int(headers["retry-after"]) >= 1
    assert endless.has_stopped()
    assert "Traceback" not in caplog.text


def test_an_answer_that_does_not_end_when_its_time_is_over_is_cancelled_without_a_traceback(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Its client does not read, so that not even the last event can be sent."""
    endless = Endless(delay_seconds=0)
    stoppable = StoppableServer(serve(endless.engine))
    stoppable.server.grace_seconds = 0.3
    stoppable.server.config.timeout_graceful_shutdown = 1
    body = json.dumps({"model": "m", "stream": True, "messages": ASKED, "n": 16, "max_tokens": 8000})
    with stoppable.running.connect(receive_buffer=4096) as raw:
        raw.sendall((chat_head(f"content-length: {len(body)}") + body).encode())
        assert endless.started.wait(30)
        stoppable.stop()
        assert wait_for(lambda: not stoppable.server.connections.open)
    assert endless.has_stopped()
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("is_revoked", [False, True])
def test_a_server_that_needs_a_key_says_so_in_its_example_also_when_all_are_revoked(
    is_revoked: bool, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    with contextlib.closing(Database(url)) as database:
        KeyStore(database).add("alice")
        if is_revoked:
            KeyStore(database).revoke("alice")
    monkeypatch.setattr(module, "open_served_models", lambda *_, **__: ServedModels([serve.model("Hello")]))

    async def serve_and_stop(server: Server, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        while not server.should_exit:
            await asyncio.sleep(0.05)

    monkeypatch.setattr(Server, "serve", serve_and_stop)
    with pytest.raises(Stopped):
        serve_command(ModelOptions(["m"]), ListenOptions(port=0), ServerLimits(), url)
    assert "authorization: Bearer" in capfd.readouterr().err


def test_sigterm_ends_a_server_while_what_it_follows_cannot_be_read_and_usage_is_written(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pointer of the run is a pipe into which nobody writes."""
    run = tmp_path / "run"
    run.mkdir()
    write_run(run, base=tiny_folder)
    promote_model(run, tiny_folder, 1)
    url = f"sqlite:///{tmp_path / 'a.db'}"
    with contextlib.closing(Database(url)) as database:
        key, secret = KeyStore(database).add("alice")
    urls: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(module, "_print_address", lambda _, url, **__: urls.put(url))
    writers: list[int] = []

    def has_reader() -> bool:
        with contextlib.suppress(OSError):  # a pipe that nobody reads cannot be opened
            writers.append(os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    def send_request_and_signal() -> bool:
        body = {"model": "mine", "messages": ASKED, "max_tokens": 2}
        status = call(urls.get(timeout=60), "POST", CHAT, body, {**JSON, **bearer(secret)})[0]
        os.mkfifo(tmp_path / "pipe")
        (run / "model").unlink()
        (run / "model").symlink_to(tmp_path / "pipe")
        was_read = wait_for(has_reader)
        os.kill(os.getpid(), signal.SIGTERM)
        return was_read and status == 200

    try:
        with ThreadPoolExecutor(1) as threads:
            requesting = threads.submit(send_request_and_signal)
            with pytest.raises(Stopped):
                serve_command(
                    ModelOptions([str(run)], "transformers", follow=True), ListenOptions(port=0), ServerLimits(), url
                )
            assert requesting.result()
        with contextlib.closing(Database(url)) as database:
            assert KeyStore(database).usage_on(today())[key.id].requests == 1
    finally:
        gc.unfreeze()
        for writer in writers:
            os.close(writer)


@pytest.mark.parametrize("is_repeated", [False, True])
def test_a_server_that_cannot_write_usage_logs_it_and_exits(
    is_repeated: bool,
    tmp_path: Path,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As `serve` runs it, with signals."""
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 60 if is_repeated else 0.2)
    monkeypatch.setattr(module, "open_served_models", lambda *_, **__: ServedModels([serve.model("Hello")]))
    over, written = threading.Event(), threading.Event()

    class Locked(KeyStore):
        """Keys of a database in which nothing can be written for as long as a server might wait."""

        def add_usage(self, day: str, usage: Mapping[str, KeyUsage]) -> None:
            if not over.wait(20):
                written.set()

    monkeypatch.setattr("corral.serving.keys.KeyStore", Locked)
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

    def send_request_and_signal() -> None:
        body = {"model": "m", "messages": ASKED}
        assert call(urls.get(timeout=30), "POST", CHAT, body, {**JSON, **bearer(secret)})[0] == 200
        os.kill(os.getpid(), signal.SIGTERM)
        if is_repeated:
            assert closing.wait(30)
            os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as threads:
        requesting = threads.submit(send_request_and_signal)
        with pytest.raises(Stopped) as caught:
            serve_command(ModelOptions(["m"]), ListenOptions(port=0), ServerLimits(), url)
        requesting.result()
    over.set()
    assert not written.is_set(), "it waited"
    assert caught.value.signal == signal.SIGTERM
    assert f"key {key.id} used 1 requests" in caplog.text
