"""Endpoints behind the server, as its models: those that die, are busy, come back, and what is logged of them."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from corral.engines.base import Sampling
from corral.errors import InputError
from corral.serving import server
from corral.serving.admission import ServerLimits
from corral.serving.model_loading import ModelOptions, open_served_models
from corral.serving.models import ServedModel, ServedModels
from tests.conftest import web_server
from tests.engines.conformance import complete, wait_for
from tests.engines.remote.fake_server import FakeServer, chunk, fake_server, refuses_with
from tests.serving.conftest import openai_client, serve_in_thread


def test_dead_replicas_are_skipped_until_they_return_and_with_none_left_requests_fail(
    tiny_served: ServedModel, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.serving.model_loading._CHECK_SECONDS", 0.1)
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
            models = open_served_models(ModelOptions([f"tiny={tiny_folder}"], urls=[f"{first}/v1", f"{second}/v1"]))
        # The second is gone by now.
        with serve_in_thread(models) as front, openai_client(front) as client:
            assert [ask(client) for _ in range(4)] == [expected] * 4, "nobody is sent to the one that died"
            assert models.get("tiny").answerer.engine.ready
            port = int(second.rpartition(":")[2])
            with serve_in_thread(tiny_served, port=port) as again:
                assert again == second
                wait_for(lambda: alive(models) == 2)
            wait_for(lambda: alive(models) == 1)
            assert ask(client) == expected
    with serve_in_thread(models) as front, openai_client(front) as client:
        wait_for(lambda: not models.get("tiny").answerer.engine.ready)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(**request, stream=stream)
            assert caught.value.status_code == 503
            assert caught.value.response.headers["retry-after"]
        with serve_in_thread(tiny_served, port=int(first.rpartition(":")[2])):
            wait_for(lambda: models.get("tiny").answerer.engine.ready)
            assert ask(client) == expected
    asyncio.run(models.close())


def alive(models: ServedModels) -> int:
    """How many replicas may be asked."""
    return sum(each.fault is None for each in models.all()[0].answerer.engine.replicas)


def one_token(self: FakeServer) -> None:
    self.events(chunk(50, finish="stop"))


def replica(completion: Callable[[FakeServer], None] = one_token, *names: str) -> type[FakeServer]:
    """A server of these models; what answers a client's request does not answer a probe, which asks for no stream."""

    def answer(self: FakeServer) -> None:
        if self.requests[-1].get("stream"):
            completion(self)
        else:
            self.answer(200, {}, json.dumps(chunk(50, finish="stop")).encode())

    models: list[Any] = [{"id": name, "max_model_len": 512} for name in names or ("m",)]
    return fake_server(answer, models=[*models, {"id": "e", "task": "embeddings"}], protocol_version="HTTP/1.0")


def streamed(server: type[FakeServer]) -> list[Any]:
    """The requests of clients."""
    return [body for body in server.requests if body.get("stream")]


async def test_each_model_is_requested_from_the_replica_by_its_own_name(tiny_folder: Path) -> None:
    two = replica(one_token, "cook", "poet")
    with web_server(two) as url:
        models = open_served_models(ModelOptions([f"cook={tiny_folder}", f"poet={tiny_folder}"], urls=[url]))
        for name in ("poet", "cook"):
            await complete(models.get(name).answerer.engine, [5], Sampling(4))
        await models.close()
    assert [body["model"] for body in streamed(two)] == ["poet", "cook"]


DIARY: Any = {"model": "m", "messages": [{"role": "user", "content": "my diary"}], "max_tokens": 4}


@pytest.mark.parametrize("fault", ["busy", "reset"])
def test_an_error_of_the_only_replica_affects_one_request_only(fault: str, tiny_folder: Path) -> None:
    fails = FakeServer.finish if fault == "reset" else refuses_with(503, "full", **{"retry-after": "20"})
    once = replica(lambda self: (fails if len(streamed(type(self))) == 1 else one_token)(self))
    with web_server(once) as url:
        models = open_served_models(ModelOptions([f"m={tiny_folder}"], urls=[url]))
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

    def slow(self: FakeServer) -> None:
        inside.append(1)
        assert may_end.wait(30)
        one_token(self)

    with web_server(replica(slow)) as one, web_server(replica(slow)) as other:
        models = open_served_models(ModelOptions([f"m={tiny_folder}"], urls=[one, other]), at_once=2)
        tasks = [asyncio.create_task(complete(models.get("m").answerer.engine, [5], Sampling(4))) for _ in range(5)]
        await asyncio.to_thread(wait_for, lambda: len(inside) >= 4)
        await asyncio.sleep(0.3)
        assert len(inside) == 4, "two for each of two"
        may_end.set()
        await asyncio.gather(*tasks)
        await models.close()


def test_the_server_reports_how_many_requests_it_admits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(options: ModelOptions, at_once: int) -> ServedModels:
        raise InputError(f"{at_once} at once")

    monkeypatch.setattr(server, "open_served_models", refuse)
    with pytest.raises(InputError, match="7 at once"):
        server.serve(ModelOptions(["m"]), server.ListenOptions(port=0), ServerLimits(at_once=7), None)


QUOTES: dict[str, Callable[[FakeServer], None]] = {
    "busy": refuses_with(503, "no room for my diary"),
    "refused": refuses_with(400, "what is my diary"),
    "failed": refuses_with(500, "broken by my diary"),
    "failed amid": lambda self: self.events({"error": {"message": "broken by my diary", "code": 500}}),
    "nonsense": lambda self: self.events({"choices": [{"index": 0, "finish_reason": "my diary"}]}),
}


@pytest.mark.parametrize("quote", QUOTES)
def test_replica_errors_that_quote_a_prompt_are_not_logged(
    quote: str, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with web_server(replica(QUOTES[quote])) as url:
        models = open_served_models(ModelOptions([f"m={tiny_folder}"], urls=[url]))
        with serve_in_thread(models) as front, openai_client(front) as client, caplog.at_level(1):
            for stream in (False, True):
                with pytest.raises(openai.APIError):
                    list(client.chat.completions.create(**DIARY, stream=stream))
        asyncio.run(models.close())
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("corral.serving")]
    # A request that cannot be answered is told to who asked, and to nobody else.
    assert len(ours) == (0 if quote == "refused" else 2)
    status = {"busy": " 503", "failed": " 500"}.get(quote, "")
    assert all(re.fullmatch(rf".*: Engine\w*Error{status} at {url}/v1", line) for line in ours), ours
    others = [record.getMessage() for record in caplog.records if not record.name.startswith("openai")]
    assert "diary" not in "\n".join(others)
