"""A fake OpenAI-compatible server on a loopback socket, which does what a test says; and the remote engine that asks it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Sequence
from typing import Any

from corral.engines.base import Completion, Engine, Sampling
from corral.engines.remote.engine import RemoteEngine
from tests.conftest import Request
from tests.engines.conformance import DRAWN, complete

VOCABULARY_OF_SCRIPTED = 2**20


def remote(*urls: str, vocabulary: int = VOCABULARY_OF_SCRIPTED, **options: Any) -> RemoteEngine:
    """A remote engine that waits shorter and gives up earlier than by default."""
    arguments: Any = {"model": None, "backoff_seconds": 0.05, "retries": 3} | options
    return RemoteEngine([f"{url}/v1" for url in urls], vocabulary=vocabulary, **arguments)


def ask(engine: Engine, ids: Sequence[int] = (1, 2), sampling: Sampling = DRAWN) -> list[Completion]:
    async def work() -> list[Completion]:
        async with engine:
            return await complete(engine, ids, sampling)

    return asyncio.run(work())


class FakeServer(Request):
    """An endpoint with the model `m`; `completion` answers a request, and may read `requests`."""

    protocol_version = "HTTP/1.1"
    requests: list[Any]
    headers_of_requests: list[dict[str, str]]
    headers_of_lists: list[dict[str, str]]
    paths: list[str]
    models: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.headers_of_lists.append({name.lower(): value for name, value in self.headers.items()})
        self.answer(200, {}, json.dumps({"data": self.models}).encode())

    def do_POST(self) -> None:
        self.paths.append(self.path)
        self.headers_of_requests.append({name.lower(): value for name, value in self.headers.items()})
        self.requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.completion()

    def completion(self) -> None:
        raise NotImplementedError

    def events(self, *events: Any, end: bytes = b"data: [DONE]\n\n") -> None:
        data = b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + end
        self.answer(200, {"content-type": "text/event-stream"}, data)


def fake_server(completion: Callable[[Any], None], **attributes: Any) -> type[FakeServer]:
    lists: dict[str, Any] = {"requests": [], "headers_of_requests": [], "headers_of_lists": [], "paths": []}
    models = {"models": [{"id": "m", "max_model_len": 8192}]}
    return type("Fake", (FakeServer,), lists | models | {"completion": completion} | attributes)


def chunk(*ids: int, index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": "x", "token_ids": list(ids), "finish_reason": finish} | more]}


def answers_well(self: FakeServer) -> None:
    self.events(chunk(7, 8), chunk(9, finish="length"))


def first_then(
    first: Callable[[FakeServer], None], then: Callable[[FakeServer], None] = answers_well
) -> Callable[[FakeServer], None]:
    return lambda self: (first if len(self.requests) == 1 else then)(self)


def refuses_with(status: int, message: str = "no", **headers: str) -> Callable[[FakeServer], None]:
    return lambda self: self.answer(status, headers, json.dumps({"error": {"message": message}}).encode())


def breaks_off(self: FakeServer) -> None:
    """Part of an answer, and the end of the connection where more was announced."""
    self.send_response(200)
    self.send_header("content-type", "text/event-stream")
    self.send_header("content-length", "100000")
    self.end_headers()
    self.wfile.write(f"data: {json.dumps(chunk(7, 8))}\n\n".encode())
    self.close_connection = True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def knows_fields(**known: Any) -> Callable[[FakeServer], None]:
    """A server that takes these fields besides OpenAI's, and refuses others as OpenAI's does."""
    usual = {"model", "prompt", "stream", "max_tokens", "n", "temperature", "top_p", "seed"}

    def answer(self: FakeServer) -> None:
        body = self.requests[-1]
        if foreign := set(body) - usual - set(known):
            refuses_with(400, f"unknown parameter {min(foreign)}")(self)
            return
        choice: dict[str, Any] = {"text": "bc", "finish_reason": "length"}
        if "return_token_ids" in body:
            choice["token_ids"] = [98, 99][: body["max_tokens"]]
        if "logprobs" in body:
            prompt = [None, -1.0] if body.get("echo") else []
            ids = choice["token_ids"]
            choice["logprobs"] = {"token_logprobs": [*prompt, *[-0.5] * len(ids)]}
            if "return_tokens_as_token_ids" in body:
                tops = [None, {"token_id:2": -1.0}] if prompt else []
                choice["logprobs"]["top_logprobs"] = [*tops, *({f"token_id:{id_}": -0.5} for id_ in ids)]
        if body.get("stream"):
            self.events({"choices": [choice | {"index": i} for i in range(body["n"])]})
        else:
            self.answer(200, {}, json.dumps({"choices": [choice]}).encode())

    return answer
