"""Answers as they come, and what becomes of those that are cut, fail, or are broken off at any point."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import text

from corral.engines.scripted import ScriptedEngine
from corral.serving import database as database_module
from corral.serving import response_store as module
from corral.serving.admission import Admission, ServerLimits
from corral.serving.database import Database
from corral.serving.errors import Refused
from corral.serving.protocol import RequestLimits
from corral.serving.response_store import PendingResponse, call_store
from corral.serving.responses import start_response
from corral.serving.responses_protocol import ResponsesRequest
from tests.serving.conftest import Endless, Serve, openai_client, wait_for
from tests.serving.stateful import ASK, echo_engine, echoed, list_items
from tests.serving.test_app import breaking
from tests.serving.test_conversation_store import items_of
from tests.serving.test_response_store import Stores


@pytest.fixture
def client(serve: Serve, database_url: str) -> openai.OpenAI:
    return serve.with_store(echo_engine(serve.template), database_url).client


@contextlib.contextmanager
def locked(url: str) -> Generator[None]:
    """Whoever writes waits, as for another program; reading goes on."""
    with contextlib.closing(Database(url)) as other, other.write_session() as writer:
        lock = "LOCK TABLE conversations, responses, items IN EXCLUSIVE MODE" if "postgresql" in url else "SELECT 1"
        writer.execute(text(lock))  # a file is locked by whoever begins to write
        yield


async def test_a_turn_cancelled_while_it_starts_releases_its_conversation(
    database_url: str, database: Database, serve: Serve
) -> None:
    store = Stores(database)
    conversation = store.create("a", {})
    request = ResponsesRequest(model="m", input="Hi", conversation=conversation.id)
    served = serve.model(echo_engine(serve.template))
    with locked(database_url):
        asking = asyncio.create_task(start_response(served, store.responses, "a", request))
        await asyncio.sleep(0.2)
        asking.cancel()
        await asyncio.sleep(0.05)
        assert not asking.done(), "it must not leave before it knows what it took"
    with pytest.raises(asyncio.CancelledError):
        await asking
    answer = await (await start_response(served, store.responses, "a", request)).result()
    assert answer.status == "completed"
    assert len(items_of(store, conversation.id)) == 2


def test_a_locked_database_gives_503_with_retry_after_and_can_be_read(
    database_url: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_LOCK_SECONDS", 1)
    client = serve.with_store(echo_engine(serve.template), database_url).client
    kept = client.conversations.create()
    with locked(database_url), ThreadPoolExecutor(12) as threads:
        asking = [threads.submit(client.conversations.create) for _ in range(12)]
        asking += [threads.submit(client.responses.create, **ASK, input="Hi") for _ in range(4)]
        assert client.conversations.retrieve(kept.id) == kept
        faults = [each.exception() for each in asking]
    for fault in faults:
        assert isinstance(fault, openai.InternalServerError)
        assert (fault.status_code, fault.code) == (503, "database_unavailable")
        assert int(fault.response.headers["retry-after"]) >= 1
    assert client.conversations.create().id


async def test_a_store_that_does_not_respond_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STORE_SECONDS", 0.1)
    over = threading.Event()
    try:
        with pytest.raises(Refused) as caught:
            await call_store(over.wait, 60)
        assert not over.is_set()
    finally:
        over.set()
    refused = caught.value
    assert (refused.status, refused.code, refused.retry_seconds) == (503, "database_unavailable", 1)


def test_heartbeats_are_written_when_all_connections_are_in_use(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Stores(database, lease_seconds=1000)
    conversation = store.create("a", {})
    turn = PendingResponse("resp_1", "a", (), stored=False, conversation=conversation.id)
    store.responses.begin(turn, {})
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 900)
    with contextlib.ExitStack() as taken:
        for _ in range(15):
            taken.enter_context(database.read_session()).execute(text("SELECT 1"))
        store.responses.renew_leases([turn.id])
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 900)
    with pytest.raises(Refused, match="being generated"):
        store.responses.begin(replace(turn, id="resp_2"), {})


async def test_a_cancelled_response_releases_its_conversation(database: Database, serve: Serve) -> None:
    store = Stores(database)
    conversation = store.create("a", {})
    request = ResponsesRequest(model="m", input="Hi", conversation=conversation.id)
    served = serve.model(echo_engine(serve.template))
    left = await start_response(served, store.responses, "a", request)
    left.cancel()
    left.cancel()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait([task], timeout=5)
    answer = await (await start_response(served, store.responses, "a", request)).result()
    assert answer.status == "completed"
    assert len(items_of(store, conversation.id)) == 2


def test_a_stream_has_openais_events_in_order_and_ends_with_the_stored_response(client: openai.OpenAI) -> None:
    events = list(client.responses.create(**ASK, input="Hello", stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 3
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    first, last = events[0], events[-1]
    assert first.type == "response.created"
    assert (first.response.status, first.response.output, first.response.usage) == ("in_progress", [], None)
    assert last.type == "response.completed"
    assert last.response == client.responses.retrieve(first.response.id)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == last.response.output_text
    assert {e.item_id for e in events if e.type == "response.output_text.delta"} == {last.response.output[0].id}


def test_openais_stream_helper_reads_the_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(**ASK, input="Hello") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == echoed("Hello")


def test_stream_events_have_openais_names(client: openai.OpenAI) -> None:
    blocks = httpx2.post(f"{client.base_url}responses", json={**ASK, "input": "Hi", "stream": True}).text.split("\n\n")
    assert blocks.pop() == ""
    for block in blocks:
        name, data = block.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_a_truncated_answer_is_incomplete_with_a_reason(client: openai.OpenAI) -> None:
    conversation = client.conversations.create()
    cut = client.responses.create(model="m", input="Hello", max_output_tokens=3, conversation=conversation.id)
    assert cut.status == "incomplete"
    assert cut.incomplete_details
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert list_items(client, conversation.id)[-1][:2] == ("assistant", "incomplete")
    *_, last = client.responses.create(model="m", input="Hello", max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"


def test_a_vote_chooses_the_answer_and_is_reported(database_url: str, serve: Serve) -> None:
    encode = serve.template.tokenizer.backend_tokenizer.encode
    ids = [encode(text, add_special_tokens=False).ids for text in ("no", "yes", "yes")]
    served = ScriptedEngine(lambda _, sampling, choice: ids[choice])
    wish = {"consensus": {"method": "rouge-l", "n": 3, "stop": "never"}}
    client = serve.with_store(served, database_url).client
    conversation = client.conversations.create()
    response = client.responses.create(**ASK, input="?", conversation=conversation.id, extra_body=wish)
    assert response.output_text == "yes"
    assert [c["text"] for c in response.model_extra["consensus"]["candidates"]] == ["no", "yes", "yes"]  # type: ignore[index]
    assert client.responses.retrieve(response.id).model_extra == response.model_extra
    *_, last = client.responses.create(**ASK, input="?", conversation=conversation.id, stream=True, extra_body=wish)
    assert last.type == "response.completed"
    assert last.response.output_text == "yes"
    assert [text for _, _, text in list_items(client, conversation.id)] == ["?", "yes"] * 2


NINE_TURNS: Any = [
    {"role": role, "content": f"{text} {i}"}
    for i in range(9)
    for role, text in (("user", "question"), ("assistant", "answer"))
]


def test_a_long_conversation_is_refused_or_truncated_on_request(database_url: str, serve: Serve) -> None:
    client = serve.with_store(echo_engine(serve.template, context=200), database_url).client
    conversation = client.conversations.create(items=[{"role": "system", "content": "Be kind."}, *NINE_TURNS])
    ask: Any = {"model": "m", "input": "The last one", "max_output_tokens": 60, "conversation": conversation.id}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**ask)
    assert caught.value.code == "context_length_exceeded"
    response = client.responses.create(**ask, truncation="auto")
    assert response.usage
    assert 70 < response.usage.input_tokens <= 140
    assert response.output_text.startswith("system\nBe kind.\nuser\nquestion ")
    assert "question 0" not in response.output_text
    assert len(list_items(client, conversation.id)) == 21, "nothing is deleted"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**(ask | {"input": "long " * 200}), truncation="auto")
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("limits", "part"),
    [(RequestLimits(messages=6), "6 messages"), (RequestLimits(prompt_characters=60), "60 characters")],
    ids=str,
)
def test_stored_messages_count_towards_the_limits_or_are_truncated_on_request(
    limits: RequestLimits, part: str, database_url: str, serve: Serve
) -> None:
    served = serve.model(echo_engine(serve.template), limits)
    client = serve.with_store(served, database_url).client
    conversation = client.conversations.create(items=NINE_TURNS)
    ask: Any = ASK | {"input": "The last one", "conversation": conversation.id}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**ask)
    assert (caught.value.param, part in caught.value.message) == ("input", True)
    response = client.responses.create(**ask, truncation="auto")
    assert response.output_text == echoed("question 7", "answer 7", "question 8", "answer 8", "The last one")


async def test_too_many_messages_are_refused_before_any_is_stored(database: Database, serve: Serve) -> None:
    request = ResponsesRequest.model_validate({"model": "m", "input": [{"role": "user", "content": ""}] * 21})
    served = serve.model(echo_engine(serve.template), RequestLimits(messages=20))
    with pytest.raises(Refused, match="20 messages"):
        await start_response(served, Stores(database).responses, "a", request)
    with database.read_session() as session:
        assert session.scalar(text("SELECT count(*) FROM responses")) == 0


def test_a_second_turn_during_an_answer_is_refused_at_once(database_url: str, serve: Serve) -> None:
    client = serve.with_store(echo_engine(serve.template, delay_seconds=0.02), database_url).client
    conversation = client.conversations.create()
    stream = client.responses.create(**ASK, input="First", conversation=conversation.id, stream=True)
    next(iter(stream))
    for again in (True, False):
        with pytest.raises(openai.ConflictError) as caught:
            client.responses.create(**ASK, input="Second", conversation=conversation.id, stream=again)  # type: ignore[call-overload]
        assert caught.value.code == "conversation_locked"
    with pytest.raises(openai.ConflictError):
        client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "x"}])
    assert client.responses.create(**ASK, input="elsewhere").status == "completed"
    last = list(stream)[-1]
    assert last.type == "response.completed"
    second = client.responses.create(**ASK, input="Second", conversation=conversation.id)
    assert second.output_text == echoed("First", last.response.output_text, "Second")


def test_an_answer_that_takes_longer_than_a_lease_keeps_its_conversation(database_url: str, serve: Serve) -> None:
    client = serve.with_store(Endless().engine, database_url, lease_seconds=2).client
    conversation = client.conversations.create()
    with client.responses.create(model="m", input="Go", conversation=conversation.id, stream=True) as stream:
        next(iter(stream))
        time.sleep(2.5)
        with pytest.raises(openai.ConflictError):
            client.responses.create(model="m", input="Me too", conversation=conversation.id)


def test_a_stream_the_client_leaves_keeps_its_text_as_cancelled(database_url: str, serve: Serve) -> None:
    endless = Endless()
    client = serve.with_store(endless.engine, database_url).client
    conversation = client.conversations.create()
    id_ = seen = ""
    with client.responses.create(model="m", input="Go", conversation=conversation.id, stream=True) as stream:
        for event in stream:
            if event.type == "response.created":
                id_ = event.response.id
            if event.type == "response.output_text.delta":
                seen += event.delta
            if len(seen) > 5:
                break
    assert wait_for(lambda: client.responses.retrieve(id_).status == "cancelled")
    kept = client.responses.retrieve(id_)
    assert kept.output_text.startswith(seen)
    assert kept.usage
    assert kept.usage.output_tokens > 0
    assert list_items(client, conversation.id) == [
        ("user", "completed", "Go"),
        ("assistant", "incomplete", kept.output_text),
    ]
    assert endless.has_stopped(within=0), "the engine still works for nobody"
    with client.responses.create(model="m", input="Go on", conversation=conversation.id, stream=True) as stream:
        assert next(iter(stream)).type == "response.created", "the conversation is free"


def test_an_answer_whose_client_left_before_it_ended_is_not_kept(database_url: str, serve: Serve) -> None:
    endless = Endless()
    server = serve.with_store(endless.engine, database_url)
    url, client = server.url, server.client
    conversation = client.conversations.create()
    with pytest.raises(openai.APITimeoutError), openai_client(url, timeout=0.5) as hasty:
        hasty.responses.create(model="m", input="Go", conversation=conversation.id)
    assert endless.started.is_set()

    def is_free() -> bool:
        try:
            client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "again"}])
        except openai.ConflictError:
            return False
        return True

    assert wait_for(is_free)
    assert [text for _, _, text in list_items(client, conversation.id)] == ["again"]


def test_an_engine_error_fails_the_response_and_keeps_the_conversation(database_url: str, serve: Serve) -> None:
    client = serve.with_store(breaking(RuntimeError("secret of the machine")), database_url).client
    conversation = client.conversations.create()
    with pytest.raises(openai.InternalServerError) as caught:
        client.responses.create(model="m", input="Go", conversation=conversation.id)
    assert "secret" not in caught.value.message
    *_, last = client.responses.create(model="m", input="Go", conversation=conversation.id, stream=True)
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error
    assert last.response.error.code == "server_error"
    assert "secret" not in last.response.error.message
    assert client.responses.retrieve(last.response.id) == last.response
    assert list_items(client, conversation.id) == []


def test_a_stream_whose_time_is_up_ends_with_an_error_and_keeps_its_text(sqlite: Database, serve: Serve) -> None:
    server = serve.with_store(Endless().engine, sqlite, Admission(ServerLimits(max_seconds=2)))
    conversation = server.client.conversations.create()
    first, *_, last = server.client.responses.create(
        model="m", input="Go", conversation=conversation.id, stream=True, store=True
    )
    assert (last.type, last.code) == ("error", "deadline_exceeded")  # type: ignore[union-attr]
    assert wait_for(lambda: server.client.responses.retrieve(first.response.id).status == "cancelled")  # type: ignore[union-attr]
    assert [status for _, status, _ in list_items(server.client, conversation.id)] == ["completed", "incomplete"]


def test_deleting_a_conversation_during_its_answer_fails_the_answer(database_url: str, serve: Serve) -> None:
    client = serve.with_store(echo_engine(serve.template, delay_seconds=0.02), database_url).client
    conversation = client.conversations.create()
    stream = client.responses.create(**ASK, input="Go", conversation=conversation.id, stream=True)
    first = next(iter(stream))
    client.conversations.delete(conversation.id)
    last = list(stream)[-1]
    assert last.type == "response.failed"
    assert last.response.error
    assert conversation.id in last.response.error.message
    assert first.type == "response.created"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.response.id)
