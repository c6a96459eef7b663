"""Endpoints behind the server, as its models: those that die, are busy, come back, and what is logged of them."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

from corral.engines.base import Sampling
from corral.errors import InputError
from corral.serving import server
from corral.serving.admission import ServerLimits
from corral.serving.generation import ServedModel
from corral.serving.served_models import ServedModels, open_served_models
from tests.conftest import Request, web_server
from tests.engines.conformance import complete, wait_for
from tests.serving.conftest import openai_client, serve_in_thread


def test_dead_replicas_are_skipped_until_they_return_and_with_none_left_requests_fail(
    tiny_served: ServedModel, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.serving.served_models._CHECK_SECONDS", 0.1)
    request: Any = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 8,
        "seed": 1,
        "temperature": 1,
        "top_p": 1,
    }

    def ask(client: openai.OpenAI) -> str:
        return str(client.chat.completions.create(**request).choices[0].message.content)

    with serve_in_thread(tiny_served) as first, openai_client(first) as direct:
        expected = ask(direct)
        with serve_in_thread(tiny_served) as second:
            models = open_served_models([f"tiny={tiny_folder}"], urls=[f"{first}/v1", f"{second}/v1"])
        # The second is gone by now.
        with serve_in_thread(models) as front, openai_client(front) as client:
            assert [ask(client) for _ in range(4)] == [expected] * 4, "nobody is sent to the one that died"
            assert models.ready
            port = int(second.rpartition(":")[2])
            with serve_in_thread(tiny_served, port=port) as again:
                assert again == second
                wait_for(lambda: alive(models) == 2)
            wait_for(lambda: alive(models) == 1)
            assert ask(client) == expected
    with serve_in_thread(models) as front, openai_client(front) as client:
        wait_for(lambda: not models.ready)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(**request, stream=stream)
            assert caught.value.status_code == 503
            assert caught.value.response.headers["retry-after"]
        with serve_in_thread(tiny_served, port=int(first.rpartition(":")[2])):
            wait_for(lambda: models.ready)
            assert ask(client) == expected
    asyncio.run(models.close())


def alive(models: ServedModels) -> int:
    """How many replicas may be asked."""
    engine: Any = models.all()[0].answerer.engine
    return len(engine._endpoints.available)


ONE_TOKEN: Any = {"choices": [{"index": 0, "text": "x", "token_ids": [50], "finish_reason": "stop"}]}


class Replica(Request):
    """A server that answers one token to everything; a test overrides what it answers to a client's request."""

    names: tuple[str, ...] = ("m",)

    def do_GET(self) -> None:
        models: list[Any] = [{"id": name, "max_model_len": 512} for name in self.names]
        self.answer(200, {}, json.dumps({"data": [*models, {"id": "e", "task": "embeddings"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body.get("stream"):
            self.completion(body)
        else:
            self.answer(200, {}, json.dumps(ONE_TOKEN).encode())

    def completion(self, body: Any) -> None:
        self.send_events()

    def send_events(self, event: Any = None) -> None:
        data = f"data: {json.dumps(event or ONE_TOKEN)}\n\ndata: [DONE]\n\n".encode()
        self.answer(200, {"content-type": "text/event-stream"}, data)


async def test_each_model_is_requested_from_the_replica_by_its_own_name(tiny_folder: Path) -> None:
    requested: list[str] = []

    class Two(Replica):
        names = ("cook", "poet")

        def completion(self, body: Any) -> None:
            requested.append(body["model"])
            self.send_events()

    with web_server(Two) as url:
        models = open_served_models([f"cook={tiny_folder}", f"poet={tiny_folder}"], urls=[url])
        for name in ("poet", "cook"):
            await complete(models.get(name).answerer.engine, [5], Sampling(4))
        await models.close()
    assert requested == ["poet", "cook"]


DIARY: Any = {"model": "m", "messages": [{"role": "user", "content": "my diary"}], "max_tokens": 4}


@pytest.mark.parametrize("fault", ["busy", "reset"])
def test_an_error_of_the_only_replica_affects_one_request_only(fault: str, tiny_folder: Path) -> None:
    first: list[Any] = []

    class Once(Replica):
        def completion(self, body: Any) -> None:
            first.append(body)
            if len(first) > 1:
                self.send_events()
            elif fault == "busy":
                self.answer(503, {"retry-after": "20"}, b'{"error": {"message": "full"}}')
            else:
                self.finish()

    with web_server(Once) as replica:
        models = open_served_models([f"m={tiny_folder}"], urls=[replica])
        with serve_in_thread(models) as front, openai_client(front) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(**DIARY)
            later = int(caught.value.response.headers["retry-after"])
            assert caught.value.status_code == 503
            assert later == 20 if fault == "busy" else 0 < later < 20
            for _ in range(3):
                assert client.chat.completions.create(**DIARY).choices[0].finish_reason == "stop"
        asyncio.run(models.close())


async def test_replicas_get_no_more_requests_at_once_than_the_server_admits(tiny_folder: Path) -> None:
    inside: list[int] = []
    may_end = threading.Event()

    class Slow(Replica):
        def completion(self, body: Any) -> None:
            inside.append(1)
            assert may_end.wait(30)
            self.send_events()

    with web_server(Slow) as one, web_server(Slow) as other:
        models = open_served_models([f"m={tiny_folder}"], urls=[one, other], at_once=2)
        tasks = [asyncio.create_task(complete(models.get("m").answerer.engine, [5], Sampling(4))) for _ in range(5)]
        await asyncio.to_thread(wait_for, lambda: len(inside) >= 4)
        await asyncio.sleep(0.3)
        assert len(inside) == 4, "two for each of two"
        may_end.set()
        await asyncio.gather(*tasks)
        await models.close()


def test_the_server_reports_how_many_requests_it_admits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(specs: Sequence[str], **options: Any) -> ServedModels:
        raise InputError(f"{options['at_once']} at once")

    monkeypatch.setattr(server, "open_served_models", refuse)
    with pytest.raises(InputError, match="7 at once"):
        server.serve(server.ModelOptions(["m"]), server.ListenOptions(port=0), ServerLimits(at_once=7), None)


QUOTES: dict[str, Callable[[Any], None]] = {
    "busy": lambda self: self.answer(503, {}, b'{"error": {"message": "no room for my diary"}}'),
    "refused": lambda self: self.answer(400, {}, b'{"error": {"message": "what is my diary"}}'),
    "failed": lambda self: self.answer(500, {}, b'{"error": {"message": "broken by my diary"}}'),
    "failed amid": lambda self: self.send_events({"error": {"message": "broken by my diary", "code": 500}}),
    "nonsense": lambda self: self.send_events({"choices": [{"index": 0, "finish_reason": "my diary"}]}),
}


@pytest.mark.parametrize("quote", QUOTES)
def test_replica_errors_that_quote_a_prompt_are_not_logged(
    quote: str, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Quoting(Replica):
        def completion(self, body: Any) -> None:
            QUOTES[quote](self)

    with web_server(Quoting) as replica:
        models = open_served_models([f"m={tiny_folder}"], urls=[replica])
        with serve_in_thread(models) as front, openai_client(front) as client, caplog.at_level(1):
            for stream in (False, True):
                with pytest.raises(openai.APIError):
                    list(client.chat.completions.create(**DIARY, stream=stream))
        asyncio.run(models.close())
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("corral")]
    # A request that cannot be answered is told to who asked, and to nobody else.
    assert len(ours) == (0 if quote == "refused" else 2)
    status = {"busy": " 503", "failed": " 500"}.get(quote, "")
    assert all(re.fullmatch(rf".*: Engine\w*Error{status} at {replica}/v1", line) for line in ours), ours
    others = [record.getMessage() for record in caplog.records if not record.name.startswith("openai")]
    assert "diary" not in "\n".join(others)
