"""Which endpoint is asked, when it is asked again, and when it rests: over real sockets, of servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator

import pytest

from corral.errors import EngineError, EngineUnavailableError
from tests.conftest import web_server
from tests.engines.conformance import DRAWN, complete, wait_for
from tests.engines.remote.fake_server import (
    FakeServer,
    answers_well,
    ask,
    chunk,
    fake_server,
    first_then,
    refuses_with,
    remote,
)


async def test_requests_take_turns_at_the_endpoints_and_no_more_than_concurrency_are_under_way() -> None:
    inside: list[int] = []
    may_end = threading.Event()

    def slow(self: FakeServer) -> None:
        inside.append(1)
        assert may_end.wait(60)
        answers_well(self)

    servers = [fake_server(slow), fake_server(slow)]
    with web_server(servers[0]) as first, web_server(servers[1]) as second:
        async with remote(first, second, concurrency=6) as engine:
            tasks = [asyncio.create_task(complete(engine, [1], DRAWN)) for _ in range(24)]
            await asyncio.to_thread(wait_for, lambda: len(inside) >= 6)
            await asyncio.sleep(0.3)
            assert len(inside) == 6
            may_end.set()
            await asyncio.gather(*tasks)
    assert [len(each.requests) for each in servers] == [12, 12]


@pytest.mark.parametrize(("most", "taken"), [(None, 64), (8, 8), (-3, 1), (10**12, 1024)])
async def test_what_an_endpoint_lists_is_believed_within_bounds(most: int | None, taken: int) -> None:
    models = [{"id": "m", "max_model_len": 8192} | ({} if most is None else {"max_requests": most})]
    with web_server(fake_server(answers_well, models=models)) as url:
        async with remote(url) as engine:
            assert engine.features.requests == taken


async def test_ready_tells_whether_an_endpoint_may_be_asked() -> None:
    with web_server(fake_server(answers_well, protocol_version="HTTP/1.0")) as url:
        engine = remote(url, retries=0, backoff_seconds=3600)
        assert engine.ready
    async with engine:
        with pytest.raises(EngineError):
            await complete(engine, [1], DRAWN)
        await asyncio.sleep(0.1)
        assert not engine.ready


async def test_an_endpoint_that_failed_three_times_is_asked_again_once_it_lists_the_model() -> None:
    listed = fake_server(FakeServer.finish, models=[{"id": "m", "max_model_len": 8192}])
    with web_server(listed) as url, web_server(fake_server(answers_well)) as other:
        engine = remote(url, other)
        listed.models = [{"id": "another", "max_model_len": 8192}]
        async with engine:
            for _ in range(8):
                await complete(engine, [1], DRAWN)
            assert len(listed.requests) == 3
            await asyncio.to_thread(wait_for, lambda: len(listed.headers_of_lists) >= 4)
            assert len(listed.requests) == 3, "it does not list the model"
            listed.completion = answers_well  # type: ignore[method-assign]
            listed.models = [{"id": "m", "max_model_len": 8192}]
            while len(listed.requests) < 4:
                await asyncio.gather(*(complete(engine, [1], DRAWN) for _ in range(2)))


@pytest.mark.parametrize("retries", [0, 3])
async def test_a_request_that_one_endpoint_is_too_busy_for_goes_to_another_and_the_next_is_still_sent_there(
    retries: int,
) -> None:
    busy = fake_server(first_then(refuses_with(503, **{"retry-after": "3600"})))
    with web_server(busy) as url, web_server(fake_server(answers_well)) as other:
        async with remote(url, other, retries=retries, backoff_seconds=60) as engine:
            for _ in range(5):
                assert (await complete(engine, [1], DRAWN))[0].ids == (7, 8, 9)
    assert len(busy.requests) == 3, "it has its turn: the first, which it refuses, the second and the fourth"


@pytest.mark.parametrize("fault", ["busy", "reset"])
async def test_one_failed_request_does_not_keep_the_next_from_the_endpoint(fault: str) -> None:
    first = FakeServer.finish if fault == "reset" else refuses_with(503, "full", **{"retry-after": "20"})
    server = fake_server(first_then(first))
    with web_server(server) as url:
        async with remote(url, retries=0, backoff_seconds=60) as engine:
            with pytest.raises(EngineUnavailableError) as caught:
                await complete(engine, [1], DRAWN)
            reported = (caught.value.status, round(caught.value.retry_seconds or 0))
            assert reported == ((503, 20) if fault == "busy" else (None, 0))
            assert url in str(caught.value.where)
            assert engine.ready
            assert (await complete(engine, [1], DRAWN))[0].ids == (7, 8, 9)
    assert len(server.requests) == 2


ERRORS: dict[str, Callable[[FakeServer], None]] = {
    "500": refuses_with(500),
    "no such model": refuses_with(404),
    "a page": lambda self: self.answer(200, {"content-type": "text/html"}, b"<html>"),
    "an error event": lambda self: self.events({"error": {"message": "no", "code": 500}}),
}


@pytest.mark.parametrize("case", ERRORS)
async def test_an_endpoint_that_answers_errors_beside_one_that_works_costs_no_request_and_is_left_alone(
    case: str,
) -> None:
    broken = fake_server(ERRORS[case])
    with web_server(broken) as url, web_server(fake_server(answers_well)) as other:
        async with remote(url, other, retries=0, backoff_seconds=60) as engine:
            for _ in range(10):
                assert (await complete(engine, [1], DRAWN))[0].ids == (7, 8, 9)
    assert len(broken.requests) == 3


async def test_a_request_that_no_endpoint_can_answer_does_not_count_against_them() -> None:
    def poisoned(self: FakeServer) -> None:
        (refuses_with(500) if self.requests[-1]["prompt"] == [0] else answers_well)(self)

    first, second = fake_server(poisoned), fake_server(poisoned)
    with web_server(first) as url, web_server(second) as other:
        async with remote(url, other, retries=3, backoff_seconds=60) as engine:
            for _ in range(5):
                with pytest.raises(EngineError, match="answered 500"):
                    await complete(engine, [0], DRAWN)
            together = [complete(engine, [1], DRAWN) for _ in range(10)]
            assert all(found[0].ids == (7, 8, 9) for found in await asyncio.gather(*together))
    assert min(len(each.requests) for each in (first, second)) > 5, "both are still asked"


async def test_the_last_endpoint_rests_only_until_it_lists_its_model() -> None:
    server = fake_server(lambda self: (FakeServer.finish if len(self.requests) <= 3 else answers_well)(self))
    with web_server(server) as url:
        async with remote(url, retries=0, backoff_seconds=3600) as engine:
            for _ in range(3):
                with pytest.raises(EngineUnavailableError):
                    await complete(engine, [1], DRAWN)
            await asyncio.to_thread(wait_for, lambda: engine.ready)
            assert (await complete(engine, [1], DRAWN))[0].ids == (7, 8, 9)
    assert len(server.headers_of_lists) == 2, "it was asked for its models once more"


def test_with_check_seconds_endpoints_that_nobody_asks_are_checked() -> None:
    # A connection for each request: one that is kept would outlive the server.
    server = fake_server(answers_well, protocol_version="HTTP/1.0")
    with web_server(server) as url:
        engine = remote(url, check_seconds=0.05)
        lazy = remote(url)
        assert engine.ready
    wait_for(lambda: not engine.ready)
    assert lazy.ready, "it has not noticed"
    with web_server(server, int(url.rpartition(":")[2])):
        wait_for(lambda: engine.ready)
        assert ask(engine)[0].ids == (7, 8, 9)
        assert ask(lazy)[0].ids == (7, 8, 9)


async def test_without_retries_each_endpoint_is_tried_once_and_a_request_is_refused_while_all_rest() -> None:
    first, second = fake_server(refuses_with(503)), fake_server(refuses_with(429))
    with web_server(first) as url, web_server(second) as other:
        async with remote(url, other, retries=0, backoff_seconds=60) as engine:
            with pytest.raises(EngineUnavailableError, match=r"503.*429"):
                await complete(engine, [1], DRAWN)
            assert engine.ready
    assert (len(first.requests), len(second.requests)) == (1, 1)
    with web_server(fake_server(answers_well, protocol_version="HTTP/1.0")) as url:
        engine = remote(url, retries=0, check_seconds=0.05)
    wait_for(lambda: not engine.ready)
    async with engine:
        with pytest.raises(EngineUnavailableError):
            engine.submit([1], DRAWN)


REPLICA = """
import http.server, json, time

class Replica(http.server.BaseHTTPRequestHandler):
    def send(self, data):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if self.command == "POST" else "application/json")
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send(json.dumps({"data": [{"id": "m", "max_model_len": 8192}]}).encode())

    def do_POST(self):
        event = {"choices": [{"index": 0, "text": "x", "token_ids": [7, 8], "finish_reason": None}]}
        self.send(b"data: " + json.dumps(event).encode() + b"\\n\\n")
        time.sleep(3600)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Replica)
print(server.server_port, flush=True)
server.serve_forever()
"""
"""A server in a process of its own, which begins an answer and does not end it."""


@contextlib.contextmanager
def replica_process() -> Generator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", REPLICA], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


async def test_a_request_is_taken_from_a_replica_that_hangs_and_the_replica_is_back_when_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("corral.engines.remote.failover._PROBE_SECONDS", 2.0)
    second = fake_server(answers_well)
    with replica_process() as (process, url), web_server(second) as other:
        async with remote(url, other, retries=50, check_seconds=0.1) as engine:
            stream = aiter(engine.submit([1], DRAWN))
            assert (await anext(stream)).ids == (7, 8)
            assert not second.requests
            process.send_signal(signal.SIGSTOP)
            assert [id_ async for delta in stream for id_ in delta.ids] == [9], "the other gives the rest"
            await asyncio.to_thread(wait_for, lambda: engine.replicas[0].fault == "silent")
            assert engine.replicas[1].fault is None
            assert [each.url for each in engine.replicas] == [f"{url}/v1", f"{other}/v1"]
            assert engine.ready
            process.send_signal(signal.SIGCONT)
            await asyncio.to_thread(wait_for, lambda: engine.replicas[0].fault is None)


async def test_a_replica_that_does_not_list_its_model_any_more_still_finishes_its_answers() -> None:
    may_end = threading.Event()

    def slow(self: FakeServer) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(f"data: {json.dumps(chunk(7, 8))}\n\n".encode())
        assert may_end.wait(60)
        self.wfile.write(f"data: {json.dumps(chunk(9, finish='length'))}\n\ndata: [DONE]\n\n".encode())

    server = fake_server(slow, protocol_version="HTTP/1.0")
    with web_server(server) as url:
        async with remote(url, retries=0, check_seconds=0.05) as engine:
            stream = aiter(engine.submit([1], DRAWN))
            assert (await anext(stream)).ids == (7, 8)
            server.models = [{"id": "another", "max_model_len": 8192}]
            listed = len(server.headers_of_lists)
            await asyncio.to_thread(wait_for, lambda: len(server.headers_of_lists) > listed + 5)
            assert [each.fault for each in engine.replicas] == ["lacks the model"]
            may_end.set()
            assert [id_ async for delta in stream for id_ in delta.ids] == [9]
    assert len(server.requests) == 1


async def test_an_engine_without_a_server_says_what_became_of_each_and_quotes_none() -> None:
    with web_server(fake_server(refuses_with(500, "my diary"), protocol_version="HTTP/1.0")) as url:
        engine = remote(url, url.replace("127.0.0.1", "localhost"), retries=0, check_seconds=0.05)
    async with engine:
        await asyncio.to_thread(wait_for, lambda: not engine.ready)
        assert engine.fault == "none of 2 servers can be asked: unreachable"
    assert engine.fault == "it was closed"
